"""Workers of a core in trouble: no room for files, and a replacement that is late."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from crewing import OldAgent, pids, wait_links
from running import Program, RunningAgent, RunningCore, poll
from service import Service
from visiting import Connection
from watching import get, sample, samples

from tunnel.core.supervisor import MAX_WAITING

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]
TWO = "-workers=2"


def files_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def kill_until_they_wait(program: Program, *numbers: int) -> None:
    """Kill workers until the next ones in their places are started seconds later."""

    def kill() -> dict[int, int]:
        was = pids(program)
        for number in numbers:
            os.kill(was[number], signal.SIGKILL)
        return was

    for _ in range(3):
        was = kill()
        poll(lambda was=was: all(pids(program).get(at) not in (None, was[at]) for at in numbers), "replaced", 20)  # type: ignore[misc]
    seen = program.mark()
    kill()
    for number in numbers:
        ended = program.wait_for("worker ended", after=seen, worker=number)
        assert float(ended["wait"].removesuffix("s")) > 1


def test_a_worker_without_room_for_files_loses_those_connections_only(
    start_core: Start, start_service: StartService, ending: ExitStack
) -> None:
    core, service = start_core(TWO), start_service()
    ending.callback(OldAgent(core, f"app={service.url}").close)  # one link: what comes to the other is passed on
    home = core.wait_for("agent connected")["worker"]
    worker = pids(core)[home]
    kept = ending.enter_context(Connection(core.public, "app.localhost"))
    assert kept.ask("GET /echo").status == 200
    before = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (3, before[1]))
    with ExitStack() as stack:
        late = [stack.enter_context(Connection(core.public, "app.localhost")) for _ in range(20)]
        for visitor in late:
            visitor.send(visitor.request("GET /echo"))
        core.wait_for("connections between processes dropped", worker=home)
        assert kept.ask("GET /echo").status == 200
    resource.prlimit(worker, resource.RLIMIT_NOFILE, before)
    for _ in range(10):
        with Connection(core.public, "app.localhost") as visitor:
            assert visitor.ask("GET /echo").status == 200
    assert pids(core)[home] == worker and not core.find("worker ended")


def test_a_worker_that_has_no_file_left_to_pass_a_visitor_on_answers_itself(
    start_core: Start, start_service: StartService, ending: ExitStack
) -> None:
    core, service = start_core(TWO), start_service()
    ending.callback(OldAgent(core, f"app={service.url}").close)
    worker = pids(core)[1 - core.wait_for("agent connected")["worker"]]
    open_before = sum(map(files_of, pids(core).values()))
    visitors = [ending.enter_context(Connection(core.public, "app.localhost")) for _ in range(20)]
    poll(lambda: sum(map(files_of, pids(core).values())) == open_before + 20, "all are accepted")
    before = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (3, before[1]))
    for visitor in visitors:
        visitor.send(visitor.request("GET /echo"))
    outcomes = [visitor.read().outcome for visitor in visitors]
    assert "" in outcomes and set(outcomes) <= {"", "no_agent", "internal"}, outcomes  # the store has no file either
    assert len(set(outcomes)) > 1, "none was passed on"
    assert not core.find("connection broke")
    resource.prlimit(worker, resource.RLIMIT_NOFILE, before)
    for _ in range(10):
        with Connection(core.public, "app.localhost") as visitor:
            assert visitor.ask("GET /echo").status == 200


def test_connections_that_wait_for_a_worker_are_bounded_and_never_left(start_core: Start, ending: ExitStack) -> None:
    core = start_core(TWO, "-agent-tls=false")
    before = files_of(core.pid)
    kill_until_they_wait(core, 1)
    agents = [ending.enter_context(socket.create_connection(core.agents, 5)) for _ in range(MAX_WAITING + 40)]
    for sock in agents:
        sock.sendall(b"GET /?worker=1 HTTP/1.1\r\n")
    poll(lambda: sum(is_closed(sock) for sock in agents) >= 40, "those that are too many are closed")
    assert before + MAX_WAITING - 20 < files_of(core.pid) <= before + MAX_WAITING
    os.kill(pids(core)[0], signal.SIGKILL)  # it had passed them on
    poll(lambda: len(pids(core)) == 2 and get(core.metrics, "/readyz")[1].count("2 of 2"), "both are there", 30)
    poll(lambda: all(is_closed(sock) for sock in agents), "the others are closed", 20)
    poll(lambda: files_of(core.pid) <= before, "nothing is left open")


def test_pages_answer_soon_while_a_worker_stands_still(
    start_core: Start, start_agent: StartAgent, start_service: StartService, ending: ExitStack
) -> None:
    core = start_core(TWO, "-agent-tls=false")
    start_agent(core, start_service().url, "-subdomain=app")
    wait_links(core, 2)
    with Connection(core.public, "app.localhost") as visitor:
        assert visitor.ask("GET /echo").status == 200
    names = ("tunnel_requests_total", "tunnel_connections_total", "tunnel_workers_active")
    before = {name: sample(core.metrics, name, **LABELS.get(name, {})) for name in names}
    one = pids(core)[1]
    os.kill(one, signal.SIGSTOP)
    ending.callback(os.kill, one, signal.SIGCONT)
    for path in ("/metrics", "/readyz", "/metrics/agents", "/health/detailed"):
        began = time.monotonic()
        status, text = get(core.metrics, path)
        assert (status, time.monotonic() - began < 3) == (200, True), (path, status, time.monotonic() - began)
    assert '"workers":{"ok":true,"reason":"1 of 2 workers serve"}' in text
    assert {name: sample(core.metrics, name, **LABELS.get(name, {})) for name in names} == before


LABELS = {"tunnel_requests_total": {"code": "200"}}


def test_what_an_agents_killed_worker_had_under_way_has_failed(
    start_core: Start, start_agent: StartAgent, start_service: StartService, ending: ExitStack
) -> None:
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url, "-subdomain=app", TWO)
    wait_links(core, 2)
    for _ in range(10):
        visitor = ending.enter_context(Connection(core.public, "app.localhost"))
        visitor.send(visitor.request("GET /hold"))
    poll(lambda: service.begun.count("/hold") == 10, "all are under way")
    assert sample(agent.metrics, "agent_streams_active") == 10
    before = json.loads(get(agent.metrics, "/health/detailed")[1])["statistics"]
    os.kill(pids(agent)[1], signal.SIGKILL)
    agent.wait_for("worker ended")
    page = {name: value for (name, _), value in samples(agent.metrics).items()}
    active, failed = page["agent_streams_active"], page["agent_streams_failed"]
    assert 0 < active < 10 and failed == page["agent_requests_failed"] == 10 - active
    assert page["agent_streams_total"] == active + page["agent_streams_completed"] + failed
    after = json.loads(get(agent.metrics, "/health/detailed")[1])["statistics"]
    assert after["frames_received"] >= before["frames_received"] > 0  # nothing goes backwards


def test_an_agent_whose_workers_are_all_down_says_that_it_has_no_link(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core = start_core()
    agent = start_agent(core, start_service().url, "-subdomain=app", TWO)
    wait_links(core, 2)
    kill_until_they_wait(agent, 0, 1)
    page = samples(agent.metrics)
    assert page["agent_connection_active", frozenset({("agent_id", "agent")})] == 0
    assert page["agent_workers_active", frozenset()] == 0


def is_closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_reload_that_all_processes_hear_of_loses_none(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    """As `systemctl kill -s HUP` does it: to every process of the unit."""
    core, service = start_core(TWO), start_service()
    start_agent(core, service.url, "-subdomain=app")
    was, seen = pids(core), core.mark()
    for pid in (*was.values(), core.pid):
        os.kill(pid, signal.SIGHUP)
    core.wait_for("certificates read again", after=seen)
    with Connection(core.public, "app.localhost") as visitor:
        assert visitor.ask("GET /echo").status == 200
    assert pids(core) == was and not core.find("worker ended", after=seen)
