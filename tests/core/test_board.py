"""Limits kept by several workers together: two workers' views of one board, in one process and in several."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tunnel.core.board import ACCOUNTS, CELLS, VISITOR_HANDSHAKES, VISITORS, Board, Rows, make_board, size_of
from tunnel.core.limits import Shares
from tunnel.core.quotas import Account, Limits, QuotaFailure, Use
from tunnel.core.shared import PAUSE, SLACK, SharedAccount, SharedRate, SharedShares
from tunnel.errors import Failure

KEY = bytes(16)


@pytest.fixture
def boards() -> Iterator[list[Board]]:
    file = make_board(2)
    yield [Board(file, 2, number, KEY) for number in range(2)]
    os.close(file)


@pytest.fixture
def two(boards: list[Board], wall: Any, ticks: Any) -> Any:
    """An account as two workers have it."""

    def make(**limits: Any) -> list[SharedAccount]:
        accounts = [SharedAccount(board.row(7), "acme-1", "acme", wall=wall, monotonic=ticks) for board in boards]
        for account in accounts:
            account.set_limits(Limits(**limits))
        return accounts

    return make


def passes(account: Account) -> bool:
    try:
        account.admit_request()
    except Failure as exc:
        assert isinstance(exc, QuotaFailure)
        return False
    return True


def test_a_rate_is_the_rate_of_all(two: Any, ticks: Any) -> None:
    first, second = two(requests_per_second=10, requests_burst=4)
    assert [passes(one) for one in (first, second, first, second)] == [True] * 4
    assert not passes(first) and not passes(second)
    ticks.now += 0.1
    assert passes(second) and not passes(first)
    with pytest.raises(QuotaFailure) as caught:
        first.admit_request()
    assert math.isclose(caught.value.retry_after, 0.1)


def test_a_bandwidth_is_the_bandwidth_of_all(two: Any, ticks: Any) -> None:
    first, second = two(bandwidth_bytes_per_second=1000)
    assert first.take_bytes(250, 0) == 0  # the burst
    assert math.isclose(second.take_bytes(0, 500), 0.5)
    assert math.isclose(first.take_bytes(500, 0), 1.0)
    ticks.now += 0.5
    assert math.isclose(second.take_bytes(0, 100), 0.6)


def test_a_worker_that_comes_later_forgives_no_debts(two: Any, boards: list[Board], wall: Any, ticks: Any) -> None:
    first, second = two(requests_per_second=1, requests_burst=2)
    assert passes(first) and passes(second) and not passes(first)
    late = SharedAccount(boards[1].row(7), "acme-1", "acme", wall=wall, monotonic=ticks)
    late.set_limits(Limits(requests_per_second=1, requests_burst=2))
    assert not passes(late) and not passes(first)
    # New limits do, once: for the worker that hears of them first.
    fresh = Limits(requests_per_second=1, requests_burst=3)
    first.set_limits(fresh)
    assert [passes(first) for _ in range(4)] == [True, True, True, False]
    second.set_limits(fresh)
    assert not passes(second)


def test_a_month_is_the_month_of_all(two: Any, wall: Any) -> None:
    first, second = two(requests_per_month=5, bandwidth_bytes_per_month=1000)
    first.settle(first.period, Use(1, 0, 0))
    second.settle(second.period, Use(1, 0, 0))
    assert [passes(one) for one in (first, second, first, second, first)] == [True, True, True, True, False]
    assert first.month_requests == second.month_requests == 5
    # What the store says after each has written its part is never less than what is known, and adds what others used.
    first.settle(first.period, Use(3, 0, 0))
    assert first.month_requests == 5
    second.settle(second.period, Use(9, 0, 0))
    assert first.month_requests == 9
    rows = {row.type: row for row in first.quotas()}
    assert (rows["requests"].usage, rows["requests"].pending) == (9, 0)
    first.take_bytes(400, 100)
    second.take_bytes(0, 500)
    assert first.month_bytes == second.month_bytes == 1000
    wall.now = 1_796_083_200.0  # December
    assert passes(first) and passes(second)
    assert first.month_requests == 2 and second.month_bytes == 0


def test_without_limits_nothing_is_shared(two: Any, boards: list[Board]) -> None:
    first, second = two()
    for _ in range(100):
        first.admit_request()
    assert first.take_bytes(1 << 30, 0) == 0
    assert (first.month_requests, second.month_requests) == (100, 0)
    assert boards[0].row(7).read_month() == (0, 0, 0)
    [_, bandwidth, requests, *_] = first.quotas()
    assert (requests.usage, requests.pending, bandwidth.pending) == (100, 100, 1 << 30)


HAMMER = """
import sys, time
from tunnel.core.board import Board
from tunnel.core.quotas import Limits, QuotaFailure
from tunnel.core.shared import SharedAccount
board = Board(int(sys.argv[1]), 3, int(sys.argv[2]), bytes(16))
account = SharedAccount(board.row(0), "a", "a")
account.set_limits(Limits(requests_per_second=500, requests_burst=100, requests_per_month=1_000_000))
print("ready", flush=True)
until = float(sys.stdin.readline())
admitted = 0
while time.monotonic() < until:
    try:
        account.admit_request()
        admitted += 1
    except QuotaFailure:
        pass
    account.take_bytes(1, 0)
