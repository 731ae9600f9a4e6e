"""The logs of both programs in a mixed load: each line a JSON object with the contract's keys, nothing anywhere else.

The reference page's queries find exactly what they should, trace ids are those of exported spans, secrets never appear.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from logql import evaluate
from observing import Span, spans_of, tracing
from running import Program, RunningAgent, RunningCore
from service import Service
from visiting import Connection
from watching import SpanTap, ask

from tunnel.errors import OUTCOMES

pytestmark = pytest.mark.system

ACCESS = ("time", "level", "msg", "method", "host", "path", "status", "outcome", "duration", "bytes_in", "bytes_out")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
SECRETS = ("tt_" + "s" * 43, "Bearer-secret-1", "cookie-secret-2", "query-secret-3", "userinfo-secret-4")


class Run:
    """Both programs' lines after a load, and all their spans."""

    def __init__(self, core: Program, agents: list[Program], spans: list[Span]) -> None:
        self.core, self.agents, self.spans = core, agents, spans

    @property
    def requests(self) -> list[dict[str, Any]]:
        return self.core.find("request")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    directory = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack:
        tap = stack.enter_context(SpanTap(directory))
        flags, environment = tracing(tap.endpoint)
        service = Service()
        stack.callback(service.close)
        core = RunningCore(directory / "core", *flags, environment=environment)
        stack.callback(core.close)
        nobody = stack.enter_context(socket.socket())
        nobody.bind(("127.0.0.1", 0))
        local = f"app={service.url},closed=http://127.0.0.1:{nobody.getsockname()[1]}"
        agent = RunningAgent(core, local, "-log-level=debug", *flags, environment=environment)
        stack.callback(agent.close)
        stranger = RunningAgent(core, "http://127.0.0.1:1", token=SECRETS[0], agent_id="stranger", ready=False)
        stranger.expected_code = 1
        stack.callback(stranger.close)
        stranger.wait()
        load(core, service)
        agent.kill()
        assert ask(core, "GET /after").outcome == "no_agent"
        stack.pop_all().close()
        yield Run(core, [agent, stranger], spans_of(tap))


def load(core: RunningCore, service: Service) -> None:
    hidden = (f"Authorization: {SECRETS[1]}", f"Cookie: session={SECRETS[2]}", f"Proxy-Authorization: {SECRETS[1]}")
    for path in ("/echo", "/status/404", "/status/500", "/garbage", "/slow?ms=1100", "/download?size=100000"):
        ask(core, f"GET {path}", *hidden)
    ask(core, f"GET /echo?password={SECRETS[3]}")
    ask(core, f"GET http://user:{SECRETS[4]}@app.localhost/echo")
    ask(core, "GET /error/authentication%20failed")  # words from outside
    ask(core, "POST /upload", body=b"x" * 5000)
    ask(core, "GET /", host="nobody.localhost")
    ask(core, "GET /", host="closed.localhost")
    ask(core, "TRACE /")
    with Connection(core.public, "app.localhost") as visitor:
        visitor.send(visitor.request("GET /hang"))
        service.wait_request("/hang")
        visitor.reset()
    core.wait_for("request", outcome="visitor_aborted")
    with Connection(core.public, "app.localhost") as visitor:
        visitor.send(visitor.request("GET /upgrade", "Connection: Upgrade", "Upgrade: echo"))
        assert visitor.read_head().status == 101
        visitor.half_close()
        assert visitor.exactly(3) == b"bye"
    core.wait_for("request", status=101)


def test_every_line_is_an_object_and_nothing_else_is_said(run: Run) -> None:
    for program in (run.core, *run.agents):
        assert program.lines and program.other_lines == []
        assert program.error_text == ""
        for line in program.lines:
            record = json.loads(line)
            assert list(record)[:3] == ["time", "level", "msg"]
            assert TIME.fullmatch(record["time"])
            assert record["level"] in ("DEBUG", "INFO", "WARNING", "ERROR")
            assert all(re.fullmatch(r"[a-z][a-z0-9_]*", key) for key in record), record
            assert ("error" in record) == (record["level"] == "ERROR"), record


