"""A visitor's connection: its socket, what has been read of it, and the deadline it is under now."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import Task

from tunnel.core.limits import Counts, no_refusals
from tunnel.net import GONE, HALF_CLOSED, HERE, Socket

if TYPE_CHECKING:
    from tunnel.core.reading import Known
    from tunnel.core.request import Request

#: seconds that a visitor who ended its direction is left in peace before we ask whether it is still there
HALF_CLOSED_GRACE = 1.0
#: seconds without a write after which a visitor who ended its direction is taken for gone, in the middle of a body
SILENT_GRACE = 5.0

#: seconds that the local service has to ask for the body of a visitor who waits for that (Expect: 100-continue)
CONTINUE_AFTER = 1.0
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# What a connection waits for; each has its own time-out.
IDLE, HEAD, ANSWER, BODY, RAW = "idle", "head", "answer", "body", "raw"


class Visitor:
    """One connection. The sweeper calls `tick`; whatever it decides, it does by closing or by failing the stream.

    phase and deadline (monotonic seconds) are set by who serves it: its task, or tunnel/core/quick.py; the deadline
    moves on here too. `limit` is how many seconds `begin` left.
    `half_since` is when the visitor was first seen to have ended its direction, 0 while it has not.
    """

    __slots__ = (
        "address",
        "buffer",
        "crowd",
        "deadline",
        "forwarded",
        "guest",
        "half_since",
        "has_ended",
        "hops",
        "is_over",
        "is_proxy",
        "is_ready",
        "known",
        "limit",
        "on_silent",
        "phase",
        "probed",
        "proto",
        "refusals",
        "request",
        "served",
        "socket",
        "task",
        "unread",
        "wrote",
    )

    def __init__(self, socket: Socket, address: str, proto: str, refusals: Counts | None = None) -> None:
        self.socket = socket
        self.address = address
        self.proto = proto
        self.buffer = b""
        self.phase = IDLE
        self.deadline = self.limit = 0.0
        self.request: Request | None = None
        self.served = 0  # requests so far, the present one included
        self.refusals = no_refusals() if refusals is None else refusals
        self.half_since = 0.0
        self.probed = False
        self.wrote = 0.0
        self.unread = -1  # bytes of ours that it had not taken at the last look, while we wait for that
        self.known: Known | None = None  # what its last head said, where the next may say it again
        self.is_proxy = False  # a trusted one: its requests are others', and each says whose
        self.crowd = ""  # what the address that asks counts as where places are shared (tunnel.core.crowds)
        self.guest: str | None = None  # for whom a trusted proxy asks now, as counted by tunnel.core.forwarding
        self.task: Task | None = None  # waits while requests are served without it (tunnel/core/quick.py)
        self.is_ready = False  # something may have come that nobody has read yet
        self.has_ended = False  # behind what there is to read comes the end (told by tunnel.ready)
        self.is_over = False  # the last answer was one after which the connection ends
        self.hops = 0  # how often one process of this core has passed the connection to another
        self.forwarded: tuple[bytes, bytes] = (b"", b"")  # the last Host and the fields made for it

    def begin(self, phase: str, seconds: float) -> None:
        """Wait for this from now on, for so long at most."""
        self.phase, self.limit = phase, seconds
        self.deadline = monotonic() + seconds

    def rest(self) -> None:
        """The request is over, and another may come."""
        self.half_since, self.probed = 0.0, False

    def tick(self, now: float) -> None:
        if self.request is not None and self.request.writing:
            self._note_taking(now)
        if now > self.deadline:
            self.deadline = float("inf")
            self._expire()
            return
        request = self.request
        if request is not None and self.phase in (ANSWER, BODY) and now - request.started > 0.1:
            is_mute = not (request.head_written or request.writing)
            if is_mute and request.is_waiting_for_100 and now - request.started > CONTINUE_AFTER:
                self._ask_for_body(request)
            self._look(request, now)

    def _note_taking(self, now: float) -> None:
        """The kernel holds megabytes, and takes more only when much of that is gone: who reads slowly, but reads, is
        seen by what is left of it."""
        unread = self.socket.count_unread()
        if unread != self.unread:
            if self.unread >= 0:
                self.wrote = now
                self.deadline = max(self.deadline, now + self.limit)
            self.unread = unread

    def _ask_for_body(self, request: Request) -> None:
        """Send the 100 that the local service does not: some visitors wait for it for ever (RFC 9110, 10.1.1)."""
        request.continued = True
        try:
            self.socket.send_nowait(CONTINUE)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            request.abort("the visitor closed the connection")

    def _expire(self) -> None:
        request = self.request
        if request is None:
            self.refusals["idle_time"] += self.phase == IDLE
            self.socket.close()
        elif self.phase in (IDLE, HEAD):
            self.refusals["head_time"] += 1
            request.expired = True
            self.socket.wake_receiver()
        else:
            is_waiting = self.phase == ANSWER and not (request.reading or request.writing)
            self.refusals["first_byte_time" if is_waiting else "body_idle_time"] += 1
            request.expire()

    def _look(self, request: Request, now: float) -> None:
        """Is the visitor still there? An end of its direction may be a half-close by one who still listens.

        Only something written tells the two apart. While nothing of the answer is written, an interim response is
        (RFC 9110, 15.2: clients ignore it): if the visitor is gone, it comes back as a reset. Within a body there is
        nothing to write, so silence decides; an event stream's reader never half-closes. While we wait for the visitor
        to take something, that is what would come back.
        """
        peer = self.socket.peer()
        if peer == HERE:
            return
        if peer == GONE:
            request.abort("the visitor closed the connection")
            return
        assert peer == HALF_CLOSED
        if not self.half_since:
            self.half_since = now
        elif now - self.half_since < HALF_CLOSED_GRACE:
            pass
        elif self.phase == ANSWER:
            if not self.probed and request.http_version == "1.1" and not (request.head_written or request.writing):
                self.probed = True
                try:
                    self.socket.send_nowait(CONTINUE)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    request.abort("the visitor closed the connection")
        elif request.event_stream or (not request.writing and now - max(self.wrote, self.half_since) > SILENT_GRACE):
            request.abort("the visitor closed the connection")
