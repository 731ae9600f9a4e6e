"""What the agent knows of a stream that it serves, and of the request to the local service in it.

The core has to say who was slow also when no answer comes: because it has waited long enough, or the visitor has, or
the service broke off. It can't know that the service was reached and says nothing, so it is told (WAITING,
tunnel/SPEC.md): once for each wait that gets long, and with the reset of a stream that failed in one.
"""

from __future__ import annotations

from tunnel.handler import LocalVisit, StreamVisit
from tunnel.http.client import Service
from tunnel.http.forwarded import Forwarded
from tunnel.link.stream import Stream
from tunnel.link.workers import Cancellable
from tunnel.net import Socket
from tunnel.wire.frames import Open

FOREVER = float("inf")
LONG_TO_HEAD = 0.2  #: seconds that a wait for an answer's head lasts before the core is told
LONG_IN_BODY = 1.0  #: and for the next part of a body, which many services send now and then


class ServedStream(StreamVisit, kw_only=True):
    """A stream being served, with its deadline for the sweeper."""

    stream: Stream
    opened: Open
    service: Service
    scope: Cancellable | None
    local: LocalRequest | None = None  # may have been begun without a task, which goes on with it
    deadline: float = FOREVER
    timed_out: bool = False
    waits_since: float = 0.0  # for the service; 0: since it was asked; FOREVER: it is not what is waited for
    told: float = -1.0  # the wait that the core was told of

    def tick(self, now: float) -> None:
        if now > self.deadline:
            self.deadline = FOREVER
            self.timed_out = True
            if self.scope is not None:
                self.scope.cancel()
        elif self.waits_since != self.told:
            self.tell_waiting(now, LONG_IN_BODY if self.waits_since else LONG_TO_HEAD)

    def tell_waiting(self, now: float, least: float = 0.0) -> None:
        """Tell the core that the local service is waited for, if it is, and has been for at least so many seconds."""
        local = self.local
        if local is None:
            return
        waited = now - (self.waits_since or local.started)
        if waited >= least:
            self.told = self.waits_since
            ours = 0.0 if local.status else local.started - self.started
            self.stream.link.session.tell_waiting(self.stream, int((ours + waited) * 1e6), int(waited * 1e6))


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
