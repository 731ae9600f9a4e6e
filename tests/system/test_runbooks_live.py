"""What the runbooks tell an operator to ask, asked: every PromQL query runs in a real Prometheus with our rules that
scrapes a core and an agent, every metric it names is there, and every `curl … | jq` finds its part of the real page.
And an alert that goes out leads to its page."""

from __future__ import annotations

import json
import re
import shutil
import threading
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from observing import Prometheus
from runbooks import PAGES, ROOT, queries, recorded, series_named
from running import RunningAgent, RunningCore, poll
from service import Service
from visiting import Connection

pytestmark = pytest.mark.system

QUERIES = [(path.stem, query) for path in PAGES for query in queries(path.read_text(), "promql")]
#: metrics that need what is not here
ABSENT = {
    "ALERTS": "nothing fires",
    "alertmanager_notifications_failed_total": "no Alertmanager runs",
    "alertmanager_config_last_reload_successful": "no Alertmanager runs",
    "tunnel_workers": "one process",
    "tunnel_workers_active": "one process",
    "tunnel_worker_restarts_total": "one process",
    "agent_workers": "one process",
    "agent_workers_active": "one process",
    "agent_worker_restarts_total": "one process",
    "prometheus_notifications_errors_total": "Prometheus knows none",
}
_CURL = re.compile(r"http://127\.0\.0\.1:(\d+)(/\S*) \| jq (?:-c )?'([^']*)'")


def pick(path: str, page: Any) -> list[Any]:
    """What `jq` finds for `.a.b[].c`. Raises KeyError for what is not there."""
    found = [page]
    for key, each in re.findall(r"\.(\w+)(\[\])?", path):
        found = [one[key] for one in found]
        if each:
            found = [one for many in found for one in many]
    return found


def has_series(prometheus: Prometheus, name: str) -> bool:
    return bool(prometheus.query(f'count({{__name__="{name}"}})'))


class Sink(ThreadingHTTPServer):
    """What Prometheus takes for Alertmanager: keeps the alerts that it is told of."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, dict[str, str]]] = []
        super().__init__(("127.0.0.1", 0), _Request)


class _Request(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        sink = self.server
        assert isinstance(sink, Sink)
        sink.alerts += json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_alerts_go_out_with_the_address_and_without_its_label(tmp_path: Path, ending: ExitStack) -> None:
    """The shipped configuration in a real Prometheus; only times and targets are other ones."""
    copy, base = tmp_path / "shipped", "https://git.example.com/x"
    shutil.copytree(ROOT / "deploy" / "prometheus", copy)
    config = copy / "prometheus.yml"
    config.write_text(
        config.read_text()
        .replace("environment: prod\n", f"environment: prod\n    runbooks: {base}\n")
        .replace("evaluation_interval: 15s", "evaluation_interval: 1s")
    )
    for rules in (copy / "rules").iterdir():
        rules.write_text(re.sub(r"for: \w+", "for: 0s", re.sub(r"interval: \w+", "interval: 1s", rules.read_text())))
    for targets in (copy / "targets").iterdir():
        targets.write_text("[]")
    sink = Sink()
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    ending.callback(sink.server_close)
    ending.callback(sink.shutdown)
    (copy / "targets" / "alertmanager.yml").write_text(json.dumps([{"targets": [f"127.0.0.1:{sink.server_port}"]}]))
    ending.enter_context(Prometheus(tmp_path, {}, config=config))
    poll(
        lambda: {"TunnelCoreAbsent", "AgentMetricsAbsent"} <= {one["labels"]["alertname"] for one in sink.alerts},
        "the alerts come", 20, 0.1,
    )  # fmt: skip
    for alert in sink.alerts:
        assert alert["annotations"]["runbook_url"] == f"{base}/{alert['labels']['alertname']}.md"
        assert "runbooks" not in alert["labels"]
        assert alert["labels"]["cluster"] == "tunnel-production"


def test_queries_and_pages(
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
    tmp_path: Path,
    ending: ExitStack,
) -> None:
    core, service = start_core("-heartbeat=200ms"), start_service()
    agent = start_agent(core, service.url, "-subdomain=app", "-metrics-report-interval=1s", "-heartbeat=200ms")
    rules = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
    targets = {
        "tunnel-core": (core.metrics, "/metrics"),
        "tunnel-agents": (core.metrics, "/metrics/agents"),
        "tunnel-agent": (agent.metrics, "/metrics"),
    }
    prometheus = ending.enter_context(Prometheus(tmp_path, targets, rule_files=rules))
    prometheus.wait_up()
    with Connection(core.public, "app.localhost") as visitor:
        visitor.ask("GET /echo")
        visitor.ask("GET /status/500")

    with urllib.request.urlopen(f"http://127.0.0.1:{prometheus.port}/metrics", timeout=5) as answer:
        own = set(re.findall(r"^# TYPE (\w+)", answer.read().decode(), re.MULTILINE))
    elsewhere = {*ABSENT, *own, *recorded(), ""}
    names = {name for _, query in QUERIES for name, _ in series_named(query)} - elsewhere

    def missing() -> list[str]:
        return sorted(name for name in names if not has_series(prometheus, name))

    with suppress(AssertionError):
        poll(lambda: not missing(), "every metric has series", 15, 0.25)
    assert missing() == []
    for page, query in QUERIES:
        assert prometheus.query(query) is not None, page  # raises when Prometheus refuses it

    ports = {"9090": core.metrics[1], "9091": agent.metrics[1], "9000": core.dashboard[1], "9093": prometheus.port}
    asked = {(port, path): "" for path_ in PAGES for port, path, _ in _CURL.findall(path_.read_text())}
    assert len(asked) >= 6
    for port, path in asked:
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[port]}{path}", timeout=5) as answer:
            asked[port, path] = answer.read().decode()
    for runbook in PAGES:
        for port, path, words in _CURL.findall(runbook.read_text()):
            first, _, rest = words.partition(" | ")
            found = pick(first, json.loads(asked[port, path]))
            assert found, f"{runbook.stem}: {words} finds nothing"
            if rest.startswith("{"):
                assert set(re.findall(r"\w+", rest)) <= found[0].keys(), f"{runbook.stem}: {words}"
