"""Who has become readable, asked once for many sockets, and told to a function instead of a task.

`trio.lowlevel.wait_readable` costs a call to the kernel and the wake-up of a task each time. That is right for a task
that has something to wait for; a request that is served in one go has not. So a socket whose next bytes may be dealt
with at once stays in an epoll set of its own for as long as it lives, edge-triggered. The run loop waits for the set
together with Trio's own (front.py) and calls the sockets' functions, one after another; where that can't be, a task
waits for it and calls them. They must neither wait nor raise, and belong to no task: `trio.lowlevel.current_task`
may find none.

What they queue meanwhile on links leaves when all have been called (`after`): one write for all of them, and without
waking the links' writers. Those that come in a burst are rarely all there at the first look, and a write and what it
wakes at the other end cost as much as several requests: so the run loop looks again before it lets that leave.

While this program serves, the other end of its links mostly waits for it, and the other way round. So what no visitor
waits for is put off until there is nobody to serve (`when_idle`): that time is nobody's.

Linux only: elsewhere `make_ready` gives None, and all goes the way of tasks, which is the reference.
"""

from __future__ import annotations

import select
from collections.abc import Callable

import trio

from tunnel import front
from tunnel.net import Socket

MOST = 128  #: sockets told in a row

_ENDED = getattr(select, "EPOLLRDHUP", 0) | getattr(select, "EPOLLHUP", 0) | getattr(select, "EPOLLERR", 0)

Told = Callable[[bool], None]  #: has_ended: what there is to read ends with the connection's end


class Ready:
    """on_problem hears of a function that raised; the others are called all the same.

    may_be_in_front: of Trio's own wait, where that can be. is_in_front: it is.
    """

    def __init__(self, on_problem: Callable[[Exception], None], may_be_in_front: bool = True) -> None:
        self._set = select.epoll()
        self._told: dict[int, Told] = {}
        self._after: list[Callable[[], None]] = []
        self._idle: front.Work = {}
        self._on_problem = on_problem
        self._may_be_in_front = may_be_in_front
        self.is_in_front = False
        self.is_telling = False

    def add(self, socket: Socket, told: Told) -> bool:
        """Call `told` whenever bytes or the end arrive on a socket (soon if some are there), and when it is closed
        here. It may be called once too often, never too rarely: read until less came than was asked for, and once more
        where the connection has ended; under TLS, until nothing comes.

        False when the kernel has no room, or when this is over: then a task has to wait for it.
        """
        number = socket.sock.fileno()
        try:
            self._set.register(number, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        except (OSError, ValueError):
            return False
        self._told[number] = told

        def close() -> None:
            if self._told.pop(number, None) is not None:
                self._set.unregister(number)
                told(True)

        socket.on_close = close
        return True

    def after(self, told: Callable[[], None]) -> None:
        """Call this when all that are ready now have been told."""
        self._after.append(told)

    def when_idle(self, work: Callable[[], None]) -> bool:
        """Call this, which must not raise, when there is nobody to tell and no task that can run, right before the
        program sleeps: once, however often it was asked for until then. That may never be. False where that moment is
        not known."""
        if self.is_in_front:
            self._idle[work] = None
        return self.is_in_front

    async def run(self) -> None:
        """Until cancelled."""
        remove = front.put(self._set, self, MOST, self._idle) if self._may_be_in_front else None
        self.is_in_front = remove is not None
        try:
            if remove is not None:
                await trio.sleep_forever()
            while True:
                await trio.lowlevel.wait_readable(self._set)
                self.tell(self._set.poll(0, MOST))
                self.finish()
        finally:
            if remove is not None:
                remove()
            self.is_in_front = False
            self._told.clear()
            self._set.close()

    def tell(self, events: front.Events, other: int = -1) -> bool:
        """Call the functions of those that are ready; whether `other`, which is none of them, is among them."""
        has_other = False
        find = self._told.get
        self.is_telling = True
        for number, flags in events:
            told = find(number)
            if told is not None:
                try:
                    told(flags & _ENDED != 0)
                except Exception as exc:
                    self._on_problem(exc)
            elif number == other:  # else an earlier one has closed it
                has_other = True
        return has_other

    def finish(self) -> None:
        """All have been told: what they have queued leaves."""
        self.is_telling = False
        if self._after:
            after, self._after = self._after, []
            for last in after:
                try:
                    last()
                except Exception as exc:
                    self._on_problem(exc)


def make_ready(on_problem: Callable[[Exception], None], may_be_in_front: bool = True) -> Ready | None:
    return Ready(on_problem, may_be_in_front) if hasattr(select, "epoll") else None
