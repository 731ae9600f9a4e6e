"""Messages between processes: order, answers, open files, and the end of one of the two."""

import errno
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from scarcity import open_files, room_below

from tunnel.errors import TunnelError
from tunnel.workers import channel as channels
from tunnel.workers.channel import MAX_FILES, Channel, ChannelLost, Handler, WithFiles


@asynccontextmanager
async def pair(handlers: Mapping[str, Handler]) -> AsyncIterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    here, there = Channel(ours, {}), Channel(theirs, handlers)
    async with trio.open_nursery() as nursery:
        await nursery.start(here.run)
        await nursery.start(there.run)
        try:
            yield here, there
        finally:
            here.close()
            there.close()


async def test_calls_are_answered_and_failures_told() -> None:
    async def slow(message: Any, files: list[int]) -> Any:
        await trio.lowlevel.checkpoint()
        return [message, "slowly"]

    def refuse(message: Any, files: list[int]) -> Any:
        raise TunnelError("not today")

    handlers: dict[str, Handler] = {"add": lambda message, files: sum(message), "slow": slow, "refuse": refuse}
    async with pair(handlers) as (here, _):
        assert await here.call("add", [1, 2, 3]) == 6
        assert await here.call("slow", {"a": b"\x00\xff"}) == [{"a": b"\x00\xff"}, "slowly"]
        with pytest.raises(ChannelLost, match="not today"):
            await here.call("refuse")
        assert await here.call("add", [1]) == 1  # it goes on


async def test_what_is_told_keeps_its_order_before_a_call() -> None:
    heard: list[int] = []
    async with pair({"note": lambda message, files: heard.append(message), "sync": lambda m, f: None}) as (here, _):
        for at in range(1000):
            here.tell("note", at)
        await here.call("sync")
        assert heard == list(range(1000))


async def test_what_is_told_early_waits_for_its_handler() -> None:
    heard: list[Any] = []
    with trio.fail_after(10):
        async with pair({"sync": lambda message, files: None}) as (here, there):
            here.tell("names", 1)
            here.tell("other", 2)
            here.tell("names", 3)
            await here.call("sync")
            with pytest.raises(ChannelLost):  # who calls is told at once
                await here.call("names", 4)
            there.on("names", lambda message, files: heard.append(message))
            assert heard == [1, 3]
            here.tell("names", 5)
            await here.call("sync")
            assert heard == [1, 3, 5]
            there.on("other", lambda message, files: heard.append(message))
            assert heard == [1, 3, 5, 2]


async def test_files_that_nobody_took_are_closed_at_the_end() -> None:
    near, far = socket.socketpair()
    async with pair({"sync": lambda message, files: None}) as (here, _):
        here.tell("take", None, [far.detach()])
        await here.call("sync")
        near.setblocking(False)
        with pytest.raises(BlockingIOError):
            near.recv(1)
    assert near.recv(1) == b""
    near.close()


async def test_large_messages_pass_while_others_wait_their_turn() -> None:
    body = os.urandom(5_000_000)
    async with pair({"size": lambda message, files: len(message)}) as (here, there):
        there.handlers["echo"] = lambda message, files: message
        here.handlers["size"] = there.handlers["size"]
        answers: list[Any] = []
        async with trio.open_nursery() as nursery:

            async def ask(channel: Channel, name: str, message: bytes) -> None:
                answers.append(await channel.call(name, message))

            nursery.start_soon(ask, here, "echo", body)
            nursery.start_soon(ask, there, "size", body)
            nursery.start_soon(ask, here, "size", b"xyz")
        assert len(answers) == 3 and body in answers and len(body) in answers and 3 in answers


async def test_open_files_travel_with_their_message() -> None:
    got: list[tuple[int, bytes]] = []

    def take(message: Any, files: list[int]) -> int:
        for number in files:
            with os.fdopen(number, "rb") as file:
                got.append((message, file.read()))
        return len(files)

    def make(count: int) -> list[int]:
        numbers = []
        for at in range(count):
            near, far = os.pipe()
            os.write(far, b"%d" % at)
            os.close(far)
            numbers.append(near)
        return numbers

    before = open_files()
    async with pair({"take": take, "give": lambda message, files: WithFiles("here", make(2))}) as (here, _):
        for at in range(20):
            here.tell("take", at, make(1))
            here.tell("take", -1)
        assert await here.call("take", 20, make(3)) == 3
        assert await here.call("take", 21, make(MAX_FILES)) == MAX_FILES
        assert got[:20] == [(at, b"0") for at in range(20)]
        assert got[20:23] == [(20, b"0"), (20, b"1"), (20, b"2")]
        body, files = await here.call_for_files("give")
        assert body == "here" and len(files) == 2
        for number in files:
            os.close(number)
        assert await here.call("give") == "here"  # who does not want them does not keep them
    assert open_files() == before


