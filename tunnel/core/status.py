"""The status: which agents are there, what they serve, how their links are, and why requests failed. As JSON here, for
browsers as a page (tunnel/core/statushtml.py)."""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from tunnel import __version__
from tunnel.core.recent import FailedRequest, Recent
from tunnel.core.statushtml import POLICY, render
from tunnel.handler import CoreStatistics, LinkStatistics, Page, PageAnswer, PageRequest
from tunnel.http.answers import HTML, preferred

if TYPE_CHECKING:
    from tunnel.core.server import Core


class TunnelStatus(msgspec.Struct):
    """A tunnel as the status shows it. connections: its links; probes: by link."""

    name: str
    protocol: str
    url: str
    account_id: str
    connections: list[str]
    probes: dict[str, Any]


class Said(msgspec.Struct):
    """What a core has to say of itself: to the status page, or as a worker to its supervisor."""

    statistics: CoreStatistics
    checks: dict[str, dict[str, Any]]
    tunnels: list[TunnelStatus]
    details: dict[str, Any]
    recent: Recent


def said_by(core: Core, worker: int = 0) -> Said:
    details = core.details()
    probes = details.get("tunnels", {})
    recent = core.recent()
    for failure in recent.failures:
        failure.worker = worker
    return Said(
        core.statistics(),
        core.readiness(),
        [
            TunnelStatus(
                tunnel.name,
                tunnel.protocol,
                tunnel.url,
                tunnel.account_id,
                [agent.visit.connection_id for agent in tunnel.links],
                probes.get(tunnel.name, {}),
            )
            for tunnel in core.registry.tunnels.values()
        ],
        details,
        recent,
    )


def united(tunnels: Iterable[TunnelStatus]) -> list[TunnelStatus]:
    """One row for each tunnel, of rows of several workers."""
    rows: dict[tuple[str, str, str], TunnelStatus] = {}
    for one in tunnels:
        row = rows.setdefault(
            (one.name, one.protocol, one.account_id),
            TunnelStatus(one.name, one.protocol, one.url, one.account_id, [], {}),
        )
        row.url = one.url or row.url
        row.connections += one.connections
        row.probes.update(one.probes)
    return list(rows.values())


class Source(Protocol):
    async def say(self) -> Said: ...


class Status(msgspec.Struct):
    """What the page is about, and the JSON has: its keys are an interface. checks: of readiness.

    requests: how many there were, how many of them failed, and how many had which outcome. failures: oldest first.
    """

    version: str
    uptime_seconds: float
    checks: dict[str, dict[str, Any]]
    connections: dict[str, float]
    links: list[LinkStatistics]
    tunnels: list[TunnelStatus]
    requests: dict[str, Any]
    limit_refusals: dict[str, int]
    failures: list[FailedRequest]


def status_page(core: Source) -> Page:
    """The page for `/` and `/status` on the dashboard address: HTML for browsers, JSON for all else."""
    started = monotonic()

    async def page(request: PageRequest) -> PageAnswer:
        said = await core.say()
        statistics, recent = said.statistics, said.recent
        active = len({(link.account_id, link.instance or link.connection_id) for link in statistics.links})
        outcomes = {name: count for name, count in recent.outcomes.items() if count}
        status = Status(
            __version__,
            round(monotonic() - started, 1),
            said.checks,
            {"active": active, "limit": statistics.connections_limit},
            statistics.links,
            said.tunnels,
            {"total": sum(outcomes.values()), "failed": recent.failed, "outcomes": outcomes},
            {name: count for name, count in statistics.limit_refusals.items() if count},
            recent.failures,
        )
        headers = {"Cache-Control": "no-store", "Vary": "Accept"}
        if preferred(request.headers.get("accept", "").encode("latin-1", "replace")) == HTML:
            headers["Content-Security-Policy"] = POLICY
            return PageAnswer(200, render(status).encode("utf-8", "replace"), "text/html; charset=utf-8", headers)
        return PageAnswer(200, msgspec.json.encode(status) + b"\n", "application/json", headers)

    return page
