"""Our wait for sockets in front of Trio's: `tunnel.ready`'s set is asked by the run loop itself, not by a task.

Through Trio's public functions a turn of the run loop in which one of our sockets is served costs, beside the serving,
a wait for the set of Trio's sockets, the wake-up of a task, a question to our own set, and the registration of that
for the next time: five calls to the kernel instead of three. At one request at a time that is a quarter of what a
request costs, and a tenth at 32.

So while `Ready` runs, a `Front` stands in for the I/O manager of Trio's runner. It waits for our set, in which
Trio's own epoll is one more member, calls what ours want, and leaves the rest to Trio. It waits again by itself only
while there is nothing in a turn for Trio: none of its sockets, no task that can run, no deadline come or changed. So
deadlines, cancellation and fairness are Trio's as ever.

Nothing public of Trio reaches its I/O manager, so this knows five names of its inside. Where one of them is missing, or
the run is a guest of another loop, `put` says no and a task waits instead; tests/test_ready.py holds both ways to the
same, and says which one is used.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from time import monotonic
from typing import Any

import trio

#: tells those that are ready, (file number, what epoll says of it); returns whether `other` is among them
Tell = Callable[[list[tuple[int, int]], int], bool]

_ONLY_OURS: Any = True  #: for Trio: something happened, and nothing of it is yours


class Front:
    """Stands before the I/O manager of a runner, with our set and what tells its members; most: how many in a row."""

    def __init__(self, runner: Any, ours: select.epoll, tell: Tell, most: int) -> None:
        behind = self._behind = runner.io_manager
        self.other: int = behind._epoll.fileno()
        self._runnable = runner.runq
        self._next_deadline = runner.deadlines.next_deadline
        self._poll = ours.poll
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
        poll, tell, most, other = self._poll, self._tell, self._most, self.other
        events = poll(timeout, most)
        if not events:
            return events
        next_deadline, runnable = self._next_deadline, self._runnable
        deadline, until = next_deadline(), monotonic() + timeout
        while not tell(events, other):
            left = until - monotonic()
            if left <= 0 or runnable or next_deadline() != deadline or not (events := poll(left, most)):
                return _ONLY_OURS
        return self._behind.get_events(0)

    def process_events(self, events: Any) -> None:
        if events is not _ONLY_OURS:
            self._process_events(events)


def put(ours: select.epoll, tell: Tell, most: int) -> Callable[[], None] | None:
    """Stand before the I/O manager of this run from now on; returns what ends that, or None where it can't be."""
    try:
        runner: Any = trio._core._run.GLOBAL_RUN_CONTEXT.runner
        if runner.is_guest or isinstance(runner.io_manager, Front):
            return None
        front = Front(runner, ours, tell, most)
    except AttributeError:  # another Trio
        return None
    behind, runner.io_manager = runner.io_manager, front
    ours.register(front.other, select.EPOLLIN)

    def remove() -> None:
        assert runner.io_manager is front
        runner.io_manager = behind
        ours.unregister(front.other)

    return remove
