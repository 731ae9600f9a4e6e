"""Every LogQL and TraceQL query that ships, asked of what real programs wrote: dashboards, runbooks, the document, the
links between Grafana's data sources. Lines go through Promtail's pipeline first, spans through a real OTLP receiver.

Loki and Tempo cannot be had from a package index: logql.py and traceql.py evaluate as their documentation says.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import dukpy
import logql
import promtail
import pytest
import runbooks
import traceql
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
sys.path.insert(0, str(ROOT / "tests" / "system"))

from observing import tracing  # noqa: E402
from rogue import Rogue, masked  # noqa: E402
from running import RunningAgent, RunningCore, poll  # noqa: E402
from service import Service  # noqa: E402
from visiting import Broken, Connection  # noqa: E402
from watching import Asking, SpanTap, ask  # noqa: E402

pytestmark = pytest.mark.system

KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
DEAD = "http://127.0.0.1:1"  # a collector that nobody is
#: queries that find nothing here → why. That their words are the programs' own, test_runbooks.py sees to.
NOT_HERE = {
    "metrics report broke": "reports are well",
    "plug-in could not start": "plug-ins start",
    'outcome="overloaded"': "nothing is full",
    "certificate has expired": "certificates are new",
    "can't use a certificate": "they can",
    "certificate is not trusted": "agents pin it",
    "certificates read again": "no SIGHUP",
    "certificate not issued": "the core gets none here",
    "certificate waits": "the core gets none here",
    "too_many_connections": "there are few",
    "crashed": "nothing does",
    "can't accept": "they can",
    "log records dropped": "they are read",
    "connection_quota": "no account has more links than it may",
    "traces are exported again": "the dead collector stays dead",
    "store unreachable": "the store is there",
    "usage not written": "the store is there",
    "store answers again": "the store is there",
    "the store is away": "the store is there",
    "request broke": "no bug is known",
    "can't start": "they start",
    "worker ended": "there is one process of each",
    "worker killed": "there is one process of each",
    "db.query": "no query takes half a second",
}


class Written(NamedTuple):
    """records: as Loki holds the lines of the core and its agents; lines: the core's as it wrote them. foreign: a line
    as text and one of a crash. account: the id of the agent's."""

    records: list[logql.Record]
    foreign: list[logql.Record]
    lines: list[str]
    spans: list[traceql.Span]
    account: str


def stored(program: str, lines: list[str]) -> list[logql.Record]:
    """Through the shipped pipeline."""
    config = promtail.load(DEPLOY / "promtail" / "promtail.yml")
    [stages] = [one["pipeline_stages"] for one in config["scrape_configs"] if one["job_name"] == "files"]
    found = []
    for line in lines:
        entry = promtail.run(stages, promtail.Entry(line.rstrip("\n"), {"container": program}))
        assert entry is not None
        found.append(logql.Record(entry.line, entry.labels, entry.metadata))
    return found


def span_of(found: dict[str, Any]) -> traceql.Span:
    value = {one["key"]: next(iter(one["value"].items())) for one in found.get("attributes", ())}
    return {
        "service": "tunnel-agent" if found["from_agent"] else "tunnel-core",
        "name": found["name"], "kind": KINDS[found["kind"]], "trace": found["traceId"],
        "status": ("unset", "ok", "error")[(found.get("status") or {}).get("code", 0)],
        "duration": (int(found["endTimeUnixNano"]) - int(found["startTimeUnixNano"])) / 1e9,
        "attributes": {key: float(text) if kind == "intValue" else text for key, (kind, text) in value.items()},
    }  # fmt: skip


