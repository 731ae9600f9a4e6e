"""Limits on strangers: what each refused so far, how often an address may come, and who gives way when it is full.

All of it is looked at once a connection or once a refusal, never once a request. Addresses are IPv4 addresses and /64
networks of IPv6 (one customer's, RFC 6177), kept in tables of bounded size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import monotonic

from tunnel.errors import LIMITS

MAX_ADDRESSES = 10_000  #: remembered by each table; the one not seen for longest is forgotten first
GRACE = 1.0  #: seconds in which a silent connection does not give way to another one of the same crowd

FREE_FAILURES = 3  #: refused logins of an address that are answered at once
FIRST_DELAY = 0.25  #: seconds, for the next; each further one waits twice as long
MAX_DELAY = 4.0
FORGIVEN = 60.0  #: seconds without a failure after which an address starts anew

Counts = dict[str, int]
Clock = Callable[[], float]

_NOBODY_ELSE = nullcontext()


def no_refusals() -> Counts:
    return dict.fromkeys(LIMITS, 0)


def network_of(address: str) -> str:
    """What counts as one address: the address itself, for IPv6 its /64."""
    if ":" not in address:
        return address
    head, _, tail = address.partition("::")
    groups = head.split(":") if head else []
    if len(groups) < 4:
        rest = tail.split(":") if tail else []
        groups += ["0"] * max(0, 8 - len(groups) - len(rest)) + rest
    return ":".join(groups[:4]) + "::/64"


class Rate:
    """So many a second from one address, and `burst` seconds' worth at once. 0: any number."""

    def __init__(self, per_second: float, burst: float = 10.0, clock: Clock = monotonic) -> None:
        self._cost = 1 / per_second if per_second else 0.0
        self._burst = burst
        self._clock = clock
        self._paid: OrderedDict[str, float] = OrderedDict()

    def take(self, address: str) -> bool:
        """Whether one more may come now."""
        if not self._cost:
            return True
        now = self._clock()
        key = network_of(address)
        paid = max(self._paid.pop(key, 0.0), now - self._burst) + self._cost
        is_free = paid <= now + 1e-9
        self._paid[key] = paid if is_free else paid - self._cost
        if len(self._paid) > MAX_ADDRESSES:
            self._paid.popitem(last=False)
        return is_free


class Failures:
    """How long a refused login waits for its answer, the longer the more its address had. A good one never waits."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._known: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and when the last was

    def note(self, address: str) -> float:
        """One more; the seconds that its answer should wait."""
        now, key = self._clock(), network_of(address)
        count, last = self._known.pop(key, (0, now))
        count = 1 if now - last > FORGIVEN else count + 1
        self._known[key] = (count, now)
        if len(self._known) > MAX_ADDRESSES:
            self._known.popitem(last=False)
        if count <= FREE_FAILURES:
            return 0.0
        return min(MAX_DELAY, FIRST_DELAY * 2.0 ** min(count - FREE_FAILURES - 1, 10))


class Shares:
    """Connections there are, in all and from each address; 0: any number."""

    #: where several processes accept: the seconds to leave the next connection to another one
    turn: Callable[[], float] | None = None

    def __init__(self, most: int, most_each: int) -> None:
        self.total = 0
        self._most = most
        self._most_each = most_each
        self._each: dict[str, int] = {}

    def enter(self, address: str, is_proxy: bool = False) -> str:
        """Count one more, or say which limit is in its way (a word of LIMITS). A proxy's address has no limit."""
        with self._alone():
            return self._enter(network_of(address), is_proxy)

    def _enter(self, key: str, is_proxy: bool) -> str:
        total, count = self._elsewhere(key)
        if self._most and self.total + total >= self._most:
            return "connections"
        if self._each.get(key, 0) + count >= self._most_each > 0 and not is_proxy:
            return "connections_per_address"
        self._count(key)
        return ""

    def _alone(self) -> AbstractContextManager[None]:
        """No other process of this core decides while this one does."""
        return _NOBODY_ELSE

    def _elsewhere(self, key: str) -> tuple[int, int]:
        """Connections in all and from this address that other processes of this core have."""
        return 0, 0

    def _note(self, key: str, change: int) -> None:
        """Tell the other processes."""

    def _count(self, key: str) -> None:
        self.total += 1
        self._each[key] = self._each.get(key, 0) + 1
        self._note(key, 1)

    def change(self, address: str, other: str, is_proxy: bool = False) -> str:
        """One of `address` turns out to be of another: counted there, or the limit in its way and nothing changed."""
        with self._alone():
            self.leave(address)
            limit = self._enter(network_of(other), is_proxy)
            if limit:
                self._count(network_of(address))
            return limit

    def count(self, address: str) -> int:
        """Connections there are from this address, here."""
        return self._each.get(network_of(address), 0)

    def add(self, address: str) -> None:
        """Count one that is let in whatever the limits: elsewhere, or in the place of another."""
        self._count(network_of(address))

    def leave(self, address: str) -> None:
        key = network_of(address)
        self.total -= 1
        self._each[key] -= 1
        if not self._each[key]:
            del self._each[key]
        self._note(key, -1)


class Place:
    """One connection among `shares`, under the address that it is for as far as is known; `leave` in any case."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._address: str | None = None

    def take(self, address: str, is_proxy: bool = False) -> str:
        """Count it there from now on, or say which limit is in its way (as Shares.enter)."""
        if self._address is None:
            limit = self._shares.enter(address, is_proxy)
        else:
            limit = self._shares.change(self._address, address, is_proxy)
        if not limit:
            self._address = address
        return limit

    def add(self, address: str) -> None:
        """Count it there, whatever the limits."""
        self.leave()
        self._shares.add(address)
        self._address = address

    def leave(self) -> None:
        if self._address is not None:
            self._shares.leave(self._address)
            self._address = None


class Waiting:
    """Connections that have yet to say who they are. When there are too many, the most crowded address gives way.

    evict ends a connection. Those that have said hello are safe. A newcomer from the crowded address itself takes
    only the place of one that has been silent for GRACE, so that a fleet which comes all at once gets in one by one.
    """

    def __init__(self, most: int, clock: Clock = monotonic) -> None:
        self.total = 0
        self._most = most
        self._clock = clock
        self._silent: dict[str, OrderedDict[object, tuple[float, Callable[[], None]]]] = {}

    def enter(self, address: str, key: object, evict: Callable[[], None]) -> bool:
        """Whether there is a place for it, taken from a silent one if need be. Pair it with `leave`."""
        home = network_of(address)
        if self.total >= self._most and not self._make_room(home):
            return False
        self.total += 1
        self._silent.setdefault(home, OrderedDict())[key] = (self._clock(), evict)
        return True

    def heard(self, address: str, key: object) -> None:
        """It has said hello."""
        self._forget(network_of(address), key)

    def leave(self, address: str, key: object) -> None:
        self.total -= 1
        self.heard(address, key)

    def _make_room(self, home: str) -> bool:
        if not self._silent:
            return False
        crowded, crowd = max(self._silent.items(), key=lambda item: len(item[1]))
        key, (since, evict) = next(iter(crowd.items()))
        own = self._silent.get(home)
        if own is not None and len(own) >= len(crowd) and self._clock() - since < GRACE:
            return False
        self._forget(crowded, key)
        evict()
        return True

    def _forget(self, home: str, key: object) -> None:
        crowd = self._silent.get(home)
        if crowd is not None:
            crowd.pop(key, None)
            if not crowd:
                del self._silent[home]
