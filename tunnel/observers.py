"""Observers side by side, in one coroutine.

Metrics, tracing and logs only look at a visit before and after its handler. As three guarded layers they are nine
coroutines a visit, each resumed whenever the visit goes on; here they are one, with the same promises: the order of the
layers, and an observer that raises is reported once, switched off, and hurts neither the handler nor the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunnel.handler import Begin, End, Guard, Handler, Layer, Observer, Visit

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


class Observers:
    """One layer of several guarded observers, outermost first."""

    def __init__(self, guards: Sequence[Guard]) -> None:
        self._guards = guards
        self._begins: dict[str, tuple[tuple[Guard, Begin], ...]] = {}
        self._ends: dict[str, tuple[tuple[Guard, End], ...]] = {}
        self._gather()

    def _gather(self) -> None:
        """Who is still on, by kind of visit: begins from outside in, ends from inside out."""
        on = [(guard, guard.layer) for guard in self._guards if not guard.is_off]
        for kind in _KINDS:
            observers = [(guard, one) for guard, one in on if isinstance(one, Observer)]
            self._begins[kind] = tuple((guard, one.begins[kind]) for guard, one in observers if kind in one.begins)
            self._ends[kind] = tuple((guard, one.ends[kind]) for guard, one in reversed(observers) if kind in one.ends)

    def _switch_off(self, guard: Guard, exc: Exception) -> None:
        guard.switch_off(exc)
        self._gather()

    def __call__(self, handler: Handler) -> Handler:
        begins, ends = self._begins, self._ends

        async def observed(visit: Visit) -> None:
            kind = visit.kind
            for guard, begin in begins.get(kind, ()):
                try:
                    begin(visit)
                except Exception as exc:
                    self._switch_off(guard, exc)
            try:
                await handler(visit)
            except BaseException as raised:
                for guard, end in ends.get(kind, ()):
                    try:
                        end(visit, raised)
                    except Exception as exc:
                        self._switch_off(guard, exc)
                raise
            for guard, end in ends.get(kind, ()):
                try:
                    end(visit, None)
                except Exception as exc:
                    self._switch_off(guard, exc)

        return observed