def trouble(core: RunningCore, service: Service, agent: RunningAgent) -> None:
    """A few requests of each kind, the last of them under way when their agent is killed."""
    for line in ("GET /echo", "GET /status/500", "GET /status/404", "GET /garbage", "POST /upload"):
        ask(core, line, body=b"x" if line.startswith("POST") else None)
    slow = [Asking(core, f"GET /slow?ms={ms}") for ms in (1200, 2200)]
    ask(core, "GET /", host="nobody.localhost")
    ask(core, "GET /", host="closed.localhost")
    for _ in range(3):
        ask(core, "GET /echo", host="limited.localhost")
    with Connection(core.public, "app.localhost") as visitor, suppress(Broken):
        visitor.send(b"GET /echo HTTP/1.1\r\nHost: app.localhost\r\n")
        visitor.read_head()  # 408, since the head never ends
    socket.create_connection(core.agents).close()
    stranger = Rogue(core)
    stranger.write(masked(b"\xff" * 16))
    stranger.end()
    stranger.sock.close()
    for one in slow:
        one.result()
    hanging = Asking(core)
    service.wait_request("/hang")
    agent.kill()
    hanging.join(10)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    directory = tmp_path_factory.mktemp("asked")
    with ExitStack() as stack:
        service = Service()
        stack.callback(service.close)
        taps = []
        for name in ("core", "agent"):  # one each: a span says of itself whose it is by where it went
            (directory / name).mkdir()
            taps.append(stack.enter_context(SpanTap(directory / name)))
        flags, environment = tracing(taps[0].endpoint, "-head-timeout=1s", "-agent-tls=false", "-log-level=debug")
        core = RunningCore(directory / "data", *flags, environment=environment)
        stack.callback(core.close)
        token = core.new_token("limited")
        core.command("account", "limit", "limited", "-requests-per-second", "1", "-requests-burst", "1")
        flags, environment = tracing(taps[1].endpoint, "-log-level=debug")
        agent = RunningAgent(core, f"app={service.url},closed=http://127.0.0.1:1", *flags, environment=environment)
        stack.callback(agent.close)
        second = RunningAgent(
            core, service.url, "-subdomain=limited", f"-tracing-endpoint={DEAD}", token=token, agent_id="second",
            environment={"OTEL_BSP_SCHEDULE_DELAY": "100"},
        )  # fmt: skip
        stack.callback(second.close)
        stranger = RunningAgent(core, DEAD, token="tt_" + "s" * 43, agent_id="stranger", ready=False)
        stranger.expected_code = 1
        stack.callback(stranger.close)
        stranger.wait()
        trouble(core, service, agent)
        second.wait_for("traces cannot be exported", timeout=20)
        core.wait_for("request", outcome="link_lost")
        account = str(core.wait_for("agent connected", agent_id="agent")["account_id"])
        poll(
            lambda: any(one["name"] == "GET" and "link_lost" in json.dumps(one) for one in taps[0].spans),
            "its span",
            15,
        )
        again = RunningAgent(core, service.url, "-subdomain=app", *flags, environment=environment)
        stack.callback(again.close)
        core.terminate()
        again.wait_for("link ended")
        spans = [span_of({**one, "from_agent": tap is taps[1]}) for tap in taps for one in tap.spans]
        stack.pop_all().close()
    yield Written(
        stored("tunnel-core", core.lines) + stored("tunnel-agent", agent.lines + second.lines + again.lines),
        stored("tunnel-core", ["2026-02-09T09:00:00.123Z INFO    core ready", "Fatal Python error: x"]),
        core.lines, spans, account,
    )  # fmt: skip


# Logs ------------------------------------------------------------------------------------------------------------


def dashboards() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield panel["title"], target


def data_sources() -> dict[str, dict[str, Any]]:
    [path] = (DEPLOY / "grafana" / "provisioning" / "datasources").glob("*.yml")
    return {one["uid"]: one["jsonData"] for one in yaml.safe_load(path.read_text())["datasources"]}


def log_queries() -> list[tuple[str, str]]:
    found = [(title, target["expr"]) for title, target in dashboards() if target["datasource"]["uid"] == "loki"]
    found += [(path.stem, query) for path in runbooks.PAGES for query in runbooks.queries(path.read_text(), "logql")]
    text = (ROOT / "DEPLOYMENT.md").read_text()
    found += [("DEPLOYMENT", line.strip()) for line in re.findall(r"^    (\{container.*)$", text, re.MULTILINE)]
    assert len(found) > 50
    return found


def filled_in(query: str, written: Written) -> str:
    trace_id = next(one.metadata["trace_id"] for one in written.records if "trace_id" in one.metadata)
    values = {"$account": ".*", "$__range": "1h", "ACCOUNT_ID": written.account, "HOST": "app.localhost",
              "4bf92f3577b34da6a3ce929d0e0e4736": trace_id}  # fmt: skip
    values["AGENT"] = "stranger" if "authentication failed" in query else "agent"
    for name, value in values.items():
        query = query.replace(name, value)
    return query


def is_metric(query: str) -> bool:
    return not query.lstrip().startswith("{")


def test_every_log_query_finds_something(written: Written) -> None:
    wrong, silent = [], set()
    for where, query in log_queries():
        text = filled_in(query, written)
        found = logql.measure(text, written.records) if is_metric(text) else logql.select(text, written.records)
        reasons = [word for word in NOT_HERE if word in query]
        silent.update(reasons)
        if bool(found) == bool(reasons):
            wrong.append(f"{where}: {query}")
    assert not wrong, "\n".join(wrong)
    assert silent == NOT_HERE.keys() - {"db.query"}


