"""The state of one stream at one end: two halves, credit, what has arrived and what waits to be sent."""

from __future__ import annotations

from collections import deque

from msgspec import Struct

from tunnel.wire import states
from tunnel.wire.frames import STREAM_WINDOW, Open, Response

#: stands for a queue that nothing was put into yet: most streams need none, and each would cost 0.7 KiB
NOTHING: deque[bytes] = deque(maxlen=0)


class Stream(Struct, eq=False, weakref=True):
    """`head` is what the other end began its half with: an Open at the acceptor, the final Response at the opener.

    inbox: body parts not yet taken, never more than a window. pending: frames that wait for the writer, oldest first.
    ended: the other end has sent all. trailers: its trailer fields. failure: (outcome code, text) of a RESET.
    """

    id: int
    out: int = states.IDLE
    inn: int = states.IDLE
    credit: int = STREAM_WINDOW  # bytes we may still send
    receivable: int = STREAM_WINDOW  # bytes the other end may still send
    consumed: int = 0  # bytes taken, not yet given back as credit
    inbox: deque[bytes] = NOTHING
    inbox_bytes: int = 0
    pending: deque[bytes] = NOTHING
    pending_bytes: int = 0
    head: Open | Response | None = None
    interims: tuple[Response, ...] = ()
    ended: bool = False
    trailers: bytes = b""
    failure: tuple[int, str] | None = None
    moved: int = 0  # bytes for which credit was given, either way: with `consumed`, a measure of its going on
    seen: int = -1  # that measure, when Held last looked
    stalls: int = 0  # at so many looks in a row it had not changed

    @property
    def is_over(self) -> bool:
        return self.failure is not None or (self.out == states.DONE and self.inn == states.DONE)

    def wake(self) -> None:
        """Something about this stream has changed. Whoever waits for it overrides this."""
