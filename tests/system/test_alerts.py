"""Real faults ring: a real Prometheus with our rules, a real Alertmanager with our routes, a webhook that is told.

The rules are the shipped ones with one change: no waiting (`for`), and evaluation every second. Of the alerts those are
kept that a fault is brought about for, so that none silences another. What each says in other cases, promtool tests.
"""

from __future__ import annotations

import http.server
import json
import re
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from observing import Prometheus
from rogue import Rogue, masked
from running import RunningAgent, RunningCore, poll
from service import Service
from visiting import Broken, Connection
from watching import ask, free_port

from tunnel.monitoring.files import write_alertmanager, write_prometheus
from tunnel.monitoring.programs import find_programs

pytestmark = pytest.mark.system

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = {"TunnelCoreDown", "AgentDisconnected", "HighErrorRate", "LocalServiceErrors", "QuotaExceeded"}
STRANGERS = {"VisitorsHitLimits", "AgentPortUnderLoad", "LinkProtocolErrors", "CapacityLimitReached", "HeldBytesHigh"}
SECONDS = 40.0  #: an alert has to get through scrape, rule, Alertmanager's grouping and the webhook; it takes about 5


class Webhook(http.server.ThreadingHTTPServer):
    """What Alertmanager told: (status, labels, annotations) of each alert, in the order they came."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, str], dict[str, str]]] = []
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for one in said["alerts"]:
                    hook.told.append((one["status"], one["labels"], one["annotations"]))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def firing(self) -> set[str]:
        return {labels["alertname"] for status, labels, _ in self.told if status == "firing"}

    def of(self, alert: str, status: str = "firing") -> tuple[dict[str, str], dict[str, str]]:
        return next(
            (labels, notes) for said, labels, notes in self.told if (labels["alertname"], said) == (alert, status)
        )


@contextmanager
def listening() -> Iterator[Webhook]:
    with Webhook() as hook:
        thread = threading.Thread(target=hook.serve_forever, daemon=True)
        thread.start()
        yield hook
        hook.shutdown()
        thread.join(5)


@contextmanager
def alertmanager(directory: Path, webhook: str) -> Iterator[str]:
    """Alertmanager with the shipped routes, grouping by the second, and a webhook at each receiver. Its address."""
    config = write_alertmanager(DEPLOY, directory, webhook=webhook)
    text, count = re.subn(r"(group_wait|group_interval): \S+", r"\1: 1s", config.read_text())
    assert count == 2
    config.write_text(text)
    address = f"127.0.0.1:{free_port()}"
    command = [
        find_programs()["alertmanager"], f"--config.file={config}", f"--storage.path={directory / 'data'}",
        f"--web.listen-address={address}", "--cluster.listen-address=", "--log.level=warn",
    ]  # fmt: skip
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        poll(lambda: api(address, "status"), f"Alertmanager is there: {(directory / 'log').read_text()}", 30, 0.1)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def api(address: str, path: str) -> Any:
    """Alertmanager's answer; None while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://{address}/api/v2/{path}", timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def without_waiting(rules: Path, alerts: set[str]) -> None:
    for path in rules.glob("*.yml"):
        document = yaml.safe_load(path.read_text())
        for group in document["groups"]:
            group["interval"] = "1s"
            group["rules"] = [rule for rule in group["rules"] if "record" in rule or rule["alert"] in alerts]
            for rule in group["rules"]:
                rule.pop("for", None)
        document["groups"] = [group for group in document["groups"] if group["rules"]]
        path.write_text(json.dumps(document))  # JSON is YAML


class Visitors(threading.Thread):
    """Ask for these (host, path) again and again."""

    def __init__(self, core: RunningCore) -> None:
        super().__init__(daemon=True)
        self.wanted: list[tuple[str, str]] = [("app", "/echo")]
        self.ended = threading.Event()
        self._core = core
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            for host, path in list(self.wanted):
                with suppress(Broken, OSError), Connection(self._core.public, f"{host}.localhost") as visitor:
                    visitor.ask(f"GET {path}")


