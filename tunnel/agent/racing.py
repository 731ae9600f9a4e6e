"""Several tries at one connection: a new one begins while the old ones hang, and the first that arrives is it.

A try that went into a dead network hears of its return late: the kernel repeats an unanswered SYN after 1, 3, 7 s,
lost bytes after as long as they have been lost. A new try gets through at once. The first one goes on all the while,
for whom a busy core serves slowly, not at all, is only late; those after it make room for newer ones.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")

HURRY = 1.5  #: seconds without a step ahead after which another try begins; with a handshake, 2 s from a healed network
MOST = 3  #: tries at a time


class Try(Generic[T]):
    """What a try tells its race."""

    def __init__(self, race: Race[T]) -> None:
        self.scope = trio.CancelScope()
        self._race = race

    def step(self) -> None:
        """It has got ahead: no reason to begin another one now."""
        self._race.moved = trio.current_time()

    def arrive(self, result: T) -> bool:
        """Whether it is the first; then it lives on, for as long as its result does."""
        return self._race.take(self, result)


class Race(Generic[T]):
    """run: one try, a task of `nursery`. It raises, or calls `arrive`; the one that came first may stay."""

    def __init__(self, nursery: trio.Nursery, run: Callable[[Try[T]], Awaitable[None]]) -> None:
        self.moved = trio.current_time()
        self._nursery = nursery
        self._run = run
        self._running: list[Try[T]] = []
        self._first: Try[T] | None = None
        self._result: T | None = None
        self._problem: Exception | None = None
        self._ended = trio.Event()  # one has arrived, or none is left

    async def win(self) -> T:
        """The result of the first that arrives. Raises what ended the last try when none is left.

        When it returns, raises or is cancelled, all tries are over but the one that won.
        """
        try:
            self._begin()
            while not self._ended.is_set():
                with trio.move_on_at(self.moved + HURRY):
                    await self._ended.wait()
                if not self._ended.is_set() and trio.current_time() >= self.moved + HURRY:
                    self._begin()
            if self._first is None:
                assert self._problem is not None
                raise self._problem
            return self._result  # type: ignore[return-value]  # set together with _first
        finally:
            for one in self._running:
                if one is not self._first:
                    one.scope.cancel()

    def take(self, one: Try[T], result: T) -> bool:
        if self._first is not None or one.scope.cancel_called:
            return False
        self._first, self._result = one, result
        self._ended.set()
        return True

    def _begin(self) -> None:
        if len(self._running) >= MOST:
            self._running.pop(1).scope.cancel()
        one = Try(self)
        self._running.append(one)
        self.moved = trio.current_time()
        self._nursery.start_soon(self._guard, one)

    async def _guard(self, one: Try[T]) -> None:
        try:
            with one.scope:
                await self._run(one)
        except Exception as exc:
            if one is self._first:
                raise
            self._problem = exc
        finally:
            if one in self._running:
                self._running.remove(one)
            if not self._running:
                self._ended.set()
