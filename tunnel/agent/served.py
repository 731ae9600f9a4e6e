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

    __slots__ = ("deadline", "opened", "scope", "service", "stream", "timed_out")

    def __init__(self, stream: Stream, opened: Open, service: Service, scope: Cancellable) -> None:
        super().__init__(None, frames.PROTOCOLS[opened.protocol])
        self.stream = stream
        self.opened = opened
        self.service = service
        self.scope = scope
        self.deadline = FOREVER
        self.timed_out = False

    def tick(self, now: float) -> None:
        if now > self.deadline:
            self.deadline = FOREVER
            self.timed_out = True
            self.scope.cancel()


class LocalRequest(LocalVisit):
    """An exchange with the local service. socket: the connection that it has, until it is kept for the next."""

    __slots__ = ("head", "socket", "visit")

    def __init__(self, visit: ServedStream, head: Forwarded) -> None:
        super().__init__(visit, visit.service.address, "http")
        self.visit = visit
        self.head = head
        self.socket: Socket | None = None
