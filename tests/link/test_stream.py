"""Streams as others use them: Trio's own contract, cancellation at every wait, back-pressure, failures with words."""

import socket as stdlib_socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio
import trio.testing
from linking import NOTHING, Linked, linked, really_linked, socket_pair

from tunnel.errors import Failure
from tunnel.link.stream import RawStream, Stream
from tunnel.net import Socket
from tunnel.wire.frames import LINK_WINDOW, STREAM_WINDOW, UNKNOWN, Response


@pytest.fixture
async def pair() -> AsyncIterator[Linked]:
    async with linked() as pair:
        yield pair


# Trio's contract -----------------------------------------------------------------------------------------------------


async def clog(sender: RawStream) -> None:
    """Fill the windows until nothing more goes."""
    with trio.move_on_after(0.5):
        await sender.send_all(bytes(2 * STREAM_WINDOW))


@pytest.mark.parametrize("from_core", [True, False])
async def test_a_raw_stream_is_a_half_closeable_stream(pair: Linked, autojump_clock: object, from_core: bool) -> None:
    async def make() -> tuple[RawStream, RawStream]:
        core, agent = await pair.open_raw()
        return (core, agent) if from_core else (agent, core)

    async def make_clogged() -> tuple[RawStream, RawStream]:
        sender, receiver = await make()
        await clog(sender)
        await clog(receiver)
        return sender, receiver

    await trio.testing.check_half_closeable_stream(make, make_clogged)


async def test_a_raw_stream_over_a_real_link_is_a_half_closeable_stream() -> None:
    async with really_linked() as pair:
        await trio.testing.check_half_closeable_stream(pair.open_raw, None)


async def test_a_socket_is_a_half_closeable_stream() -> None:
    async def make() -> tuple[Socket, Socket]:
        return socket_pair()

    async def make_clogged() -> tuple[Socket, Socket]:
        # Full pipes of the local kind: TCP over loopback takes a few bytes more at any moment.
        pair = stdlib_socket.socketpair()
        for sock in pair:
            sock.setblocking(False)
        one, other = Socket(pair[0]), Socket(pair[1])
        for end in (one, other):
            while end.send_nowait(bytes(10_000)):
                pass
        return one, other

    await trio.testing.check_half_closeable_stream(make, make_clogged)


# Exchanges -----------------------------------------------------------------------------------------------------------


async def test_heads_bodies_and_trailers(pair: Linked) -> None:
    stream, there = await pair.open()
    await stream.send(b"x" * 300_000, end=True)
    received = b""
    while part := await there.receive():
        received += part
    assert received == b"x" * 300_000
    pair.agent.session.respond(there, Response(103, -1, 0, 0, b"\r\n"))
    pair.agent.session.respond(there, Response(200, UNKNOWN, 0, 0, b"OK\r\n"), b"answer")
    there.finish(b"A: b\r\n")
    assert [(await stream.answer()).status, (await stream.answer()).status] == [103, 200]
    assert [await stream.receive(), await stream.receive()] == [b"answer", b""]
    assert stream.trailers == b"A: b\r\n"
    assert stream.is_over
    assert there.is_over


async def test_a_failure_has_the_other_ends_words(pair: Linked) -> None:
    stream, there = await pair.open()
    there.reset("local_refused", "nobody listens on port 3000")
    for wait in (stream.answer, stream.receive, lambda: stream.send(b"x")):
        with pytest.raises(Failure) as caught:
            await wait()
        assert (caught.value.outcome, caught.value.text) == ("local_refused", "nobody listens on port 3000")
    with pytest.raises(Failure):
        stream.finish()
    with pytest.raises(Failure):
        await there.receive()


async def test_a_code_that_nobody_knows_means_that_the_agent_gave_up(pair: Linked) -> None:
    stream, there = await pair.open()
    pair.agent.session.reset(there, 200, "?")
    with pytest.raises(Failure) as caught:
        await stream.answer()
    assert caught.value.outcome == "link_lost"


async def test_what_came_before_the_failure_is_read_first(pair: Linked) -> None:
    stream, there = await pair.open()
    pair.agent.session.respond(there, Response(200, UNKNOWN, 0, 0, b"OK\r\n"), b"begin")
    await stream.answer()
    there.reset("local_broken")
    await trio.testing.wait_all_tasks_blocked()
    assert await stream.receive() == b"begin"
    with pytest.raises(Failure):
        await stream.receive()


