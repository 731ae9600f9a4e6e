"""Places for connections. When all are taken, one that keeps the server waiting makes room for a newcomer.

A connection waits for its client when it reads from it or writes to it; while its answer is made it is safe. Of those
that wait, the address that has most of them gives one up, the one that has waited longest: a crowd of silent
connections keeps nobody out, whatever it sends now and then. Who is cut off while it was idle asks again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Place:
    """One connection's, `with` which it is served. is_given: whether there was one for it."""

    def __init__(self, places: Places, address: str) -> None:
        self.address = address
        self.is_given = False
        self.scope = trio.CancelScope()
        self._places = places

    def __enter__(self) -> Place:
        self.is_given = self._places.enter(self)
        self.scope.__enter__()
        return self

    def __exit__(self, *raised: object) -> bool | None:
        if self.is_given:
            self._places.leave(self)
        return self.scope.__exit__(*raised)  # type: ignore[arg-type]

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Around what waits for the client. Raises trio.TooSlowError after so many seconds."""
        self._places.waits(self)
        try:
            with trio.fail_after(seconds):
                yield
        finally:
            self._places.goes_on(self)


class Places:
    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._waiting: dict[Place, None] = {}  # who has waited longest comes first

    def enter(self, place: Place) -> bool:
        if self._taken >= self._most and not self._make_room():
            return False
        self._taken += 1
        return True

    def leave(self, place: Place) -> None:
        self._waiting.pop(place, None)
        self._taken -= not place.scope.cancel_called

    def waits(self, place: Place) -> None:
        if not place.scope.cancel_called:  # else it has been given up, and ends as soon as it is its turn
            self._waiting[place] = None

    def goes_on(self, place: Place) -> None:
        self._waiting.pop(place, None)

    def _make_room(self) -> bool:
        if not self._waiting:
            return False
        [(crowded, _)] = Counter(place.address for place in self._waiting).most_common(1)
        place = next(place for place in self._waiting if place.address == crowded)
        del self._waiting[place]
        self._taken -= 1
        place.scope.cancel()
        return True
