"""An agent of two workers, with real processes: one agent to everybody."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from crewing import Visitors, pids, wait_links
from running import Program, RunningAgent, RunningCore, address, poll
from service import Service
from visiting import Connection
from watching import get, run_agent, sample, samples

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]
TWO = "-workers=2"


@pytest.mark.parametrize("core_workers", [1, 2])
def test_it_is_one_agent(
    start_core: Start, start_agent: StartAgent, start_service: StartService, core_workers: int
) -> None:
    core = start_core(f"-workers={core_workers}", "-max-connections=1")
    agent = start_agent(core, start_service().url, "-subdomain=app", TWO, "-metrics-report-interval=1s")
    wait_links(core, 2 * core_workers)
    assert len(agent.find("tunnel ready")) == len(agent.find("metrics and health")) == 1
    for _ in range(20):
        with Connection(core.public, "app.localhost") as visitor:
            assert visitor.ask("GET /echo").status == 200
    # One page with the sums, also at the core; and it counts once.
    page = samples(agent.metrics)
    assert page["agent_requests_total", frozenset()] == page["agent_requests_success", frozenset()] == 20
    assert page["agent_local_request_duration_microseconds_count", frozenset()] == 20
    assert page["agent_connection_active", frozenset({("agent_id", "agent")})] == 1
    assert page["agent_workers_active", frozenset()] == 2

    def reported() -> dict[str, float]:
        return {name: value for (name, _), value in samples(core.metrics, "/metrics/agents").items()}

    poll(lambda: reported().get("agent_requests_total") == 20, "its report has come", 15, 0.2)
    assert reported()["agent_connection_active"] == 1
    assert reported()["agent_workers_active"] == reported()["agent_workers"] == 2
    assert reported()["agent_worker_restarts_total"] == 0
    assert sample(core.metrics, "tunnel_connections_active") == 1
    for path in ("/healthz", "/readyz", "/health/detailed"):
        assert get(agent.metrics, path)[0] == 200, path
    # The links of all its workers are used.
    both = {record["connection_id"] for record in core.find("agent connected")}
    assert len(both) == 2 * core_workers
    # Another one is one too many.
    other = start_agent(core, "http://127.0.0.1:9", "-subdomain=other", agent_id="other", ready=False)
    assert other.wait_for("connection refused")["reason"] == "too_many_connections"


def test_a_killed_worker_is_replaced(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core = start_core()
    agent = start_agent(core, start_service().url, "-subdomain=app", TWO)
    wait_links(core, 2)
    seen = core.mark()
    with Visitors(core, 8) as load:
        load.wait(200)
        before = sample(agent.metrics, "agent_requests_total")
        os.kill(pids(agent)[0], signal.SIGKILL)
        core.wait_for("agent connected", after=seen, timeout=20)
        load.wait(200)
    # What was under way on its link is answered with a 502; everything else is served by the other one meanwhile.
    assert not load.failed
    statuses = list(load.answered.values())
    assert statuses.count(200) == len(statuses) - statuses.count(502) and statuses.count(502) <= 8
    assert agent.wait_for("worker ended")["error"] == "killed by SIGKILL"
    assert sample(agent.metrics, "agent_requests_total") > before
    assert sample(agent.metrics, "agent_worker_restarts_total") == 1
    assert len(agent.find("metrics and health")) == 1


def test_refused_credentials_are_said_once(start_core: Start) -> None:
    core = start_core()
    code, out, _ = run_agent(
        "-log-json", TWO, f"-server=127.0.0.1:{core.agents[1]}", f"-server-fingerprint={core.fingerprint}",
        "-local=http://127.0.0.1:9", "-metrics-addr=", AGENT_TOKEN="tt_wrong",
    )  # fmt: skip
    assert code == 1
    assert out.count("giving up") == 1
    assert len(core.find("authentication failed")) == 1


def test_a_revoked_token_ends_it(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core = start_core()
    token = core.new_token("acme")
    agent = start_agent(core, start_service().url, "-subdomain=app", TWO, token=token)
    wait_links(core, 2)
    core.command("account", "disable", "acme")
    agent.expected_code = 1
    assert agent.wait(20) == 1
    assert len(agent.find("giving up")) == 1


def test_it_waits_for_a_core_and_finds_it(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(TWO), start_service()
    agent = start_agent(core, service.url, "-subdomain=app", TWO)
    wait_links(core, 4)
    core.close()
    poll(lambda: get(agent.metrics, "/readyz")[0] == 503, "it is not ready")
    again = core.again()
    try:
        poll(lambda: len(again.find("agent connected")) >= 4, "all links are back", 20)
        assert get(agent.metrics, "/readyz")[0] == 200
        with Connection(again.public, "app.localhost") as visitor:
            assert visitor.ask("GET /echo").status == 200
        agent.close()
    finally:
        again.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_it_stops_politely(
    start_core: Start, start_agent: StartAgent, start_service: StartService, number: int
) -> None:
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url, "-subdomain=app", TWO)
    wait_links(core, 2)
    waiting = [Connection(core.public, "app.localhost") for _ in range(6)]
    for visitor in waiting:
        visitor.send(visitor.request("GET /slow?ms=700"))
    poll(lambda: service.begun.count("/slow?ms=700") == 6, "all are under way")
    began = time.monotonic()
    agent.signal(number)
    assert [visitor.read().status for visitor in waiting] == [200] * 6
    assert agent.wait(10) == 0
    assert time.monotonic() - began < 8
    assert len(agent.find("draining")) == len(agent.find("stopped")) == 1
    for visitor in waiting:
        visitor.close()


def test_it_stops_before_it_has_found_a_core(ending: ExitStack) -> None:
    agent = Program(
        "agent",
        ["-m", "tunnel.agent", "-log-json", "-server=127.0.0.1:1", "-tls=false", "-local=9",
         "-metrics-addr=127.0.0.1:0", TWO],
        {"AGENT_TOKEN": "tt_x"},
    )  # fmt: skip
    ending.callback(agent.close)
    metrics = address(agent.wait_for("metrics and health")["url"])
    agent.wait_for("connection failed", timeout=30)
    poll(lambda: sample(metrics, "agent_workers_active") == 2, "both are there", 20)
    agent.terminate()
    assert agent.wait(10) == 0
    assert not agent.find("crashed") and not agent.find("worker ended")


def test_its_workers_end_without_it(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core = start_core()
    agent = start_agent(core, start_service().url, "-subdomain=app", TWO)
    wait_links(core, 2)
    children = list(pids(agent).values())
    agent.kill()
    poll(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "no worker is left", 20)
    poll(lambda: len(core.find("agent disconnected")) == 2, "the core has noticed")
