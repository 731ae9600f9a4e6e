"""Brings what accounts use to the store, in batches; nothing is lost by a failure, nothing added twice.

A batch is cut once and keeps its number until the store has confirmed it. The store notes the number in the
transaction that adds the batch, so one whose confirmation was lost on the way is recognised when it comes again.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio

from tunnel.core import records
from tunnel.core.quotas import Account, Use
from tunnel.core.store import Store


@dataclass(slots=True)
class _Batch:
    number: int
    use: dict[tuple[str, str], Use]  # by (account id, period)
    tokens: dict[str, float]  # token id → last used


class UsageWriter:
    """accounts: the live ones, by id. wall: seconds since 1970."""

    def __init__(self, store: Store, accounts: Mapping[str, Account], wall: Callable[[], float]) -> None:
        self._store = store
        self._accounts = accounts
        self._wall = wall
        self._writer = secrets.token_hex(16)
        self._number = 0
        self._batch: _Batch | None = None  # on its way to the store
        self._tokens: dict[str, float] = {}
        self._flushing = trio.Lock()

    def note_token(self, token_id: str) -> None:
        """The token was used just now."""
        self._tokens[token_id] = self._wall()

    async def flush(self) -> None:
        """Write what failed before, then what was counted since. Raises StoreError."""
        async with self._flushing:
            if self._batch is not None:
                await self._write(self._batch)
            self._batch = self._cut()
            if self._batch is not None:
                await self._write(self._batch)

    def unwritten(self) -> Use:
        """What the store has not confirmed, to be said of a program that ends. Nothing is counted any more."""
        batches = [self._batch, self._cut()]
        total = Use()
        for batch in batches:
            for use in batch.use.values() if batch is not None else ():
                total.add(use)
        return total

    def _cut(self) -> _Batch | None:
        use: dict[tuple[str, str], Use] = {}
        wall = self._wall()
        for account in self._accounts.values():
            account.roll(wall)
            for period, part in account.take().items():
                use[account.id, period] = part
        if not use and not self._tokens:
            return None
        self._number += 1
        tokens, self._tokens = self._tokens, {}
        return _Batch(self._number, use, tokens)

    async def _write(self, batch: _Batch) -> None:
        wall = self._wall()
        stored = await self._store.query(
            "usage.add",
            lambda conn: records.add_usage(conn, self._writer, batch.number, batch.use, batch.tokens, wall),
            write=True,
        )
        self._batch = None
        for (account_id, period), use in stored.items():
            account = self._accounts.get(account_id)
            if account is not None:
                account.settle(period, use)
