"""Limits: what passes, what is refused, how long to wait; and the month."""

import math
from typing import Any

import pytest

from tunnel.core.quotas import (
    MAX_LINKS_EACH,
    MONTHS,
    TYPES,
    Account,
    Limits,
    QuotaFailure,
    Use,
    beginning_of,
    default_limits,
    month_of,
    over_limit,
)
from tunnel.errors import Failure, Refused

NOVEMBER_END = 1_796_083_200.0  # 2026-12-01T00:00:00Z


@pytest.fixture
def make(wall: Any, ticks: Any) -> Any:
    def make(default_links: int | None = None, **limits: Any) -> Account:
        return Account(
            "acme-1",
            "acme",
            Limits(**limits),
            defaults=Limits(max_connections=default_links),
            wall=wall,
            monotonic=ticks,
        )

    return make


def refused(account: Account) -> QuotaFailure:
    with pytest.raises(Failure) as caught:
        account.admit_request()
    assert isinstance(caught.value, QuotaFailure)
    assert caught.value.outcome == "quota"
    return caught.value


def test_months() -> None:
    assert month_of(NOVEMBER_END - 0.001) == ("2026-11", NOVEMBER_END)
    assert month_of(NOVEMBER_END)[0] == "2026-12"
    assert month_of(month_of(NOVEMBER_END)[1])[0] == "2027-01"
    assert beginning_of("2026-12") == NOVEMBER_END


def test_a_fresh_account_has_no_limits(make: Any) -> None:
    account = make()
    for _ in range(10_000):
        account.admit_request()
        assert account.take_bytes(1 << 30, 1 << 30) == 0.0
    for _ in range(2000):
        account.admit_link()
    assert [(row.type, row.usage, row.limit) for row in account.quotas()] == [
        ("connection", 2000, math.inf), ("bandwidth", 20_000 << 30, math.inf), ("requests", 10_000, math.inf),
        ("names", 0, math.inf), ("ports", 0, math.inf),
    ]  # fmt: skip


def test_links(make: Any) -> None:
    account = make(max_connections=2)
    account.admit_link()
    account.admit_link()
    with pytest.raises(
        Refused, match=r"limit of 2 agents is reached: end some, or ask .*account limit acme -connections N"
    ) as caught:
        account.admit_link()
    assert caught.value.reason == "connection_quota"
    assert account.exceeded == {**dict.fromkeys(TYPES, 0), "connection": 1}
    account.drop_link()
    account.admit_link()
    assert account.links == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((1000, -1, 10_000, 100), (900, 10_000, 100)),
        ((1, -1, 1, 1), (1, 1, 1)),  # never less than one
        ((2, -1, 0, 0), (2, math.inf, math.inf)),
        ((10, -1, 0, 0), (9, math.inf, math.inf)),
        ((1000, 0, 5, 0), (math.inf, 5, math.inf)),
        ((1000, 7, 0, 5), (7, math.inf, 5)),
    ],
)
def test_limits_at_a_time_of_an_account_without_its_own(
    flags: tuple[int, int, int, int], expected: tuple[float, float, float]
) -> None:
    account = Account("a", "a", defaults=default_limits(*flags))
    assert (account.link_limit, account.name_limit, account.port_limit) == expected
    account.set_limits(Limits(max_connections=0, max_names=0, max_ports=1))
    assert (account.link_limit, account.name_limit, account.port_limit) == (0, 0, 1)


@pytest.mark.parametrize(
    ("type", "most", "said"),
    [
        ("connection", 1, "limit of 1 agent is reached"), ("connection", 2, "limit of 2 agents is reached"),
        ("names", 1, "limit of 1 name, in use or held, is reached"), ("ports", 1, "limit of 1 TCP port is reached"),
    ],
)  # fmt: skip
def test_one_is_not_several(type: str, most: int, said: str) -> None:
    assert said in over_limit(type, most, "acme")


def test_the_default_limit_of_links(make: Any) -> None:
    account = make(default_links=1)
    account.admit_link()
    with pytest.raises(Refused):
        account.admit_link()
    account.set_limits(Limits(max_connections=2))
    account.admit_link()
    assert account.quotas()[0].limit == 2


