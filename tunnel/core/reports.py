"""What agents report of themselves over their links: the newest of each, for a day after they were last seen."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from tunnel.handler import AgentReport

KEPT = 24 * 3600.0  #: seconds that an agent stays listed after its last link
MAX_AGENTS = 10_000
MAX_PER_ACCOUNT = 1_000


class Reports:
    """Reports by account and agent."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._reports: dict[tuple[str, str], AgentReport] = {}
        self._links: dict[tuple[str, str], set[str]] = {}

    def begin(self, account_id: str, agent_id: str, connection_id: str) -> None:
        """A link is up."""
        key = (account_id, agent_id)
        self._links.setdefault(key, set()).add(connection_id)
        report = self._reports.get(key)
        if report is not None:
            report.connected, report.at = True, self._clock()
        elif self._has_room(account_id):
            self._reports[key] = AgentReport(agent_id, account_id, b"", self._clock(), True)

    def take(self, account_id: str, agent_id: str, connection_id: str, text: bytes) -> None:
        """A report has come."""
        report = self._reports.get((account_id, agent_id))
        if report is not None:
            report.text, report.at = text, self._clock()

    def end(self, account_id: str, agent_id: str, connection_id: str) -> None:
        """A link is gone; the agent is disconnected when it was its last."""
        key = (account_id, agent_id)
        links = self._links.get(key, set())
        links.discard(connection_id)
        if not links:
            self._links.pop(key, None)
            report = self._reports.get(key)
            if report is not None:
                report.connected, report.at = False, self._clock()

    def all(self) -> list[AgentReport]:
        now = self._clock()
        for key in [key for key, one in self._reports.items() if not one.connected and now - one.at > KEPT]:
            del self._reports[key]
        return list(self._reports.values())

    def _has_room(self, account_id: str) -> bool:
        if len(self._reports) >= MAX_AGENTS:
            self.all()
        if len(self._reports) < MAX_PER_ACCOUNT:
            return True
        of_account = sum(1 for account, _ in self._reports if account == account_id)
        return len(self._reports) < MAX_AGENTS and of_account < MAX_PER_ACCOUNT
