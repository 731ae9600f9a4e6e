"""Plug-ins: found by name, started around the program, their layers guarded.

A plug-in is an async context manager that is given the program (`tunnel.handler.Host`) and yields a layer. Its name is
an entry point of the group `tunnel.layers`, or `module:attribute`. The order of layers is the order of the setting
`layers`, outermost first; the default (tunnel/config) is tracing, metrics, logs, health: tracing first, so that the
others see the trace id, and logs inside metrics, because nothing after it needs to know that a line was written.

A plug-in that breaks costs what it does itself and no more, wherever it breaks: as a layer, in a task, in a function
that it has left here, or while it ends. Each of these is reported once.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, TypeVar, cast

import msgspec
import trio

from tunnel import __version__
from tunnel.errors import OUTCOMES, REFUSALS, ConfigError
from tunnel.handler import (
    AgentReport,
    AgentStatistics,
    Check,
    CoreStatistics,
    Guard,
    Host,
    Layer,
    Observer,
    Page,
    PlugIn,
    Workers,
)
from tunnel.log import get_logger
from tunnel.observers import Observers, fold

GROUP = "tunnel.layers"

T = TypeVar("T")

log = get_logger("tunnel.plugins")


class Program:
    """What both programs offer their plug-ins: the `tunnel.handler.Host`."""

    def __init__(
        self,
        role: str,
        options: dict[str, dict[str, Any]],
        statistics: Callable[[], CoreStatistics | AgentStatistics],
        take_round_trips: Callable[[], list[float]],
        reports: Callable[[], list[AgentReport]] = list,
    ) -> None:
        self.role = role
        self.version = __version__
        self.options = options
        self.outcomes = tuple(OUTCOMES)
        self.refusals = REFUSALS
        self.checks: dict[str, Check] = {}
        self.pages: dict[str, Page] = {}
        self.offers: dict[str, Callable[[], bytes]] = {}
        self.workers: Workers | None = None  # of a supervisor
        self.make_report: Callable[[], bytes] | None = None
        self._statistics = statistics
        self._take_round_trips = take_round_trips
        self._reports = reports
        self._details: dict[str, Callable[[], dict[str, Any]]] = {}
        self.with_workers: Callable[[dict[str, Any]], dict[str, Any]] = lambda own: own  # of a supervisor: and theirs
        self._observers: list[Observers] = []
        self._broken: set[str] = set()  # checks that have been reported

    def statistics(self) -> CoreStatistics | AgentStatistics:
        return self._statistics()

    def settle(self) -> None:
        for observers in self._observers:
            observers.settle()

    def take_round_trips(self) -> list[float]:
        return self._take_round_trips()

    def reports(self) -> list[AgentReport]:
        return self._reports()

    def set_report(self, make: Callable[[], bytes]) -> None:
        self.make_report = make

    def add_page(self, path: str, page: Page) -> None:
        self.pages[path] = page

    def offer(self, name: str, make: Callable[[], bytes]) -> None:
        self.offers[name] = make

    def set_details(self, name: str, details: Callable[[], dict[str, Any]]) -> None:
        self._details[name] = details

    def details(self) -> dict[str, dict[str, Any]]:
        return self.with_workers({name: details() for name, details in self._details.items()})

    def readiness(self) -> dict[str, dict[str, Any]]:
        """What the checks say, by name. One that raises does not hold."""
        return {name: self._ask(name, check) for name, check in self.checks.items()}

    def _ask(self, name: str, check: Check) -> dict[str, Any]:
        try:
            ok, reason = check()
        except Exception as exc:
            if name not in self._broken:
                self._broken.add(name)
                log.error("a check broke", check=name, error=_text(exc))
            return {"ok": False, "reason": f"the check broke: {_text(exc)}"}
        return {"ok": bool(ok), "reason": str(reason)}

    @asynccontextmanager
    async def plugged_in(self, names: Sequence[str], nursery: trio.Nursery) -> AsyncIterator[list[Layer]]:
        """Start the plug-ins and give their guarded layers, outermost first. Raises ConfigError on an unknown name."""
        plugins = [(name, find(name)) for name in names]
        guards: list[Guard] = []
        async with AsyncExitStack() as stack:
            for name, plugin in plugins:
                seat = _Seat(self, Guard(name, _NOTHING, len(guards), log.stdlib), nursery)
                try:
                    seat.guard.layer = await _enter(stack, name, plugin, seat)
                except ConfigError:
                    raise
                except ValueError as exc:  # a plug-in's word for a setting that it can't use
                    raise ConfigError(f"{name}: {exc}") from exc
                except Exception as exc:
                    log.error("plug-in could not start", plugin=name, error=_text(exc))
                else:
                    guards.append(seat.guard)
            layers = fold(guards)
            self._observers = [layer for layer in layers if isinstance(layer, Observers)]
            telling = [trio.CancelScope() for _ in self._observers]
            for scope, observers in zip(telling, self._observers, strict=True):
                nursery.start_soon(_run_within, scope, observers.run)
            try:
                yield layers
            finally:
                for scope in telling:
                    scope.cancel()
                self.settle()

    @asynccontextmanager
    async def supervised(self, names: Sequence[str], nursery: trio.Nursery) -> AsyncIterator[None]:
        """Start what the plug-ins have for a supervisor: the function `supervise` beside a plug-in, if there is one.

        It is an async context manager that is given this program, whose `workers` answer for their plug-ins. Raises
        ConfigError as `plugged_in` does.
        """
        async with AsyncExitStack() as stack:
            for name in names:
                plugin = find(name)
                supervise = getattr(sys.modules.get(getattr(plugin, "__module__", "")), "supervise", None)
                if supervise is None:
                    continue
                try:
                    await _enter(stack, name, supervise, _Seat(self, Guard(name, _NOTHING, 0, log.stdlib), nursery))
                except ConfigError:
                    raise
                except Exception as exc:
                    log.error("plug-in could not start", plugin=name, error=_text(exc))
            yield

    def switch_off(self, guard: Guard, exc: Exception) -> None:
        guard.switch_off(exc)
        for observers in self._observers:
            observers.gather()


_NOTHING = Observer({}, {})  #: the layer of a plug-in that has none yet


class _Seat:
    """What one plug-in is given: the program, but what it starts or leaves here can't hurt that."""

    def __init__(self, program: Program, guard: Guard, nursery: trio.Nursery) -> None:
        self.guard = guard
        self.nursery = _Tasks(nursery, lambda exc: program.switch_off(guard, exc))
        self._program = program

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def set_details(self, name: str, details: Callable[[], dict[str, Any]]) -> None:
        """What JSON does not know is shown as text: a worker's go through a channel."""

        def plain() -> dict[str, Any]:
            return msgspec.json.decode(msgspec.json.encode(details(), enc_hook=str), type=dict[str, Any])

        self._program.set_details(
            name, self._caught(f"details of {name}", plain, lambda exc: {"unavailable": _text(exc)})
        )

    def set_report(self, make: Callable[[], bytes]) -> None:
        self._program.set_report(self._caught("report", make, lambda exc: b""))

    def _caught(self, what: str, function: Callable[[], T], instead: Callable[[Exception], T]) -> Callable[[], T]:
        is_reported = False

        def caught() -> T:
            nonlocal is_reported
            try:
                return function()
            except Exception as exc:
                if not is_reported:
                    log.error("plug-in's function broke", plugin=self.guard.name, function=what, error=_text(exc))
                is_reported = True
                return instead(exc)

        return caught


