"""The metrics plug-in: counts visits, serves /metrics, and on the core /metrics/agents.

Two halves share this frame: core_metrics (tunnel_*) and agent_metrics (agent_*). What both have in common, the
process and its run loop, is in runtime; what agents say over their links in reports.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from prometheus_client import CollectorRegistry

from observability.agent_metrics import AgentMetrics
from observability.core_metrics import CoreMetrics
from observability.exposition import page
from observability.reports import AgentBook, make_report
from observability.runtime import LagMeter, PauseMeter, RuntimeMetrics
from tunnel.handler import Host, Layer


@asynccontextmanager
async def plugin(host: Host) -> AsyncIterator[Layer]:
    """Yields the counting layer. Configuration: section "metrics", `go_names`."""
    lag, pauses = LagMeter(), PauseMeter()
    registry = CollectorRegistry(auto_describe=False)
    if host.role == "core":
        book = AgentBook(host)
        core = CoreMetrics(host, book.link_began, book.link_ended)
        registry.register(core)
        host.add_page("/metrics/agents", book.page)
        layer = core.layer
    else:
        agent = AgentMetrics(host)
        registry.register(agent)
        host.set_report(lambda: make_report(agent.collect()))
        layer = agent.layer
    registry.register(RuntimeMetrics(lag, pauses, bool(host.options.get("metrics", {}).get("go_names"))))
    host.add_page("/metrics", page(registry))
    measuring = trio.CancelScope()

    async def measure() -> None:
        with measuring:
            await lag.run()

    host.nursery.start_soon(measure)
    pauses.install()
    try:
        yield layer
    finally:
        pauses.remove()
        measuring.cancel()
