"""The state of one stream at one end: two halves, credit, what has arrived and what waits to be sent."""

from __future__ import annotations

from collections import deque

from tunnel.wire import states
from tunnel.wire.frames import STREAM_WINDOW, Open, Response

#: stands for a queue or list that nothing was put into yet: most streams need none, and each would cost 0.7 KiB
NOTHING: deque[bytes] = deque(maxlen=0)
NO_INTERIMS: list[Response] = []


class Stream:
    """`head` is what the other end began its half with: an Open at the acceptor, the final Response at the opener.

    inbox: body parts not yet taken, never more than a window. pending: frames that wait for the writer, oldest first.
    ended: the other end has sent all. trailers: its trailer fields. failure: (outcome code, text) of a RESET.
    """

    __slots__ = (
        "consumed",
        "credit",
        "ended",
        "failure",
        "head",
        "id",
        "inbox",
        "inbox_bytes",
        "inn",
        "interims",
        "out",
        "pending",
        "pending_bytes",
        "receivable",
        "trailers",
    )

    def __init__(self, id: int) -> None:
        self.id = id
        self.out = states.IDLE
        self.inn = states.IDLE
        self.credit = STREAM_WINDOW  # bytes we may still send
        self.receivable = STREAM_WINDOW  # bytes the other end may still send
        self.consumed = 0  # bytes taken, not yet given back as credit
        self.inbox = NOTHING
        self.inbox_bytes = 0
        self.pending = NOTHING
        self.pending_bytes = 0
        self.head: Open | Response | None = None
        self.interims = NO_INTERIMS
        self.ended = False
        self.trailers = b""
        self.failure: tuple[int, str] | None = None

    @property
    def is_over(self) -> bool:
        return self.failure is not None or (self.out == states.DONE and self.inn == states.DONE)

    def wake(self) -> None:
        """Something about this stream has changed. Whoever waits for it overrides this."""
