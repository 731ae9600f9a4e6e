"""What is kept of requests that failed or were turned away: of which, how much, and nothing that does harm."""

from __future__ import annotations

import re
from typing import Any

import pytest
from inprocess import core, respond

from tunnel.core.recent import KEPT, MAX_NAME, MAX_TEXT, Recent, RecentRequests, together
from tunnel.errors import Failure
from tunnel.handler import RequestVisit, StreamVisit, path_of

HOSTILE = "\"><script>alert(1)</script><!--' onload=x \x00\x1b[2J\u202egnp.exe\u2028&amp;"
CHOSEN = ("request_id", "method", "host", "target", "agent_id")


def ended(outcome: str = "local_refused", status: int = 502, **facts: Any) -> RequestVisit:
    given = {"method": "GET", "host": "app.example.com", "target": "/", "request_id": "r", **facts}
    return RequestVisit(client="192.0.2.1", scheme="http", outcome=outcome, status=status, **given)


def noted(*visits: RequestVisit) -> Recent:
    requests = RecentRequests()
    for visit in visits:
        requests.note(visit)
    return requests.say()


def test_what_is_kept_of_a_failed_request() -> None:
    visit = ended(
        target="/a/b?token=hush#x", error="can't connect", tunnel="app", agent_id="laptop", connection_id="conn-1",
        account_id="acme", trace_id="ab" * 16, sampled=True, request_id="abc",
    )  # fmt: skip
    visit.ended = visit.started + 0.25
    recent = noted(visit)
    (one,) = recent.failures
    assert (one.request_id, one.method, one.host, one.path) == ("abc", "GET", "app.example.com", "/a/b")
    assert (one.status, one.outcome, one.side, one.failed) == (502, "local_refused", "local service", True)
    assert (one.error, one.milliseconds, one.tunnel) == ("can't connect", 250.0, "app")
    assert (one.agent_id, one.connection_id, one.account_id, one.trace_id) == ("laptop", "conn-1", "acme", "ab" * 16)
    assert (recent.failed, recent.outcomes["local_refused"]) == (1, 1)


def test_trace_ids_only_of_traces_that_are_exported() -> None:
    assert noted(ended(trace_id="ab" * 16)).failures[0].trace_id == ""


def test_a_service_that_answers_500_has_failed() -> None:
    recent = noted(ended("ok", 500, error="the local service answered 500"))
    (one,) = recent.failures
    assert (one.outcome, one.side, one.failed, recent.failed) == ("ok", "local service", True, 1)


def test_who_is_turned_away_has_a_cause_and_has_not_failed() -> None:
    recent = noted(ended("no_tunnel", 404, cause="nothing is served under x"))
    (one,) = recent.failures
    assert (one.error, one.side, one.failed, recent.failed) == ("nothing is served under x", "visitor", False, 0)
    assert noted(ended("no_tunnel", 404)).failures[0].error  # what the outcome says, where nobody knows more


def test_whose_side_a_limit_is_on() -> None:
    (one,) = noted(ended("overloaded", 503, limit="streams_per_address", error="this address has many")).failures
    assert (one.outcome, one.side, one.limit, one.failed) == ("overloaded", "visitor", "streams_per_address", True)
    (one,) = noted(ended("overloaded", 503, limit="link_streams")).failures
    assert (one.side, one.limit) == ("core", "link_streams")
    requests = RecentRequests()
    requests.note_tcp("db", 20000, Failure("overloaded", limit="streams_per_address"), None)
    (one,) = requests.say().failures
    assert one.side == "visitor" and one.error.startswith("This address has as many")


def test_ends_that_are_usual_are_counted_only() -> None:
    recent = noted(
        ended("visitor_aborted", 499, event_stream=True), ended("visitor_aborted", 499, method=""), ended("", 0)
    )
    assert recent.failures == [] and recent.outcomes == {"ok": 0, "visitor_aborted": 2}
    assert len(noted(ended("visitor_aborted", 499)).failures) == 1


