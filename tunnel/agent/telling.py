"""What an agent says of attempts that fail.

A core that is away for a night means thousands of attempts that fail alike, and nobody reads thousands of lines. So a
reason is told when it is new, and once a minute while it stays, with the number of attempts that stand behind the
line. Two reasons in turn (two addresses of one core) are told like that each. A link that comes up ends it: what fails
next is news. No clock and no waiting in here.
"""

from __future__ import annotations

EVERY = 60.0  #: seconds between two tellings of a reason at least
MAX_REASONS = 16  # that are remembered; some carry a number that changes, and then each is news


class Telling:
    """Of all links of this process."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}  # reason → when; the one told longest ago first
        self._untold: dict[str, int] = {}

    def failed(self, reason: str, now: float) -> int:
        """An attempt has failed: how many to tell of now, this one included; 0 for nothing."""
        count = self._untold.get(reason, 0) + 1
        told = self._told.get(reason)
        if told is not None and now < told + EVERY:
            self._untold[reason] = count
            return 0
        self._told.pop(reason, None)
        self._untold.pop(reason, None)
        if len(self._told) == MAX_REASONS:
            oldest = next(iter(self._told))
            del self._told[oldest]
            self._untold.pop(oldest, None)
        self._told[reason] = now
        return count

    def came_up(self) -> None:
        """A link is up."""
        self._told.clear()
        self._untold.clear()
