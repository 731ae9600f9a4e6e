"""Handlers, and the layers around them: what a layer is, one that only looks, and the guard that makes it harmless."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import trio

from tunnel.handler.visits import Visit, monotonic

Handler = Callable[[Any], Awaitable[None]]
Layer = Callable[[Handler], Handler]


def wrap(handler: Handler, layers: Sequence[Layer]) -> Handler:
    """Put layers around a handler: the first is outermost. `wrap(handler, [])` is the handler itself."""
    for layer in reversed(layers):
        handler = layer(handler)
    return handler


Begin = Callable[[Any], None]
End = Callable[[Any, BaseException | None], None]
Ended = tuple[Any, BaseException | None]  #: a visit, and what its handler raised


Leave = Callable[[], None]
Enter = Callable[[Any], Leave | None]


class Observer:
    """A layer that only looks.

    `begins` and `ends` hold, by kind of visit, what is called before the handler, and what is called after it with the
    exception that it raised, or None. Neither waits. `late` is called as `ends` is, but some milliseconds later and for
    many visits in a row, in the order in which they ended; `visit.ended` says when that was. What only counts or
    writes belongs there: it runs in one go on a warm processor, and visitors don't wait for it. Where `batch` is given
    it is called instead, with all visits in a row: those of the kinds in `late`, and others, which it is to skip.
    `enters` hold what belongs to the handler's task (a context variable): called in it right before the handler, and
    what that returns right after. A visit that is handled without a task is not entered.

    It is a layer like any other, but a program runs neighbouring observers in one coroutine and gathers what is for
    `late` (tunnel/observers.py). By itself it calls `late` at once.
    """

    def __init__(
        self,
        begins: Mapping[str, Begin],
        ends: Mapping[str, End],
        late: Mapping[str, End] | None = None,
        batch: Callable[[Sequence[Ended]], None] | None = None,
        enters: Mapping[str, Enter] | None = None,
    ) -> None:
        self.begins = begins
        self.ends = ends
        self.enters = enters or {}
        self.late = late or {}
        self.batch = batch or self._one_by_one

    def _one_by_one(self, visits: Sequence[Ended]) -> None:
        late = self.late
        for visit, raised in visits:
            if end := late.get(visit.kind):
                end(visit, raised)

    def __call__(self, handler: Handler) -> Handler:
        async def observed(visit: Visit) -> None:
            kind = visit.kind
            if begin := self.begins.get(kind):
                begin(visit)
            raised: BaseException | None = None
            enter = self.enters.get(kind)
            leave = enter(visit) if enter is not None else None
            try:
                await handler(visit)
            except BaseException as exc:
                raised = exc
                raise
            finally:
                if leave is not None:
                    leave()
                visit.ended = monotonic()
                if end := self.ends.get(kind):
                    end(visit, raised)
                if kind in self.late:
                    self.batch(((visit, raised),))

        return observed


class Guard:
    """Makes a layer harmless: what it raises is reported once, then the layer is out of the way for good.

    The guard knows per visit whether the inner handler has run (`visit.reached`) and what it raised itself
    (`visit.raised`), so it never runs it twice, never swallows its exceptions, and lets `Cancelled` pass.
    `depth` is the layer's place counted from outside, starting at 0.
    """

    def __init__(self, name: str, layer: Layer, depth: int, log: logging.Logger) -> None:
        self.name = name
        self.is_off = False
        self.layer = layer
        self._depth = depth
        self._log = log

    def __call__(self, handler: Handler) -> Handler:
        depth = self._depth

        async def inner(visit: Visit) -> None:
            if visit.reached > depth:
                raise RuntimeError(f"layer {self.name} ran the handler twice")
            visit.reached = depth + 1
            try:
                await handler(visit)
            except BaseException as exc:
                visit.raised = exc
                raise

        try:
            layered = self.layer(inner)
        except Exception as exc:
            self.switch_off(exc)
            return handler
        if layered is inner:
            return handler  # it has no interest in visits: nothing is paid

        async def guarded(visit: Visit) -> None:
            if self.is_off:
                await handler(visit)
                return
            try:
                await layered(visit)
            except BaseException as exc:
                if exc is visit.raised or not isinstance(exc, Exception):
                    raise
                self.switch_off(exc)
            else:
                if visit.reached > depth and visit.raised is None:
                    return
                self.switch_off(RuntimeError("it swallowed the handler's call or its exception"))
            if visit.reached <= depth:
                await handler(visit)
            elif isinstance(visit.raised, trio.Cancelled):
                # Raised anew if it is from outside; the layer's own must not get out of its scope.
                await trio.lowlevel.checkpoint_if_cancelled()
                raise RuntimeError(f"layer {self.name} cancelled the handler")
            elif visit.raised is not None:
                raise visit.raised

        return guarded

    def switch_off(self, exc: BaseException) -> None:
        """The layer raised this: report it, once, and pass the layer by from now on."""
        if not self.is_off:
            self.is_off = True
            self._log.error(
                "layer switched off",
                extra={"fields": {"layer": self.name, "error": f"{type(exc).__name__}: {exc}"}},
            )
