"""Raw bytes both ways between a visitor and a stream: TCP tunnels, and HTTP connections after an upgrade."""

from __future__ import annotations

import trio

from tunnel.core.quotas import Account
from tunnel.core.visitor import Visitor
from tunnel.handler import RequestVisit, StreamVisit
from tunnel.link.stream import RawStream
from tunnel.link.tasks import open_pair


async def join(stream: RawStream, visitor: Visitor, visit: RequestVisit | StreamVisit, account: Account) -> None:
    """Raw bytes both ways, with half-close and shaping. Raises as `RawStream` and `Socket` do."""

    async def inwards() -> None:
        data, visitor.buffer = visitor.buffer, b""
        while data := data or await visitor.socket.recv():
            visit.bytes_in += len(data)
            await stream.send_all(data)
            delay = account.take_bytes(len(data), 0)
            if delay:
                await trio.sleep(delay)
            data = b""
        await stream.send_eof()

    async with open_pair() as nursery:
        nursery.start_soon(inwards)
        while data := await stream.receive_some():
            visit.bytes_out += len(data)
            await visitor.socket.send(data)
            delay = account.take_bytes(0, len(data))
            if delay:
                await trio.sleep(delay)
        await visitor.socket.finish()
