"""Accounts in a running core: who may attach, with what limits, and what they use.

Gate and door work with live objects in memory; the store is asked when an agent attaches, and watched for changes by
one look at its revision a second. What is counted is written in batches every `flush_interval` (5 s): a core that is
killed (SIGKILL) loses the use of at most that long, plus the time a write takes, and nothing of it is ever added
twice: a batch keeps its number until the store has confirmed it. While the store is away, attached agents go on, use
is kept in memory, and the outage is logged once.

Accounts are one thing in three rooms, each of which goes on from the one before: those in memory (live.py), agents who
say whose they are (authenticating.py), and here names, what has changed in the store, and what goes there.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Collection, Mapping

import sqlalchemy as sa
import trio

from tunnel.core import records
from tunnel.core.authenticating import Authenticating
from tunnel.core.claiming import find_lost_names
from tunnel.core.domain import Domain
from tunnel.core.first import FirstToken, ensure_default
from tunnel.core.holds import Holds
from tunnel.core.live import AccountRows, apply
from tunnel.core.quotas import NO_LIMITS, Account, Limits, QuotaFailure
from tunnel.core.records import Snapshot
from tunnel.core.store import Store, StoreError
from tunnel.core.tokens import Grant
from tunnel.errors import Refused
from tunnel.handler import QuotaStatistics, Visit
from tunnel.log import get_logger

__all__ = ["Account", "Accounts", "FirstToken", "Grant", "QuotaFailure", "ensure_default"]

log = get_logger("tunnel.core")

#: seconds that the store has for one look at it: a server may be there and say nothing for ever
_ANSWER_TIME = 5.0
_LOCAL = Domain("localhost")


class _Trouble:
    """Logs an outage once when it begins and once when it ends."""

    def __init__(self, begun: str, ended: str) -> None:
        self._begun, self._ended = begun, ended
        self._is_on = False

    def note(self, cause: str) -> None:
        """cause: "" if all is well."""
        if cause and not self._is_on:
            log.error(self._begun, error=cause)
        elif self._is_on and not cause:
            log.info(self._ended)
        self._is_on = bool(cause)


class Accounts(Authenticating):
    """store: opened. flush_interval, watch_interval, name_hold: seconds. wall, monotonic: clocks, seconds. defaults:
    limits at a time of accounts that have none of their own.

    Raises ConfigError for an unusable JWT key (jwt_public_key is the path of a PEM file).
    """

    def __init__(
        self,
        store: Store,
        *,
        jwt_secret: str = "",
        jwt_public_key: str = "",
        defaults: Limits = NO_LIMITS,
        domain: Domain = _LOCAL,
        flush_interval: float = 5.0,
        watch_interval: float = 1.0,
        name_hold: float = 600.0,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        rows: AccountRows | None = None,
    ) -> None:
        super().__init__(store, defaults, wall, monotonic, rows, jwt_secret, jwt_public_key)
        self._flush_interval = flush_interval
        self._watch_interval = watch_interval
        self._domain = domain
        self._holds = Holds(store, name_hold, wall, monotonic, domain)
        #: TCP ports that are open for an account here, by account id
        self.ports_open: Callable[[], Mapping[str, int]] = dict
        #: the names that are served or held here (name → account id), for `take_lost`
        self.names_known: Callable[[], Mapping[str, str]] = dict
        self._lost: dict[str, tuple[str, Refused]] = {}
        self._is_current = False  # everything in memory is as of `_revision`
        self._cause = "the store was not asked yet"  # "" while it answers
        self._watching = _Trouble("store unreachable", "store answers again")
        self._writing = _Trouble("usage not written", "usage is written again")

    # Names --------------------------------------------------------------------------------------------------------

    async def owner_of(self, name: str, parent: Visit | None = None) -> str | None:
        """The id of the account that has reserved the name or holds it (in use, or within `name_hold` after that).

        name: lower case. Cached for 2 s, "nobody" too. Raises StoreError.
        """
        return await self._holds.owner_of(name, parent)

    async def is_reserved(self, name: str) -> bool:
        """Whether the name is reserved for an account. Asks the store each time. Raises StoreError."""
        return await self._store.query("name.reserved", lambda conn: records.is_reserved(conn, name))

    async def claim(self, names: Collection[str], account_id: str) -> None:
        """Take names for an account, all or none. Raises Refused (name_reserved, name_taken, name_quota) or
        StoreError."""
        account = self._accounts.get(account_id)
        try:
            await self._holds.claim(names, account_id, math.inf if account is None else account.name_limit)
        except Refused as exc:
            self.exceeded["names"] += exc.reason == "name_quota"
            raise

    async def release(self, names: Collection[str], account_id: str) -> None:
        """The names' last link is gone: they are held for `name_hold` seconds from now. Never raises StoreError."""
        await self._holds.release(names, account_id)

    def set_names_in_use(self, in_use: Callable[[], Mapping[str, str]]) -> None:
        """Say who serves what now (name → account id): these names stay held, whatever became of their claims."""
        self._holds.in_use = in_use

    def take_lost(self) -> dict[str, tuple[str, Refused]]:
        """Known names that the store has since given to others, or whose account is gone: whose they were, and why not
        any more. Each is said once."""
        lost, self._lost = self._lost, {}
        return lost

    @property
    def revision(self) -> int:
        """Of the store, as last seen."""
        return self._revision

    def look_again(self) -> None:
        """Something that is kept may be older than `revision`: `watch` is to take it all over anew."""
        self._is_current = False

    # In the background ----------------------------------------------------------------------------------------------

    async def run(
        self, on_change: Callable[[], None], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Watch the store and bring it what was counted, until cancelled. The caller flushes once more after that.

        on_change: called when limits, tokens, accounts or names may have changed, or a granted token has run out:
        time to `check` each grant.
        """
        await self.watch(on_change)
        task_status.started()
        async with trio.open_nursery() as nursery:  # neither waits for the other: a write has no time limit
            nursery.start_soon(_every, self._watch_interval, lambda: self.watch(on_change))
            nursery.start_soon(_every, self._flush_interval, self._flush_quietly)

    async def watch(self, on_change: Callable[[], None]) -> None:
        """One look at the store; takes over what has changed. An unreachable or silent store is logged, not raised.

        What has run out is said first: that needs no store.
        """
        wall = self._wall()
        for account in self._accounts.values():
            account.roll(wall)
        past = bisect_right(self._expiries, wall)
        if past:
            del self._expiries[:past]
            on_change()
        is_changed = False
        try:
            with trio.fail_after(_ANSWER_TIME):
                revision = await self._store.query("revision.read", records.read_revision)
                if revision != self._revision or not self._is_current:
                    await self._refresh()
                    is_changed = True
            self._cause = ""
        except StoreError as exc:
            self._cause = str(exc)
        except trio.TooSlowError:
            self._cause = f"the store {self._store.database.name} did not answer within {_ANSWER_TIME:g} s"
        self._watching.note(self._cause)
        if is_changed:
            on_change()

    async def _refresh(self) -> None:
        self._is_current = False
        ids = list(self._accounts)
        names = dict(self.names_known())

        def read(conn: sa.Connection) -> tuple[Snapshot, dict[str, Refused]]:
            return records.read_snapshot(conn, ids), find_lost_names(conn, names, self._domain)

        snapshot, lost = await self._store.query("accounts.refresh", read)
        self._holds.clear()
        self._revision = snapshot.revision
        for account_id in ids:
            account, record = self._accounts.get(account_id), snapshot.accounts.get(account_id)
            if account is None:
                continue  # forgotten while we read
            if record is None:
                account.is_deleted = True
            else:
                apply(account, record)
        self._take_tokens(snapshot, set(ids))
        self._lost.update({name: (names[name], refusal) for name, refusal in lost.items()})
        # an account or a name that came while we read may be older than this revision: look once more, at once
        self._is_current = self._accounts.keys() <= set(ids) and self.names_known().keys() <= names.keys()

    async def _flush_quietly(self) -> None:
        try:
            await self.flush()
            lost = await self._holds.touch()
            if lost:
                self._lost.update(lost)
                self.look_again()  # `watch` says so
        except StoreError as exc:
            self._writing.note(str(exc))
        else:
            self._writing.note("")
            self._evict()

    async def flush(self) -> None:
        """Bring everything counted so far to the store. Raises StoreError; what was not written stays for the next.

        Safe to cancel and to call at any time, also by several tasks.
        """
        await self._usage.flush()

    async def flush_last(self) -> None:
        """Bring the rest to the store, at the program's end. If that fails, say in the log what is lost."""
        try:
            await self.flush()
        except StoreError as exc:
            lost = self._usage.unwritten()
            if lost:
                log.error(
                    "usage is lost",
                    requests=lost.requests,
                    bytes_in=lost.bytes_in,
                    bytes_out=lost.bytes_out,
                    error=str(exc),
                )

    # What others want to know -----------------------------------------------------------------------------------------

    def is_ready(self) -> tuple[bool, str]:
        """A readiness check: did the store answer when it was last asked? (holds, reason)"""
        return not self._cause, self._cause or f"{self._store.system} answers"

    def quotas(self) -> list[QuotaStatistics]:
        """Of every account that has a link."""
        ports, names = self.ports_open(), self._holds.counts
        return [
            row
            for account in self._accounts.values()
            if account.links
            for row in account.quotas(names.get(account.id, 0), ports.get(account.id, 0))
        ]


async def _every(interval: float, work: Callable[[], Awaitable[None]]) -> None:
    """interval: seconds from one beginning to the next; work that takes longer is begun again at once."""
    at = trio.current_time() + interval
    while True:
        await trio.sleep_until(at)
        at = trio.current_time() + interval
        await work()
