"""The health plug-in: does the run loop turn (/healthz), may it take traffic (/readyz), and everything on one page.

    /healthz  /health/live     200 while the run loop turns: what a supervisor restarts the process by
    /readyz   /health/ready    200 while all of the program's checks hold: what a balancer sends traffic by
    /health                    both
    /health/detailed           both, with version, uptime, runtime, statistics and what plug-ins have to say

Otherwise 503. All answer JSON: {"status": "ok" or "unavailable", "checks": {name: {"ok": bool, "reason": text}}}.
A loop that does not turn can't answer at all, so a probe's time-out says the same; the 503 tells of a loop that
answers, but seconds late. The layer is the handler itself: health watches no visit.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from observability.runtime import LagMeter
from tunnel.handler import Host, Layer, Observer, Page, PageAnswer, PageRequest

MAX_LAG = 5.0  # seconds: as long as a heartbeat; beyond it links begin to die
MAX_REASON = 200  # characters

Checks = dict[str, dict[str, Any]]


@asynccontextmanager
async def plugin(host: Host) -> AsyncIterator[Layer]:
    """Yields a layer that does nothing, and adds the pages."""
    health = Health(host)
    for path, page in health.pages().items():
        host.add_page(path, page)
    measuring = trio.CancelScope()

    async def measure() -> None:
        with measuring:
            await health.lag.run()

    host.nursery.start_soon(measure)
    try:
        yield Observer({}, {})  # visits are nothing to it
    finally:
        measuring.cancel()


@asynccontextmanager
async def supervise(host: Host) -> AsyncIterator[None]:
    """The same pages for a program of several workers; its checks are of them all."""
    async with plugin(host):
        yield


class Health:
    def __init__(self, host: Host) -> None:
        self.lag = LagMeter()
        self._host = host
        self._started = time.monotonic()

    def pages(self) -> dict[str, Page]:
        live, ready = _page(self.live), _page(self.ready, refresh=self._refresh)
        return {
            "/healthz": live,
            "/health/live": live,
            "/readyz": ready,
            "/health/ready": ready,
            "/health": _page(self.both, refresh=self._refresh),
            "/health/detailed": _page(self.both, self.more, refresh=self._refresh),
        }

    async def _refresh(self) -> None:
        if self._host.workers is not None:
            await self._host.workers.refresh()

    def live(self) -> Checks:
        lag = self.lag.newest()
        reason = f"the run loop turns, {lag:.3f} s late" if lag <= MAX_LAG else f"the run loop is {lag:.1f} s late"
        return {"run_loop": {"ok": lag <= MAX_LAG, "reason": reason}}

    def ready(self) -> Checks:
        """All of the host's checks. One that raises does not hold."""
        answers: Checks = {}
        for name, check in dict(self._host.checks).items():
            try:
                ok, reason = check()
                reason = str(reason)
            except Exception as exc:
                ok, reason = False, f"the check broke: {type(exc).__name__}: {exc}"
            answers[name] = {"ok": bool(ok), "reason": reason[:MAX_REASON]}
        return answers

    def both(self) -> Checks:
        return {**self.live(), **self.ready()}

    def more(self) -> dict[str, Any]:
        """The rest of /health/detailed. Sections that can't be had say why, and the page still answers."""
        tasks = trio.lowlevel.current_statistics()
        return {
            "role": self._host.role,
            "version": self._host.version,
            "uptime_seconds": round(time.monotonic() - self._started, 3),
            "runtime": {
                "tasks_living": tasks.tasks_living,
                "tasks_runnable": tasks.tasks_runnable,
                "run_loop_lag_seconds": self.lag.worst(),
            },
            "statistics": _try(self._host.statistics),
            "details": _try(self._host.details),
        }


def _try(section: Callable[[], Any]) -> Any:
    try:
        return section()
    except Exception as exc:
        return {"unavailable": f"{type(exc).__name__}: {exc}"[:MAX_REASON]}


def _page(
    checks: Callable[[], Checks],
    more: Callable[[], dict[str, Any]] | None = None,
    refresh: Callable[[], Awaitable[None]] | None = None,
) -> Page:
    async def page(request: PageRequest) -> PageAnswer:
        if refresh is not None:
            await refresh()
        answers = checks()
        ok = all(check["ok"] for check in answers.values())
        content = {"status": "ok" if ok else "unavailable", "checks": answers, **(more() if more else {})}
        body = msgspec.json.encode(content, enc_hook=str)  # infinity (no limit) becomes null
        return PageAnswer(200 if ok else 503, body + b"\n", "application/json", {"Cache-Control": "no-store"})

    return page
