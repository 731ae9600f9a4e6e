"""An account as the core sees it while it is attached: its limits, and what it has used.

The request path only adds integers; clocks are read only where a limit needs one. Use is what the store knew plus
what was counted here since; `take()` and `settle()` are how `accounts.py` brings the counts to the store.

Both rates are kept as one number, the time at which everything admitted so far would be paid for at the exact rate
(the virtual scheduling form of a token bucket: ATM Forum TM 4.0, GCRA). A month is a calendar month in UTC.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime

from tunnel.errors import Failure, Refused
from tunnel.handler import QuotaStatistics

#: seconds' worth of bytes that pass unshaped after a pause
BURST = 0.25
#: shorter waits are not asked for; the debt stays, so the rate holds
MIN_WAIT = 0.005
#: seconds of an account's bandwidth that may be owed before its next requests are refused: nobody waits for longer, but
#: for what those under way add
MAX_DEBT = 10.0
#: months other than the present one whose use is kept in mind
MONTHS = 2
#: links of one agent at one process of the core: as many as it may have workers
MAX_LINKS_EACH = 16
#: the types of tunnel_quota_exceeded_total, tunnel_quota_usage, tunnel_quota_limit
TYPES = ("connection", "bandwidth", "requests", "names", "ports")
#: what an account has at a time, what its owner can do about it, and the flag of `account limit` that says how much
AT_A_TIME = {
    "connection": ("agent{s}", "end some", "connections"),
    "names": ("name{s}, in use or held,", "serve fewer, wait until held ones are free", "names"),
    "ports": ("TCP port{s}", "serve fewer TCP tunnels", "ports"),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """None: no such limit. Bytes are body bytes of both directions together."""

    max_connections: int | None = None
    requests_per_second: float | None = None
    requests_burst: int | None = None  # None: twice the rate, at least 1
    requests_per_month: int | None = None
    bandwidth_bytes_per_second: int | None = None
    bandwidth_bytes_per_month: int | None = None
    max_names: int | None = None  # in use or held; those that are reserved for it don't count
    max_ports: int | None = None  # of TCP tunnels


LIMIT_NAMES = tuple(field.name for field in fields(Limits))
NO_LIMITS = Limits()


def default_limits(connections: int, connections_each: int, names_each: int, ports_each: int) -> Limits:
    """Of accounts that have none of their own, by the core's flags: agents in all, agents, names and ports of one
    account. 0 is no limit; connections_each -1: a tenth of all places stays free for other accounts."""
    each = math.ceil(connections * 0.9) if connections_each < 0 else connections_each
    return Limits(max_connections=each or None, max_names=names_each or None, max_ports=ports_each or None)


def over_limit(type: str, most: float, account: str) -> str:
    """What an agent is told that asks for more than its account may have. account: name or id."""
    what, advice, flag = AT_A_TIME[type]
    what = what.format(s="" if most == 1 else "s")
    if type == "names" and not most:
        return (
            "the account serves only names that are reserved for it: choose one of them, or ask the core's operator "
            f"for this one (tunnel reserve NAME {account})"
        )
    return (
        f"the account's limit of {most:g} {what} is reached: {advice}, or ask the core's operator for more "
        f"(account limit {account} -{flag} N)"
    )


class QuotaFailure(Failure):
    """A request that is over its account's quota. quota: "requests" or "bandwidth"."""

    def __init__(self, quota: str, text: str, retry_after: float) -> None:
        super().__init__("quota", text, retry_after=retry_after)
        self.quota = quota


@dataclass(slots=True)
class Use:
    """What was used: requests, and body bytes towards the local service and back."""

    requests: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def add(self, other: Use) -> None:
        self.requests += other.requests
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out

    def __bool__(self) -> bool:
        return bool(self.requests or self.bytes_in or self.bytes_out)


def month_of(at: float) -> tuple[str, float]:
    """The month (UTC) of a time in seconds since 1970: ("2026-11", its end in seconds since 1970)."""
    day = datetime.fromtimestamp(at, UTC)
    end = datetime(day.year + day.month // 12, day.month % 12 + 1, 1, tzinfo=UTC)
    return f"{day.year:04}-{day.month:02}", end.timestamp()


def beginning_of(month: str) -> float:
    """When a month of `month_of` begins, in seconds since 1970."""
    return datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC).timestamp()