def test_requests_a_second_with_burst(make: Any, ticks: Any) -> None:
    account = make(requests_per_second=10, requests_burst=5)
    for _ in range(5):
        account.admit_request()
    failure = refused(account)
    assert failure.quota == "requests"
    assert failure.retry_after == pytest.approx(0.1)
    ticks.now += failure.retry_after
    account.admit_request()
    refused(account)
    assert account.requests == 6  # the refused ones are not use
    assert account.exceeded["requests"] == 2
    ticks.now += 3600
    for _ in range(5):
        account.admit_request()
    refused(account)


def test_the_rate_holds_over_time(make: Any, ticks: Any) -> None:
    account = make(requests_per_second=100)
    admitted = 0
    for _ in range(10_000):  # 1,000 a second for 10 s
        ticks.now += 0.001
        try:
            account.admit_request()
            admitted += 1
        except Failure:
            pass
    assert 1000 <= admitted <= 1000 + 200 + 1  # the burst is twice the rate


@pytest.mark.parametrize(
    ("rate", "burst", "at_once"), [(0.5, None, 1), (1, None, 2), (3, None, 6), (10, 1, 1), (0.1, 4, 4)]
)
def test_bursts(make: Any, rate: float, burst: int | None, at_once: int) -> None:
    account = make(requests_per_second=rate, requests_burst=burst)
    for _ in range(at_once):
        account.admit_request()
    assert refused(account).retry_after == pytest.approx(1 / rate)


def test_requests_a_month(make: Any, wall: Any) -> None:
    account = make(requests_per_month=3)
    account.settle("2026-11", Use(1, 0, 0))
    account.admit_request()
    account.admit_request()
    failure = refused(account)
    assert failure.quota == "requests"
    assert failure.retry_after == NOVEMBER_END - wall.now
    assert "3 requests a month" in failure.text
    wall.now = NOVEMBER_END
    account.admit_request()
    assert account.month_requests == 1


def test_a_clock_that_was_set_forward_and_back(make: Any, wall: Any) -> None:
    """The month that it came back to goes on where it was, and ends when it does."""
    account, began = make(requests_per_month=3), wall.now
    for _ in range(3):
        account.admit_request()
    assert account.take() == {"2026-11": Use(3, 0, 0)}
    for _ in range(3):
        wall.now = NOVEMBER_END + 3600
        account.roll(wall.now)
        wall.now = began
        assert refused(account).retry_after == NOVEMBER_END - began
        assert account.month_requests == 3
    account.settle("2026-11", Use(2, 0, 0))
    account.admit_request()
    assert account.take() == {"2026-11": Use(1, 0, 0)}
    wall.now = NOVEMBER_END
    account.admit_request()
    assert (account.period, account.month_requests) == ("2026-12", 1)
    for month in range(24):
        wall.now = NOVEMBER_END + month * 31 * 86400
        account.roll(wall.now)
    assert len(account._months) <= MONTHS


def test_bytes_a_month(make: Any, wall: Any) -> None:
    account = make(bandwidth_bytes_per_month=1000)
    account.admit_request()
    account.take_bytes(400, 700)  # a stream under way is not broken off
    failure = refused(account)
    assert failure.quota == "bandwidth"
    assert failure.retry_after == NOVEMBER_END - wall.now
    assert account.exceeded == {**dict.fromkeys(TYPES, 0), "bandwidth": 1}
    wall.now = NOVEMBER_END + 1
    account.admit_request()


def test_bandwidth_holds_within_five_percent(make: Any, ticks: Any) -> None:
    rate = 10 << 20
    account = make(bandwidth_bytes_per_second=rate)
    begin, sent = ticks.now, 0
    while ticks.now - begin < 10:
        sent += 65536
        ticks.now += account.take_bytes(0, 65536)
    assert sent / (ticks.now - begin) == pytest.approx(rate, rel=0.05)


def test_bandwidth_is_shared_by_streams(make: Any, ticks: Any) -> None:
    rate = 1 << 20
    account = make(bandwidth_bytes_per_second=rate)
    begin = ticks.now
    ready = [begin] * 8
    sent = [0] * 8
    while min(ready) - begin < 20:
        stream = ready.index(min(ready))
        ticks.now = max(ticks.now, ready[stream])
        sent[stream] += 16384
        ready[stream] = ticks.now + account.take_bytes(16384, 0)
    assert sum(sent) / 20 == pytest.approx(rate, rel=0.05)
    assert max(sent) < 1.2 * min(sent)