def test_real_faults_ring(
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
    tmp_path: Path,
    ending: ExitStack,
) -> None:
    core, service, fragile = start_core("-heartbeat=200ms"), start_service(), start_service()
    often = ("-metrics-report-interval=1s", "-heartbeat=200ms")
    first = start_agent(core, f"app={service.url},fragile={fragile.url}", *often, agent_id="first")
    token = core.new_token("limited")
    core.command("account", "limit", "limited", "-requests-per-second", "1", "-requests-burst", "1")
    second = start_agent(core, service.url, "-subdomain=limited", *often, token=token, agent_id="second")
    hook = ending.enter_context(listening())
    where = ending.enter_context(alertmanager(tmp_path / "alertmanager", hook.url))
    host, port = core.metrics
    targets = {"core": f"{host}:{port}", "agents": f"{first.metrics[0]}:{first.metrics[1]}", "alertmanager": where}
    config = write_prometheus(DEPLOY, tmp_path / "prometheus", targets, "1s")
    without_waiting(config.parent / "rules", ALERTS)
    prometheus = ending.enter_context(Prometheus(tmp_path, {}, config=config))
    visitors = Visitors(core)
    ending.callback(visitors.join, 10)
    ending.callback(visitors.ended.set)

    def rings(alert: str, severity: str = "warning", **expected: str) -> None:
        def there() -> bool:
            alerts = {one["labels"]["alertname"] for one in api(where, "alerts?active=true") or ()}
            return alert in alerts and alert in hook.firing()

        poll(there, f"{alert} rings; told: {hook.told}", SECONDS, 0.2)
        labels, notes = hook.of(alert)
        assert labels["severity"] == severity
        assert expected.items() <= labels.items()
        assert notes["runbook_url"].endswith(f"/{alert}.md")
        assert notes["summary"] and notes["description"]

    def is_scraped() -> bool:
        return prometheus.value('sum(tunnel_requests_total{job="tunnel-core",code="200"})') not in (None, 0) and bool(
            prometheus.query('agent:connection_active{agent_id="second"} == 1')
        )

    poll(is_scraped, "everything is scraped and recorded", SECONDS, 0.2)
    assert not hook.told
    assert api(where, "alerts") == []

    # A local service that is stopped: its agent's requests fail, and the core's answers are 502.
    fragile.close()
    visitors.wanted.append(("fragile", "/"))
    rings("LocalServiceErrors", agent_id="first", service="agent")
    rings("HighErrorRate", service="core-server")
    visitors.wanted.remove(("fragile", "/"))

    # An account that asks for more than it may.
    visitors.wanted.append(("limited", "/echo"))
    rings("QuotaExceeded", type="requests")
    visitors.wanted.remove(("limited", "/echo"))

    # An agent that is killed, and comes back.
    second.kill()
    rings("AgentDisconnected", agent_id="second")
    start_agent(core, service.url, "-subdomain=limited", *often, token=token, agent_id="second")
    poll(
        lambda: any(said == "resolved" and labels["alertname"] == "AgentDisconnected" for said, labels, _ in hook.told),
        "its alert is resolved", SECONDS, 0.2,
    )  # fmt: skip

    # The core itself.
    assert "TunnelCoreDown" not in hook.firing()
    core.kill()
    rings("TunnelCoreDown", "critical")
    assert hook.firing() == ALERTS


def test_strangers_ring(
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
    tmp_path: Path,
    ending: ExitStack,
) -> None:
    """Limits that are reached for real, seen firing in Prometheus: floods at both ports, links that break the protocol,
    an agent that is full, visitors who do not read."""
    core = start_core(
        "-agent-tls=false", "-max-handshakes=2", "-max-streams=8", "-max-buffer=8MiB", "-body-idle-timeout=60s"
    )
    start_agent(core, start_service().url, "-subdomain=app")
    host, port = core.metrics
    targets = {"core": f"{host}:{port}"}
    config = write_prometheus(DEPLOY, tmp_path / "prometheus", targets, "1s")
    without_waiting(config.parent / "rules", STRANGERS)
    prometheus = ending.enter_context(Prometheus(tmp_path, {}, config=config))
    poll(
        lambda: prometheus.value('tunnel_held_bytes_limit{job="tunnel-core"}') == 2**23,
        "it is scraped",
        SECONDS,
        0.2,
    )
    assert not firing(prometheus)

    for _ in range(8):  # as many as the agent's link may carry
        stopped = ending.enter_context(Connection(core.public, "app.localhost"))
        stopped.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stopped.send(stopped.request("GET /download?size=100000000"))
    poll(lambda: "HeldBytesHigh" in firing(prometheus), "held bytes ring", SECONDS, 0.2)
    for _ in range(40):
        assert ask(core, "GET /echo").status == 503
    for _ in range(3):
        rogue = Rogue(core)
        rogue.write(masked(b"\xff" * 16))
        rogue.end()
        rogue.sock.close()
    for _ in range(200):
        socket.create_connection(core.agents).close()
    for _ in range(600):
        with Connection(core.public, "app.localhost") as visitor:
            assert visitor.ask("GET /" + "x" * 20_000).status == 414
    poll(lambda: firing(prometheus) == STRANGERS, "all of them ring", SECONDS, 0.2)


def firing(prometheus: Prometheus) -> set[str]:
    return {labels["alertname"] for labels, _ in prometheus.query('ALERTS{alertstate="firing"}')}