class Account:
    """One account, shared by all its links; made by `Accounts.load`.

    links: that serve. attached: links that are there, also those that only finish what they have. requests, bytes_in,
    bytes_out: counted by this process since it loaded the account.
    exceeded: refusals by type, shared by all accounts. defaults:
    limits at a time of an account that has none of its own. wall, monotonic: clocks, seconds.
    """

    __slots__ = (
        "_agents",
        "_base_bytes",
        "_base_requests",
        "_byte_cost",
        "_bytes_paid",
        "_defaults",
        "_is_limited",
        "_monotonic",
        "_month_begin",
        "_month_end",
        "_months",
        "_past",
        "_period",
        "_request_cost",
        "_requests_paid",
        "_taken",
        "_wall",
        "attached",
        "bytes_in",
        "bytes_out",
        "exceeded",
        "id",
        "is_deleted",
        "is_disabled",
        "limits",
        "links",
        "name",
        "requests",
        "seen",
    )

    def __init__(
        self,
        id: str,
        name: str,
        limits: Limits | None = None,
        *,
        exceeded: dict[str, int] | None = None,
        defaults: Limits = NO_LIMITS,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = id
        self.name = name
        self.links = self.attached = 0
        self._agents: dict[str, int] = {}  # links by the agent that says who it is
        self.requests = self.bytes_in = self.bytes_out = 0
        self.is_disabled = self.is_deleted = False
        self.exceeded = exceeded if exceeded is not None else dict.fromkeys(TYPES, 0)
        self.seen = monotonic()  # when it was last attached or asked for
        self._defaults = defaults
        self._wall = wall
        self._monotonic = monotonic
        self._taken = Use()  # the counts at the last take()
        self._past: dict[str, Use] = {}  # counted in a month that is over, not taken yet
        self._base_requests = self._base_bytes = 0  # use of the month = base + counts
        self._months: dict[str, tuple[int, int]] = {}  # requests and bytes of months that were left
        self._period, self._month_end = month_of(wall())
        self._month_begin = beginning_of(self._period)
        self._requests_paid = self._bytes_paid = -math.inf
        self.limits = Limits()
        self.set_limits(limits or Limits())

    @property
    def period(self) -> str:
        return self._period

    @property
    def month_requests(self) -> int:
        return self._base_requests + self.requests

    @property
    def month_bytes(self) -> int:
        return self._base_bytes + self.bytes_in + self.bytes_out

    def set_limits(self, limits: Limits) -> None:
        """New limits hold at once; debts from the old rates are forgotten."""
        self.limits = limits
        rate, bandwidth = limits.requests_per_second, limits.bandwidth_bytes_per_second
        self._request_cost = 0.0 if rate is None else 1 / max(rate, 1e-9)
        self._byte_cost = 0.0 if bandwidth is None else 1 / max(bandwidth, 1)
        self._requests_paid = self._bytes_paid = -math.inf
        self._is_limited = (
            limits.requests_per_second is not None
            or limits.bandwidth_bytes_per_second is not None
            or limits.requests_per_month is not None
            or limits.bandwidth_bytes_per_month is not None
        )

    # Links ----------------------------------------------------------------------------------------------------

    @property
    def agents(self) -> int:
        """Agents that have links; one that does not say who it is counts by link."""
        return self.links - sum(self._agents.values()) + len(self._agents)

    def admit_link(self, agent: str = "") -> None:
        """Count a link. agent: whose it is; all of its links count as one connection, up to MAX_LINKS_EACH.

        Raises Refused("connection_quota") when the account holds as many as it may.
        """
        if agent in self._agents:
            self.check_links(agent)
        elif self.agents >= self.link_limit:
            self.exceeded["connection"] += 1
            raise Refused("connection_quota", over_limit("connection", self.link_limit, self.name))
        self.add_link(agent)

    def check_links(self, agent: str) -> None:
        """Raises Refused("connection_quota") when the agent has as many links here as any may have."""
        if self._agents.get(agent, 0) >= MAX_LINKS_EACH:
            self.exceeded["connection"] += 1
            raise Refused("connection_quota", f"this agent already has {MAX_LINKS_EACH} links here, as many as it may")

    def check_parting(self) -> None:
        """Raises Refused("connection_quota") when many of its links only finish what they have: there may be as many
        as it may have agents, each of which has dialled again, or is one with a link to each worker."""
        parting = self.attached - self.links
        if parting >= max(self.link_limit, MAX_LINKS_EACH):
            self.exceeded["connection"] += 1
            raise Refused("connection_quota", f"{parting} links of the account are still finishing what they have")

    def add_link(self, agent: str = "") -> None:
        """Count a link that has been admitted elsewhere."""
        self.links += 1
        if agent:
            self._agents[agent] = self._agents.get(agent, 0) + 1

    def attach(self) -> None:
        self.attached += 1

    def detach(self) -> None:
        self.attached -= 1
        self.seen = self._monotonic()

    def drop_link(self, agent: str = "") -> None:
        self.links -= 1
        self.seen = self._monotonic()
        if agent in self._agents:
            self._agents[agent] -= 1
            if not self._agents[agent]:
                del self._agents[agent]

    @property
    def link_limit(self) -> float:
        return self._most(self.limits.max_connections, self._defaults.max_connections)

    @property
    def name_limit(self) -> float:
        return self._most(self.limits.max_names, self._defaults.max_names)

    @property
    def port_limit(self) -> float:
        return self._most(self.limits.max_ports, self._defaults.max_ports)

    def _most(self, own: int | None, default: int | None) -> float:
        most = default if own is None else own
        return math.inf if most is None else most

    # Requests and bytes: the hot path -------------------------------------------------------------------------

    def admit_request(self) -> None:
        """Count a request. Raises QuotaFailure with the seconds after which one would pass."""
        if self._is_limited:
            self._check_request()
        self.requests += 1

    def take_bytes(self, n_in: int, n_out: int) -> float:
        """Count body bytes; returns the seconds to wait before the next ones (0.0: none).

        The bytes have passed: all takers share the debt and each waits for what was owed when it took, which keeps
        the sum at the rate. A stream under way is shaped, never broken off, when the month's bytes run out.
        """
        self.bytes_in += n_in
        self.bytes_out += n_out
        if not self._byte_cost:
            return 0.0
        now = self._monotonic()
        paid = max(self._bytes_paid, now - BURST) + (n_in + n_out) * self._byte_cost
        self._bytes_paid = paid
        return paid - now if paid - now >= MIN_WAIT else 0.0

    def _check_request(self) -> None:
        limits = self.limits
        wall = self._wall()
        self.roll(wall)
        month = limits.requests_per_month
        if month is not None and self.month_requests >= month:
            raise self._fail("requests", f"The limit of {month} requests a month is reached.", self._month_end - wall)
        month = limits.bandwidth_bytes_per_month
        if month is not None and self.month_bytes >= month:
            raise self._fail("bandwidth", f"The limit of {month} bytes a month is reached.", self._month_end - wall)
        now = self._monotonic()
        bandwidth = limits.bandwidth_bytes_per_second
        if bandwidth is not None and self._bytes_paid - now > MAX_DEBT:
            text = f"The limit of {bandwidth} bytes a second is reached."
            raise self._fail("bandwidth", text, self._bytes_paid - now - MAX_DEBT)
        rate = limits.requests_per_second
        if rate is None:
            return
        burst = limits.requests_burst if limits.requests_burst is not None else 2 * rate
        paid = max(self._requests_paid, now) + self._request_cost
        wait = paid - now - max(1.0, burst) * self._request_cost
        if wait > 1e-9:
            raise self._fail("requests", f"The limit of {rate:g} requests a second is reached.", wait)
        self._requests_paid = paid

    def _fail(self, quota: str, text: str, retry_after: float) -> QuotaFailure:
        self.exceeded[quota] += 1
        return QuotaFailure(quota, text, retry_after)

    # The month, and the way to the store ----------------------------------------------------------------------

    def roll(self, wall: float) -> None:
        """Begin another month if `wall` (seconds since 1970) is not in this one: mostly the next.

        A clock that was wrong may lead back to the month before; its use is known still, so its limits hold.
        """
        if self._month_begin <= wall < self._month_end:
            return
        self._past.setdefault(self._period, Use()).add(self._untaken())
        self._taken = Use(self.requests, self.bytes_in, self.bytes_out)
        self._months[self._period] = self.month_requests, self.month_bytes
        self._period, self._month_end = month_of(wall)
        self._month_begin = beginning_of(self._period)
        requests, size = self._months.pop(self._period, (0, 0))
        if len(self._months) > MONTHS:
            del self._months[next(iter(self._months))]
        self._base_requests = requests - self.requests
        self._base_bytes = size - self.bytes_in - self.bytes_out

    def take(self) -> dict[str, Use]:
        """What was counted since the last take, by month. The caller owns it and must get it to the store."""
        taken, self._past = self._past, {}
        fresh = self._untaken()
        if fresh:
            taken.setdefault(self._period, Use()).add(fresh)
            self._taken = Use(self.requests, self.bytes_in, self.bytes_out)
        return {period: use for period, use in taken.items() if use}

    def settle(self, period: str, stored: Use) -> None:
        """The store holds `stored` for the month, all that was taken included (other cores' use too)."""
        if period == self._period:
            self._base_requests = stored.requests - self._taken.requests
            self._base_bytes = stored.bytes_in + stored.bytes_out - self._taken.bytes_in - self._taken.bytes_out

    def is_settled(self) -> bool:
        """Nothing is left to take."""
        return not self._past and not self._untaken()

    def _untaken(self) -> Use:
        taken = self._taken
        return Use(self.requests - taken.requests, self.bytes_in - taken.bytes_in, self.bytes_out - taken.bytes_out)

    def quotas(self, names: int = 0, ports: int = 0) -> list[QuotaStatistics]:
        """Use and limit now: agents; bytes and requests of this month; names and TCP ports, of which it has so many.
        The limit is infinite where there is none."""
        requests, bandwidth = self.limits.requests_per_month, self.limits.bandwidth_bytes_per_month
        fresh = self._untaken()
        fresh_bytes = fresh.bytes_in + fresh.bytes_out
        most_bytes, most_requests = (math.inf if limit is None else limit for limit in (bandwidth, requests))
        return [
            QuotaStatistics(self.id, "connection", self.agents, self.link_limit),
            QuotaStatistics(self.id, "bandwidth", self.month_bytes, most_bytes, fresh_bytes),
            QuotaStatistics(self.id, "requests", self.month_requests, most_requests, fresh.requests),
            QuotaStatistics(self.id, "names", names, self.name_limit),
            QuotaStatistics(self.id, "ports", ports, self.port_limit),
        ]
