"""The limits' own rooms: how often an address may come, who gives way, how long a refused login waits."""

import math
from typing import Any

import pytest

from tunnel.core import limits
from tunnel.core.limits import (
    FORGIVEN,
    FREE_FAILURES,
    GRACE,
    MAX_ADDRESSES,
    MAX_DELAY,
    Failures,
    Place,
    Rate,
    Shares,
    Waiting,
)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::6", "2001:db8:1:2::/64"),
        ("2001:db8::1", "2001:db8:0:0::/64"),
        ("::1", "0:0:0:0::/64"),
        ("fe80::1:2:3:4", "fe80:0:0:0::/64"),
    ],
)
def test_what_counts_as_one_address(address: str, network: str) -> None:
    assert limits.network_of(address) == network


def test_a_rate_has_a_burst_and_comes_back(ticks: Any) -> None:
    rate = Rate(2, burst=3, clock=ticks)
    assert [rate.take("192.0.2.1") for _ in range(8)] == [True] * 6 + [False] * 2
    assert rate.take("192.0.2.2")
    ticks.now += 0.5
    assert [rate.take("192.0.2.1") for _ in range(2)] == [True, False]
    assert all(Rate(0).take("192.0.2.1") for _ in range(1000))


def test_tables_of_addresses_are_bounded(ticks: Any) -> None:
    rate, failures = Rate(1, clock=ticks), Failures(ticks)
    for number in range(MAX_ADDRESSES + 100):
        rate.take(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        failures.note(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(rate._paid) == len(failures._known) == MAX_ADDRESSES


def test_failures_wait_longer_and_longer_each_address_for_itself(ticks: Any) -> None:
    failures = Failures(ticks)
    waits = [failures.note("192.0.2.1") for _ in range(FREE_FAILURES + 10)]
    assert waits[:FREE_FAILURES] == [0] * FREE_FAILURES
    assert waits[FREE_FAILURES : FREE_FAILURES + 3] == [0.25, 0.5, 1]
    assert waits[-1] == MAX_DELAY
    assert failures.note("192.0.2.2") == 0
    ticks.now += FORGIVEN + 1
    assert failures.note("192.0.2.1") == 0


def test_shares_of_connections() -> None:
    shares = Shares(5, 2)
    assert [shares.enter("192.0.2.1") for _ in range(3)] == ["", "", "connections_per_address"]
    assert [shares.enter("192.0.2.9", is_proxy=True) for _ in range(3)] == ["", "", ""]
    assert shares.enter("192.0.2.2") == "connections"
    shares.leave("192.0.2.1")
    assert shares.enter("192.0.2.2") == ""
    for address in ("192.0.2.1", "192.0.2.2", *["192.0.2.9"] * 3):
        shares.leave(address)
    assert (shares.total, shares._each) == (0, {})
    assert {Shares(0, 0).enter("192.0.2.1") for _ in range(100)} == {""}


def test_a_place_that_turns_out_to_be_anothers() -> None:
    shares = Shares(4, 1)
    balancer = [Place(shares) for _ in range(3)]
    assert [place.take("192.0.2.9", is_proxy=True) for place in balancer] == ["", "", ""]
    assert balancer[0].take("192.0.2.1") == ""
    assert balancer[1].take("192.0.2.1") == "connections_per_address"  # and it is the balancer's still
    assert shares._each == {"192.0.2.9": 2, "192.0.2.1": 1}
    assert balancer[1].take("192.0.2.2") == ""
    for place in [*balancer, Place(shares)]:
        place.leave()
        place.leave()
    assert (shares.total, shares._each) == (0, {})


class Crowd:
    """A Waiting, and who was evicted from it."""

    def __init__(self, most: int, clock: Any) -> None:
        self.waiting = Waiting(most, clock)
        self.evicted: list[str] = []

    def come(self, address: str, key: str) -> bool:
        def evict() -> None:
            self.evicted.append(key)
            self.waiting.leave(address, key)

        return self.waiting.enter(address, key, evict)


def test_the_crowded_address_gives_way_to_another_at_once(ticks: Any) -> None:
    crowd = Crowd(3, ticks)
    assert [crowd.come("192.0.2.1", f"silent-{n}") for n in range(3)] == [True] * 3
    assert crowd.come("192.0.2.2", "agent")
    assert crowd.evicted == ["silent-0"]
    assert crowd.waiting.total == 3


def test_within_the_crowd_only_the_long_silent_give_way(ticks: Any) -> None:
    crowd = Crowd(2, ticks)
    crowd.come("192.0.2.1", "first")
    crowd.come("192.0.2.1", "second")
    assert not crowd.come("192.0.2.1", "third")
    ticks.now += GRACE
    assert crowd.come("192.0.2.1", "third")
    assert crowd.evicted == ["first"]


def test_who_has_said_hello_is_safe(ticks: Any) -> None:
    crowd = Crowd(2, ticks)
    for key in ("first", "second"):
        crowd.come("192.0.2.1", key)
        crowd.waiting.heard("192.0.2.1", key)
    ticks.now += math.pi * GRACE
    assert not crowd.come("192.0.2.2", "third")
    crowd.waiting.leave("192.0.2.1", "first")
    assert crowd.come("192.0.2.2", "third")
    crowd.waiting.leave("192.0.2.1", "second")
    crowd.waiting.leave("192.0.2.2", "third")
    assert (crowd.waiting.total, crowd.waiting._silent) == (0, {})