print(admitted, account.requests, account.bytes_in)
"""


def hammer(script: str, file: int) -> list[list[int]]:
    """The numbers that each of three workers prints after a second of it, all at once."""
    import time

    command = [sys.executable, "-c", script, str(file)]
    workers = [
        subprocess.Popen(
            [*command, str(number)], pass_fds=[file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    began = time.monotonic()
    counts = []
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(f"{began + 1}\n")
        worker.stdin.flush()
    for worker in workers:
        out, _ = worker.communicate(timeout=30)
        assert worker.returncode == 0
        counts.append([int(word) for word in out.split()])
    return counts


def test_processes_keep_a_rate_and_lose_no_count() -> None:
    file = make_board(3)
    counts = hammer(HAMMER, file)
    admitted = sum(count[0] for count in counts)
    assert 500 <= admitted <= 100 + 500 * 1.0 + 1
    period, requests, bytes_ = Board(file, 3, -1, KEY).row(0).read_month()
    assert requests == admitted == sum(count[1] for count in counts)
    assert bytes_ == sum(count[2] for count in counts)
    assert period > 202600
    os.close(file)


def test_visitors_are_counted_over_all(boards: list[Board]) -> None:
    first, second = (SharedShares(5, 3, board, VISITORS) for board in boards)
    assert first.enter("192.0.2.1") == second.enter("192.0.2.1") == first.enter("192.0.2.1") == ""
    assert first.enter("192.0.2.1") == second.enter("192.0.2.1") == "connections_per_address"
    assert second.enter("192.0.2.2") == first.enter("2001:db8::1") == ""
    assert first.enter("192.0.2.9") == second.enter("192.0.2.9") == "connections"
    first.leave("192.0.2.1")
    assert second.enter("192.0.2.1") == ""
    boards[0].clear_counts(1)  # the second one has ended
    assert [first.enter(f"192.0.2.{at}") for at in (1, 2, 3, 4)] == ["", "", "", "connections"]


CROWD = """
import sys, time
from tunnel.core.board import VISITORS, Board
from tunnel.core.shared import SharedShares
board = Board(int(sys.argv[1]), 3, int(sys.argv[2]), bytes(16))
shares = SharedShares(0, 4, board, VISITORS)
address, other = "192.0.2.1", f"192.0.2.{2 + int(sys.argv[2])}"
cell = board.cell_of(address)
print("ready", flush=True)
until = float(sys.stdin.readline())
let_in = refused = most = 0
while time.monotonic() < until:
    held = 0
    for at in range(3):
        if at == 2:
            shares.add(other)
            limit = shares.change(other, address)
            if limit:
                shares.leave(other)
        else:
            limit = shares.enter(address)
        held += not limit
        refused += bool(limit)
        with board.deciding(VISITORS):  # else one leaves and another comes while we add up
            most = max(most, shares.count(address) + board.count_elsewhere(VISITORS, cell))
    let_in += held
    for _ in range(held):
        shares.leave(address)
