"""Raw bytes under an account's bandwidth: what waits, and what an end or a visitor who has gone does not wait for."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from inprocess import until
from linking import linked, socket_pair

from tunnel.core.joining import LOOK, join
from tunnel.core.quotas import Account
from tunnel.core.visitor import Visitor
from tunnel.handler import StreamVisit
from tunnel.link.stream import RawStream
from tunnel.net import Socket

DEBT = 60.0


class Slow(Account):
    """Each part owes a minute."""

    def take_bytes(self, n_in: int, n_out: int) -> float:
        super().take_bytes(n_in, n_out)
        return DEBT


class Joined:
    """socket: the visitor's end; service: the stream's other end."""

    def __init__(self, socket: Socket, service: RawStream) -> None:
        self.socket = socket
        self.service = service
        self.over = trio.Event()
        self.problem: Exception | None = None
        self.visit = StreamVisit(None, "tcp")

    async def run(self, stream: RawStream, socket: Socket) -> None:
        try:
            await join(stream, Visitor(socket, "192.0.2.1", "tcp"), self.visit, Slow("slow", "slow"))
        except trio.BrokenResourceError as exc:
            self.problem = exc
        finally:
            socket.close()
            self.over.set()


@asynccontextmanager
async def joined() -> AsyncIterator[Joined]:
    near, far = socket_pair()
    async with linked() as link, trio.open_nursery() as nursery:
        stream, service = await link.open_raw()
        one = Joined(far, service)
        nursery.start_soon(one.run, stream, near)
        yield one
        nursery.cancel_scope.cancel()
    near.close()
    far.close()


async def test_the_next_part_waits_for_what_is_owed(autojump_clock: trio.testing.MockClock) -> None:
    async with joined() as one:
        await one.socket.send(b"one")
        assert await one.service.receive_some() == b"one"
        began = trio.current_time()
        await one.socket.send(b"two")
        assert await one.service.receive_some() == b"two"
        assert DEBT <= trio.current_time() - began < DEBT + LOOK
        await one.service.send_all(b"three")
        assert await one.socket.recv() == b"three"
        began = trio.current_time()
        await one.service.send_all(b"four")
        assert await one.socket.recv() == b"four"
        assert DEBT <= trio.current_time() - began < DEBT + LOOK


async def test_an_end_is_passed_on_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """Whatever the last part owes: nobody is served by the wait, and a drain would wait for it."""
    async with joined() as one:
        began = trio.current_time()
        await one.socket.send(b"last words")
        one.socket.shutdown()
        assert await one.service.receive_some() == b"last words"
        assert await one.service.receive_some() == b""
        await one.service.send_all(b"answer")
        await one.service.send_eof()
        assert await one.socket.recv() == b"answer"
        assert await one.socket.recv() == b""
        await one.over.wait()
        assert one.problem is None
        assert trio.current_time() - began < 1


@pytest.mark.parametrize("direction", ["in", "out"])
async def test_a_visitor_who_is_gone_is_not_waited_for(direction: str, autojump_clock: trio.testing.MockClock) -> None:
    async with joined() as one:
        if direction == "in":
            await one.socket.send(b"one")
            assert await one.service.receive_some() == b"one"
            await one.socket.send(b"two")
        else:
            await one.service.send_all(b"one")
            assert await one.socket.recv() == b"one"
            await one.service.send_all(b"two")
        await until(lambda: one.visit.bytes_in + one.visit.bytes_out)
        await trio.testing.wait_all_tasks_blocked()  # "two" waits
        began = trio.current_time()
        one.socket.abort()
        await one.over.wait()
        assert one.problem is not None
        assert trio.current_time() - began <= 2 * LOOK
