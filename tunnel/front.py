"""Our wait for sockets in front of Trio's: `tunnel.ready`'s set is asked by the run loop itself, not by a task.

Through Trio's public functions a turn of the run loop in which one of our sockets is served costs, beside the serving,
a wait for the set of Trio's sockets, the wake-up of a task, a question to our own set, and the registration of that
for the next time: five calls to the kernel instead of three. At one request at a time that is a quarter of what a
request costs, and a tenth at 32.

So while `Ready` runs, a `Front` stands in for the I/O manager of Trio's runner. It waits for our set, in which
Trio's own epoll is one more member, has ours served, and leaves the rest to Trio. It waits again by itself only
while there is nothing in a turn for Trio: none of its sockets, no task that can run, no deadline come or changed. So
deadlines, cancellation and fairness are Trio's as ever.

Only here is it known that the program is about to sleep, so here is done what may wait until then (`Ready.when_idle`).

Nothing public of Trio reaches its I/O manager, so this knows five names of its inside. Where one of them is missing, or
the run is a guest of another loop, `put` says no and a task waits instead; tests/test_ready.py holds both ways to the
same, tests/test_front.py says which one is used.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

import trio

Events = list[tuple[int, int]]  #: who is ready: file number, what epoll says of it
Work = dict[Callable[[], None], None]  #: in the order in which it was asked for, nothing twice

LOOKS = 4  #: for more that are ready, before what has been queued leaves

_ONLY_OURS: Any = True  #: for Trio: something happened, and nothing of it is yours


class Served(Protocol):
    """Whose sockets they are."""

    def tell(self, events: Events, other: int) -> bool:
        """Call the functions of those that are ready; returns whether `other`, which is none of them, is among them."""

    def finish(self) -> None:
        """All have been told."""


class Front:
    """Stands before the I/O manager of a runner, with our set and who serves its members; most: how many in a row.

    idle: what to do before the program sleeps. It must not raise.
    """

    def __init__(self, runner: Any, ours: select.epoll, served: Served, most: int, idle: Work) -> None:
        behind = self._behind = runner.io_manager
        self.other: int = behind._epoll.fileno()
        self._runnable = runner.runq
        self._next_deadline = runner.deadlines.next_deadline
        self._poll = ours.poll
        self._tell = served.tell
        self._finish = served.finish
        self._most = most + 1
        self._idle = idle
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
        until = monotonic() + timeout
        next_deadline, runnable = self._next_deadline, self._runnable
        deadline = next_deadline()
        events = self._wait(timeout)
        if not events:
            return events if next_deadline() == deadline and not runnable else _ONLY_OURS
        while not self._serve(events):
            left = until - monotonic()
            if left <= 0 or runnable or next_deadline() != deadline or not (events := self._wait(left)):
                return _ONLY_OURS
        return self._behind.get_events(0)

    def _serve(self, events: Events) -> bool:
        """Tell those that are ready, and those that become so meanwhile unless a task could run; whether some are
        Trio's."""
        tell, other = self._tell, self.other
        is_needed = tell(events, other)
        for _ in range(LOOKS):
            if is_needed or self._runnable or not (events := self._poll(0, self._most)):
                break
            is_needed = tell(events, other)
        self._finish()
        return is_needed

    def _wait(self, timeout: float) -> Events:
        """Who is ready, in `timeout` seconds at most. If that is nobody now, it is time for what may wait until then;
        where that gives Trio something to do, nobody is waited for."""
        idle = self._idle
        if idle and timeout > 0:
            if events := self._poll(0, self._most):
                return events
            until, deadline = monotonic() + timeout, self._next_deadline()
            work = list(idle)
            idle.clear()
            for one in work:
                one()
            is_needed = self._runnable or self._next_deadline() != deadline
            timeout = 0.0 if is_needed else max(0.0, until - monotonic())
        return self._poll(timeout, self._most)

    def process_events(self, events: Any) -> None:
        if events is not _ONLY_OURS:
            self._process_events(events)


def put(ours: select.epoll, served: Served, most: int, idle: Work) -> Callable[[], None] | None:
    """Stand before the I/O manager of this run from now on; returns what ends that, or None where it can't be."""
    try:
        runner: Any = trio._core._run.GLOBAL_RUN_CONTEXT.runner
        if runner.is_guest or isinstance(runner.io_manager, Front):
            return None
        front = Front(runner, ours, served, most, idle)
    except AttributeError:  # another Trio
        return None
    behind, runner.io_manager = runner.io_manager, front
    ours.register(front.other, select.EPOLLIN)

    def remove() -> None:
        assert runner.io_manager is front
        runner.io_manager = behind
        ours.unregister(front.other)

    return remove
