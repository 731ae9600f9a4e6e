"""Plug-ins: found by name, started around the program, their layers guarded.

A plug-in is an async context manager that is given the program (`tunnel.handler.Host`) and yields a layer. Its name is
an entry point of the group `tunnel.layers`, or `module:attribute`. The order of layers is the order of the setting
`layers`, outermost first; the default (tunnel/config) is tracing, metrics, logs, health: tracing first, so that the
others see the trace id, and logs inside metrics, because nothing after it needs to know that a line was written.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import trio

from tunnel import __version__
from tunnel.errors import OUTCOMES, REFUSALS, ConfigError
from tunnel.handler import (
    AgentReport,
    AgentStatistics,
    Check,
    CoreStatistics,
    Guard,
    Layer,
    Page,
    PlugIn,
    Workers,
)
from tunnel.log import get_logger
from tunnel.observers import Observers, fold

GROUP = "tunnel.layers"

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
        self._nursery: trio.Nursery | None = None
        self._observers: list[Observers] = []

    @property
    def nursery(self) -> trio.Nursery:
        assert self._nursery is not None, "the program has not started"
        return self._nursery

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
        return {name: details() for name, details in self._details.items()}

    @asynccontextmanager
    async def plugged_in(self, names: Sequence[str], nursery: trio.Nursery) -> AsyncIterator[list[Layer]]:
        """Start the plug-ins and give their guarded layers, outermost first. Raises ConfigError on an unknown name."""
        self._nursery = nursery
        plugins = [(name, find(name)) for name in names]
        guards: list[Guard] = []
        async with AsyncExitStack() as stack:
            for name, plugin in plugins:
                try:
                    layer = await stack.enter_async_context(plugin(self))
                except ConfigError:
                    raise
                except ValueError as exc:  # a plug-in's word for a setting that it can't use
                    raise ConfigError(f"{name}: {exc}") from exc
                except Exception as exc:
                    log.error("plug-in could not start", plugin=name, error=f"{type(exc).__name__}: {exc}")
                else:
                    guards.append(Guard(name, layer, len(guards), log.stdlib))
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
        self._nursery = nursery
        async with AsyncExitStack() as stack:
            for name in names:
                plugin = find(name)
                supervise = getattr(sys.modules.get(getattr(plugin, "__module__", "")), "supervise", None)
                if supervise is None:
                    continue
                try:
                    await stack.enter_async_context(supervise(self))
                except ConfigError:
                    raise
                except Exception as exc:
                    log.error("plug-in could not start", plugin=name, error=f"{type(exc).__name__}: {exc}")
            yield


async def _run_within(scope: trio.CancelScope, task: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await task()


def find(name: str) -> PlugIn:
    """The plug-in of this name. Raises ConfigError."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return cast(PlugIn, getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError) as exc:
            raise ConfigError(f"layers: can't load {name!r} ({exc})") from exc
    found = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none; install the package with pip first"
        raise ConfigError(f"layers: there is no plug-in {name!r}; known: {known}")
    try:
        return cast(PlugIn, found[name].load())
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"layers: can't load {name!r} ({exc})") from exc
