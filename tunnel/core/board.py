"""Memory that all workers of a core see, so that limits hold over all of them: exactly, and without asking anybody.

The supervisor makes it (an anonymous file), and each worker maps it. Three parts:

- *counts*, a table of its own for each worker: connections in all, and by address. Only the worker writes there, all
  read and add up; one that looks for room holds the lock of its kind until it has counted itself;
- *times*, one table for all: until when an address has used up its rate;
- *accounts*, a row of 64 bytes for each that is in use; the supervisor gives rows out.

What several may write is changed under a lock on its bytes (fcntl(2): about 1 µs, and the kernel gives it back for a
worker that is killed). Addresses are cells of a table by a keyed hash: two of them share a cell once in CELLS, and no
one can choose which. Times are CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2s

CELLS = 1 << 16
ACCOUNTS = 1 << 16  #: rows; an account that finds none is limited by each worker alone
ROW = 64

_TOTAL = 64  # bytes for a worker's total, on a line of its own
_COUNTS = _TOTAL + 4 * CELLS
_TIMES = 8 * CELLS
_U32, _U64, _F64 = struct.Struct("=I"), struct.Struct("=Q"), struct.Struct("=d")

# What is counted by worker, and what is kept for all
VISITORS, GUESTS = 0, 1
AGENT_HANDSHAKES, VISITOR_HANDSHAKES = 0, 1


class Board:
    """file: of `make_board`. worker: whose counts these are, out of `workers`; -1 for the supervisor. key: for hashing
    addresses."""

    def __init__(self, file: int, workers: int, worker: int, key: bytes) -> None:
        self._file = file
        self._key = key
        self._map = mmap.mmap(file, size_of(workers))
        self._own = worker
        self._others = [number for number in range(workers) if number != worker]
        self._times_at = 2 * workers * _COUNTS
        self._accounts_at = self._times_at + 2 * _TIMES

    def cell_of(self, text: str) -> int:
        return int.from_bytes(blake2s(text.encode(), key=self._key, digest_size=4).digest(), "big") % CELLS

    @contextmanager
    def locked(self, at: int, size: int) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_EX, size, at)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, size, at)

    # Counts -----------------------------------------------------------------------------------------------------

    def _counts_at(self, worker: int, kind: int) -> int:
        return (2 * worker + kind) * _COUNTS

    def clear_counts(self, worker: int) -> None:
        """It has ended, and its connections with it."""
        for kind in (VISITORS, GUESTS):
            start = self._counts_at(worker, kind)
            self._map[start : start + _COUNTS] = bytes(_COUNTS)

    @contextmanager
    def deciding(self, kind: int) -> Iterator[None]:
        """Held while a worker looks whether there is room for one more, and counts it: between the two no other may."""
        with self.locked(self._counts_at(0, kind), 1):
            yield

    def write_total(self, kind: int, count: int) -> None:
        _U64.pack_into(self._map, self._counts_at(self._own, kind), count)

    def add_count(self, kind: int, cell: int, change: int) -> None:
        at = self._counts_at(self._own, kind) + _TOTAL + 4 * cell
        _U32.pack_into(self._map, at, _U32.unpack_from(self._map, at)[0] + change)

    def total_elsewhere(self, kind: int) -> int:
        return sum(_U64.unpack_from(self._map, self._counts_at(other, kind))[0] for other in self._others)

    def least_elsewhere(self, kind: int) -> int:
        least: int = min(_U64.unpack_from(self._map, self._counts_at(other, kind))[0] for other in self._others)
        return least

    def count_elsewhere(self, kind: int, cell: int) -> int:
        place = _TOTAL + 4 * cell
        return sum(_U32.unpack_from(self._map, self._counts_at(other, kind) + place)[0] for other in self._others)

    # Times ------------------------------------------------------------------------------------------------------

    def pay(self, kind: int, cell: int, cost: float, now: float, burst: float) -> bool:
        """Take one from an address' rate, if it is free; `burst`: seconds that may be used at once."""
        at = self._times_at + kind * _TIMES + 8 * cell
        with self.locked(at, 8):
            paid = max(_F64.unpack_from(self._map, at)[0], now - burst) + cost
            if paid > now + 1e-9:
                return False
            _F64.pack_into(self._map, at, paid)
            return True

    # Accounts ---------------------------------------------------------------------------------------------------

    def row(self, number: int) -> Row:
        return Row(self, self._map, self._accounts_at + number * ROW)


class Row:
    """An account's part. Read and write it within `locked`.

    requests_paid, bytes_paid: times, as in Account. limits: which these hold for. period: the month as YYYYMM, and
    what was used in it.
    """

    __slots__ = ("_at", "_board", "_map")

    def __init__(self, board: Board, map: mmap.mmap, at: int) -> None:
        self._board = board
        self._map = map
        self._at = at

    @contextmanager
    def locked(self) -> Iterator[None]:
        with self._board.locked(self._at, ROW):
            yield

    def read_times(self) -> tuple[float, float]:
        requests, bytes_ = _TIMES_ROW.unpack_from(self._map, self._at)
        return requests, bytes_

    def write_times(self, requests_paid: float, bytes_paid: float) -> None:
        _TIMES_ROW.pack_into(self._map, self._at, requests_paid, bytes_paid)

    def read_month(self) -> tuple[int, int, int]:
        """(period, requests, bytes)"""
        period, requests, bytes_ = _MONTH_ROW.unpack_from(self._map, self._at + 16)
        return period, requests, bytes_

    def write_month(self, period: int, requests: int, bytes_: int) -> None:
        _MONTH_ROW.pack_into(self._map, self._at + 16, period, requests, bytes_)

    def read_limits(self) -> int:
        limits: int = _U64.unpack_from(self._map, self._at + 40)[0]
        return limits

    def write_limits(self, limits: int) -> None:
        _U64.pack_into(self._map, self._at + 40, limits)

    def clear(self) -> None:
        """For an account that has not had it before."""
        self._map[self._at : self._at + ROW] = bytes(ROW)


_TIMES_ROW = struct.Struct("=dd")
_MONTH_ROW = struct.Struct("=QQQ")


def size_of(workers: int) -> int:
    return 2 * workers * _COUNTS + 2 * _TIMES + ACCOUNTS * ROW


def make_board(workers: int) -> int:
    """A file of zeros in memory, for `Board`. What nobody has written takes no memory."""
    file = os.memfd_create("tunnel-board")
    os.truncate(file, size_of(workers))
    return file


class Rows:
    """Which account has which row, in the supervisor."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._rows: dict[str, int] = {}
        self._users: dict[str, set[str]] = {}
        self._free: list[int] = []
        self._next = 0

    def take(self, user: str, account_id: str) -> int:
        """The account's row, -1 if there is none. user: the worker that uses it."""
        if account_id not in self._rows:
            if self._free:
                number = self._free.pop()
            elif self._next < ACCOUNTS:
                number, self._next = self._next, self._next + 1
            else:
                return -1
            self._rows[account_id] = number
            self._board.row(number).clear()
        self._users.setdefault(account_id, set()).add(user)
        return self._rows[account_id]

    def give_back(self, user: str, account_id: str) -> None:
        users = self._users.get(account_id, set())
        users.discard(user)
        if not users and account_id in self._rows:
            del self._users[account_id]
            self._free.append(self._rows.pop(account_id))

    def drop(self, user: str) -> None:
        """The worker has ended."""
        for account_id in [account_id for account_id, users in self._users.items() if user in users]:
            self.give_back(user, account_id)
