"""Raw bytes both ways between a visitor and a stream: TCP tunnels, and HTTP connections after an upgrade.

A direction that passes its account's bandwidth reads on at once and owes the wait before it passes on what it has read
then: so an end, and a connection that breaks, count when they come and not when the debt is paid. Who is gone while a
part waits is seen within a second, and holds up no drain.
"""

from __future__ import annotations

import trio

from tunnel.core.quotas import Account
from tunnel.core.visitor import Visitor
from tunnel.handler import RequestVisit, StreamVisit
from tunnel.link.stream import RawStream
from tunnel.link.tasks import open_pair
from tunnel.net import GONE

LOOK = 1.0  #: seconds from one look whether the visitor is still there to the next, while a part waits


async def join(stream: RawStream, visitor: Visitor, visit: RequestVisit | StreamVisit, account: Account) -> None:
    """Raw bytes both ways, with half-close and shaping. Raises as `RawStream` and `Socket` do."""

    async def inwards() -> None:
        data, visitor.buffer = visitor.buffer, b""
        delay = 0.0
        while data := data or await visitor.socket.recv():
            if delay:
                await _pause(visitor, delay)
            visit.bytes_in += len(data)
            await stream.send_all(data)
            delay = account.take_bytes(len(data), 0)
            data = b""
        await stream.send_eof()

    async with open_pair() as nursery:
        nursery.start_soon(inwards)
        delay = 0.0
        while data := await stream.receive_some():
            if delay:
                await _pause(visitor, delay)
            visit.bytes_out += len(data)
            await visitor.socket.send(data)
            delay = account.take_bytes(0, len(data))
        await visitor.socket.finish()


async def _pause(visitor: Visitor, delay: float) -> None:
    """Wait, seconds. Raises trio.BrokenResourceError when the visitor is gone meanwhile."""
    until = trio.current_time() + delay
    while (left := until - trio.current_time()) > 0:
        await trio.sleep(min(left, LOOK))
        if visitor.socket.peer() == GONE:
            raise trio.BrokenResourceError("the visitor closed the connection")
