"""The life of both programs, with real processes: killed, stopped, cut off, started again."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from running import Program, RunningAgent, RunningCore, poll
from service import Service
from visiting import Broken
from watching import Asking, Relay, ask, get, sample, wait_served

pytestmark = pytest.mark.system

HEARTBEAT = ("-heartbeat=200ms", "-heartbeat-timeout=1s")
Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]


# Killed ----------------------------------------------------------------------------------------------------------


def test_agent_killed_within_a_request(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    asking = Asking(core)
    service.wait_request("/hang")
    killed = time.monotonic()
    agent.kill()
    answer = asking.result()
    assert (answer.status, answer.outcome) == (502, "link_lost")
    assert time.monotonic() - killed < 1
    assert core.wait_for("request", outcome="link_lost")["level"] == "ERROR"
    answer = ask(core, "GET /echo")
    assert (answer.status, answer.outcome) == (503, "no_agent")
    assert int(answer["retry-after"]) > 0


def test_core_killed_and_started_again(
    start_core: Start, start_agent: StartAgent, start_service: StartService, ending: ExitStack
) -> None:
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url)  # no -subdomain: a name of the core's choice
    [(name, url)] = agent.tunnels.items()
    assert ask(core, "GET /echo", host=f"{name}.localhost").status == 200
    asking = Asking(core, host=f"{name}.localhost")
    service.wait_request("/hang")
    core.kill()
    asking.join(5)
    assert isinstance(asking.answer, Broken)
    # The other end of a cut link ends the work on its streams at once.
    assert service.wait_closed("/hang", 2)
    mark = agent.mark()
    again = core.again()
    ending.callback(again.close)
    wait_served(again, 5, f"{name}.localhost")
    assert agent.wait_for("tunnel ready", after=mark)["url"] == url
    assert sample(agent.metrics, "agent_reconnections_total") >= 1


# Stopped and cut off ---------------------------------------------------------------------------------------------


def test_agent_that_stands_still(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(*HEARTBEAT), start_service()
    agent = start_agent(core, service.url, "-subdomain=app", *HEARTBEAT)
    assert ask(core, "GET /echo").status == 200
    mark = agent.mark()
    agent.stop()
    try:
        asking = Asking(core, "GET /echo")
        answer = asking.result()
        assert (answer.status, answer.outcome) == (502, "link_lost")
        assert asking.took < 2
        core.wait_for("agent disconnected", reason="no heartbeat for 1 s", timeout=2)
        assert ask(core, "GET /echo").outcome == "no_agent"
    finally:
        agent.cont()
    wait_served(core, 5)
    assert agent.wait_for("link ended", after=mark)
    assert core.wait_for("agent connected", after=core.mark() - 20)


def test_core_that_stands_still(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(*HEARTBEAT), start_service()
    agent = start_agent(core, service.url, "-subdomain=app", *HEARTBEAT)
    core.stop()
    try:
        stopped = time.monotonic()
        agent.wait_for("link ended", reason="no heartbeat for 1 s", timeout=5)
        assert time.monotonic() - stopped < 2.2
        assert get(agent.metrics, "/readyz")[0] == 503
    finally:
        core.cont()
    wait_served(core, 5)
    poll(lambda: get(agent.metrics, "/readyz")[0] == 200, "the agent is ready")


def test_black_hole_is_noticed_by_both(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(*HEARTBEAT), start_service()
    with Relay(core.agents) as relay:
        server = f"-server=127.0.0.1:{relay.address[1]}"
        agent = start_agent(core, service.url, "-subdomain=app", server, *HEARTBEAT)
        assert ask(core, "GET /echo").status == 200
        asking = Asking(core)
        service.wait_request("/hang")
        held = time.monotonic()
        relay.hold()
        answer = asking.result()
        assert (answer.status, answer.outcome) == (502, "link_lost")
        core.wait_for("agent disconnected", timeout=2)
        agent.wait_for("link ended", timeout=2)
        assert time.monotonic() - held < 2.2
        service.wait_closed("/hang")
        relay.release()
        wait_served(core, 5)


def test_local_service_down_and_up(start_core: Start, start_agent: StartAgent, ending: ExitStack) -> None:
    core, service = start_core(), Service()
    ending.callback(service.close)
    agent = start_agent(core, service.url, "-subdomain=app")
    assert ask(core, "GET /echo").status == 200
    service.close()
    answer = ask(core, "GET /echo", "Accept: application/json")
    assert (answer.status, answer.outcome) == (502, "local_refused")
    assert b"local service" in answer.body and str(service.port).encode() in answer.body
    record = core.wait_for("request", outcome="local_refused")
    assert str(service.port) in record["error"]
    assert agent.is_running and not agent.find("link ended")
    again = Service(service.port)
    ending.callback(again.close)
    assert ask(core, "GET /echo").status == 200


# Many ------------------------------------------------------------------------------------------------------------


def test_two_hundred_agents_return(start_core: Start, start_service: StartService, ending: ExitStack) -> None:
    core, service = start_core(), start_service()
    script = Path(__file__).with_name("manyagents.py")
    many = Program(
        "agents",
        [str(script), str(core.agents[1]), core.fingerprint, service.url, "200"],
        {"AGENT_TOKEN": core.token},
    )
    ending.callback(many.close)

    def active(core: RunningCore) -> float:
        return sample(core.metrics, "tunnel_connections_active")

    poll(lambda: active(core) == 200, "200 agents", 40, 0.1)
    core.kill()
    again = core.again()
    ending.callback(again.close)
    began = time.monotonic()
    slowest = 0.0

    def back() -> bool:
        nonlocal slowest
        asked = time.monotonic()
        assert get(again.metrics, "/healthz")[0] == 200
        slowest = max(slowest, time.monotonic() - asked)
        return active(again) == 200

    poll(back, "all 200 agents are back", 10, 0.1)
    assert time.monotonic() - began < 10
    assert slowest < 1
    assert ask(again, "GET /echo", host="many7.localhost").status == 200
    assert ask(again, "GET /echo", host="many199.localhost").status == 200
