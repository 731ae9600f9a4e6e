"""Which account a public name belongs to, as the store says: reserved, in use, or held after its last link.

Visitors ask for any name they like, so answers, "nobody" too, are kept for a moment in a cache of bounded size. Names
in use here are written to the store again and again, so that a core that is killed and started again, or another
core, keeps the rule "10 minutes after the last link".
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping

import sqlalchemy as sa

from tunnel.core import claiming
from tunnel.core.domain import Domain
from tunnel.core.store import Store, StoreError
from tunnel.errors import Refused
from tunnel.handler import Visit
from tunnel.log import get_logger

log = get_logger("tunnel.core")

#: seconds that an answer is kept; names kept at most
CACHE_TIME = 2.0
CACHE_SIZE = 10_000
#: names in use are written this often within the time they are held, and at least once in so many seconds
_TOUCHES = 10
_TOUCH_INTERVAL = 60.0


class Holds:
    """hold: seconds that a name stays its account's after its last link. wall, monotonic: clocks, seconds. domain: the
    core's base domain.

    counts: names in use or held by account, as last heard of the store.
    """

    def __init__(
        self,
        store: Store,
        hold: float,
        wall: Callable[[], float],
        monotonic: Callable[[], float],
        domain: Domain,
    ) -> None:
        self.counts: dict[str, int] = {}
        self._store = store
        self._domain = domain
        self._hold = hold
        self._ahead = max(0.0, claiming.SAFE - hold)  # names in use are written as seen so much later than now
        self._wall = wall
        self._monotonic = monotonic
        self._cache: OrderedDict[str, tuple[float, str | None]] = OrderedDict()  # name → (good until, owner)
        self._asked = 0  # how often the cache was emptied: an answer from before is not kept
        self._claimed: dict[str, str] = {}  # in use here: name → account id
        self._next_touch = 0.0
        #: who serves what now (name → account id), if somebody knows better than claims and releases do: an agent
        #: refused after its claim releases nothing, and a link may go while the next one claims
        self.in_use: Callable[[], Mapping[str, str]] | None = None

    async def owner_of(self, name: str, parent: Visit | None = None) -> str | None:
        """The id of the account that has reserved or holds the name; None for nobody. Raises StoreError."""
        cached = self._cache.get(name)
        if cached is not None and self._monotonic() < cached[0]:
            return cached[1]
        asked = self._asked
        since = self._wall() - self._hold
        owner = await self._store.query(
            "name.owner", lambda conn: claiming.name_owner(conn, name, since, self._domain), parent=parent
        )
        if asked == self._asked:
            self._keep(name, owner)
        return owner

    async def claim(self, names: Collection[str], account_id: str, most: float = math.inf) -> None:
        """Take names for an account, now in use, all or none of them; in one transaction, however many they are.

        Nothing is written for a name that the account has reserved. most: names that it may have. Raises Refused
        (name_reserved, name_taken, name_quota) or StoreError.
        """
        now = self._wall()
        since = now - self._hold
        claimed, self.counts[account_id] = await self._store.query(
            "name.claim",
            lambda conn: claiming.claim_names(conn, names, account_id, now + self._ahead, since, self._domain, most),
            write=True,
        )
        for name in {*names, *claimed}:
            if self.in_use is None:
                self._claimed[name] = account_id
            self._forget(name)

    async def release(self, names: Collection[str], account_id: str) -> None:
        """The names' last link is gone; they are held from now on. If the store fails, from their last touch on."""
        above = {one for name in names for one in self._domain.above_here(name)}
        if above:  # most have none, and there may be many names in use
            names = {*names, *(above - self._with_above(self._in_use()).keys())}
        for name in names:
            if self._claimed.get(name) == account_id:
                del self._claimed[name]
            self._forget(name)
        now = self._wall()
        owned = dict.fromkeys(names, account_id)
        try:
            await self._store.query("name.release", lambda conn: claiming.touch_names(conn, owned, now), write=True)
        except StoreError as exc:
            log.error("names not released in the store", tunnels=sorted(names), error=str(exc))

    async def touch(self) -> dict[str, tuple[str, Refused]]:
        """Write again, when it is time, that the names in use are in use. Says which of them are another account's by
        now: whose they were, and why not any more. Raises StoreError."""
        if self._monotonic() < self._next_touch:
            return {}
        now = self._wall()
        in_use = self._in_use()
        claimed = self._with_above(in_use)

        def touch(conn: sa.Connection) -> tuple[dict[str, int], dict[str, str]]:
            there = claiming.touch_names(conn, claimed, now + self._ahead)
            claiming.forget_claims(conn, now, now - self._hold, self._domain)
            counts = claiming.count_claims(conn, set(claimed.values()), now - self._hold)
            return counts, claiming.find_unclaimed(conn, in_use, there, self._domain)

        self.counts, unclaimed = await self._store.query("name.touch", touch, write=True)
        self._next_touch = self._monotonic() + min(_TOUCH_INTERVAL, (self._hold + self._ahead) / _TOUCHES)
        lost: dict[str, tuple[str, Refused]] = {}
        for account_id, names in claiming.by_account(unclaimed).items():
            lost.update(await self._claim_again(names, account_id))
        return lost

    async def _claim_again(self, names: Collection[str], account_id: str) -> dict[str, tuple[str, Refused]]:
        """Names in use that are reserved no more, or forgotten by others while we did not reach the store. Whatever the
        account's limit: it has them."""
        try:
            await self.claim(names, account_id)
        except Refused as exc:
            if len(names) > 1:  # all or none were claimed
                parts = [await self._claim_again([name], account_id) for name in names]
                return {name: why for part in parts for name, why in part.items()}
            await self._store.query(
                "name.release", lambda conn: claiming.give_up_claims(conn, names, account_id), write=True
            )
            return dict.fromkeys(names, (account_id, exc))
        return {}

    def _in_use(self) -> dict[str, str]:
        return dict(self._claimed if self.in_use is None else self.in_use())

    def _with_above(self, names: Mapping[str, str]) -> dict[str, str]:
        """With those above them that were claimed with them."""
        claimed = dict(names)
        for name, account_id in names.items():
            for above in self._domain.above_here(name):
                claimed.setdefault(above, account_id)
        return claimed

    def clear(self) -> None:
        """Forget all answers: something was changed. A name in use may be reserved no more, and needs a claim."""
        self._cache.clear()
        self._asked += 1
        self._next_touch = 0.0

    def _forget(self, name: str) -> None:
        self._cache.pop(name, None)
        self._asked += 1

    def _keep(self, name: str, owner: str | None) -> None:
        self._cache[name] = (self._monotonic() + CACHE_TIME, owner)
        self._cache.move_to_end(name)
        if len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
