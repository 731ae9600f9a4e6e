"""One task for all deadlines: what waits has a `tick`, and the sweeper calls it a few times a second.

A cancel scope a wait costs 6 µs a request; a deadline that is a plain number, looked at four times a second, costs
next to nothing and fires within a quarter of a second, which is enough for time-outs of seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Protocol

import trio

PERIOD = 0.25  #: seconds


class Ticking(Protocol):
    def tick(self, now: float) -> None: ...


class Sweeper:
    """`on_problem` hears of a tick that raised; the others go on."""

    def __init__(self, on_problem: Callable[[Exception], None], period: float = PERIOD) -> None:
        self._items: set[Ticking] = set()
        self._period = period
        self._on_problem = on_problem
        self.add = self._items.add
        self.discard = self._items.discard

    async def run(self) -> None:
        while True:
            await trio.sleep(self._period)
            now = monotonic()
            for item in list(self._items):
                try:
                    item.tick(now)
                except Exception as exc:
                    self._items.discard(item)
                    self._on_problem(exc)
