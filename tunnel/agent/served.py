"""What the agent knows of a stream that it serves, and of the request to the local service in it."""

from __future__ import annotations

from tunnel.handler import LocalVisit, StreamVisit
from tunnel.http.client import Service
from tunnel.http.forwarded import Forwarded
from tunnel.link.stream import Stream
from tunnel.link.workers import Cancellable
from tunnel.net import Socket
from tunnel.wire import frames
from tunnel.wire.frames import Open

FOREVER = float("inf")


class ServedStream(StreamVisit):
    """A stream being served, with its deadline for the sweeper."""

    __slots__ = ("deadline", "local", "opened", "scope", "service", "stream", "timed_out")

    def __init__(self, stream: Stream, opened: Open, service: Service, scope: Cancellable) -> None:
        super().__init__(None, frames.PROTOCOLS[opened.protocol])
        self.stream = stream
        self.opened = opened
        self.service = service
        self.scope: Cancellable | None = scope
        self.local: LocalRequest | None = None  # begun without a task, which may have to go on with it
        self.deadline = FOREVER
        self.timed_out = False

    def tick(self, now: float) -> None:
        if now > self.deadline:
            self.deadline = FOREVER
            self.timed_out = True
            if self.scope is not None:
                self.scope.cancel()


class LocalRequest(LocalVisit):
    """An exchange with the local service. socket: the connection that it has, until it is kept for the next.

    Of one that was begun without a task: `request`, all that is sent; `sent`, how many bytes of it the kernel took, -1
    when the connection turned out to be dead; `part`, the beginning of the answer; `problem`, what came instead.
    """

    __slots__ = ("head", "part", "problem", "request", "sent", "socket", "visit")

    def __init__(self, visit: ServedStream, head: Forwarded) -> None:
        super().__init__(visit, visit.service.address, "http")
        self.visit = visit
        self.head = head
        self.socket: Socket | None = None
        self.request = b""
        self.sent = -1
        self.part: bytes | None = None
        self.problem: Exception | None = None
