"""Observers side by side, in one coroutine.

Metrics, tracing and logs only look at a visit before and after its handler. As three guarded layers they are nine
coroutines a visit, each resumed whenever the visit goes on; here they are one, with the same promises: the order of the
layers, and an observer that raises is reported once, switched off, and hurts neither the handler nor the others.

What observers do `late` is gathered and done for many visits in a row. Between two requests a busy processor's caches
are filled with other things, so that code costs two to four times as much when it runs once a request as when it runs
for twenty of them. Where it is known when the program is about to sleep they wait for that (`Observers.when_idle`), so
that they take no time from requests that are under way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import trio

from tunnel.handler import Begin, End, Ended, Enter, Guard, Handler, Layer, Leave, Observer, Visit, monotonic

PAUSE = 0.01  # seconds after a visit's end within which it is told to those who want it late
MOST = 64  # visits told in a row: the run loop does nothing else meanwhile
SOME = 32  # visits that are worth being told in a row, when there is nothing else to do
MOST_WAITING = 512  # visits told in a row if there is always something else to do
_KINDS = ("connect", "link", "stream", "request", "local", "query")


def fold(guards: Sequence[Guard]) -> list[Layer]:
    """The same layers, outermost first, with each run of observers made one layer."""
    layers: list[Layer] = []
    run: list[Guard] = []
    for guard in guards:
        if isinstance(guard.layer, Observer):
            run.append(guard)
            continue
        if run:
            layers.append(Observers(run))
            run = []
        layers.append(guard)
    if run:
        layers.append(Observers(run))
    return layers


def only_observers(layers: Sequence[Layer]) -> Observers | None:
    """These layers as one that may be called by hand, where no coroutine is; None if one of them needs a coroutine."""
    if not layers:
        return Observers([])
    return layers[0] if len(layers) == 1 and isinstance(layers[0], Observers) else None


class Observers:
    """One layer of several guarded observers, outermost first. `run` has to run for those that are told late.

    when_idle: has a function called when the program has nothing else to do, or says that it can't.
    """

    def __init__(self, guards: Sequence[Guard]) -> None:
        self.when_idle: Callable[[Callable[[], None]], bool] | None = None
        self._guards = guards
        self._begins: defaultdict[str, tuple[tuple[Guard, Begin], ...]] = defaultdict(tuple)
        self._ends: defaultdict[str, tuple[tuple[Guard, End], ...]] = defaultdict(tuple)
        self._late: tuple[tuple[Guard, Observer], ...] = ()
        self._late_kinds: frozenset[str] = frozenset()
        self._over: list[Ended] = []  # not told yet
        self._most = MOST
        self._wake = trio.Event()
        self._enters: dict[str, tuple[tuple[Guard, Enter], ...]] = {}
        self.gather()

    def gather(self) -> None:
        """Look anew who is still on, by kind of visit: begins from outside in, ends from inside out."""
        on = [(guard, guard.layer) for guard in self._guards if not guard.is_off]
        observers = [(guard, one) for guard, one in on if isinstance(one, Observer)]
        inside = observers[::-1]
        for kind in _KINDS:
            self._begins[kind] = tuple((guard, one.begins[kind]) for guard, one in observers if kind in one.begins)
            self._ends[kind] = tuple((guard, one.ends[kind]) for guard, one in inside if kind in one.ends)
        kinds = {kind for _, one in observers for kind in one.enters}
        self._enters = {
            kind: tuple((guard, one.enters[kind]) for guard, one in observers if kind in one.enters) for kind in kinds
        }
        self._late = tuple((guard, one) for guard, one in inside if one.late)
        self._late_kinds = frozenset(kind for _, one in self._late for kind in one.late)

    def _switch_off(self, guard: Guard, exc: Exception) -> None:
        guard.switch_off(exc)
        self.gather()

    def __call__(self, handler: Handler) -> Handler:
        go_on = self.go_on(handler)

        async def observed(visit: Visit) -> None:
            self.begin(visit)
            if visit.kind in self._enters:
                await go_on(visit)
                return
            try:
                await handler(visit)
            except BaseException as raised:
                self.end(visit, raised)
                raise
            self.end(visit, None)

        return observed

    def go_on(self, handler: Handler) -> Handler:
        """The same for visits that `begin` has told of already."""

        async def observed(visit: Visit) -> None:
            leaves = self._enter(visit)
            try:
                await handler(visit)
            except BaseException as raised:
                self._leave(leaves)
                self.end(visit, raised)
                raise
            self._leave(leaves)
            self.end(visit, None)

        return observed

    def _enter(self, visit: Visit) -> list[tuple[Guard, Leave]]:
        leaves = []
        for guard, enter in self._enters.get(visit.kind, ()):
            try:
                leave = enter(visit)
            except Exception as exc:
                self._switch_off(guard, exc)
            else:
                if leave is not None:
                    leaves.append((guard, leave))
        return leaves

    def _leave(self, leaves: list[tuple[Guard, Leave]]) -> None:
        for guard, leave in reversed(leaves):
            try:
                leave()
            except Exception as exc:
                self._switch_off(guard, exc)

    def begin(self, visit: Visit) -> None:
        for guard, begin in self._begins[visit.kind]:
            try:
                begin(visit)
            except Exception as exc:
                self._switch_off(guard, exc)

    def end(self, visit: Visit, raised: BaseException | None) -> None:
        """Of a visit that has begun, once."""
        visit.ended = monotonic()
        kind = visit.kind
        for guard, end in self._ends[kind]:
            try:
                end(visit, raised)
            except Exception as exc:
                self._switch_off(guard, exc)
        if kind in self._late_kinds:
            over = self._over
            over.append((visit, raised))
            count = len(over)
            if count == 1:
                self._wake.set()
            elif count == SOME:
                waits = self.when_idle is not None and self.when_idle(self.settle)
                self._most = MOST_WAITING if waits else MOST
            elif count >= self._most:
                self.settle()

    def settle(self) -> None:
        """Tell now what is to be told late."""
        over, self._over = self._over, []
        if not over:
            return
        for guard, observer in self._late:
            try:
                observer.batch(over)
            except Exception as exc:
                self._switch_off(guard, exc)

    async def run(self) -> None:
        """Until cancelled: tell what has ended, PAUSE seconds after the first of it."""
        while True:
            await self._wake.wait()
            await trio.sleep(PAUSE)
            self._wake = trio.Event()
            self.settle()
