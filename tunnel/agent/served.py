"""What the agent knows of a stream that it serves, and of the request to the local service in it."""

from __future__ import annotations

from tunnel.handler import LocalVisit, StreamVisit
from tunnel.http.client import Service
from tunnel.http.forwarded import Forwarded
from tunnel.link.stream import Stream
from tunnel.link.workers import Cancellable
from tunnel.net import Socket
from tunnel.wire.frames import Open

FOREVER = float("inf")


class ServedStream(StreamVisit, kw_only=True):
    """A stream being served, with its deadline for the sweeper."""

    stream: Stream
    opened: Open
    service: Service
    scope: Cancellable | None
    local: LocalRequest | None = None  # begun without a task, which may have to go on with it
    deadline: float = FOREVER
    timed_out: bool = False

    def tick(self, now: float) -> None:
        if now > self.deadline:
            self.deadline = FOREVER
            self.timed_out = True
            if self.scope is not None:
                self.scope.cancel()


class LocalRequest(LocalVisit, kw_only=True):
    """An exchange with the local service. socket: the connection that it has, until it is kept for the next.

    Of one that was begun without a task: `request`, all that is sent; `sent`, how many bytes of it the kernel took, -1
    when the connection turned out to be dead; `part`, the beginning of the answer; `problem`, what came instead.
    """

    visit: ServedStream
    head: Forwarded
    socket: Socket | None = None
    request: bytes = b""
    sent: int = -1
    part: bytes | None = None
    problem: Exception | None = None
