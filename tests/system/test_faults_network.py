"""A network in trouble between agent and core (docs/FAULTS.md): slow, silent, cut, corrupting."""

from __future__ import annotations

import socket
import struct
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha1

import pytest
from running import RunningAgent, RunningCore, poll
from service import Service
from troubled import Full, Troubled
from watching import Asking, ask, sample, status_of, wait_served

pytestmark = pytest.mark.system

HEARTBEAT = ("-heartbeat=200ms", "-heartbeat-timeout=1s")
PLAIN = "-agent-tls=false"
Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]


def test_slow_is_not_broken(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(*HEARTBEAT), start_service()
    with Troubled(core.agents) as net:
        agent = start_agent(core, service.url, "-subdomain=app", net.flag, *HEARTBEAT)
        net.delay, net.rate = 0.05, 400_000
        assert len(ask(core, "GET /download?size=200000").body) == 200_000
        assert net.connections == 1 and not agent.find("link ended")


def test_silence_before_the_welcome_is_not_waited_for(start_core: Start, start_agent: StartAgent) -> None:
    """A network that dies in the moment between the WebSocket and the core's welcome, and never gives a sign."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        came: list[float] = []
        kept: list[socket.socket] = []

        def shake_and_say_nothing() -> None:
            with suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    head = b""
                    while not head.endswith(b"\r\n\r\n"):
                        head += sock.recv(65536)
                    key = next(
                        line[19:] for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key: ")
                    )
                    accept = b64encode(sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
                    sock.sendall(
                        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept
                    )
                    kept.append(sock)
                    came.append(time.monotonic())

        thread = threading.Thread(target=shake_and_say_nothing)
        thread.start()
        core = start_core(PLAIN)
        where = f"-server=127.0.0.1:{listener.getsockname()[1]}"
        agent = start_agent(core, "http://127.0.0.1:9", "-subdomain=app", where, ready=False)
        poll(lambda: len(came) >= 2, "another attempt", 15)
        assert came[1] - came[0] < 7  # 2 s of silence, a random wait of at most 0.4 s, and what a busy machine takes
        assert "fallen silent" in agent.wait_for("connection failed")["error"]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for sock in kept:
            sock.close()


@pytest.mark.parametrize("reset", [True, False], ids=["rst", "fin"])
def test_a_cut_link_comes_back(
    start_core: Start, start_agent: StartAgent, start_service: StartService, reset: bool
) -> None:
    core, service = start_core(), start_service()
    with Troubled(core.agents) as net:
        start_agent(core, service.url, "-subdomain=app", net.flag)
        asking = Asking(core)
        service.wait_request("/hang")
        cut = time.monotonic()
        net.cut(reset=reset)
        answer = asking.result()
        assert (answer.status, answer.outcome) == (502, "link_lost")
        assert time.monotonic() - cut < 1
        wait_served(core, 4)  # 2 s, and what a busy machine takes
        assert len([one for one in service.begun if one == "/hang"]) == 1


@pytest.mark.parametrize("cut", [True, False], ids=["what hung is cut", "what hung hangs on"])
def test_half_open_is_found_and_healed(
    start_core: Start, start_agent: StartAgent, start_service: StartService, cut: bool
) -> None:
    core, service = start_core(*HEARTBEAT), start_service()
    with Troubled(core.agents) as net:
        agent = start_agent(core, service.url, "-subdomain=app", net.flag, *HEARTBEAT)
        asking = Asking(core)
        service.wait_request("/hang")
        stalled = time.monotonic()
        net.stall()
        assert asking.result().outcome == "link_lost"
        assert agent.wait_for("link ended", reason="no heartbeat for 1 s", timeout=3)
        assert time.monotonic() - stalled < 3
        poll(lambda: net.connections >= 2, "the agent dials into the void", 5)
        assert ask(core, "GET /echo").outcome == "no_agent"
        net.heal(cut=cut)
        wait_served(core, 4)  # 2 s, and what a busy machine takes
        assert len([one for one in service.begun if one == "/hang"]) == 1


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_a_dial_that_hangs_does_not_hold_up_the_next(
    start_core: Start, start_agent: StartAgent, start_service: StartService, tls: bool
) -> None:
    """A route that swallows what is sent on it, for longer than a try has without another one beside it."""
    core, service = start_core(*([] if tls else [PLAIN])), start_service()
    with Troubled(core.agents) as net:
        net.stall()
        agent = start_agent(core, service.url, "-subdomain=app", net.flag, ready=False)
        agent.wait_for("connecting to server")
        poll(lambda: net.connections >= 2, "another try", 5)
        assert not agent.find("connection failed")
        net.heal(cut=False)
        wait_served(core, 4)  # 2 s, and what a busy machine takes
        core.wait_for("agent connected")
        assert len(core.find("agent connected")) == 1
        assert len(agent.find("connecting to server")) == 1  # it is one attempt, in the log and in the metrics


def test_a_route_that_leads_nowhere_for_a_while(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    """The kernel would repeat the SYN of the first try 7 s after it began; we don't wait for that."""
    core, service, route = start_core(), start_service(), Full()
    agent = start_agent(core, service.url, "-subdomain=app", f"-server=127.0.0.1:{route.address[1]}", ready=False)
    began = time.monotonic()
    agent.wait_for("connecting to server")
    poll(lambda: time.monotonic() - began > 3.4, "the SYN of the third second is lost", 5)
    with route.heal(core.agents):
        healed = time.monotonic()
        wait_served(core, 3.4)
        assert time.monotonic() - healed < 3  # 2 s, and what a busy machine takes


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_corruption_ends_the_link_and_not_the_tunnel(
    start_core: Start, start_agent: StartAgent, start_service: StartService, direction: str, tls: bool
) -> None:
    core, service = start_core(*HEARTBEAT, *([] if tls else [PLAIN])), start_service()
    with Troubled(core.agents) as net:
        agent = start_agent(core, service.url, "-subdomain=app", net.flag, *HEARTBEAT)
        assert ask(core, "GET /echo").status == 200
        net.corrupt(direction)
        assert agent.wait_for("link ended", timeout=5)["reason"]
        wait_served(core, 5)
        assert core.is_running and agent.is_running


def test_each_request_arrives_once_whatever_is_cut(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    """Two agents of one name, one behind a link that is cut again and again, under load."""
    core, service = start_core(), start_service()
    with Troubled(core.agents) as net:
        start_agent(core, service.url, "-subdomain=app", net.flag, agent_id="cut")
        start_agent(core, service.url, "-subdomain=app", agent_id="sound")
        statuses: list[int] = []

        def visit(base: int) -> None:
            for number in range(60):
                statuses.append(ask(core, f"GET /echo?id={base + number}").status)

        visitors = [threading.Thread(target=visit, args=(1000 * n,)) for n in range(4)]
        for visitor in visitors:
            visitor.start()
        while any(visitor.is_alive() for visitor in visitors):
            net.cut(reset=True)
            visitors[0].join(0.1)
            for visitor in visitors[1:]:
                visitor.join(0.01)
        targets = [one for one in service.begun if one.startswith("/echo?id=")]
        assert len(targets) == len(set(targets))
        assert set(statuses) <= {200, 502} and statuses.count(200) <= len(targets) <= 240
        assert statuses.count(200) > 120


def test_another_agent_serves_while_ones_service_is_down(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service, dead = start_core(), start_service(), start_service()
    dead.close()
    start_agent(core, dead.url, "-subdomain=app", agent_id="dead")
    start_agent(core, service.url, "-subdomain=app", agent_id="sound")
    assert [status_of(core) for _ in range(10)] == [200] * 10
    assert len(service.requests) == 10
    assert sample(core.metrics, "tunnel_request_outcomes_total", outcome="local_refused") == 0


def test_a_service_that_resets_at_once_costs_its_own_requests_only(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    """Before TLS begins, at every connection, also those by which the agent looks whether it is up."""
    core, service = start_core(), start_service()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reset_all() -> None:
            with suppress(OSError):
                while True:
                    with listener.accept()[0] as hasty:
                        hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        thread = threading.Thread(target=reset_all)
        thread.start()
        agent = start_agent(core, f"app={service.url},hasty=https://127.0.0.1:{listener.getsockname()[1]}")
        answers = [ask(core, "GET /", host="hasty.localhost") for _ in range(30)]
        assert {(one.status, one.outcome) for one in answers} == {(502, "local_refused")}
        assert status_of(core) == 200
        assert agent.is_running and not [one for one in agent.records if "broke" in one["msg"]]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
