"""The stack's own programs with the settings of deploy/compose.yaml: they find each other, serve, and say how they are.

Only addresses and directories differ: ports are the kernel's, host names loopback, volumes directories of the test.
"""

from __future__ import annotations

import http.client
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from running import START_TIMEOUT, Address, Program, address, poll
from stackfile import SERVICES, health_command
from visiting import Connection

pytestmark = pytest.mark.system


def is_healthy(service: str, port: int) -> bool:
    """What Docker would see, by the service's own health check."""
    [usual] = {"core": ["9090"], "agent": ["9091"], "sample": ["3000"]}[service]
    program, *words = health_command(service, **{f"p{usual}": str(port)})
    assert program == "python"
    done = subprocess.run([sys.executable, *words], capture_output=True, timeout=30, check=False)
    return done.returncode == 0


def start(service: str, **changed: str) -> Program:
    _, *arguments = [word.replace(":3000", ":0") for word in SERVICES[service]["command"]]
    environment: dict[str, str] = {**SERVICES[service].get("environment", {}), **changed}
    environment.pop("OTEL_EXPORTER_OTLP_ENDPOINT", None)  # nobody is there
    return Program(service, arguments, environment)


def loopback(place: Address) -> tuple[str, int]:
    return ("::1" if ":" in place[0] else "127.0.0.1", place[1])


def test_the_stack_serves_its_sample(tmp_path: Path, ending: ExitStack) -> None:
    core = start(
        "core", TUNNEL_DATA_DIR=str(tmp_path / "core"), TUNNEL_INVITE_DIR=str(tmp_path / "invite"),
        TUNNEL_PUBLIC_ADDR=":0", TUNNEL_AGENT_ADDR=":0", TUNNEL_METRICS_ADDR=":0", TUNNEL_DASHBOARD_ADDR=":0",
    )  # fmt: skip
    ending.callback(core.close)
    ready = core.wait_for("core ready", timeout=START_TIMEOUT)
    metrics = address(ready["metrics"])[1]
    poll(lambda: is_healthy("core", metrics), "the core is healthy", START_TIMEOUT)

    # The status page is not for everybody: `docker compose exec core cat dashboard.token`, in the image's directory.
    token = (tmp_path / "core" / "dashboard.token").read_text().strip()
    for fields, status in (({}, 401), ({"Authorization": f"Bearer {token}"}, 200)):
        connection = http.client.HTTPConnection("127.0.0.1", address(ready["status"])[1], timeout=10)
        connection.request("GET", "/status", headers=fields)
        assert connection.getresponse().status == status
        connection.close()

    sample = start("sample")
    ending.callback(sample.close)
    poll(lambda: sample.other_lines, "the sample listens", START_TIMEOUT)
    served = loopback(address(sample.other_lines[0]))
    if served[0] == "127.0.0.1":
        assert is_healthy("sample", served[1])

    # Nothing is pasted: what the agent needs lies in the directory that it shares with the core.
    agent = start(
        "agent", AGENT_SERVER=f"127.0.0.1:{address(ready['agents'])[1]}", AGENT_METRICS_ADDR=":0",
        AGENT_TOKEN_FILE=str(tmp_path / "invite" / "token"),
        AGENT_SERVER_FINGERPRINT_FILE=str(tmp_path / "invite" / "fingerprint"),
        AGENT_LOCAL=f"http://{'[::1]' if ':' in served[0] else served[0]}:{served[1]}",
    )  # fmt: skip
    ending.callback(agent.close)
    agent.wait_for("tunnel ready", timeout=START_TIMEOUT)
    reported = address(agent.wait_for("metrics and health")["url"])[1]
    poll(lambda: is_healthy("agent", reported), "the agent is healthy", START_TIMEOUT)

    visitor = Connection(("127.0.0.1", address(ready["public"])[1]), "sample.localhost")
    answer = visitor.ask("GET /hello")
    assert answer.status == 200 and b"GET /hello" in answer.body
    visitor.close()

    # Prometheus comes by the container's name, which on loopback would be refused.
    for name, port in (("tunnel-core:9090", metrics), ("tunnel-agent:9091", reported)):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/metrics", headers={"Host": name})
        page = connection.getresponse()
        assert page.status == 200 and b"trio_tasks_living" in page.read()
        connection.close()

    core.terminate()
    assert core.wait() == 0
    assert not is_healthy("core", metrics)
    poll(lambda: not is_healthy("agent", reported), "the agent is not ready without a core", START_TIMEOUT)