class _Tasks:
    """A nursery whose tasks end with what they raise. on_failure hears of it."""

    def __init__(self, nursery: trio.Nursery, on_failure: Callable[[Exception], None]) -> None:
        self._nursery = nursery
        self._on_failure = on_failure

    def start_soon(self, async_fn: Callable[..., Awaitable[Any]], /, *args: Any, name: object = None) -> None:
        self._nursery.start_soon(self._guarded, async_fn, args, name=name or async_fn)

    async def start(self, async_fn: Callable[..., Awaitable[Any]], /, *args: Any, name: object = None) -> Any:
        """What it raises before it has started is the caller's."""

        async def guarded(*, task_status: trio.TaskStatus[Any]) -> None:
            started = _Started(task_status)
            try:
                await async_fn(*args, task_status=started)
            except Exception as exc:
                if not started.is_over:
                    raise
                self._on_failure(exc)

        return await self._nursery.start(guarded, name=name or async_fn)

    async def _guarded(self, async_fn: Callable[..., Awaitable[Any]], args: Sequence[Any]) -> None:
        try:
            await async_fn(*args)
        except BaseException as exc:
            own, others = _parts(exc)
            if own is not None:
                self._on_failure(own)
            if others is not None:
                raise others from None


class _Started:
    def __init__(self, status: trio.TaskStatus[Any]) -> None:
        self.is_over = False
        self._status = status

    def started(self, value: Any = None) -> None:
        self._status.started(value)
        self.is_over = True


async def _enter(
    stack: AsyncExitStack, name: str, plugin: Callable[[Host], AbstractAsyncContextManager[T]], seat: _Seat
) -> T:
    """Begin a plug-in. Its end neither fails nor takes away what the program raises."""
    manager = plugin(cast(Host, seat))
    entered = await manager.__aenter__()

    async def leave(
        kind: type[BaseException] | None, raised: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            await manager.__aexit__(kind, raised, traceback)
        except BaseException as exc:
            own, others = _parts(exc)
            if own is not None and own is not raised:
                log.error("plug-in broke while it ended", plugin=name, error=_text(own))
            if others is not None and raised is None:
                raise others from None
        return False

    stack.push_async_exit(leave)
    return entered


def _parts(exc: BaseException) -> tuple[Exception | None, BaseException | None]:
    """What a plug-in did wrong, and what is not its doing: a cancellation may come in a group with that."""
    if isinstance(exc, Exception):
        return exc, None
    return exc.split(Exception) if isinstance(exc, BaseExceptionGroup) else (None, exc)


def _text(exc: BaseException) -> str:
    return " ".join(f"{type(exc).__name__}: {exc}".split())


async def _run_within(scope: trio.CancelScope, task: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await task()


def find(name: str) -> PlugIn:
    """The plug-in of this name. Raises ConfigError."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return cast(PlugIn, getattr(importlib.import_module(module), attribute))
        except Exception as exc:
            raise _unusable(name, exc) from exc
    found = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none; install the package with pip first"
        raise ConfigError(f"layers: there is no plug-in {name!r}; known: {known}")
    try:
        return cast(PlugIn, found[name].load())
    except Exception as exc:
        raise _unusable(name, exc) from exc


def _unusable(name: str, exc: Exception) -> ConfigError:
    """Whatever its module does when it is imported."""
    reason = str(exc) if isinstance(exc, (ImportError, AttributeError)) else _text(exc)
    return ConfigError(f"layers: can't load {name!r} ({reason})")
