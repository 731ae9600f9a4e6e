"""Every Prometheus query of the dashboards returns data from a real Prometheus that scrapes a core and two agents under
mixed traffic, or stands in RIGHTLY_EMPTY with the reason."""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from observing import Prometheus
from runbooks import series_named
from running import RunningAgent, RunningCore, poll
from service import Service
from visiting import Broken, Connection

pytestmark = pytest.mark.system

DASHBOARDS = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"
#: (dashboard, panel or annotation) → why it has no data here
RIGHTLY_EMPTY = {
    ("tunnel-core", "Alerts"): "no rules are loaded, so no alert fires",
    ("tunnel-agents", "Alerts"): "no rules are loaded, so no alert fires",
    ("tunnel-core", "Restarts"): "the core is not restarted",
    ("tunnel-core", "Workers of cores"): "one process",
    ("tunnel-core", "Workers of agents"): "one process",
    ("tunnel-core", "Replaced workers"): "one process",
}
#: series that alerts look at → why there are none here
NO_SERIES = {
    "prometheus_notifications_errors_total": "no Alertmanager is configured",
    "alertmanager_notifications_failed_total": "no Alertmanager runs",
    "alertmanager_config_last_reload_successful": "no Alertmanager runs",
    "tunnel_workers": "one process",
    "tunnel_workers_active": "one process",
    "tunnel_worker_restarts_total": "one process",
    "agent_workers": "one process",
    "agent_workers_active": "one process",
    "agent_worker_restarts_total": "one process",
}
PATHS = ("/echo", "/status/404", "/status/500", "/garbage", "/slow?ms=120", "/download?size=70000", "/sse?n=2&ms=5")


def substituted(expr: str, job: str) -> str:
    values = {"job": job, "instance": ".*", "account": ".*", "agent": ".*", "agents_job": "tunnel-agents",
              "__rate_interval": "1m", "__range": "5m"}  # fmt: skip
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], expr)


def queries() -> list[tuple[str, str, list[str]]]:
    """(dashboard, title, [query for each job that it may be asked for])"""
    found = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        board: dict[str, Any] = json.loads(path.read_text())
        jobs = ["tunnel-core"] if board["uid"] == "tunnel-core" else ["tunnel-agents", "tunnel-agent"]
        targets = [
            (panel["title"], target["expr"])
            for panel in board["panels"]
            for target in panel.get("targets", ())
            if target["datasource"]["uid"] == "prometheus"
        ]
        targets += [(one["name"], one["expr"]) for one in board["annotations"]["list"]]
        found += [(board["uid"], title, [substituted(expr, job) for job in jobs]) for title, expr in targets]
    return found


def copy_of_rules(where: Path) -> tuple[Path, list[tuple[str, str]], list[tuple[str, str]]]:
    """(the recording rules, evaluated every second; these as (name, expression); the alerts likewise)."""
    groups: list[dict[str, Any]] = []
    for path in sorted((DASHBOARDS.parents[1] / "prometheus" / "rules").glob("*.yml")):
        groups += yaml.safe_load(path.read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    for group in groups:
        group["interval"] = "1s"
        group["rules"] = [rule for rule in group["rules"] if "record" in rule]
    where.write_text(json.dumps({"groups": [group for group in groups if group["rules"]]}))  # JSON is YAML
    recording = [(rule["record"], rule["expr"]) for rule in rules if "record" in rule]
    return where, recording, [(rule["alert"], rule["expr"]) for rule in rules if "alert" in rule]


def visit(core: RunningCore, ended: threading.Event) -> None:
    hosts = [*(("app", path) for path in PATHS), ("closed", "/"), ("nobody", "/"), ("limited", "/echo")]
    while not ended.is_set():
        for host, path in hosts:
            with Connection(core.public, f"{host}.localhost") as visitor, suppress(Broken):
                visitor.ask(f"GET {path}")
        with Connection(core.public, "app.localhost") as visitor:
            visitor.send(visitor.request("GET /upgrade", "Connection: Upgrade", "Upgrade: echo"))
            visitor.read_head()
        ended.wait(0.05)


def test_every_query_has_data(
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
    tmp_path: Path,
    ending: ExitStack,
) -> None:
    core, service = start_core("-heartbeat=200ms"), start_service()
    nobody = ending.enter_context(socket.socket())
    nobody.bind(("127.0.0.1", 0))
    often = ("-metrics-report-interval=1s", "-heartbeat=200ms")
    local = f"app={service.url},closed=http://127.0.0.1:{nobody.getsockname()[1]}"
    agent = start_agent(core, local, *often)
    token = core.new_token("limited")
    core.command(
        "account", "limit", "limited", "-requests-per-second", "2", "-requests-burst", "2", "-connections", "3"
    )
    second = start_agent(core, service.url, "-subdomain=limited", *often, token=token, agent_id="second")
    targets = {
        "tunnel-core": (core.metrics, "/metrics"),
        "tunnel-agents": (core.metrics, "/metrics/agents"),
        "tunnel-agent": (agent.metrics, "/metrics"),
    }
    rules, recording, alerts = copy_of_rules(tmp_path / "rules.yml")
    prometheus = ending.enter_context(Prometheus(tmp_path, targets, rule_files=[rules]))
    prometheus.wait_up()
    ended = threading.Event()
    visitor = threading.Thread(target=visit, args=(core, ended), daemon=True)
    visitor.start()
    ending.callback(visitor.join, 10)
    ending.callback(ended.set)
    poll(lambda: prometheus.value('agent_connection_active{job="tunnel-agents",agent_id="second"}') == 1, "seen", 10)
    second.kill()
    stranger = start_agent(core, service.url, token="tt_" + "s" * 43, agent_id="stranger", ready=False)
    stranger.expected_code = 1
    poll(lambda: prometheus.value('agent_connection_active{agent_id="second"}') == 0, "the second agent is gone", 10)
    start_agent(core, service.url, "-subdomain=limited", *often, token=token, agent_id="second")

    def empty() -> set[tuple[str, str]]:
        return {
            (board, title)
            for board, title, texts in queries()
            if not any(not math.isnan(value) for text in texts for _, value in prometheus.query(text))
        }

    with suppress(AssertionError):
        poll(lambda: empty() <= RIGHTLY_EMPTY.keys(), "all queries have data", 20, 0.5)
    assert empty() == RIGHTLY_EMPTY.keys()

    def unrecorded() -> set[str]:
        return {name for name, _ in recording if not prometheus.query(name)}

    with suppress(AssertionError):
        poll(lambda: not unrecorded(), "every recording rule has data", 10, 0.5)
    assert unrecorded() == set()
    for name, expression in (*recording, *alerts):
        assert prometheus.query(expression) is not None, name  # raises when Prometheus refuses it
    looked_at = {series for _, expression in alerts for series, _ in series_named(expression) if series}
    with urllib.request.urlopen(f"http://127.0.0.1:{prometheus.port}/metrics", timeout=5) as answer:
        own = set(re.findall(r"^# TYPE (\w+)", answer.read().decode(), re.MULTILINE))  # it does not scrape itself here
    assert {name for name in looked_at - own if not prometheus.query(name)} == NO_SERIES.keys()
