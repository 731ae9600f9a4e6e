"""The accounts that are in memory: loaded from the store when they are first asked for, forgotten when no longer used.

Each has one object, which gate and door work with, and there are its tokens, as far as they were used. Whatever was
read is as of a revision of the store, and nothing older than what was seen is taken over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa

from tunnel.core import records
from tunnel.core.board import Row
from tunnel.core.quotas import TYPES, Account, Limits, Use
from tunnel.core.records import AccountRecord, Snapshot, TokenRecord
from tunnel.core.shared import SharedAccount
from tunnel.core.store import Store
from tunnel.core.usage import UsageWriter
from tunnel.errors import Refused
from tunnel.handler import Visit

#: seconds that an account without links stays in memory
_LINGER = 60.0


class AccountRows(Protocol):
    """Where accounts keep what all workers of a core share."""

    async def take(self, account_id: str) -> Row | None: ...

    def give_back(self, account_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Seen:
    """A granted token as of a revision: what was read earlier never replaces what was read later."""

    revision: int
    record: TokenRecord


class LiveAccounts:
    """store, defaults, wall, monotonic, rows: as for `Accounts`."""

    def __init__(
        self,
        store: Store,
        defaults: Limits,
        wall: Callable[[], float],
        monotonic: Callable[[], float],
        rows: AccountRows | None,
    ) -> None:
        #: refusals by type since start: tunnel_quota_exceeded_total
        self.exceeded: dict[str, int] = dict.fromkeys(TYPES, 0)
        self._store = store
        self._defaults = defaults
        self._rows = rows
        self._wall = wall
        self._monotonic = monotonic
        self._revision = 0  # the newest seen; nothing older is taken over
        self._accounts: dict[str, Account] = {}  # with links, or lately asked for
        self._tokens: dict[str, Seen] = {}  # of these accounts, as far as they were used
        self._usage = UsageWriter(store, self._accounts, wall)

    async def load(self, account_id: str, parent: Visit | None = None) -> Account:
        """The account's one live object. Raises Refused("bad_token") for an unknown one, or StoreError."""
        while True:
            account = self._accounts.get(account_id)
            if account is not None:
                if account.is_deleted:
                    break
                account.seen = self._monotonic()
                return account
            row = await self._rows.take(account_id) if self._rows is not None else None
            account = self._make(account_id, row)
            period = account.period

            def read(conn: sa.Connection, period: str = period) -> tuple[Snapshot, Use]:
                snapshot = records.read_snapshot(conn, [account_id])
                use = records.read_usage_of(conn, [account_id], [period])
                return snapshot, use.get((account_id, period), Use())

            snapshot, use = await self._store.query("account.load", read, parent=parent)
            if snapshot.revision < self._revision or account_id in self._accounts:
                continue  # changed or loaded by another while we read
            record = snapshot.accounts.get(account_id)
            if record is None:
                break
            apply(account, record)
            account.settle(period, use)
            self._accounts[account_id] = account
            self._take_tokens(snapshot, {account_id})
            return account
        raise Refused("bad_token", "the token's account does not exist")

    def _make(self, account_id: str, row: Row | None = None) -> Account:
        options: dict[str, Any] = {
            "exceeded": self.exceeded,
            "defaults": self._defaults,
            "wall": self._wall,
            "monotonic": self._monotonic,
        }
        if row is None:
            return Account(account_id, account_id, **options)
        return SharedAccount(row, account_id, account_id, **options)

    def _take_tokens(self, snapshot: Snapshot, ids: set[str]) -> None:
        for seen in list(self._tokens.values()):
            token = seen.record
            if token.account_id not in ids or seen.revision > snapshot.revision:
                continue
            fresh = snapshot.tokens.get(token.id)
            if fresh is None:
                del self._tokens[token.id]
            else:
                self._tokens[token.id] = Seen(snapshot.revision, fresh)

    def _evict(self) -> None:
        """Forget accounts that nobody uses: no links for a while, draining ones neither, and everything written."""
        now = self._monotonic()
        idle = {
            account.id
            for account in self._accounts.values()
            if not (account.links or account.attached) and account.is_settled() and now - account.seen > _LINGER
        }
        for account_id in idle:
            del self._accounts[account_id]
            if self._rows is not None:
                self._rows.give_back(account_id)
        if idle:  # a token whose account is being loaded just now stays
            self._tokens = {id: seen for id, seen in self._tokens.items() if seen.record.account_id not in idle}


def apply(account: Account, record: AccountRecord) -> None:
    account.name = record.name
    account.is_disabled = record.is_disabled
    if account.limits != record.limits:
        account.set_limits(record.limits)
