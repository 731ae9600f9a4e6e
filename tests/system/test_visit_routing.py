"""Which agent gets a request: names, several tunnels of one agent, several agents of one tunnel, other accounts."""

import json
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable

import pytest
from pair import Tunnel
from running import RunningAgent, RunningCore, poll
from service import Service
from visiting import Connection

pytestmark = pytest.mark.system

StartCore = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[..., Service]


@pytest.mark.parametrize(
    "host",
    ["app.localhost", "APP.localhost", "App.LocalHost:8080", "app.localhost:1", "app.localhost.", "app.localhost:"],
)
def test_names_know_no_case_and_no_port(tunnel: Tunnel, host: str) -> None:
    with tunnel.connect() as visitor:
        assert visitor.ask("GET /echo", f"Host: {host}").status == 200


def test_an_absolute_target_names_the_host(tunnel: Tunnel) -> None:
    """It agrees with the Host field, and the service gets the path (RFC 9112, 3.2.2)."""
    with tunnel.connect() as visitor:
        answer = visitor.ask("GET http://app.localhost/head?x=1", "Host: APP.localhost")
        assert answer.body.startswith(b"GET /head?x=1 HTTP/1.1\r\nHost: app.localhost\r\n")


@pytest.mark.parametrize(
    "host", ["other.localhost", "localhost", "deep.app.localhost", "app.localhost.example", "127.0.0.1", "[::1]:80"]
)
def test_unknown_names_are_404(tunnel: Tunnel, host: str) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask("GET /", f"Host: {host}")
        assert (answer.status, answer.outcome) == (404, "no_tunnel")
        assert visitor.ask("GET /echo").status == 200


def test_one_agent_serves_several_tunnels(
    start_core: StartCore, start_agent: StartAgent, start_service: StartService
) -> None:
    """Subdomains of the base domain, *.localhost beside it, and a full host name."""
    core = start_core("-agent-tls=false", "-base-domain=tunnel.example")
    api, web = start_service(), start_service()
    agent = start_agent(core, f"api={api.url},web={web.url},www.custom.example={web.url}")
    assert agent.tunnels == {
        "api": f"http://api.tunnel.example:{core.public[1]}",
        "web": f"http://web.tunnel.example:{core.public[1]}",
        "www.custom.example": f"http://www.custom.example:{core.public[1]}",
    }
    with Connection(core.public, "") as visitor:
        for host, service in {
            "api.tunnel.example": api, "web.tunnel.example": web, "WWW.Custom.Example:80": web, "api.localhost": api,
        }.items():  # fmt: skip
            before = len(service.requests)
            assert visitor.ask("GET /echo", f"Host: {host}").status == 200
            assert len(service.requests) == before + 1 and service.requests[-1].get("host") == host
        for host in ("custom.example", "tunnel.example", "www.tunnel.example", "other.custom.example"):
            assert visitor.ask("GET /echo", f"Host: {host}").status == 404


