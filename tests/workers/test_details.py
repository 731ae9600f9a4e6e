"""Sections of /health/detailed of several workers, put together."""

from __future__ import annotations

from tunnel.workers.details import counts, together


def test_numbers_add_up_and_what_has_keys_is_put_together() -> None:
    one = {
        "tunnels": {"app": {"conn-1": {"up": True, "milliseconds": 1.5}}},
        "tracing": {"exporting": True, "endpoint": "http://x", "exported": 3, "collector_up": True},
    }
    other = {
        "tunnels": {"app": {"conn-2": {"up": False, "milliseconds": 2.5}}, "new": {}},
        "tracing": {"exporting": True, "endpoint": "http://y", "exported": 4, "collector_up": False},
        "third": {"party": None},
    }
    assert together([one, other]) == {
        "tunnels": {
            "app": {"conn-1": {"up": True, "milliseconds": 1.5}, "conn-2": {"up": False, "milliseconds": 2.5}},
            "new": {},
        },
        "tracing": {"exporting": True, "endpoint": "http://x", "exported": 7, "collector_up": False},
        "third": {"party": None},
    }
    assert one["tracing"]["exported"] == 3, "the parts stay as they are"
    assert together([]) == {}


def test_of_what_is_alike_the_first_one_counts() -> None:
    looks = [{"local_services": {"a:1": {"up": is_up, "reason": str(is_up)}}} for is_up in (True, False)]
    assert together(looks, ("local_services",)) == looks[0]


def test_a_worker_of_another_mind_does_not_spoil_it() -> None:
    assert together([{"a": {"b": 1}}, {"a": {"b": "unavailable"}}, {"a": "?"}]) == {"a": {"b": 1}}
    assert together([{"a": {"b": True}}, {"a": {"b": 1}}]) == {"a": {"b": True}}


def test_what_an_ended_worker_leaves_is_what_it_has_counted() -> None:
    details = {"tracing": {"exporting": True, "exported": 3}, "tunnels": {"app": {"conn-1": {"age": 1}}}, "odd": 5}
    assert counts(details) == {"tracing": {"exported": 3}}
