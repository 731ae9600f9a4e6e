"""Raw bytes both ways between a stream and a local service: TCP tunnels, and HTTP connections after an upgrade."""

from __future__ import annotations

from tunnel.errors import BY_CODE, OUTCOMES, Failure
from tunnel.handler import LocalVisit, StreamVisit
from tunnel.http.client import Service
from tunnel.link.stream import RawStream, Stream
from tunnel.link.tasks import open_pair
from tunnel.net import Socket


async def join(stream: RawStream, socket: Socket, visit: StreamVisit | LocalVisit) -> None:
    """Raw bytes both ways until both directions ended. Raises trio.BrokenResourceError."""

    async def inwards() -> None:
        while data := await stream.receive_some():
            visit.bytes_in += len(data)
            await socket.send(data)
        await socket.finish()

    async with open_pair() as nursery:
        nursery.start_soon(inwards)
        while data := await socket.recv():
            visit.bytes_out += len(data)
            await stream.send_all(data)
        await stream.send_eof()


def broken(stream: Stream, service: Service) -> Failure:
    """Which side a raw connection broke on."""
    if stream.failure is not None:
        row = BY_CODE.get(stream.failure[0], OUTCOMES["link_lost"])
        return Failure(row.name, stream.failure[1])
    return Failure("local_broken", f"{service.address} broke the connection off")
