"""What agents report: the newest of each, bounded, kept for a day."""

from typing import Any

import pytest

from tunnel.core import reports
from tunnel.core.reports import KEPT, Reports


def test_the_newest_report_of_each_agent(ticks: Any) -> None:
    store = Reports(ticks)
    store.begin("acme", "a", "conn-1")
    store.begin("acme", "b", "conn-2")
    store.take("acme", "a", "conn-1", b"up 1\n")
    ticks.now += 5
    store.take("acme", "a", "conn-1", b"up 2\n")
    assert [(one.agent_id, one.text, one.at, one.connected) for one in store.all()] == [
        ("a", b"up 2\n", ticks.now, True), ("b", b"", ticks.now - 5, True)
    ]  # fmt: skip
    store.take("acme", "nobody", "conn-9", b"x")
    assert len(store.all()) == 2


def test_an_agent_is_connected_until_its_last_link_ends(ticks: Any) -> None:
    store = Reports(ticks)
    for connection in ("conn-1", "conn-2"):
        store.begin("acme", "a", connection)
    store.end("acme", "a", "conn-1")
    assert store.all()[0].connected
    store.end("acme", "a", "conn-2")
    store.end("acme", "a", "conn-2")
    assert not store.all()[0].connected
    store.begin("acme", "a", "conn-3")
    assert [one.connected for one in store.all()] == [True]


def test_a_day_after_its_last_link_an_agent_is_forgotten(ticks: Any) -> None:
    store = Reports(ticks)
    store.begin("acme", "a", "conn-1")
    store.begin("acme", "b", "conn-2")
    store.end("acme", "a", "conn-1")
    ticks.now += KEPT
    assert len(store.all()) == 2
    ticks.now += 1
    assert [one.agent_id for one in store.all()] == ["b"]


def test_one_account_cannot_take_all_the_room(ticks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MAX_PER_ACCOUNT", 3)
    monkeypatch.setattr(reports, "MAX_AGENTS", 5)
    store = Reports(ticks)
    for account in ("acme", "other"):
        for number in range(10):
            store.begin(account, f"a{number}", f"conn-{account}-{number}")
            store.take(account, f"a{number}", f"conn-{account}-{number}", b"x")
    assert [one.account_id for one in store.all()] == ["acme"] * 3 + ["other"] * 2
    for number in range(10):
        store.end("acme", f"a{number}", f"conn-acme-{number}")
    ticks.now += KEPT + 1
    store.begin("third", "a", "conn-x")
    assert {one.account_id for one in store.all()} == {"other", "third"}
