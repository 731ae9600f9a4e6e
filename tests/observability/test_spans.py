"""What a span says: names, attributes, status, events, times; and that a request's phases add up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tracetools import SPAN, TRACE, a_local, a_request, a_stream

from observability.context import SpanContext
from observability.groups import MAX_TEXT, redact, split_target
from observability.phases import phases
from observability.record import ROOT, Origin, Record
from observability.spans import CLIENT, INTERNAL, SERVER, Facts, SpanBuilder, WallClock
from tunnel.errors import OUTCOMES
from tunnel.handler import ConnectVisit, QueryVisit, RequestVisit, Visit


class FakeClock(WallClock):
    """Offset 0, or what the test says holds from a monotonic second on."""

    def __init__(self, *history: tuple[float, int]) -> None:
        super().__init__()
        self._history = list(history) or [(float("-inf"), 0)]


def built(visit: Visit, ended: float = 0.0, origin: Origin = ROOT, failure: str = "", role: str = "core") -> Facts:
    visit.trace_id, visit.span_id = TRACE, visit.span_id or SPAN
    facts = SpanBuilder(role, FakeClock()).build((visit, ended or visit.started + 1, origin, failure))
    assert facts is not None
    return facts


def test_a_request() -> None:
    visit = a_request(target="/a%20b/c?token=hunter2&x=1&flag")
    visit.status, visit.outcome, visit.bytes_in, visit.bytes_out = 200, "ok", 10, 1024
    facts = built(visit)
    assert (facts.name, facts.kind, facts.failed, facts.parent_id) == ("GET", SERVER, False, "")
    expected = {
        "http.request.method": "GET",
        "http.method": "GET",
        "http.url": "http://api.localhost/a%20b/c?token=REDACTED&x=REDACTED&REDACTED",
        "url.scheme": "http",
        "url.path": "/a%20b/c",
        "url.query": "token=REDACTED&x=REDACTED&REDACTED",
        "server.address": "api.localhost",
        "client.address": "192.0.2.7",
        "http.response.status_code": 200,
        "user_agent.original": "ua/1",
        "network.protocol.version": "1.1",
        "http.request.body.size": 10,
        "http.response.body.size": 1024,
        "agent.id": "agent-1",
        "tunnel.connection.id": "conn-1",
        "tunnel.account.id": "acme",
        "tunnel.outcome": "ok",
        "tunnel.name": "api",
        "tunnel.request.id": "req-1",
    }
    assert {key: value for key, value in facts.attributes.items() if not key.startswith("tunnel.phase.")} == expected
    assert "hunter2" not in repr(facts)


@pytest.mark.parametrize("method", ["BREW", "get", "", "X" * 100])
def test_an_unknown_method_does_not_become_a_name(method: str) -> None:
    visit = a_request()
    visit.method = method
    facts = built(visit)
    assert facts.name == "HTTP"
    assert facts.attributes["http.request.method"] == "_OTHER"
    assert facts.attributes["http.request.method_original"] == method


def test_a_stream_at_either_end() -> None:
    visit = a_stream(a_request())
    visit.offset = -5.25
    facts = built(visit)
    assert (facts.name, facts.kind) == ("tunnel.stream", CLIENT)
    assert facts.attributes["tunnel.clock.offset_seconds"] == -5.25
    assert facts.attributes["tunnel.stream.id"] == 7
    facts = built(a_stream(None), role="agent")
    assert (facts.name, facts.kind) == ("agent.stream", SERVER)
    assert "tunnel.clock.offset_seconds" not in facts.attributes
    assert facts.attributes["url.query"] == "q=REDACTED"


def test_a_tcp_tunnel_counts_bytes_not_bodies() -> None:
    stream = a_stream(None, "tcp")
    stream.bytes_in, stream.bytes_out = 3, 5
    facts = built(stream)
    assert (facts.attributes["tunnel.bytes_in"], facts.attributes["tunnel.bytes_out"]) == (3, 5)
    assert not any(key.startswith("http.") for key in facts.attributes)
    assert built(a_local(stream), role="agent").name == "tcp"


def test_a_local_request() -> None:
    visit = a_local(a_stream(None))
    visit.address, visit.status = "[::1]:3000", 503
    facts = built(visit, role="agent")
    assert (facts.name, facts.kind, facts.failed, facts.description) == ("GET", CLIENT, True, "HTTP 503")
    assert facts.attributes["server.address"] == "::1"
    assert facts.attributes["server.port"] == 3000
    assert facts.attributes["url.full"] == "http://[::1]:3000/hello?q=REDACTED"
    assert facts.attributes["error.type"] == "503"


def test_a_query() -> None:
    facts = built(QueryVisit("token.find", "postgresql", parent=a_request()))
    assert (facts.name, facts.kind) == ("db.query", INTERNAL)
    assert facts.attributes == {"db.system.name": "postgresql", "db.operation.name": "token.find"}


def test_connecting_at_the_agent() -> None:
    visit = ConnectVisit("tunnel.example:8443")
    for at, name in enumerate(("dialed", "tls", "websocket", "authenticated")):
        visit.marks[name] = visit.started + at / 10
    visit.outcome = "ok"
    facts = built(visit, role="agent")
    assert (facts.name, facts.kind, facts.failed) == ("agent.connect", CLIENT, False)
    assert facts.attributes["server.address"] == "tunnel.example"
    assert [name for name, _, _ in facts.events] == ["dialed", "tls", "websocket", "authenticated"]


@pytest.mark.parametrize("role", ["core", "agent"])
def test_a_failed_authentication_is_an_error(role: str) -> None:
    visit = ConnectVisit("192.0.2.1:4711")
    visit.outcome, visit.reason, visit.error = "refused", "bad_token", "authentication failed: no such token"
    facts = built(visit, role=role)
    assert facts.failed
    assert facts.description == "authentication failed: no such token"
    assert facts.attributes["error.type"] == facts.attributes["tunnel.refusal"] == "bad_token"


@pytest.mark.parametrize(("outcome", "reason"), [("link_lost", ""), ("refused", "timeout"), ("refused", "protocol")])
def test_who_never_said_who_he_is_makes_no_span(outcome: str, reason: str) -> None:
    """A port scan, silence, noise. Of an agent that did say it, the same is a span."""
    visit = ConnectVisit("192.0.2.1:4711")
    visit.outcome, visit.reason = outcome, reason
    builder = SpanBuilder("core", FakeClock())
    assert builder.build((visit, visit.started, ROOT, "")) is None
    visit.agent_id = "agent-1"
    visit.trace_id, visit.span_id = TRACE, SPAN
    assert builder.build((visit, visit.started, ROOT, "")) is not None


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_status_follows_the_table_of_outcomes(outcome: str) -> None:
    row = OUTCOMES[outcome]
    visit = a_request()
    visit.outcome, visit.status, visit.error = outcome, row.status, "it broke" if row.failed else ""
    facts = built(visit)
    assert facts.failed == row.failed
    assert facts.description == ("it broke" if row.failed else "")
    assert facts.attributes.get("error.type") == (outcome if row.failed else None)
    assert facts.attributes["tunnel.outcome"] == outcome


def test_a_500_of_the_local_service_is_an_error_though_the_tunnel_did_well() -> None:
    visit = a_request()
    visit.outcome, visit.status = "ok", 500
    facts = built(visit)
    assert (facts.failed, facts.attributes["error.type"], facts.description) == (True, "500", "HTTP 500")


def test_exceptions_and_cancellation() -> None:
    visit = a_request()
    facts = built(visit, failure="KeyError")
    assert (facts.failed, facts.attributes["error.type"]) == (True, "KeyError")
    assert facts.events[-1] == ("exception", facts.end, "KeyError")
    visit.outcome = "visitor_aborted"
    facts = built(visit, failure="Cancelled")
    assert not facts.failed
    assert facts.events[-1] == ("cancelled", facts.end, "")


def test_what_visitors_choose_is_bounded_and_encodable() -> None:
    visit = a_request([(b"User-Agent", b"\xff\xfe" * 5000)], target="/" + "p" * 9000 + "?" + "q" * 9000)
    visit.host = "a\udc80b"
    facts = built(visit)
    for value in facts.attributes.values():
        assert not isinstance(value, str) or (value.encode() is not None and len(value) <= 3 * MAX_TEXT)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("a=1&b=2", "a=REDACTED&b=REDACTED"),
        ("a=1;b=2", "a=REDACTED&b=REDACTED"),
        ("a=b=c", "a=REDACTED"),
        ("secret", "REDACTED"),
        ("secret&a=&&", "REDACTED&a=REDACTED&&"),
        ("=x", "=REDACTED"),
        ("a=%26b%3Dc", "a=REDACTED"),
    ],
)
def test_redaction(query: str, expected: str) -> None:
    assert redact(query) == expected


@given(st.lists(st.tuples(st.text("abc", min_size=1), st.text("XYZ=%?", min_size=1)), min_size=1, max_size=5))
def test_no_value_survives_redaction(pairs: list[tuple[str, str]]) -> None:
    out = redact("&".join(f"{name}={value}" for name, value in pairs))
    assert [part.partition("=")[0] for part in out.split("&")] == [name for name, _ in pairs]
    assert not set("XYZ%?") & set(out)


def test_targets() -> None:
    assert split_target("/a?b=c#d=e") == ("/a", "b=REDACTED")
    assert split_target("http://user:secret@host/a?b=c") == ("/a", "b=REDACTED")
    assert split_target("*") == ("*", "")
    assert split_target("/go?to=http://x/") == ("/go", "to=REDACTED")
    assert split_target("") == ("", "")


# Times -----------------------------------------------------------------------------------------------------------


def record(visit: Visit, span_id: str, started: float, ended: float, parent: str = "") -> Record:
    visit.trace_id, visit.span_id, visit.started, visit.ended = TRACE, span_id, started, ended
    return visit, ended, Origin(parent, False, None), ""


def test_a_child_that_ends_after_its_parent_is_cut() -> None:
    builder = SpanBuilder("core", FakeClock())
    request = a_request()
    early, late = a_stream(request), a_stream(request)
    first, second, third = (
        builder.build(one)
        for one in (
            record(request, "1" * 16, 10.0, 11.0),
            record(early, "2" * 16, 10.5, 11.5, "1" * 16),
            record(late, "3" * 16, 11.2, 11.3, "1" * 16),
        )
    )
    assert first is not None and second is not None and third is not None
    assert (second.start, second.end) == (10_500_000_000, first.end)
    assert (third.start, third.end) == (first.end, first.end)


def test_a_step_of_the_clock_does_not_tear_a_trace_apart() -> None:
    builder = SpanBuilder("core", FakeClock((float("-inf"), 0), (10.5, -3_600_000_000_000)))
    request = a_request()
    request.started = 10.0
    stream = a_stream(request)
    child = builder.build(record(stream, "2" * 16, 10.6, 10.8, "1" * 16))
    parent = builder.build(record(request, "1" * 16, 10.0, 11.0))
    assert child is not None and parent is not None
    assert parent.start <= child.start <= child.end <= parent.end


def test_the_wall_clock_is_measured_again_and_steps_are_kept() -> None:
    clock = WallClock()
    before = clock.offset(0.0)
    clock._history[0] = (float("-inf"), before - 5_000_000_000)  # as if the clock had been 5 s behind then
    clock.refresh(every=60)
    assert clock.offset(1e12) == before - 5_000_000_000  # not yet
    clock.refresh(every=0)
    assert abs(clock.offset(1e12) - before) < 1_000_000_000
    assert clock.offset(0.0) == before - 5_000_000_000


def test_marks_become_events_inside_the_span() -> None:
    visit = a_request()
    visit.started = 10.0
    visit.marks = {"head": 10.25, "opened": 9.0, "answered": 12.0}
    facts = built(visit, 11.0)
    assert facts.events == [
        ("head", 10_250_000_000, ""),
        ("opened", 10_000_000_000, ""),
        ("answered", 11_000_000_000, ""),
    ]


def test_a_link_and_a_tracestate_are_said() -> None:
    visit = a_request()
    visit.headers["tracestate"] = "a=1"
    facts = built(visit, origin=Origin("", False, SpanContext("1" * 32, "2" * 16, True)))
    assert facts.link == ("1" * 32, "2" * 16, True)
    assert facts.tracestate == "a=1"


# Phases ----------------------------------------------------------------------------------------------------------


def timed(marks: dict[str, float], agent_us: int = -1, local_us: int = -1) -> RequestVisit:
    visit = a_request()
    visit.started, visit.marks, visit.agent_us, visit.local_us = 100.0, marks, agent_us, local_us
    return visit


def test_phases_of_a_whole_request() -> None:
    marks = {"head": 100.001, "opened": 100.003, "answered": 100.053, "first_byte": 100.054}
    spent = phases(timed(marks, 40_000, 30_000), 100.1)
    assert list(spent) == ["visitor", "queue", "link", "agent", "local", "answer", "body"]
    assert {name: round(value, 3) for name, value in spent.items()} == {
        "visitor": 1.0,
        "queue": 2.0,
        "link": 10.0,
        "agent": 10.0,
        "local": 30.0,
        "answer": 1.0,
        "body": 46.0,
    }
    facts: dict[str, Any] = built(timed(marks, 40_000, 30_000), 100.1).attributes
    assert facts["tunnel.phase.local_ms"] == 30.0


@pytest.mark.parametrize(
    ("marks", "stuck"),
    [
        ({}, ["visitor"]),
        ({"head": 100.1}, ["visitor", "queue"]),
        ({"head": 100.1, "first_byte": 100.4}, ["visitor", "queue", "body"]),
        ({"head": 100.1, "opened": 100.2}, ["visitor", "queue", "remote"]),
        ({"head": 100.1, "opened": 100.2, "first_byte": 100.3}, ["visitor", "queue", "remote", "body"]),
        ({"head": 100.1, "opened": 100.2, "uploaded": 100.3}, ["visitor", "queue", "upload", "remote"]),
        (
            {"head": 100.1, "opened": 100.2, "answered": 100.3, "upgraded": 100.4},
            ["visitor", "queue", "link", "answer", "body"],
        ),
    ],
)
def test_a_request_that_got_stuck_has_its_time_there(marks: dict[str, float], stuck: list[str]) -> None:
    spent = phases(timed(marks), 101.0)
    assert list(spent) == stuck
    assert sum(spent.values()) == pytest.approx(1000)


def test_a_request_without_an_answer_has_the_shares_that_are_known() -> None:
    marks = {"head": 100.0, "opened": 100.0, "first_byte": 101.0}  # a page of our own
    spent = phases(timed(marks, 900_000, 800_000), 101.0)
    assert {name: round(value) for name, value in spent.items()} == {
        "visitor": 0, "queue": 0, "link": 100, "agent": 100, "local": 800, "body": 0,
    }  # fmt: skip


def test_a_visitor_who_sends_no_body_is_to_blame_for_the_wait() -> None:
    visit = timed({"head": 100.1, "opened": 100.2})
    visit.outcome = "request_timeout"
    assert list(phases(visit, 101.0)) == ["visitor", "queue", "upload"]


def test_an_answer_that_broke_off_had_waited_for_the_service() -> None:
    visit = timed({"head": 100.0, "opened": 100.0, "answered": 100.1, "first_byte": 100.1}, 90_000, 80_000)
    visit.stalled_us = 700_000
    spent = phases(visit, 101.0)
    assert {name: round(spent[name]) for name in ("link", "local", "body")} == {"link": 10, "local": 780, "body": 200}


MARKS = ["head", "opened", "uploaded", "answered", "first_byte", "upgraded"]


@example({"opened": 100.1, "uploaded": 100.2}, -1, -1, 0, "request_timeout", 100.5)
@given(
    st.dictionaries(st.sampled_from(MARKS), st.floats(99, 103)),
    st.integers(-1, 5_000_000),
    st.integers(-1, 5_000_000),
    st.integers(0, 5_000_000),
    st.sampled_from(["ok", "request_timeout"]),
    st.floats(100, 102),
)
def test_phases_add_up_whatever_the_marks_say(
    marks: dict[str, float], agent: int, local: int, stalled: int, outcome: str, ended: float
) -> None:
    visit = timed(marks, agent, local)
    visit.stalled_us, visit.outcome = stalled, outcome
    spent = phases(visit, ended)
    assert sum(spent.values()) == pytest.approx((ended - 100) * 1e3, abs=1e-6)
    assert all(value >= -1e-6 for value in spent.values())
