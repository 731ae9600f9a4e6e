"""What the supervisor knows of its workers' agents: which names each serves, and which agents count as connected.

Decisions are sync, and exact over all workers. What a worker had goes when it ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from time import monotonic

from tunnel.core.quotas import over_limit

Name = tuple[str, str, str]  #: tunnel, account id, protocol


class Roster:
    """hold: seconds that a name stays its account's after its last link."""

    def __init__(self, hold: float, clock: Callable[[], float] = monotonic) -> None:
        self._hold = hold
        self._clock = clock
        self._names: dict[int, dict[str, Name]] = {}  # by worker
        self._held: dict[str, float] = {}  # names that nobody serves now, until when
        self._links: dict[str, tuple[int, tuple[str, str]]] = {}  # by connection id: worker, agent
        self._agents: Counter[tuple[str, str]] = Counter()  # links by (account id, instance)
        self._accounts: Counter[str] = Counter()  # agents by account id

    # Names ------------------------------------------------------------------------------------------------------

    def learn(self, worker: int, up: Iterable[Name], down: Iterable[str], is_held: bool = True) -> None:
        """is_held: those that are down stay their account's for a while."""
        served = self._names.setdefault(worker, {})
        for name in up:
            served[name[0]] = name
            self._held.pop(name[0], None)
        for lost in down:
            served.pop(lost, None)
            if is_held:
                self._note_hold(lost)

    def _note_hold(self, name: str) -> None:
        if not any(name in served for served in self._names.values()):
            self._held[name] = self._clock() + self._hold

    def names_of(self, worker: int) -> list[Name]:
        return list(self._names.get(worker, {}).values())

    def names(self) -> dict[str, str]:
        """Account ids by the names that are served."""
        return {name: account_id for served in self._names.values() for name, account_id, _ in served.values()}

    def forget_expired(self) -> list[str]:
        """Names whose hold is over."""
        now = self._clock()
        gone = [name for name, until in self._held.items() if until < now]
        for name in gone:
            del self._held[name]
        return gone

    # Agents -----------------------------------------------------------------------------------------------------

    @property
    def by_account(self) -> dict[str, int]:
        return dict(self._accounts)

    def admit(
        self, worker: int, account_id: str, instance: str, connection_id: str, limit: float, most: int
    ) -> tuple[str, str] | None:
        """Count a link, or say why not: reason and text. An agent counts once, whatever links it has.

        limit: agents of the account; most: of all.
        """
        agent = account_id, instance or connection_id
        if agent not in self._agents:
            if len(self._agents) >= most:
                return "too_many_connections", f"the core has its {most} links; try again later"
            if self._accounts[account_id] >= limit:
                return "connection_quota", over_limit("connection", limit, account_id)
            self._accounts[account_id] += 1
        self._agents[agent] += 1
        self._links[connection_id] = worker, agent
        return None

    def drop(self, connection_id: str) -> None:
        """The link serves no longer. Safe to call again."""
        link = self._links.pop(connection_id, None)
        if link is None:
            return
        _, agent = link
        self._agents[agent] -= 1
        if not self._agents[agent]:
            del self._agents[agent]
            self._accounts[agent[0]] -= 1
            if not self._accounts[agent[0]]:
                del self._accounts[agent[0]]

    # Workers ----------------------------------------------------------------------------------------------------

    def lose(self, worker: int) -> None:
        """The worker has ended."""
        for name in self._names.pop(worker, {}):
            self._note_hold(name)
        for connection_id in [key for key, (home, _) in self._links.items() if home == worker]:
            self.drop(connection_id)
