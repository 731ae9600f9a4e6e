"""A host for plug-ins that is nothing but data: tests set what a program would count, and read what was added."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import trio

from tunnel.errors import OUTCOMES, REFUSALS
from tunnel.handler import (
    AgentReport,
    AgentStatistics,
    Check,
    CoreStatistics,
    LinkStatistics,
    Page,
    PageAnswer,
    PageRequest,
    QuotaStatistics,
    Workers,
)


class FakeHost:
    """Implements `tunnel.handler.Host`. Everything is a plain attribute that a test may set or read."""

    def __init__(
        self,
        role: str = "core",
        options: dict[str, dict[str, Any]] | None = None,
        nursery: trio.Nursery | None = None,
    ) -> None:
        self.role = role
        self.version = "1.2.3"
        self.options = options or {}
        self.outcomes = tuple(OUTCOMES)
        self.refusals = REFUSALS
        self.checks: dict[str, Check] = {}
        self.pages: dict[str, Page] = {}
        self.round_trips: list[float] = []
        self.agent_reports: list[AgentReport] = []
        self.report: Callable[[], bytes] | None = None
        self.sections: dict[str, Callable[[], dict[str, Any]]] = {}
        self.core = CoreStatistics(1000, 0, 0, [], [], {"connection": 0, "bandwidth": 0, "requests": 0})
        self.agent = AgentStatistics("agent-1", True, 0, 0, 0, 0, 0, 0, 0, 0)
        self.offers: dict[str, Callable[[], bytes]] = {}
        self.workers: Workers | None = None
        self._nursery = nursery

    @property
    def nursery(self) -> trio.Nursery:
        if self._nursery is None:
            raise RuntimeError("this test gave the host no nursery")
        return self._nursery

    def statistics(self) -> CoreStatistics | AgentStatistics:
        return self.core if self.role == "core" else self.agent

    def settle(self) -> None:
        pass  # tests call layers one by one, and these tell at once

    def take_round_trips(self) -> list[float]:
        taken, self.round_trips = self.round_trips, []
        return taken

    def reports(self) -> list[AgentReport]:
        return self.agent_reports

    def set_report(self, make: Callable[[], bytes]) -> None:
        self.report = make

    def add_page(self, path: str, page: Page) -> None:
        self.pages[path] = page

    def offer(self, name: str, make: Callable[[], bytes]) -> None:
        self.offers[name] = make

    def set_details(self, name: str, details: Callable[[], dict[str, Any]]) -> None:
        self.sections[name] = details

    def details(self) -> dict[str, dict[str, Any]]:
        return {name: section() for name, section in self.sections.items()}

    # For tests ---------------------------------------------------------------------------------------------------

    async def get(self, path: str, accept: str = "") -> PageAnswer:
        """Ask one of the pages that plug-ins added."""
        return await self.pages[path](PageRequest(path, "", {"accept": accept} if accept else {}))

    def add_link(
        self, connection_id: str, account_id: str = "acme", agent_id: str = "agent-1", state: str = "connected"
    ) -> LinkStatistics:
        link = LinkStatistics(connection_id, agent_id, account_id, state, 0, 0, 0, 0, 0, 0.001, 0.0)
        self.core.links.append(link)
        return link

    def add_quota(self, account_id: str, type: str, usage: float, limit: float = math.inf) -> None:
        self.core.quotas.append(QuotaStatistics(account_id, type, usage, limit))
