"""One request, one trace: its tree, its parents and its blame, as a real OTLP receiver gets them from both programs.

All cases run once against one core and its agents, which then end; so what a test looks at is all there will ever be,
spans too many included.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from observing import Span, check_nesting, shape, spans_of, tracing
from running import RunningAgent, RunningCore, address
from service import Service
from visiting import Answer, Connection
from watching import SpanTap, ask

pytestmark = pytest.mark.system

WHOLE = "GET S(tunnel.stream C(agent.stream S(GET C)))"
POST = "POST S(tunnel.stream C(agent.stream S(POST C)))"
UNREACHED = "GET S(tunnel.stream C(agent.stream S(GET C)))"
LOOKED_UP = "GET S(db.query I)"
ALONE = "GET S"

#: case → (tree, outcome, status, whether the root's status is an error)
EXPECTED: dict[str, tuple[str, str, int, bool]] = {
    "plain": (WHOLE, "ok", 200, False),
    "upload": (POST, "ok", 200, False),
    "download": (WHOLE, "ok", 200, False),
    "events": (WHOLE, "ok", 200, False),
    "websocket": (WHOLE, "ok", 101, False),
    "refused by the service": (WHOLE, "ok", 404, False),
    "service fails": (WHOLE, "ok", 503, True),
    "no_tunnel": (LOOKED_UP, "no_tunnel", 404, False),
    "bad_request": (ALONE, "bad_request", 400, False),
    "quota": (ALONE, "quota", 429, False),
    "no_agent": (ALONE, "no_agent", 503, True),
    "local_refused": (UNREACHED, "local_refused", 502, True),
    "local_broken": (WHOLE, "local_broken", 502, True),
    "timeout": (WHOLE, "timeout", 504, True),
    "visitor_aborted": (WHOLE, "visitor_aborted", 499, False),
    "cut by the drain": (WHOLE, "draining", 503, True),
}
#: the agent learns of these ends from the core, so its spans end a way over the link later
ENDED_BY_THE_CORE = ("visitor_aborted", "websocket", "cut by the drain")
LINK = 0.1  #: seconds, one way over the link with both programs busy


class Run:
    """What happened: per case the request's record and its spans; and everything of both programs."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}
        self.spans: list[Span] = []
        self.records: list[dict[str, Any]] = []
        self.service: Service | None = None
        self.killed = ""  # connection id of the agent that was killed

    def record(self, case: str) -> dict[str, Any]:
        [found] = [one for one in self.records if one.get("request_id") == self.ids[case]]
        return found

    def trace(self, case: str) -> list[Span]:
        trace_id = self.record(case)["trace_id"]
        return [span for span in self.spans if span.trace == trace_id]