async def test_who_waits_on_something_else_is_told_of_the_failure(pair: Linked) -> None:
    stream, there = await pair.open()
    told = trio.Event()
    there.on_failure = told.set
    stream.reset("visitor_aborted")
    await told.wait()


async def test_closing_sends_what_was_sent_before(pair: Linked) -> None:
    core, agent = await pair.open_raw()
    await core.send_all(b"x" * 150_000)
    await core.aclose()
    received = b""
    while part := await agent.receive_some():
        received += part
    assert len(received) == 150_000
    with pytest.raises(trio.BrokenResourceError):
        await agent.send_all(b"y")


# Back-pressure -------------------------------------------------------------------------------------------------------


async def test_a_consumer_that_does_not_read_holds_its_sender_at_a_window(pair: Linked) -> None:
    stream, there = await pair.open()
    other, other_there = await pair.open()
    done: list[int] = []

    async def send() -> None:
        for number in range(40):
            await stream.send(bytes(STREAM_WINDOW // 16))
            done.append(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        assert there.inbox_bytes == STREAM_WINDOW
        assert len(done) == 16
        await other.send(b"passes")  # the link is not held up
        assert await other_there.receive() == b"passes"
        taken = 0
        while taken < 40 * STREAM_WINDOW // 16:
            taken += len(await there.receive())
    assert len(done) == 40


async def test_many_senders_share_the_links_window_and_all_arrive(pair: Linked) -> None:
    count = LINK_WINDOW // STREAM_WINDOW + 4
    ends = [await pair.open() for _ in range(count)]

    async def read(stream: Stream, sizes: list[int]) -> None:
        total = 0
        while part := await stream.receive():
            total += len(part)
        sizes.append(total)

    sizes: list[int] = []
    async with trio.open_nursery() as nursery:
        for stream, _ in ends:
            nursery.start_soon(stream.send, bytes(STREAM_WINDOW), True)
        await trio.testing.wait_all_tasks_blocked()
        assert LINK_WINDOW // 4 < sum(there.inbox_bytes for _, there in ends) <= LINK_WINDOW // 2  # the rest is kept
        for _, there in ends:
            nursery.start_soon(read, there, sizes)
    assert sizes == [STREAM_WINDOW] * count


# Cancellation --------------------------------------------------------------------------------------------------------


async def cancelled(wait: Callable[[], Any]) -> None:
    """Cancel it once it waits."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_cancelled_waits_leave_the_stream_usable(pair: Linked) -> None:
    stream, there = await pair.open()
    await cancelled(stream.answer)
    await cancelled(there.receive)
    pair.agent.session.respond(there, Response(200, UNKNOWN, 0, 0, b"OK\r\n"))
    assert (await stream.answer()).status == 200
    await cancelled(stream.receive)
    sent = 0

    async def send() -> None:
        nonlocal sent
        while True:
            await stream.send(b"y" * 10_000)
            sent += 10_000

    await cancelled(send)
    taken = 0
    while there.inbox:
        taken += len(await there.receive())
    await trio.testing.wait_all_tasks_blocked()
    await stream.send(b"z", end=True)
    while part := await there.receive():
        taken += len(part)
    assert sent + 1 <= taken <= sent + 10_001  # of the cancelled call any part may have gone, of the others all


@pytest.mark.parametrize("wait", ["receive_some", "send_all", "wait_send_all_might_not_block"])
async def test_cancelled_raw_waits_leave_the_stream_usable(pair: Linked, autojump_clock: object, wait: str) -> None:
    core, agent = await pair.open_raw()
    if wait != "receive_some":
        await clog(core)
    arguments = (b"x",) if wait == "send_all" else ()
    await cancelled(lambda: getattr(core, wait)(*arguments))
    while agent._stream.inbox:
        await agent.receive_some()
    await trio.testing.wait_all_tasks_blocked()
    await core.send_all(b"again")
    await agent.send_all(b"back")
    assert await core.receive_some() == b"back"
    assert await agent.receive_some() == b"again"


async def test_two_tasks_must_not_wait_for_the_same(pair: Linked, autojump_clock: object) -> None:
    stream, there = await pair.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.answer)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await stream.receive()
        pair.agent.session.respond(there, NOTHING, end=True)
    core, _ = await pair.open_raw()
    await clog(core)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(core._stream._wait_room)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await core._stream.send(b"x")
        nursery.cancel_scope.cancel()
