"""Our wait for sockets in front of Trio's: `tunnel.ready`'s set is asked by the run loop itself, not by a task.

Through Trio's public functions a turn of the run loop in which one of our sockets is served costs, beside the serving,
a wait for the set of Trio's sockets, the wake-up of a task, a question to our own set, and the registration of that
for the next time: five calls to the kernel instead of three. At one request at a time that is a fifth of what a
request costs, and a tenth at 32 (docs/benchmarks.md).

So while `Ready` runs, a `Front` stands in for the I/O manager of Trio's runner. It waits for our set, in which
Trio's own epoll is one more member, calls what ours want, and leaves the rest to Trio, whose deadlines, cancellation
and fairness are as ever: each turn ends with Trio's tasks. Nothing public of Trio reaches its I/O manager, so this
knows three names of its inside. Where one of them is missing, or the run is a guest of another loop, `put` says no and
a task waits instead; tests/test_ready.py holds both ways to the same, and says which one is used.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

import trio

#: tells those that are ready, (file number, what epoll says of it); returns whether `other` is among them
Tell = Callable[[list[tuple[int, int]], int], bool]

_ONLY_OURS: Any = True  #: for Trio: something happened, and nothing of it is yours


class Front:
    """Stands before `behind`, Trio's manager. ours: our set. most: how many of it are told in a row."""

    def __init__(self, behind: Any, other: int, ours: select.epoll, tell: Tell, most: int) -> None:
        self._behind = behind
        self._other = other
        self._ours = ours
        self._tell = tell
        self._most = most + 1
        self._process_events = behind.process_events
        # what tasks call, without a detour
        self.wait_readable = behind.wait_readable
        self.wait_writable = behind.wait_writable
        self.notify_closing = behind.notify_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)

    @trio.lowlevel.enable_ki_protection
    def get_events(self, timeout: float) -> Any:
        """Wait for `timeout` seconds at most. False-like means to Trio that nothing happened in that time."""
        events = self._ours.poll(timeout, self._most)
        if not events:
            return events
        if self._tell(events, self._other):
            return self._behind.get_events(0)
        return _ONLY_OURS

    def process_events(self, events: Any) -> None:
        if events is not _ONLY_OURS:
            self._process_events(events)


def put(ours: select.epoll, tell: Tell, most: int) -> Callable[[], None] | None:
    """Stand before the I/O manager of this run from now on; returns what ends that, or None where it can't be."""
    try:
        runner: Any = trio._core._run.GLOBAL_RUN_CONTEXT.runner
        behind, is_guest = runner.io_manager, runner.is_guest
        other = behind._epoll.fileno()
    except AttributeError:  # another Trio, or another Front
        return None
    if is_guest or isinstance(behind, Front):
        return None
    ours.register(other, select.EPOLLIN)
    front = runner.io_manager = Front(behind, other, ours, tell, most)

    def remove() -> None:
        assert runner.io_manager is front
        runner.io_manager = behind
        ours.unregister(other)

    return remove