def visit(run: Run, core: RunningCore, case: str, line: str, *fields: str, **options: Any) -> Answer:
    """One request, known by its request id. Some are meant to break off."""
    run.ids[case] = f"case-{len(run.ids)}"
    return ask(core, line, f"X-Request-Id: {run.ids[case]}", *fields, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    directory = tmp_path_factory.mktemp("traces")
    run = Run()
    with ExitStack() as stack:
        tap = stack.enter_context(SpanTap(directory))
        service = run.service = Service()
        stack.callback(service.close)
        flags, environment = tracing(tap.endpoint)
        core = RunningCore(directory / "core", "-tcp-ports=0", "-drain-timeout=300ms", *flags, environment=environment)
        stack.callback(core.close)

        def start(local: str, *more: str, **options: Any) -> RunningAgent:
            agent = RunningAgent(core, local, *flags, *more, environment=environment, **options)
            stack.callback(agent.close)
            return agent

        answered(run, core, service, start)
        refused(run, core, service, start)
        broken(run, core, service, start)
        tcp(run, core, service, start)
        killed(run, core, service, start)
        unwelcome(core, start)
        cut_by_the_drain(run, core, service)
        stack.pop_all().close()
        run.records = core.records
        run.spans = spans_of(tap)
    yield run


Start = Callable[..., RunningAgent]


def answered(run: Run, core: RunningCore, service: Service, start: Start) -> None:
    start(service.url, "-subdomain=app", "-request-timeout=500ms", agent_id="main")
    visit(run, core, "plain", "GET /echo?name=value&token=secret-value")
    body = b"x" * 300_000
    answer = visit(run, core, "upload", "POST /upload", body=body)
    assert answer.body.split()[1].decode() == hashlib.sha256(body).hexdigest()
    visit(run, core, "download", "GET /download?size=300000")
    visit(run, core, "events", "GET /sse?n=3&ms=20")
    visit(run, core, "refused by the service", "GET /status/404")
    visit(run, core, "service fails", "GET /status/503")
    run.ids["websocket"] = "case-websocket"
    with Connection(core.public, "app.localhost") as visitor:
        fields = ("Connection: Upgrade", "Upgrade: websocket", "X-Request-Id: case-websocket")
        visitor.send(visitor.request("GET /upgrade", *fields))
        assert visitor.read_head().status == 101
        visitor.send(b"hello")
        assert visitor.exactly(5) == b"hello"
        visitor.half_close()
        assert visitor.exactly(3) == b"bye"
        assert visitor.ends() == "closed"


def refused(run: Run, core: RunningCore, service: Service, start: Start) -> None:
    visit(run, core, "no_tunnel", "GET /", host="nobody.localhost")
    visit(run, core, "bad_request", "GET /", "Host: under_score!.localhost")
    token = core.new_token("poor")
    core.command("account", "limit", "poor", "-requests-per-month=1")
    start(service.url, "-subdomain=poor", agent_id="poor", token=token)
    assert ask(core, "GET /echo", host="poor.localhost").status == 200
    assert visit(run, core, "quota", "GET /echo", host="poor.localhost").outcome == "quota"
    gone = start(service.url, "-subdomain=gone", agent_id="gone")
    gone.close()
    core.wait_for("agent disconnected", agent_id="gone")
    assert visit(run, core, "no_agent", "GET /", host="gone.localhost").outcome == "no_agent"


def broken(run: Run, core: RunningCore, service: Service, start: Start) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        start(f"http://127.0.0.1:{nobody.getsockname()[1]}", "-subdomain=closed", agent_id="closed")
        visit(run, core, "local_refused", "GET /", host="closed.localhost")
    visit(run, core, "local_broken", "GET /garbage")
    visit(run, core, "timeout", "GET /hang")
    run.ids["visitor_aborted"] = "case-aborted"
    with Connection(core.public, "app.localhost") as visitor:
        visitor.send(visitor.request("GET /slow?ms=400&case=aborted", "X-Request-Id: case-aborted"))
        service.wait_request("/slow")
        visitor.reset()
    core.wait_for("request", request_id="case-aborted")


def tcp(run: Run, core: RunningCore, service: Service, start: Start) -> None:
    agent = start(f"raw=tcp://127.0.0.1:{service.port}", agent_id="tcp")
    port = address(agent.tunnels["raw"])[1]
    with Connection(("127.0.0.1", port), "anything") as visitor:
        assert visitor.ask("GET /echo", "Connection: close").status == 200
        assert visitor.ends() == "closed"


def killed(run: Run, core: RunningCore, service: Service, start: Start) -> None:
    agent = start(service.url, "-subdomain=killed", agent_id="killed")
    run.killed = str(agent.find("authenticated")[0]["connection_id"])
    visitors = [Connection(core.public, "killed.localhost") for _ in range(3)]
    for visitor in visitors:
        visitor.send(visitor.request("GET /hold"))
    service.wait_request("/hold", 3)
    agent.kill()
    for visitor in visitors:
        assert visitor.read().outcome == "link_lost"
        visitor.close()


def unwelcome(core: RunningCore, start: Start) -> None:
    agent = start("http://127.0.0.1:1", agent_id="stranger", token="tt_" + "x" * 43, ready=False)
    agent.expected_code = 1
    agent.wait()
    core.wait_for("authentication failed")


def cut_by_the_drain(run: Run, core: RunningCore, service: Service) -> None:
    run.ids["cut by the drain"] = "case-drain"
    with Connection(core.public, "app.localhost") as visitor:
        visitor.send(visitor.request("GET /slow?ms=450&case=drain", "X-Request-Id: case-drain"))
        service.wait_request("/slow", 2)
        core.terminate()
        assert visitor.read().outcome == "draining"
    core.wait()


@pytest.mark.parametrize("case", EXPECTED)
def test_the_tree(run: Run, case: str) -> None:
    tree, outcome, status, is_error = EXPECTED[case]
    record, spans = run.record(case), run.trace(case)
    assert shape(spans) == tree
    check_nesting(spans, slack=LINK if case in ENDED_BY_THE_CORE else 0)
    [root] = [span for span in spans if not span.parent]
    assert (record["outcome"], record["status"]) == (outcome, status)
    assert root.id == record["span_id"]
    assert root.attributes["tunnel.outcome"] == outcome
    assert root.attributes["http.response.status_code"] == status
    assert bool(root.error) == is_error, root
    if is_error:
        assert root.attributes["error.type"] == (outcome if outcome != "ok" else str(status))
    if outcome in ("no_agent", "local_refused", "local_broken", "timeout", "draining"):
        assert root.error
        assert all(span.error for span in spans if span.name != "db.query")


def test_the_tree_says_who_and_how_much(run: Run) -> None:
    spans = {(span.name, span.kind): span for span in run.trace("upload")}
    request, service = spans["POST", "S"].attributes, spans["POST", "C"].attributes
    stream, agent = spans["tunnel.stream", "C"].attributes, spans["agent.stream", "S"].attributes
    assert request["http.request.body.size"] == service["http.request.body.size"] == 300_000
    assert request["http.request.method"] == request["http.method"] == "POST"
    assert request["agent.id"] == stream["agent.id"] == agent["agent.id"] == "main"
    assert request["tunnel.connection.id"] == stream["tunnel.connection.id"]
    assert request["tunnel.account.id"].startswith("default-")
    assert stream["tunnel.stream.id"] == agent["tunnel.stream.id"]
    assert spans["POST", "S"].events == ["head", "opened", "uploaded", "answered", "first_byte"]
    [local] = [span for span in run.trace("plain") if (span.name, span.kind) == ("GET", "C")]
    assert local.events == ["connected", "first_byte", "last_byte"]


def test_values_in_queries_are_redacted(run: Run) -> None:
    spans = run.trace("plain")
    assert "secret-value" not in repr(spans)
    root = next(span for span in spans if not span.parent)
    assert root.attributes["http.url"] == "http://app.localhost/echo?name=REDACTED&token=REDACTED"
    assert root.attributes["url.query"] == "name=REDACTED&token=REDACTED"


@pytest.mark.parametrize("case", ["plain", "upload", "events", "websocket", "service fails", "local_broken", "timeout"])
def test_the_local_service_is_the_next_in_the_trace(run: Run, case: str) -> None:
    assert run.service is not None
    [seen] = [one for one in run.service.requests if one.get("x-request-id") == run.ids[case]]
    [local] = [span for span in run.trace(case) if span.kind == "C" and span.name != "tunnel.stream"]
    assert seen.get("traceparent") == f"00-{local.trace}-{local.id}-01"


def test_a_tcp_stream_is_a_trace_of_its_own(run: Run) -> None:
    [root] = [one for one in run.spans if one.attributes.get("tunnel.stream.protocol") == "tcp" and not one.parent]
    spans = [span for span in run.spans if span.trace == root.trace]
    assert shape(spans) == "tunnel.stream C(agent.stream S)"
    check_nesting(spans, slack=LINK)
    assert all(span.attributes["tunnel.outcome"] == "ok" and not span.error for span in spans)
    assert root.attributes["tunnel.bytes_out"] > 0


def test_no_span_is_left_open_when_an_agent_is_killed(run: Run) -> None:
    roots = [one for one in run.spans if one.kind == "S" and one.attributes.get("tunnel.connection.id") == run.killed]
    requests = [one for one in roots if one.name == "GET"]
    assert len(requests) == 3
    for root in requests:
        spans = [span for span in run.spans if span.trace == root.trace]
        assert shape(spans) == "GET S(tunnel.stream C)"  # what the agent knew died with it
        assert all(span.attributes["tunnel.outcome"] == "link_lost" and span.error for span in spans)


def test_links_are_traced(run: Run) -> None:
    dials = {one.attributes.get("agent.id"): one for one in run.spans if one.name == "agent.connect" and not one.error}
    assert {"main", "poor", "closed", "tcp"} <= set(dials)
    assert dials["main"].events == ["dialed", "tls", "websocket", "authenticated"]
    assert (dials["main"].kind, dials["main"].parent) == ("C", "")
    accepted = [one for one in run.spans if one.name == "agent.accept" and one.attributes.get("agent.id") == "main"]
    assert [one.error for one in accepted] == [""]


def test_a_failed_authentication_is_an_error_on_both_sides(run: Run) -> None:
    refusals = [one for one in run.spans if one.attributes.get("error.type") == "bad_token"]
    [dial] = [one for one in refusals if one.name == "agent.connect" and one.error]
    [accept] = [one for one in refusals if one.name == "agent.accept" and one.error]
    assert dial.attributes["tunnel.outcome"] == accept.attributes["tunnel.outcome"] == "refused"


def test_every_trace_is_whole(run: Run) -> None:
    """A parent that is named was exported too, by whichever program; save under the agent that was killed."""
    ids = {span.id for span in run.spans}
    assert [span for span in run.spans if span.parent and span.parent not in ids] == []
