"""The shipped Alertmanager configuration in a real Alertmanager, with a Slack and a PagerDuty that count what they are
told: who is woken, how often, and what stays silent while its cause rings."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from runbooks import alerts
from running import poll
from watching import free_port

from tunnel.monitoring.files import write_alertmanager
from tunnel.monitoring.programs import find_programs

pytestmark = pytest.mark.system

DEPLOY = Path(__file__).parents[2] / "deploy"
SEVERITY = {name: str(rule["labels"]["severity"]) for name, (_, rule) in alerts().items()}
CHANNELS = {"critical": "#tunnel-critical", "warning": "#tunnel-warnings", "info": "#tunnel-alerts"}


class Services(http.server.ThreadingHTTPServer):
    """Slack and PagerDuty: what each was sent, in the order it came."""

    def __init__(self) -> None:
        self.pages: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = []
        services = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                (services.messages if self.path == "/slack" else services.pages).append(said)
                self.send_response(200 if self.path == "/slack" else 202)
                self.end_headers()
                self.wfile.write(b"ok" if self.path == "/slack" else b'{"status":"success"}')

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def paged(self, action: str = "trigger") -> Counter[str]:
        """How often for each alert."""
        found = (one["payload"]["custom_details"]["runbook"] for one in self.pages if one["event_action"] == action)
        return Counter(Path(str(path)).stem for path in found)

    def told(self) -> Counter[tuple[str, str]]:
        """(alert, channel), how often; "resolved" messages aside."""
        found = ((one["attachments"][0], one["channel"]) for one in self.messages)
        return Counter(
            (str(said["title"]).rpartition(" ")[2], channel) for said, channel in found if said["color"] == "danger"
        )


@contextmanager
def alertmanager(directory: Path, services: Services) -> Iterator[str]:
    """With the shipped routes, grouping by the second. Its address."""
    for name, text in (("slack", f"{services.url}/slack"), ("pager", "key")):
        (directory / name).write_text(text)
    config = write_alertmanager(DEPLOY, directory, str(directory / "slack"), str(directory / "pager"))
    text, count = re.subn(r"(group_wait|group_interval): \S+", r"\1: 1s", config.read_text())
    assert count == 2
    config.write_text(text.replace("global:\n", f"global:\n  pagerduty_url: {services.url}/pagerduty\n"))
    address = f"127.0.0.1:{free_port()}"
    command = [
        find_programs()["alertmanager"], f"--config.file={config}", f"--storage.path={directory / 'data'}",
        f"--web.listen-address={address}", "--cluster.listen-address=", "--log.level=warn",
    ]  # fmt: skip
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        poll(lambda: is_ready(address), "Alertmanager is there", 30, 0.1)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ring(address: str, *names: str, ends: str = "", **labels: str) -> None:
    """As Prometheus would, with what the rules give these alerts."""
    said = [
        {
            "labels": {"alertname": name, "severity": SEVERITY[name], "cluster": "c", "service": "s", **labels},
            "annotations": {"summary": name, "description": name, "runbook_url": f"deploy/runbooks/{name}.md"},
            **({"endsAt": ends} if ends else {}),
        }
        for name in names
    ]
    request = urllib.request.Request(
        f"http://{address}/api/v2/alerts", json.dumps(said).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.status == 200


@pytest.fixture
def services(ending: ExitStack) -> Services:
    services = ending.enter_context(Services())
    threading.Thread(target=services.serve_forever, args=(0.05,), daemon=True).start()
    ending.callback(services.shutdown)
    return services


def test_every_critical_alert_pages_once_and_no_other_does(
    services: Services, tmp_path: Path, ending: ExitStack
) -> None:
    """Each in a cluster of its own, so that none silences another; told again and again, as Prometheus does."""
    address = ending.enter_context(alertmanager(tmp_path, services))
    wanted = Counter((name, CHANNELS[severity]) for name, severity in SEVERITY.items())
    for _ in range(3):
        for name in SEVERITY:
            ring(address, name, cluster=name)
    poll(lambda: services.told() >= wanted, f"everything is told: {services.told()}", 60, 0.2)
    critical = Counter(name for name, severity in SEVERITY.items() if severity == "critical")
    poll(lambda: services.paged() >= critical, "what is critical is paged", 20, 0.2)
    marker = "AlertsNotDelivered"  # when this one has come, nothing of the first is on its way
    ring(address, marker, cluster="another")
    poll(lambda: services.told()[marker, CHANNELS["critical"]] == 2 == services.paged()[marker], "the last", 20, 0.2)
    assert services.paged() == critical + Counter([marker])
    assert services.told() == wanted + Counter([(marker, CHANNELS["critical"])])
    assert {one["payload"]["severity"] for one in services.pages} == {"critical"}


def test_a_core_that_is_down_rings_alone_and_its_end_is_told(
    services: Services, tmp_path: Path, ending: ExitStack
) -> None:
    address = ending.enter_context(alertmanager(tmp_path, services))
    symptoms = ("AgentsLost", "AgentDisconnected", "HighErrorRate", "TunnelAvailabilityBurnFast", "ScrapeFailing")
    ring(address, "TunnelCoreDown", *symptoms)
    poll(lambda: services.paged()["TunnelCoreDown"], "the core's alert pages", 30, 0.2)
    ring(address, "StoreSlow")  # nothing to do with it: rings
    poll(lambda: services.told()["StoreSlow", "#tunnel-warnings"], "another alert is told", 30, 0.2)
    assert services.paged() == {"TunnelCoreDown": 1}
    assert {name for name, _ in services.told()} == {"TunnelCoreDown", "StoreSlow"}
    ring(address, *symptoms, cluster="other")  # somebody else's core is up
    poll(lambda: services.paged()["AgentsLost"], "another cluster's alerts ring", 30, 0.2)
    ring(address, "TunnelCoreDown", ends="2026-01-01T00:00:00Z")
    poll(lambda: services.paged("resolve")["TunnelCoreDown"], "the pager hears that it is over", 30, 0.2)
