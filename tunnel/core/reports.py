"""What agents report of themselves over their links: the newest of each, for a day after they were last seen.

Several agents may have one name. Each has its own report then, told apart by its instance, until it is gone; of the
name the last of them stays.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from tunnel.handler import AgentReport

KEPT = 24 * 3600.0  #: seconds that an agent stays listed after its last link
MAX_AGENTS = 10_000
MAX_PER_ACCOUNT = 1_000
MAX_INSTANCES = 64  #: agents of one name whose reports are kept


Key = tuple[str, str]  #: account, agent


class Reports:
    """Reports by account, agent and instance. An instance of "" is the link itself."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._reports: dict[Key, dict[str, AgentReport]] = {}
        self._links: dict[Key, dict[str, str]] = {}  # instances by connection id

    def begin(self, account_id: str, agent_id: str, connection_id: str, instance: str = "") -> None:
        """A link is up."""
        key, instance = (account_id, agent_id), instance or connection_id
        self._links.setdefault(key, {})[connection_id] = instance
        reports = self._reports.get(key)
        if reports is None:
            if not self._has_room(account_id):
                return
            reports = self._reports[key] = {}
        report = reports.get(instance)
        if report is not None:
            report.connected, report.at = True, self._clock()
        elif len(reports) < MAX_INSTANCES:
            reports[instance] = AgentReport(agent_id, account_id, b"", self._clock(), True, instance)
        for gone in [one for one, report in reports.items() if not report.connected]:
            del reports[gone]

    def take(self, account_id: str, agent_id: str, connection_id: str, text: bytes) -> None:
        """A report has come."""
        key = (account_id, agent_id)
        instance = self._links.get(key, {}).get(connection_id, "")
        report = self._reports.get(key, {}).get(instance)
        if report is not None:
            report.text, report.at = text, self._clock()

    def end(self, account_id: str, agent_id: str, connection_id: str) -> None:
        """A link is gone; the agent is disconnected when it was its last."""
        key = (account_id, agent_id)
        links = self._links.get(key, {})
        instance = links.pop(connection_id, "")
        if not links:
            self._links.pop(key, None)
        reports = self._reports.get(key, {})
        report = reports.get(instance)
        if report is None or instance in links.values():
            return
        report.connected, report.at = False, self._clock()
        if any(one.connected for one in reports.values()):
            del reports[instance]
        else:
            report.text = b""  # nobody asks what one that is gone has said: it is kept for a day only to be listed

    def all(self) -> list[AgentReport]:
        now = self._clock()
        for key, reports in list(self._reports.items()):
            if all(not one.connected and now - one.at > KEPT for one in reports.values()):
                del self._reports[key]
        return [report for reports in self._reports.values() for report in reports.values()]

    def _has_room(self, account_id: str) -> bool:
        if len(self._reports) >= MAX_AGENTS:
            self.all()
        if len(self._reports) < MAX_PER_ACCOUNT:
            return True
        of_account = sum(1 for account, _ in self._reports if account == account_id)
        return len(self._reports) < MAX_AGENTS and of_account < MAX_PER_ACCOUNT