def test_one_access_record_a_request(run: Run) -> None:
    requests = run.requests
    assert len(requests) == 16
    for record in requests:
        assert tuple(record)[: len(ACCESS)] == ACCESS
        assert record["request_id"] and len(record["trace_id"]) == 32 and len(record["span_id"]) == 16
        assert record["outcome"] in OUTCOMES
        assert re.fullmatch(r"\d+(\.\d+)?(s|ms)", record["duration"])
        assert "?" not in record["path"]
        if record["host"] in ("app.localhost", "closed.localhost") and record["outcome"] not in (
            "no_agent",
            "method_not_allowed",
            "bad_request",
        ):
            assert record["agent_id"] == "agent" and record["account_id"].startswith("default-")
    by_path = {record["path"]: record for record in requests}
    assert by_path["/upload"]["bytes_in"] == 5000
    assert by_path["/download"]["bytes_out"] == 100000


def test_the_query_for_failures(run: Run) -> None:
    found = evaluate('{container="tunnel-core"} |= "error" | json', run.core.lines)
    failed = [record for record in run.core.records if record["level"] == "ERROR"]
    from_outside = [record for record in run.core.records if "error" in record.get("path", "")]
    assert len(from_outside) == 1
    key = lambda record: record.get("request_id", record["time"])  # noqa: E731
    assert sorted(map(key, found)) == sorted(map(key, failed + from_outside))
    outcomes = {record["outcome"] for record in found if record["msg"] == "request" and record["level"] == "ERROR"}
    assert outcomes == {"ok", "local_broken", "local_refused", "no_agent"}  # ok: the service's own 500
    for record in run.requests:
        is_failure = OUTCOMES[record["outcome"]].failed or record["status"] >= 500
        assert (record["level"] == "ERROR") == is_failure, record


def test_the_query_for_slow_requests(run: Run) -> None:
    found = evaluate('{container="tunnel-core"} | json | duration > 1s', run.core.lines)
    assert [record["path"] for record in found] == ["/slow"]
    every = evaluate('{container="tunnel-core"} | json | duration >= 0s', run.core.lines)
    assert len(every) == len(run.requests)
    assert not [record for record in every if "__error__" in record]


def test_the_query_for_refused_agents(run: Run) -> None:
    found = evaluate('{container="tunnel-core"} |= "authentication failed" | json', run.core.lines)
    assert [(record["msg"], record["reason"]) for record in found] == [("authentication failed", "bad_token")]
    assert "authenticated" in {record["msg"] for record in run.agents[0].records}


def test_ids_in_records_are_those_of_exported_spans(run: Run) -> None:
    spans = {span.id: span for span in run.spans}
    for record in run.requests:
        span = spans[record["span_id"]]
        assert (span.trace, span.kind) == (record["trace_id"], "S")
        assert span.attributes["tunnel.outcome"] == record["outcome"]
        assert span.attributes["tunnel.request.id"] == record["request_id"]
    roots = {span.id for span in run.spans if span.kind == "S" and span.name not in ("agent.stream", "agent.accept")}
    assert roots == {record["span_id"] for record in run.requests}
    # the agent logs its local requests at debug level: the same trace, its own span
    local = run.agents[0].find("local request")
    assert local
    traces = {record["trace_id"] for record in run.requests}
    assert {record["trace_id"] for record in local} <= traces


def test_lines_about_links_are_found_from_their_spans_and_back(run: Run) -> None:
    """A link's own span ends with its welcome; what is said of the link later still names it."""
    names = {(span.trace, span.id): span.name for span in run.spans}
    for program, name, messages in (
        (run.core, "agent.accept", ("agent connected", "agent disconnected", "authentication failed")),
        (run.agents[0], "agent.connect", ("connecting to server", "authenticated", "tunnel ready")),
    ):
        for message in messages:
            lines = program.find(message)
            assert lines and all(names[line["trace_id"], line["span_id"]] == name for line in lines), message


def test_lines_about_links_that_nobody_traces_name_no_span(run: Run) -> None:
    """The stranger exports nothing."""
    refused = [line for line in run.agents[1].records if line["msg"] in ("connecting to server", "giving up")]
    assert len(refused) == 2 and not any("trace_id" in line for line in refused)


def test_secrets_never_appear(run: Run) -> None:
    text = "".join(line for program in (run.core, *run.agents) for line in program.lines)
    for secret in (*SECRETS, run.core.token if isinstance(run.core, RunningCore) else ""):
        assert secret and secret not in text
    assert not [secret for secret in SECRETS if secret in repr(run.spans)]