def test_a_flood_of_one_kind_leaves_the_other() -> None:
    recent = noted(ended(request_id="mine"), *(ended("no_tunnel", 404, request_id=f"s{at}") for at in range(3 * KEPT)))
    ids = [one.request_id for one in recent.failures]
    assert ids == ["mine", *(f"s{at}" for at in range(2 * KEPT, 3 * KEPT))]
    assert recent.outcomes == {"ok": 0, "local_refused": 1, "no_tunnel": 3 * KEPT} and recent.failed == 1


def test_what_others_have_chosen_is_cut_and_harmless() -> None:
    (one,) = noted(ended(**dict.fromkeys(CHOSEN, HOSTILE + 100000 * "x"), error="\n" + HOSTILE * 900)).failures
    for text, most in ((one.request_id, MAX_NAME), (one.host, MAX_NAME), (one.path, MAX_TEXT), (one.error, MAX_TEXT)):
        assert len(text) <= most and not re.search("[\x00-\x1f\u2028\u202e]", text)


@pytest.mark.parametrize(
    "secret", ["/t/tt_abcdefghijkl", "/eyJhbGciOiJIUzI1NiJ9.e30.x", "/" + "p" * 280 + "/tt_hush" * 9]
)
def test_a_secret_in_a_path_is_masked(secret: str) -> None:
    (one,) = noted(ended(target=secret, error=f"can't do {secret}")).failures
    assert not re.search("tt_[a-z]|eyJh", one.path + one.error)


@pytest.mark.parametrize(
    ("target", "path"),
    [("/a?b=c", "/a"), ("/?", "/"), ("*", "*"), ("http://u:p@h/x?y", "/x"), ("http://u:p@h", "/"), ("", ""),
     ("/a#b?c", "/a")],
)  # fmt: skip
def test_paths(target: str, path: str) -> None:
    assert path_of(target) == path


def test_connections_to_tcp_tunnels_count_as_no_request() -> None:
    requests = RecentRequests()
    visit = StreamVisit(None, "tcp", connection_id="conn-1", agent_id="laptop", account_id="acme", tunnel="db")
    requests.note_tcp("db", 20000, Failure("local_refused", "can't connect"), visit)
    requests.note_tcp("db", 20000, Failure("no_agent"), None)
    recent = requests.say()
    assert [(one.method, one.path, one.agent_id) for one in recent.failures] == [
        ("TCP", "port 20000", "laptop"), ("TCP", "port 20000", "")
    ]  # fmt: skip
    assert recent.failed == 0 and recent.outcomes == {"ok": 0}


def test_several_processes_as_one() -> None:
    parts = []
    for worker in range(3):
        requests = RecentRequests()
        requests.answered = 10
        for at in range(KEPT):
            requests.note(ended(request_id=f"{worker}-{at}"))
        parts.append(requests.say())
        for at, one in enumerate(parts[-1].failures):
            one.at = 3.0 * at + worker
    whole = together(parts)
    assert whole.outcomes == {"ok": 30, "local_refused": 3 * KEPT} and whole.failed == 3 * KEPT
    assert len(whole.failures) == KEPT and whole.failures[-1].request_id == f"2-{KEPT - 1}"
    assert [one.at for one in whole.failures] == sorted(one.at for one in whole.failures)
    before = RecentRequests()
    for part in parts:
        before.add(part)
    assert before.say().outcomes == whole.outcomes and before.say().failed == whole.failed
    assert len(before.say().failures) == KEPT


@pytest.mark.usefixtures("way")
async def test_requests_are_noted_where_they_end() -> None:
    async with core() as app:
        asked = [True, False, True, False]

        async def sometimes(stream: Any) -> None:
            respond(stream, b"x", status=503 if asked.pop(0) else 200)

        await app.agent(sometimes)
        caller = app.visitor()
        statuses = [(await caller.get("/one")).status for _ in range(4)]
        refused = await app.visitor().get("/two?secret=1", "nobody.example.com")
        await app.finished(5)
        recent = app.exchanger.recent.say()
        assert statuses == [503, 200, 503, 200] and refused.status == 404
        assert recent.outcomes == {"ok": 4, "no_tunnel": 1} and recent.failed == 2
        assert [(one.path, one.status) for one in recent.failures] == [("/one", 503), ("/one", 503), ("/two", 404)]
        assert recent.failures[-1].request_id == refused.fields[b"x-request-id"].decode()
