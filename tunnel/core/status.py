"""The JSON status: which agents are there, what they serve, how their links are."""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from tunnel import __version__
from tunnel.handler import CoreStatistics, Page, PageAnswer, PageRequest

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


def said_by(core: Core) -> Said:
    details = core.details()
    probes = details.get("tunnels", {})
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


def status_page(core: Source, more: dict[str, Any] | None = None) -> Page:
    """The page for `/` and `/status` on the dashboard address. more: further keys."""
    started = monotonic()

    async def page(_: PageRequest) -> PageAnswer:
        said = await core.say()
        statistics = said.statistics
        active = len({(link.account_id, link.instance or link.connection_id) for link in statistics.links})
        status = {
            "version": __version__,
            "uptime_seconds": round(monotonic() - started, 1),
            "checks": said.checks,
            "connections": {"active": active, "limit": statistics.connections_limit},
            "links": statistics.links,
            "tunnels": said.tunnels,
            **(more or {}),
        }
        return PageAnswer(200, msgspec.json.encode(status) + b"\n", "application/json")

    return page
