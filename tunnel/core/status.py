"""The JSON status: which agents are there, what they serve, how their links are."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from tunnel import __version__
from tunnel.handler import Page, PageAnswer, PageRequest

if TYPE_CHECKING:
    from tunnel.core.server import Core


def status_page(core: Core) -> Page:
    """The page for `/` and `/status` on the dashboard address."""
    started = monotonic()

    async def page(_: PageRequest) -> PageAnswer:
        statistics = core.statistics()
        probes = core.details().get("tunnels", {})
        status = {
            "version": __version__,
            "uptime_seconds": round(monotonic() - started, 1),
            "checks": core.readiness(),
            "connections": {"active": len(statistics.links), "limit": statistics.connections_limit},
            "links": statistics.links,
            "tunnels": [
                {
                    "name": tunnel.name,
                    "protocol": tunnel.protocol,
                    "url": tunnel.url,
                    "account_id": tunnel.account_id,
                    "connections": [agent.visit.connection_id for agent in tunnel.links],
                    "probes": probes.get(tunnel.name, {}),
                }
                for tunnel in core.registry.tunnels.values()
            ],
        }
        return PageAnswer(200, msgspec.json.encode(status) + b"\n", "application/json")

    return page