def test_a_name_of_another_account_is_refused(
    start_core: StartCore, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core("-agent-tls=false"), start_service()
    start_agent(core, service.url, "-subdomain=mine", agent_id="first")
    thief = start_agent(
        core,
        service.url,
        "-subdomain=mine",
        "-max-retries=1",
        token=core.new_token("other"),
        agent_id="thief",
        ready=False,
    )
    thief.expected_code = 1
    refusal = thief.wait_for("connection refused")
    assert refusal["reason"] == "name_taken" and "mine" in refusal["error"], refusal
    core.wait_for("agent refused", reason="name_taken", agent_id="thief")
    assert thief.wait() == 1
    with Connection(core.public, "mine.localhost") as visitor:
        assert visitor.ask("GET /echo").status == 200


def test_the_base_domain_and_what_is_below_anothers_name_are_refused(
    start_core: StartCore, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service, intruders = start_core("-agent-tls=false", "-base-domain=tunnel.example"), start_service(), []
    start_agent(core, f"alice={service.url},shop.example={service.url}", agent_id="first")
    token = core.new_token("other")
    for name, reason, text in (
        ("tunnel.example", "name_reserved", "the base domain itself"),
        ("x.alice.tunnel.example", "name_taken", "below alice.tunnel.example"),
        ("x.alice.localhost", "name_taken", "below alice.tunnel.example"),
        ("login.shop.example", "name_taken", "below shop.example"),
    ):
        intruder = start_agent(
            core, service.url, f"-subdomain={name}", "-max-retries=0", token=token, agent_id=name, ready=False
        )
        intruder.expected_code = 1
        intruders.append(intruder)
        refusal = intruder.wait_for("connection refused")
        assert refusal["reason"] == reason and text in refusal["error"], refusal
        core.wait_for("agent refused", reason=reason, agent_id=name)
        with Connection(core.public, "") as visitor:
            assert visitor.ask("GET /echo", f"Host: {name}").outcome == "no_tunnel"
    assert all(intruder.wait() == 1 for intruder in intruders)
    # The owner serves below its names, and an administrator gives the base domain to whom it likes.
    start_agent(core, service.url, "-subdomain=x.alice.tunnel.example", agent_id="second")
    core.command("tunnel", "reserve", "tunnel.example", "other", "-json")
    apex = start_agent(core, service.url, "-subdomain=tunnel.example", token=token, agent_id="apex")
    with Connection(core.public, "") as visitor:
        for host in ("x.alice.tunnel.example", "tunnel.example"):
            assert visitor.ask("GET /echo", f"Host: {host}").status == 200
    core.command("tunnel", "release", "tunnel.example")
    refusal = apex.wait_for("connection refused", reason="name_reserved")
    assert "tunnel reserve tunnel.example ACCOUNT" in refusal["error"]
    with Connection(core.public, "") as visitor:
        assert visitor.ask("GET /echo", "Host: tunnel.example").outcome == "no_tunnel"


def who(core: RunningCore, services: list[Service], count: int) -> Counter[int]:
    """How many of so many requests each service got."""
    before = [len(service.requests) for service in services]
    with Connection(core.public, "app.localhost") as visitor:
        for _ in range(count):
            assert visitor.ask("GET /echo").status == 200
    return Counter(
        {index: len(service.requests) - before[index] for index, service in enumerate(services)}
    )  # fmt: skip


def test_agents_of_one_tunnel_take_turns(
    start_core: StartCore, start_agent: StartAgent, start_service: StartService
) -> None:
    """Evenly; what a lost agent would have got moves to the other; one that leaves politely costs no request."""
    core = start_core("-agent-tls=false")
    services = [start_service() for _ in range(3)]
    agents = [
        start_agent(core, service.url, "-subdomain=app", agent_id=f"agent-{n}") for n, service in enumerate(services)
    ]
    assert who(core, services, 30) == {0: 10, 1: 10, 2: 10}
    agents[0].kill()
    core.wait_for("agent disconnected", agent_id="agent-0")
    assert who(core, services, 20) == {0: 0, 1: 10, 2: 10}

    failures: list[int] = []
    done = threading.Event()

    def keep_asking() -> None:
        with Connection(core.public, "app.localhost") as visitor:
            while not done.is_set():
                failures.extend({visitor.ask("GET /slow?ms=20").status} - {200})

    askers = [threading.Thread(target=keep_asking) for _ in range(5)]
    for asker in askers:
        asker.start()
    services[1].wait_request("/slow", 10)
    agents[1].terminate()
    assert agents[1].wait() == 0
    services[2].wait_request("/slow", len([one for one in services[2].requests if one.path == "/slow"]) + 20)
    done.set()
    for asker in askers:
        asker.join(10)
    assert failures == []
    assert who(core, services, 10) == {0: 0, 1: 0, 2: 10}

    agents[2].terminate()
    assert agents[2].wait() == 0
    with Connection(core.public, "app.localhost") as visitor:
        answer = visitor.ask("GET /echo")
        assert (answer.status, answer.outcome) == (503, "no_agent")
        assert int(answer["retry-after"]) >= 1
    start_agent(core, services[0].url, "-subdomain=app", agent_id="agent-0")
    assert who(core, services, 5)[0] == 5


def test_an_agent_without_room_is_passed_over(
    start_core: StartCore, start_agent: StartAgent, start_service: StartService
) -> None:
    core = start_core("-agent-tls=false", "-max-streams=2")
    services = [start_service(), start_service()]
    for number, service in enumerate(services):
        start_agent(core, service.url, "-subdomain=app", agent_id=f"agent-{number}")
    waiting = [Connection(core.public, "app.localhost") for _ in range(4)]
    for visitor in waiting:
        visitor.send(visitor.request("GET /hold"))
    poll(lambda: all(len(service.requests) == 2 for service in services), "two requests at each service")
    with Connection(core.public, "app.localhost") as visitor:
        answer = visitor.ask("GET /echo")
        assert (answer.status, answer.outcome) == (503, "overloaded")
        services[1].release.set()
        poll(lambda: visitor.ask("GET /echo").status == 200, "room again")
        assert services[1].requests[-1].path == "/echo"
    services[0].release.set()
    for visitor in waiting:
        assert visitor.read().body == b"held"
        visitor.close()


def test_a_lost_agent_answers_its_visitors(
    start_core: StartCore, start_agent: StartAgent, start_service: StartService
) -> None:
    """SIGKILL during requests: one without an answer yet gets 502, one in the middle of a body is broken off."""
    core, service = start_core("-agent-tls=false"), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    with Connection(core.public, "app.localhost") as waiting, Connection(core.public, "app.localhost") as reading:
        waiting.send(waiting.request("GET /hang"))
        reading.send(reading.request("GET /stall"))
        service.wait_request("/hang")
        assert reading.read_head().status == 200
        agent.kill()
        answer = waiting.read()
        assert (answer.status, answer.outcome) == (502, "link_lost")
        reading.exactly(5)
        assert reading.ends() == "reset"
        answer = waiting.ask("GET /echo")
        assert (answer.status, answer.outcome) == (503, "no_agent")


def test_the_status_page_names_what_is_served(tunnel: Tunnel) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{tunnel.core.dashboard[1]}/status", timeout=5) as page:
        status = json.load(page)
    entry = next(one for one in status["tunnels"] if one["name"] == "app")
    assert (entry["protocol"], entry["url"], len(entry["connections"])) == ("http", tunnel.agent.tunnels["app"], 1)
