"""The supervisor's list: agents count once, names are held, and what a worker had goes with it."""

from typing import Any

from tunnel.core.roster import Roster


def test_an_agent_counts_once_whatever_its_links(ticks: Any) -> None:
    roster = Roster(600, ticks)
    assert roster.admit(0, "acme", "i1", "c1", 1, 10) is None
    assert roster.admit(1, "acme", "i1", "c2", 1, 10) is None
    assert roster.by_account == {"acme": 1}
    refused = roster.admit(1, "acme", "i2", "c3", 1, 10)
    assert refused is not None and refused[0] == "connection_quota" and "limit of 1 agent is reached" in refused[1]
    roster.drop("c1")
    roster.drop("c1")
    assert roster.by_account == {"acme": 1}
    roster.drop("c2")
    assert roster.by_account == {}
    assert roster.admit(1, "acme", "i2", "c3", 1, 10) is None


def test_agents_without_an_instance_count_by_link(ticks: Any) -> None:
    roster = Roster(600, ticks)
    assert roster.admit(0, "acme", "", "c1", 2, 10) is None
    assert roster.admit(0, "acme", "", "c2", 2, 10) is None
    assert roster.admit(0, "acme", "", "c3", 2, 10) is not None


def test_the_limit_of_all(ticks: Any) -> None:
    roster = Roster(600, ticks)
    assert roster.admit(0, "acme", "i1", "c1", 9, 1) is None
    refused = roster.admit(1, "other", "i2", "c2", 9, 1)
    assert refused is not None and refused[0] == "too_many_connections"
    assert roster.admit(1, "acme", "i1", "c3", 9, 1) is None  # it has a place already


def test_a_worker_that_ends_takes_its_links_with_it(ticks: Any) -> None:
    roster = Roster(600, ticks)
    roster.admit(0, "acme", "i1", "c1", 9, 9)
    roster.admit(1, "acme", "i1", "c2", 9, 9)
    roster.admit(1, "other", "i2", "c3", 9, 9)
    roster.learn(0, [("app", "acme", "http")], [])
    roster.learn(1, [("app", "acme", "http"), ("shop", "other", "http")], [])
    roster.lose(1)
    assert roster.by_account == {"acme": 1}
    assert roster.names() == {"app": "acme"}
    assert [[name for name, _, _ in roster.names_of(worker)] for worker in (0, 1)] == [["app"], []]
    ticks.now += 601
    assert roster.forget_expired() == ["shop"]


def test_a_name_that_was_taken_away_is_not_held(ticks: Any) -> None:
    roster = Roster(600, ticks)
    roster.learn(0, [("app", "acme", "http")], [])
    roster.learn(0, [], ["app"], False)
    ticks.now += 601
    assert roster.forget_expired() == [] and roster.names() == {}


def test_names_are_held_from_the_last_link_anywhere(ticks: Any) -> None:
    roster = Roster(600, ticks)
    roster.learn(0, [("app", "acme", "http")], [])
    roster.learn(1, [("app", "acme", "http")], [])
    roster.learn(0, [], ["app"])
    ticks.now += 1000
    assert roster.forget_expired() == []
    roster.learn(1, [], ["app"])
    ticks.now += 500
    assert roster.forget_expired() == []
    roster.learn(1, [("app", "acme", "http")], [])
    ticks.now += 500
    assert roster.forget_expired() == []
    roster.learn(1, [], ["app"])
    ticks.now += 601
    assert roster.forget_expired() == ["app"] and roster.forget_expired() == []
