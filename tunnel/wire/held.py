"""What the sessions of one program hold of others' bytes: unread bodies and what waits to be sent.

Windows bound each stream and each link; this bounds all of them together. A sender cannot know how much that is, so
when it is reached streams are given up (`overloaded`), whichever link they are on, and no new one begins while it is
full. Those whose reader has stopped go first, the greediest of them before the others: who takes an honest answer as
fast as it comes may hold more at a moment than each of a crowd that reads nothing. Whether a reader has stopped can't
be seen from one look, so while much is held all streams are looked at once a second.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Protocol
from weakref import WeakSet

from tunnel.wire.stream import Stream
from tunnel.wire.windows import FLOOR

LOOK = 1.0  #: seconds from one look at all streams to the next
STOPPED = 2  #: stands for a stream that did not move from one look to the next, nor since
BATCH = 32  #: streams chosen at once: choosing takes a look at all


def _standing() -> float:
    return 0.0


class Holder(Protocol):
    """A session."""

    def holding(self) -> list[Stream]: ...

    def give_up(self, stream: Stream) -> None: ...


class Held:
    """Bytes held now, and the most there may be (0: any number). `refused`: streams given up because of it.

    alarm: from here on `check` wants to be called with each part that comes (0: never). clock: seconds; where it stands
    still it is not seen whose reader has stopped.
    """

    __slots__ = ("_clock", "_looked", "alarm", "bytes", "holders", "most", "refused")

    def __init__(self, most: int = 0, clock: Callable[[], float] = _standing) -> None:
        self.bytes = 0
        self.most = most
        self.alarm = most - most // 4
        self.refused = 0
        self.holders: WeakSet[Holder] = WeakSet()
        self._clock = clock
        self._looked = float("-inf")

    @property
    def is_full(self) -> bool:
        return 0 < self.most <= self.bytes

    def check(self) -> None:
        """Make room where nothing new could begin."""
        if self.is_full:
            self._make_room()
        now = self._clock()
        if now - self._looked >= LOOK:
            self._looked = now
            for _, stream in self._streams():
                moved = stream.moved + stream.consumed
                stream.stalls = stream.stalls + 1 if stream.seen == moved and _size(stream) >= FLOOR else 0
                stream.seen = moved

    def _make_room(self) -> None:
        """A little more than is needed: a look at all streams is not due with the next part again."""
        enough = self.most - max(1, self.most // 32)
        while self.bytes > enough:
            batch = heapq.nlargest(BATCH, self._streams(), key=lambda one: (_idleness(one[1]), _size(one[1])))
            for holder, stream in batch:
                if not _size(stream):
                    return  # the rest is no stream's
                self.refused += 1
                holder.give_up(stream)
                if self.bytes <= enough:
                    return
            if not batch:
                return

    def _streams(self) -> Iterator[tuple[Holder, Stream]]:
        for holder in list(self.holders):
            for stream in holder.holding():
                yield holder, stream


def _size(stream: Stream) -> int:
    return stream.inbox_bytes + stream.pending_bytes


def _idleness(stream: Stream) -> int:
    """0: it has moved since the last look, or there was none; STOPPED: not since the one before either."""
    if not _size(stream) or stream.seen != stream.moved + stream.consumed:
        return 0
    return min(1 + stream.stalls, STOPPED)
