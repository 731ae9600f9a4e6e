"""The metrics plug-in: counts visits, serves /metrics, and on the core /metrics/agents.

Two halves share this frame: core_metrics (tunnel_*) and agent_metrics (agent_*). What both have in common, the
process and its run loop, is in runtime; what agents say over their links in reports. Of a program with several workers
each counts its own, and `supervise` makes one page of it (merging).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec
import trio
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from observability import agent_metrics, core_metrics
from observability.agent_metrics import AgentMetrics
from observability.core_metrics import CoreMetrics
from observability.exposition import answer, page
from observability.merging import LOOK_SECONDS, Merger, encode
from observability.reports import AgentBook, make_report, united
from observability.runtime import LagMeter, PauseMeter, RuntimeMetrics
from tunnel.handler import AgentReport, AgentStatistics, CoreStatistics, Host, Layer, PageAnswer, PageRequest


@asynccontextmanager
async def plugin(host: Host) -> AsyncIterator[Layer]:
    """Yields the counting layer. Configuration: section "metrics", `go_names`."""
    registry = CollectorRegistry(auto_describe=False)
    if host.role == "core":
        book = AgentBook(host)
        core = CoreMetrics(host, book.link_began, book.link_ended)
        registry.register(core)
        host.add_page("/metrics/agents", book.page)
        host.offer("reports", lambda: msgspec.msgpack.encode(host.reports()))
        layer = core.layer
    else:
        agent = AgentMetrics(host)
        registry.register(agent)
        host.set_report(lambda: make_report(agent.collect()))
        layer = agent.layer
    async with _runtime(host) as runtime:
        registry.register(runtime)
        host.add_page("/metrics", page(registry))
        host.offer("metrics", lambda: encode(registry.collect()))
        yield layer


@asynccontextmanager
async def _runtime(host: Host) -> AsyncIterator[RuntimeMetrics]:
    lag, pauses = LagMeter(), PauseMeter()
    measuring = trio.CancelScope()

    async def measure() -> None:
        with measuring:
            await lag.run()

    host.nursery.start_soon(measure)
    pauses.install()
    try:
        yield RuntimeMetrics(lag, pauses, bool(host.options.get("metrics", {}).get("go_names")))
    finally:
        pauses.remove()
        measuring.cancel()


@asynccontextmanager
async def supervise(host: Host) -> AsyncIterator[None]:
    """The same pages for a program of several workers, made of what these say."""
    async with _runtime(host) as runtime:
        whole = _Whole(host, runtime)
        looking = trio.CancelScope()

        async def look() -> None:
            with looking:
                while True:
                    await trio.sleep(LOOK_SECONDS)
                    await whole.look()

        host.nursery.start_soon(look)
        host.add_page("/metrics", whole.page)
        if host.role == "core":
            host.add_page("/metrics/agents", whole.agents_page)
        else:
            host.set_report(lambda: make_report(whole.families()))
        try:
            yield
        finally:
            looking.cancel()


class _Whole:
    """All workers as one, as of the last look."""

    def __init__(self, host: Host, runtime: RuntimeMetrics) -> None:
        assert host.workers is not None
        self._host = host
        self._workers = host.workers
        self._runtime = runtime
        self._merger = Merger()
        self._reports: list[AgentReport] = []
        self._book = AgentBook(host, reports=lambda: self._reports)

    async def look(self) -> None:
        self._merger.take(await self._workers.ask("metrics"), self._workers.keys)

    def families(self) -> Iterator[Metric]:
        own = list(self._own())
        return self._merger.families(own, frozenset(metric.name for metric in own if metric.name in _WHOLE))

    def _own(self) -> Iterator[Metric]:
        """What only the supervisor knows, and its own process."""
        workers, dropped = self._workers, self._host.details().get("logs", {}).get("dropped", 0)
        if self._host.role == "core":
            prefix, extra = "tunnel", core_metrics.WORKER_FAMILIES
            statistics = self._host.statistics()
            assert isinstance(statistics, CoreStatistics)
            yield from core_metrics.connections(statistics)
            yield from core_metrics.quotas(statistics)
            yield core_metrics.FAMILIES["tunnel_logs_dropped_total"].metric(((), dropped))
        else:
            prefix, extra = "agent", agent_metrics.WORKER_FAMILIES
            agent = self._host.statistics()
            assert isinstance(agent, AgentStatistics)
            yield agent_metrics.connection(agent)
            yield agent_metrics.FAMILIES["agent_logs_dropped_total"].metric(((), dropped))
        yield extra[f"{prefix}_workers"].metric(((), workers.count))
        yield extra[f"{prefix}_workers_active"].metric(((), len(workers.keys)))
        yield extra[f"{prefix}_worker_restarts_total"].metric(((), workers.restarts))
        yield from self._runtime.collect()

    async def page(self, request: PageRequest) -> PageAnswer:
        await self.look()
        return await answer(list(self.families()), request)

    async def agents_page(self, request: PageRequest) -> PageAnswer:
        said = [one.data for one in await self._workers.ask("reports") if not one.is_last]
        self._reports = united(msgspec.msgpack.decode(data, type=list[AgentReport]) for data in said)
        return await self._book.page(request)


#: families that the supervisor makes of the whole, so that an agent with several links counts once, and one without a
#: worker is one without a link
_WHOLE = frozenset(
    {"tunnel_connections_active", "tunnel_connections_by_account", "tunnel_quota_usage", "tunnel_quota_limit",
     "agent_connection_active"}
)  # fmt: skip
