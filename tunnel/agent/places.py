"""How many requests a process of an agent takes at a time: each has a connection to a local service, an open file.

Every link's hello says how many of them it may bring. The first one does not know yet to how many workers of the core
there will be links; what it brings beyond its share is refused once the others have theirs, and goes to one of those.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tunnel.agent.attempt import Attempt
from tunnel.log import Logger
from tunnel.openfiles import allowed_now, make_room
from tunnel.wire.control import MAX_STREAMS

OURS = 300  #: files that are no open request's: 256 connections to the pages, links, the log
PROBES = 100  #: streams that come on top: the core's probes


def make_room_for_files(log: Logger) -> None:
    """Before anything else is started: workers inherit it."""

    def fitting(room: int) -> str:
        return f"start another agent: this one takes {max(room, 1)} requests at a time, and tells the core so"

    make_room(MAX_STREAMS, OURS, fitting, log)


class Places:
    """Of this process' links. each: of one of them."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        self.each = MAX_STREAMS
        self._most = sys.maxsize
        self._attempts = attempts

    def share(self, links: int) -> int:
        """For one of so many links."""
        self._most = max(allowed_now() - OURS, 1)
        self.each = min(MAX_STREAMS, max(self._most // links, 1))
        return self.each

    def is_beyond(self, attempt: Attempt) -> bool:
        """Whether a link has more streams than it may, by itself or together with the others."""
        total = sum(len(one.link.session.streams) for one in self._attempts)
        return len(attempt.link.session.streams) > attempt.max_streams + PROBES or total > self._most + PROBES