def test_a_line_that_is_no_json_breaks_no_metric_query(written: Written) -> None:
    with pytest.raises(logql.QueryError, match="JSONParserErr"):
        logql.measure('sum by (host) (count_over_time({container="tunnel-core"} | json [5m]))', written.foreign)
    for where, query in log_queries():
        if is_metric(query):
            text = filled_in(query, written)
            assert logql.measure(text, written.records + written.foreign) is not None, where


def test_top_lists_count_what_there_was(written: Written) -> None:
    """The figures, by another way than the query's."""
    [query] = [text for title, text in log_queries() if title == "Busiest hosts"]
    found = logql.measure(filled_in(query, written), written.records)
    requests = [one for one in map(json.loads, written.lines) if one["msg"] == "request"]
    hosts = {one["host"] for one in requests}
    assert found == {(("host", host),): sum(one["host"] == host for one in requests) for host in hosts}
    [query] = [text for title, text in log_queries() if title == "Slowest hosts"]
    slowest = max(logql.measure(filled_in(query, written), written.records).items(), key=lambda one: one[1])
    assert slowest[0] == (("host", "app.localhost"),) and 1.2 < slowest[1] < 30


# Traces ----------------------------------------------------------------------------------------------------------


def test_every_trace_query_finds_spans_with_what_it_selects(written: Written) -> None:
    found = [(title, target["query"]) for title, target in dashboards() if target["datasource"]["uid"] == "tempo"]
    found += [(path.stem, query) for path in runbooks.PAGES for query in runbooks.queries(path.read_text(), "traceql")]
    assert len(found) >= 10
    wrong = []
    for where, query in found:
        spans = traceql.find(query, written.spans)
        if bool(spans) == ("db.query" in query):
            wrong.append(f"{where}: {query}")
        if "method" in query:  # agents that log in are no requests, however slow or refused
            assert not traceql.find(query.partition(" | ")[0].replace("{", '{ name = "agent.accept" &&'), written.spans)
        for name in spans[0] if spans else ():
            assert any(span[name] is not None for span in spans), f"{where}: no span has {name}"
    assert not wrong, "\n".join(wrong)


# From one to the other ---------------------------------------------------------------------------------------------


def test_a_trace_leads_to_its_lines_and_a_line_to_its_trace(written: Written) -> None:
    """Tempo's and Jaeger's query for a span's logs, and the link that Grafana makes of a line of Loki's."""
    sources = data_sources()
    queries = {sources[name]["tracesToLogsV2"]["query"] for name in ("tempo", "jaeger")}
    [query] = queries
    spans = [one for one in written.spans if one["service"] == "tunnel-core" and one["kind"] == "server"]
    roots = [one for one in spans if one["name"] != "agent.accept"]
    assert len(roots) > 8
    for root in roots:
        text = query.replace("$${__trace.traceId}", root["trace"])
        lines = logql.select(text, written.records)
        requests = [one for one in lines if one["msg"] == "request"]
        assert [one["outcome"] for one in requests] == [root["attributes"]["tunnel.outcome"]], root
        assert {one["trace_id"] for one in lines} == {root["trace"]}
    traced = {one["trace"] for one in written.spans}
    fields = sources["loki"]["derivedFields"]
    [pattern] = {field["matcherRegex"] for field in fields}
    assert {field["datasourceUid"] for field in fields} == {"tempo", "jaeger"}
    leads = [linked(pattern, line) for line in written.lines]
    for line, trace_id in zip(written.lines, leads, strict=True):
        assert trace_id == json.loads(line).get("trace_id"), line
    assert len({one for one in leads if one} & traced) > 8
    [destinations] = [sources["prometheus"]["exemplarTraceIdDestinations"]]
    assert {one["name"] for one in destinations} == {"trace_id"}


def linked(pattern: str, line: str) -> str | None:
    """What Grafana takes for the trace id: the first group, as a browser's regular expressions have it."""
    code = "var found = dukpy.line.match(new RegExp(dukpy.pattern)); found ? found[1] : null"
    found: str | None = dukpy.evaljs(code, line=line, pattern=pattern)
    return found


def test_a_visitor_cannot_forge_the_link() -> None:
    [pattern] = {field["matcherRegex"] for field in data_sources()["loki"]["derivedFields"]}
    forged, real = "f" * 32, "a" * 32
    path = json.dumps(f'/"trace_id":"{forged}" trace_id={forged} span_id=1')
    for line, wanted in {
        f'{{"msg":"request","path":{path},"trace_id":"{real}"}}': real,
        f'{{"msg":"request","path":{path}}}': None,
        f"2026-02-09T09:00:00.123Z INFO    request path={path} trace_id={real} span_id=b7ad": real,
        f"2026-02-09T09:00:00.123Z INFO    request path={path}": None,
    }.items():
        assert linked(pattern, line) == wanted, line