print(let_in, refused, most)
"""


def test_processes_let_no_one_in_too_many() -> None:
    """Each of three holds up to three places of four, as fast as it can."""
    file = make_board(3)
    counts = hammer(CROWD, file)
    assert all(let_in > 100 and refused > 10 for let_in, refused, _ in counts)
    assert max(most for *_, most in counts) == 4
    os.close(file)


def test_who_has_more_leaves_the_next_one_to_others(boards: list[Board]) -> None:
    first, second = (SharedShares(0, 0, board, VISITORS) for board in boards)
    for _ in range(SLACK):
        first.enter("192.0.2.1")
    assert first.turn() == second.turn() == 0
    first.enter("192.0.2.1")
    assert first.turn() == PAUSE and second.turn() == 0
    second.enter("192.0.2.1")
    assert first.turn() == 0
    assert Shares(0, 0).turn is None  # one process has nobody to leave anything to


def test_the_counts_are_those_of_a_table_alone(boards: list[Board]) -> None:
    """One worker by itself decides as `Shares` does."""
    alone, shared = Shares(50, 4), SharedShares(50, 4, boards[0], VISITORS)
    inside: list[str] = []
    for at in range(3000):
        address = f"192.0.2.{(at * at) % 17}"
        if at % 3 == 2 and inside:
            gone = inside.pop(at % len(inside))
            alone.leave(gone)
            shared.leave(gone)
        else:
            limit = alone.enter(address)
            assert shared.enter(address) == limit
            if not limit:
                inside.append(address)
    assert alone.total == shared.total > 10


def test_handshakes_of_an_address(boards: list[Board], ticks: Any) -> None:
    first, second = (SharedRate(1, board, VISITOR_HANDSHAKES, ticks) for board in boards)
    taken = [(first, second)[at % 2].take("192.0.2.1") for at in range(12)]
    assert taken == [True] * 10 + [False] * 2
    assert second.take("192.0.2.2")
    ticks.now += 1
    assert second.take("192.0.2.1") and not first.take("192.0.2.1")
    assert all(SharedRate(0, boards[0], VISITOR_HANDSHAKES, ticks).take("192.0.2.3") for _ in range(100))


def test_rows_are_given_out_and_given_back() -> None:
    file = make_board(1)
    board = Board(file, 1, -1, KEY)
    rows = Rows(board)
    number = rows.take("0.1", "acme")
    assert rows.take("1.2", "acme") == number != rows.take("0.1", "other")
    board.row(number).write_month(202611, 5, 5)
    rows.give_back("0.1", "acme")
    assert rows.take("0.1", "third") != number
    rows.drop("1.2")
    again = rows.take("2.3", "fourth")
    assert again == number and board.row(again).read_month() == (0, 0, 0)
    os.close(file)


def test_cells_spread_and_depend_on_the_key(boards: list[Board]) -> None:
    cells = {boards[0].cell_of(f"192.0.{at // 256}.{at % 256}") for at in range(2000)}
    assert len(cells) > 1900 and max(cells) < CELLS
    assert {boards[1].cell_of("192.0.2.1")} == {boards[0].cell_of("192.0.2.1")}
    file = make_board(2)
    assert any(Board(file, 2, 0, b"another").cell_of(str(at)) != boards[0].cell_of(str(at)) for at in range(9))
    os.close(file)


def test_the_parts_do_not_overlap() -> None:
    file = make_board(4)
    board = Board(file, 4, 3, KEY)
    board.add_count(1, CELLS - 1, 1)
    assert board.pay(1, CELLS - 1, 1.0, 100.0, 10.0)
    board.row(ACCOUNTS - 1).write_limits(1)
    board.row(0).write_times(1, 2)
    assert os.fstat(file).st_size == size_of(4)
    assert board.row(1).read_times() == (0, 0)
    assert Board(file, 4, 0, KEY).count_elsewhere(1, CELLS - 1) == 1
    assert Board(file, 4, 0, KEY).total_elsewhere(1) == 0
    os.close(file)
