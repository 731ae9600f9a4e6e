"""Body that is on the way or unread: how a sender shares a link's window out among its streams.

A stream's share of a link's window is a part of what is left of it (dynamic thresholds: Choudhury and Hahne, 1998), and
half of the window is kept for streams that have little under way. So any number of consumers who have stopped leaves
room for the others, and a single fast one has its whole window.
"""

from __future__ import annotations

from typing import NamedTuple

from tunnel.wire.frames import LINK_WINDOW, SMALL_BODY, STREAM_WINDOW

FLOOR = SMALL_BODY  #: bytes that a stream may have under way however little is left of the link's window
SHARE = 4  #: else it may have a quarter of what is left above the kept half
EARLY = FLOOR // 2  #: while a link's window is short, credit goes back in steps of this
EARLY_LINK = 64 * 1024  #: and the link's in steps of this


class Windows(NamedTuple):
    """What an end grants, bytes: for each stream, and for a link."""

    stream: int = STREAM_WINDOW
    link: int = LINK_WINDOW

    @property
    def kept(self) -> int:
        """Left for streams with at most FLOOR under way."""
        return self.link // 2

    @property
    def step(self) -> int:
        """A stream's credit goes back in steps of this: no more than its share while the link's window is not short,
        or the sender waits for credit that the receiver does not give back yet."""
        return max(EARLY, min(self.stream // 4, self.link // 64))

    @property
    def short(self) -> int:
        """A receiver with less than this left gives credit back early (a sender's share may be small by now)."""
        return self.kept + self.link // 16