def test_a_pause_buys_a_quarter_of_a_second(make: Any, ticks: Any) -> None:
    account = make(bandwidth_bytes_per_second=1000)
    ticks.now += 3600
    assert account.take_bytes(250, 0) == 0.0
    assert account.take_bytes(0, 1000) == pytest.approx(1.0)
    assert account.take_bytes(0, 0) == pytest.approx(1.0)


def test_who_comes_while_much_is_owed_is_refused_and_adds_nothing(make: Any, ticks: Any) -> None:
    account = make(bandwidth_bytes_per_second=1000)
    account.take_bytes(9000, 1000)
    account.admit_request()
    assert account.take_bytes(1000, 0) == pytest.approx(10.75)
    failure = refused(account)
    assert (failure.quota, failure.text) == ("bandwidth", "The limit of 1000 bytes a second is reached.")
    assert failure.retry_after == pytest.approx(0.75)
    assert account.exceeded == {**dict.fromkeys(TYPES, 0), "bandwidth": 1}
    ticks.now += 0.76
    account.admit_request()


def test_small_debts_are_kept_not_waited_for(make: Any) -> None:
    account = make(bandwidth_bytes_per_second=1_000_000)
    account.take_bytes(250_000, 0)
    assert account.take_bytes(4000, 0) == 0.0
    assert account.take_bytes(4000, 0) == pytest.approx(0.008)


def test_new_limits_hold_at_once(make: Any) -> None:
    account = make(requests_per_second=0.001, bandwidth_bytes_per_second=1)
    account.admit_request()
    refused(account)
    assert account.take_bytes(0, 1000) > 900
    account.set_limits(Limits())
    account.admit_request()
    assert account.take_bytes(0, 1000) == 0.0


def test_a_limit_of_nothing_lets_nothing_pass_for_long(make: Any) -> None:
    account = make(requests_per_second=0.0, bandwidth_bytes_per_second=0)
    account.admit_request()
    assert refused(account).retry_after > 1e6
    assert account.take_bytes(0, 1000) > 900


def test_use_is_taken_once_and_by_month(make: Any, wall: Any) -> None:
    account = make()
    account.admit_request()
    account.take_bytes(10, 20)
    assert account.take() == {"2026-11": Use(1, 10, 20)}
    assert account.take() == {}
    assert account.is_settled()
    account.admit_request()
    account.take_bytes(1, 2)
    wall.now = NOVEMBER_END
    account.roll(wall.now)
    assert not account.is_settled()
    assert (account.month_requests, account.month_bytes) == (0, 0)
    account.admit_request()
    assert account.take() == {"2026-11": Use(1, 1, 2), "2026-12": Use(1, 0, 0)}
    account.settle("2026-11", Use(100, 100, 100))  # late news of the old month
    assert account.month_requests == 1


def test_settling_brings_in_other_cores_use(make: Any) -> None:
    account = make(requests_per_month=100)
    account.admit_request()
    account.take()
    account.admit_request()  # counted while the batch was on its way
    account.settle("2026-11", Use(50, 7, 8))
    assert (account.month_requests, account.month_bytes) == (51, 15)


def test_all_links_of_an_agent_are_one_connection(make: Any) -> None:
    account = make(max_connections=1)
    for _ in range(MAX_LINKS_EACH):
        account.admit_link("run-1")
    assert (account.links, account.agents) == (MAX_LINKS_EACH, 1)
    with pytest.raises(Refused, match=f"already has {MAX_LINKS_EACH} links"):
        account.admit_link("run-1")
    for other in ("run-2", ""):
        with pytest.raises(Refused, match="limit of 1 agent is reached"):
            account.admit_link(other)
    assert account.quotas()[0].usage == 1
    for _ in range(MAX_LINKS_EACH):
        account.drop_link("run-1")
    assert (account.links, account.agents) == (0, 0)
    account.admit_link()
    with pytest.raises(Refused):
        account.admit_link("run-2")
    account.drop_link()
    account.admit_link("run-2")
