"""Limits that several workers keep together (tunnel/core/board.py): quotas, visitors' connections, handshakes.

Each is what a single core has, with its numbers in the common memory. Rates and budgets are exact over all workers.
What stays each worker's own: how long refused logins wait, and its part of `-max-attaching` and `-max-buffer`, which
bound a process' memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from time import monotonic
from typing import TYPE_CHECKING, Any
from zlib import crc32

from tunnel.config import CoreSettings
from tunnel.core.board import Board, Row
from tunnel.core.limits import Clock, Rate, Shares, network_of
from tunnel.core.quotas import Account, Limits, Use
from tunnel.handler import QuotaStatistics

if TYPE_CHECKING:
    from tunnel.core.siblings import Siblings

SLACK = 2  #: connections that a worker may have more than another before it leaves the next one to that
PAUSE = 0.001  #: seconds that it waits then, once


class SharedAccount(Account):
    """An account whose rates and whose use of the month are those of all workers. An account without limits costs
    what it always does."""

    __slots__ = ("_counts_month", "_is_made", "_row")

    def __init__(self, row: Row, id: str, name: str, **options: Any) -> None:
        self._row = row
        self._counts_month = self._is_made = False
        super().__init__(id, name, **options)
        self._is_made = True  # from here on what is set is for all

    # Its numbers, where `Account` has its own

    @property
    def _requests_paid(self) -> float:
        return self._row.read_times()[0]

    @_requests_paid.setter
    def _requests_paid(self, value: float) -> None:
        if self._is_made:
            self._row.write_times(value, self._row.read_times()[1])

    @property
    def _bytes_paid(self) -> float:
        return self._row.read_times()[1]

    @_bytes_paid.setter
    def _bytes_paid(self, value: float) -> None:
        if self._is_made:
            self._row.write_times(self._row.read_times()[0], value)

    @property
    def month_requests(self) -> int:
        return self._read_month()[0] if self._counts_month else super().month_requests

    @property
    def month_bytes(self) -> int:
        return self._read_month()[1] if self._counts_month else super().month_bytes

    def _read_month(self) -> tuple[int, int]:
        period, requests, bytes_ = self._row.read_month()
        return (requests, bytes_) if period == self._period_number else self._own_month()

    def _own_month(self) -> tuple[int, int]:
        """What is known here of a month that nobody has begun yet."""
        return super().month_requests, super().month_bytes

    @property
    def _period_number(self) -> int:
        return int(self.period.replace("-", ""))

    def _add_month(self, requests: int, bytes_: int) -> None:
        known = self._read_month()
        self._row.write_month(self._period_number, known[0] + requests, known[1] + bytes_)

    # What changes them

    def set_limits(self, limits: Limits) -> None:
        """The first worker that hears of new limits forgets the old debts, for all."""
        if not self._is_made:
            super().set_limits(limits)
            return
        number = crc32(repr(limits).encode()) + 1
        with self._row.locked():
            times = self._row.read_times()
            super().set_limits(limits)
            if self._row.read_limits() == number:
                self._row.write_times(*times)
            elif limits != Limits():
                self._row.write_limits(number)
            was_counted = self._counts_month
            self._counts_month = limits.requests_per_month is not None or limits.bandwidth_bytes_per_month is not None
            if self._counts_month and not was_counted:
                self._raise_month(*self._own_month())

    def settle(self, period: str, stored: Use) -> None:
        super().settle(period, stored)
        if self._counts_month and period == self.period:
            with self._row.locked():
                self._raise_month(stored.requests, stored.bytes_in + stored.bytes_out)

    def _raise_month(self, requests: int, bytes_: int) -> None:
        """Others, on other machines, may have used more than is known here."""
        known = self._read_month()
        self._row.write_month(self._period_number, max(known[0], requests), max(known[1], bytes_))

    def admit_request(self) -> None:
        if not self._is_limited:
            self.requests += 1
            return
        with self._row.locked():
            self._check_request()
            if self._counts_month:
                self._add_month(1, 0)
            self.requests += 1

    def take_bytes(self, n_in: int, n_out: int) -> float:
        if not (self._byte_cost or self._counts_month):
            return super().take_bytes(n_in, n_out)
        with self._row.locked():
            if self._counts_month:
                self.roll(self._wall())  # all write the same month
                self._add_month(0, n_in + n_out)
            return super().take_bytes(n_in, n_out)

    def quotas(self, names: int = 0, ports: int = 0) -> list[QuotaStatistics]:
        rows = super().quotas(names, ports)
        if self._counts_month:
            for row in rows:
                row.pending = 0  # all that is known is in the common number
        return rows


class SharedShares(Shares):
    """kind: of tunnel.core.board, what is counted."""

    def __init__(self, most: int, most_each: int, board: Board, kind: int) -> None:
        super().__init__(most, most_each)
        self._board = board
        self._kind = kind

    def _alone(self) -> AbstractContextManager[None]:
        return self._board.deciding(self._kind)

    def _elsewhere(self, key: str) -> tuple[int, int]:
        board, kind = self._board, self._kind
        return board.total_elsewhere(kind), board.count_elsewhere(kind, board.cell_of(key))

    def turn(self) -> float:
        """The seconds to leave the next connection to a worker that has less to do. Without this the first one that
        wakes takes all that come together, and keeps them as long as they last."""
        return PAUSE if self.total > self._board.least_elsewhere(self._kind) + SLACK else 0.0

    def _note(self, key: str, change: int) -> None:
        self._board.write_total(self._kind, self.total)
        self._board.add_count(self._kind, self._board.cell_of(key), change)


class SharedRate(Rate):
    """kind: of tunnel.core.board, what takes place."""

    def __init__(self, per_second: float, board: Board, kind: int, clock: Clock = monotonic) -> None:
        super().__init__(per_second, clock=clock)
        self._board = board
        self._kind = kind

    def take(self, address: str) -> bool:
        if not self._cost:
            return True
        cell = self._board.cell_of(network_of(address))
        return self._board.pay(self._kind, cell, self._cost, self._clock(), self._burst)


class Common:
    """Of each limit the kind that one process needs, or one of several. siblings: None where this process is the whole
    core. kind: of tunnel.core.board, what is counted."""

    def __init__(self, settings: CoreSettings, siblings: Siblings | None) -> None:
        self._settings = settings
        self._siblings = siblings

    def part(self, limit: int) -> int:
        """Of a limit on this process' memory, its part."""
        return limit if self._siblings is None else -(-limit // self._siblings.count)

    def shares(self, kind: int, most: int) -> Shares:
        most_each = self._settings.max_visitors_per_address
        if self._siblings is None:
            return Shares(most, most_each)
        return SharedShares(most, most_each, self._siblings.board, kind)

    def rate(self, kind: int) -> Rate:
        most = self._settings.max_handshakes
        return Rate(most) if self._siblings is None else SharedRate(most, self._siblings.board, kind)
