"""Workers of a core in trouble: no room for files, and a replacement that is late."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from crewing import OldAgent, pids
from running import RunningAgent, RunningCore, poll
from service import Service
from visiting import Connection
from watching import get

from tunnel.core.supervisor import MAX_WAITING

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]
TWO = "-workers=2"


def files_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def kill_until_it_waits(core: RunningCore, number: int) -> None:
    """Kill a worker until the next one in its place is started seconds later."""
    for _ in range(3):
        was = pids(core)[number]
        os.kill(was, signal.SIGKILL)
        poll(lambda was=was: pids(core).get(number) not in (None, was), "it is replaced", 20)  # type: ignore[misc]
    seen = core.mark()
    os.kill(pids(core)[number], signal.SIGKILL)
    assert float(core.wait_for("worker ended", after=seen, worker=number)["wait"].removesuffix("s")) > 1


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
    kill_until_it_waits(core, 1)
    agents = [ending.enter_context(socket.create_connection(core.agents, 5)) for _ in range(MAX_WAITING + 40)]
    for sock in agents:
        sock.sendall(b"GET /?worker=1 HTTP/1.1\r\n")
    poll(lambda: sum(is_closed(sock) for sock in agents) >= 40, "those that are too many are closed")
    assert before + MAX_WAITING - 20 < files_of(core.pid) <= before + MAX_WAITING
    os.kill(pids(core)[0], signal.SIGKILL)  # it had passed them on
    poll(lambda: len(pids(core)) == 2 and get(core.metrics, "/readyz")[1].count("2 of 2"), "both are there", 30)
    poll(lambda: all(is_closed(sock) for sock in agents), "the others are closed", 20)
    poll(lambda: files_of(core.pid) <= before, "nothing is left open")


def is_closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
