"""The store as a running core uses it: every query in a thread, seen by the layers, safe to cancel.

A query is a function of a connection (they stand in `records.py`) with a name from OPERATIONS. `Store.query` runs it
in one transaction, on a thread, as the handler of a QueryVisit, so metrics and tracing see each query that is really
made. Threads are bounded by the store's own limiters: one writer for SQLite (more would only wait for its lock), some
readers; on PostgreSQL both share one.

Cancellation: a read is abandoned (its thread ends by itself), so an authentication's time-out holds while the
database hangs. A write is waited for: its transaction has then ended one way or the other. Only a program that ends
does not wait for ever: `end_by`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
import trio

from tunnel.core.database import READERS, Database, StoreError
from tunnel.handler import Layer, QueryVisit, Visit, wrap

__all__ = ["OPERATIONS", "Store", "StoreError"]

T = TypeVar("T")

#: the closed set of a query's names: the label `operation` of tunnel_db_query_duration_seconds, `db.operation.name`
OPERATIONS = (
    "store.open",
    "account.default",
    "account.load",
    "accounts.refresh",
    "name.claim",
    "name.owner",
    "name.release",
    "name.reserved",
    "name.touch",
    "revision.read",
    "token.find",
    "usage.add",
)
_KNOWN = frozenset(OPERATIONS)


class _Query(QueryVisit, kw_only=True):
    work: Callable[[], Any]
    write: bool
    result: Any = None


class Store:
    """url: see `database.Database`; "" is SQLite in data_dir. Raises ConfigError for a URL that cannot be used."""

    def __init__(self, url: str, data_dir: Path, query_layers: Sequence[Layer] = ()) -> None:
        self.database = Database(url, data_dir)
        self._handle = wrap(self._run, query_layers)
        if self.system == "sqlite":
            self._readers, self._writers = trio.CapacityLimiter(READERS), trio.CapacityLimiter(1)
        else:
            self._readers = self._writers = trio.CapacityLimiter(READERS * 2)
        self._threads = trio.CapacityLimiter(math.inf)  # of those that write, which `_writers` counts
        self._until = math.inf
        self._writing: set[trio.CancelScope] = set()

    @property
    def system(self) -> str:
        """ "sqlite" or "postgresql"."""
        return self.database.system

    async def open(self) -> None:
        """Create and migrate what is missing. Raises StoreError where it is away; ConfigError: unusable, or too new."""
        await self._ask(_Query("store.open", self.system, work=self.database.open, write=True))

    async def close(self) -> None:
        """Close the idle connections. A query after that opens new ones."""
        await trio.to_thread.run_sync(self.database.close, abandon_on_cancel=True)

    def end_by(self, until: float) -> None:
        """The program ends: from then on (trio's clock) no write is waited for, nor one under way, nor for its turn.
        They raise StoreError, and whether they have come to anything is not known."""
        self._until = min(self._until, until)
        for scope in self._writing:
            scope.deadline = self._until

    async def query(
        self,
        operation: str,
        work: Callable[[sa.Connection], T],
        *,
        write: bool = False,
        parent: Visit | None = None,
    ) -> T:
        """Run `work` in one transaction and return what it returns; what it raises rolls back and comes out here.

        operation: of OPERATIONS. parent: the visit that needs it. Raises StoreError when the database fails.
        """
        if operation not in _KNOWN:
            raise ValueError(f"unknown operation {operation!r}")

        def transact() -> T:
            with self.database.transaction(write=write) as conn:
                return work(conn)

        result: T = await self._ask(_Query(operation, self.system, parent=parent, work=transact, write=write))
        return result

    async def _ask(self, visit: _Query) -> Any:
        try:
            await self._handle(visit)
            return visit.result
        finally:
            visit.raised = None  # or traceback and visit would keep each other alive
            visit.result = None

    async def _run(self, visit: _Query) -> None:
        try:
            if visit.write:
                await self._write(visit)
            else:
                visit.result = await trio.to_thread.run_sync(visit.work, abandon_on_cancel=True, limiter=self._readers)
        except trio.Cancelled:
            visit.outcome = "visitor_aborted"
            raise
        except Exception as exc:
            visit.outcome = "internal"
            visit.error = str(exc)
            raise
        visit.outcome = "ok"

    async def _write(self, visit: _Query) -> None:
        with trio.CancelScope(deadline=self._until) as scope:
            self._writing.add(scope)
            try:
                async with self._writers:  # reads that were given up may keep the places of all
                    scope.shield = True
                    visit.result = await trio.to_thread.run_sync(
                        visit.work, abandon_on_cancel=True, limiter=self._threads
                    )
            finally:
                self._writing.discard(scope)
        if scope.cancelled_caught:
            raise StoreError(f"the store {self.database.name} did not answer before this program had to end")