# No room for files ------------------------------------------------------------------------------------------------


def readable(text: bytes) -> int:
    near, far = os.pipe()
    os.write(far, text)
    os.close(far)
    return near


class Taker:
    """Handlers that note what came: message, what stood in its files."""

    def __init__(self) -> None:
        self.taken: list[tuple[Any, list[bytes]]] = []
        self.handlers: dict[str, Handler] = {"take": self.take, "sync": lambda message, files: None}

    def take(self, message: Any, files: list[int]) -> int:
        contents = []
        for number in files:
            with os.fdopen(number, "rb") as file:
                contents.append(file.read())
        self.taken.append((message, contents))
        return len(files)


async def test_files_that_the_receiver_has_no_room_for_cost_their_message_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    taker = Taker()
    before = open_files()
    async with pair(taker.handlers) as (here, there):
        gift = [readable(b"gift")]
        there.handlers["give"] = lambda message, files: WithFiles("here", gift)
        several = sorted(readable(b"%d" % at) for at in range(3))
        told, called = readable(b"told"), readable(b"called")
        with trio.fail_after(10):
            with room_below(several[1]):  # one of the three comes
                here.tell("take", 1, several)
                await here.call("sync")
            with room_below(3):
                here.tell("take", 2, [told])
                await here.call("sync")
                with pytest.raises(ChannelLost, match="no room"):
                    await here.call("take", 3, [called])
                with pytest.raises(ChannelLost, match="no room"):
                    await here.call_for_files("give")
            assert taker.taken == []
            assert await here.call("take", 4, [readable(b"a"), readable(b"b")]) == 2  # it goes on, in step
            assert taker.taken == [(4, [b"a", b"b"])]
    assert open_files() == before
    said = [record.getMessage() for record in caplog.records]
    assert said == ["connections between processes dropped"] * 2  # once for each end


async def test_files_wait_in_bounds_for_an_end_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_WAITING", 8)
    taker = Taker()
    ours, theirs = socket.socketpair()
    here, there = Channel(ours, {}), Channel(theirs, taker.handlers)
    before = open_files()
    for at in range(2000):
        here.tell("take", at, [readable(b"%d" % at)])
    assert len(open_files() - before) == 8
    async with trio.open_nursery() as nursery:
        with trio.fail_after(30):
            await nursery.start(here.run)
            await nursery.start(there.run)
            await here.call("sync")
            assert await here.call("take", "last", [readable(b"last")]) == 1
        here.close()
        there.close()
    numbers = [number for number, _ in taker.taken[:-1]]
    assert numbers == sorted(numbers) and 8 < len(numbers) < 2000
    assert all(contents == [b"%d" % number] for number, contents in taker.taken[:-1])


class Strained(socket.socket):
    """The kernel has too many files of this user on the way, until it has said so so often."""

    refusals = 2

    def sendmsg(self, buffers: Any, ancillary: Any = (), flags: int = 0, address: Any = None) -> int:
        if ancillary and self.refusals:
            self.refusals -= 1
            raise OSError(errno.ETOOMANYREFS, "Too many references")
        return super().sendmsg(buffers, ancillary, flags)


async def test_files_that_the_kernel_does_not_take_cost_their_message_only() -> None:
    taker = Taker()
    ours, theirs = socket.socketpair()
    here, there = Channel(Strained(fileno=ours.detach()), {}), Channel(theirs, taker.handlers)
    before = open_files()
    async with trio.open_nursery() as nursery:
        await nursery.start(here.run)
        await nursery.start(there.run)
        here.tell("take", 1, [readable(b"told")])
        with pytest.raises(ChannelLost, match="no room"):
            await here.call("take", 2, [readable(b"called")])
        assert await here.call("take", 3, [readable(b"whole")]) == 1
        assert taker.taken == [(3, [b"whole"])]
        assert open_files() == before
        here.close()
        there.close()


async def test_the_other_ends_end_is_told_to_who_waits() -> None:
    async def hang(message: Any, files: list[int]) -> None:
        await trio.sleep_forever()

    async with pair({"hang": hang}) as (here, there):
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(ChannelLost, match="gone"):
                    await here.call("hang")

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            there.close()
        with pytest.raises(ChannelLost):
            await here.call("hang")
        near, far = os.pipe()
        here.tell("hang", None, [near])  # closed, not kept
        os.close(far)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(near)


async def test_an_end_within_a_message_is_an_end() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, {})
    with theirs:
        theirs.send(b"\x00\x00\x00\x10\x00")
    with trio.fail_after(5):
        await channel.run()
    assert channel.is_lost
