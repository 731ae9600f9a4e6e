"""Ending politely, with real processes: what was accepted is answered; deadlines and second signals are kept."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import RunningAgent, RunningCore, clean_environment, poll
from service import Service
from visiting import Broken, Connection
from watching import Asking, ask, get, status_of

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]


class Client(threading.Thread):
    """Keeps a connection and asks again and again until nobody accepts it any more.

    answered: statuses of whole answers. broken: requests whose answer began and broke off. unanswered: requests on a
    kept connection that the core closed without a byte, which HTTP lets it do at any time (RFC 9112, 9.3.1).
    """

    def __init__(self, core: RunningCore, line: str) -> None:
        super().__init__(daemon=True)
        self._core, self._line = core, line
        self.answered: list[int] = []
        self.broken: list[str] = []
        self.unanswered = 0
        self.start()

    def run(self) -> None:
        visitor: Connection | None = None
        while True:
            fresh = visitor is None
            try:
                if visitor is None:
                    visitor = Connection(self._core.public, "app.localhost")
            except ConnectionError:
                return
            try:
                answer = visitor.ask(self._line)
            except (Broken, ConnectionError) as exc:
                if visitor.buffer or (isinstance(exc, Broken) and exc.partial):
                    self.broken.append(repr(exc))
                self.unanswered += 1
                visitor.close()
                if fresh:  # it was in the listener's backlog: nobody had accepted it
                    return
                visitor = None
                continue
            self.answered.append(answer.status)
            if answer["connection"].lower() == "close":
                visitor.close()
                visitor = None


def test_drain_under_load_fails_no_accepted_request(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core("-drain-delay=1s"), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    clients = [Client(core, "GET /echo") for _ in range(8)]
    slow = [Client(core, "GET /slow?ms=900") for _ in range(4)]
    poll(lambda: all(client.answered for client in clients + slow), "every client has an answer")
    core.terminate()
    began = time.monotonic()
    core.wait_for("draining")
    status, text = get(core.metrics, "/readyz")
    assert status == 503 and "shutting down" in text
    assert time.monotonic() - began < 0.5
    assert get(core.metrics, "/healthz")[0] == 200
    # Within the delay new connections are still taken.
    assert ask(core, "GET /echo").status == 200
    poll(lambda: not any(client.is_alive() for client in clients + slow), "the clients have ended", 10)
    assert core.wait(10) == 0
    assert time.monotonic() - began < 5
    for client in clients + slow:
        assert not client.broken
        assert set(client.answered) == {200}
        # At most one of its connections was closed while its next request was on the way, and one not accepted.
        assert client.unanswered <= 2
    # Whatever the core has begun, the visitor has got.
    records = core.find("request")
    assert {record["outcome"] for record in records} == {"ok"}
    assert len(records) == 1 + sum(len(client.answered) for client in clients + slow)
    assert agent.wait_for("the core sends us away")
    assert core.records[-1]["msg"] == "stopped"


def test_drain_deadline(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core("-drain-timeout=500ms"), start_service()
    start_agent(core, service.url, "-subdomain=app")
    asking = Asking(core)
    service.wait_request("/hang")
    core.terminate()
    answer = asking.result()
    assert (answer.status, answer.outcome) == (503, "draining")
    assert 0.4 < asking.took < 3
    assert core.wait(5) == 0
    assert core.find("drain deadline reached")
    assert core.find("request", outcome="draining", status=503)
    assert service.wait_closed("/hang")


def test_second_signal_ends_now(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    asking = Asking(core)
    service.wait_request("/hang")
    core.terminate()
    assert core.wait_for("draining")["under_way"] == 1
    assert core.is_running
    began = time.monotonic()
    core.terminate()
    core.wait(5)
    assert time.monotonic() - began < 2
    asking.join(2)
    assert asking.answer is not None
    agent.terminate()  # it dials in vain: nothing to wait for
    began = time.monotonic()
    assert agent.wait(5) == 0
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGHUP, signal.SIGHUP]])
def test_agent_finishes_its_requests(
    start_core: Start, start_agent: StartAgent, start_service: StartService, signals: list[int]
) -> None:
    """A terminal that is closed may say so twice, by its shell and by the kernel."""
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    asking = Asking(core, "GET /hold")
    service.wait_request("/hold")
    for number in signals:
        agent.signal(number)
        assert agent.wait_for("draining")["timeout"] == "30s"
    poll(lambda: get(agent.metrics, "/readyz")[0] == 503, "the agent says that it stops", 2)
    poll(lambda: status_of(core) == 503, "no new requests for it", 2)
    service.release.set()
    answer = asking.result()
    assert (answer.status, answer.body) == (200, b"held")
    assert agent.wait(5) == 0
    assert agent.records[-1]["msg"] == "stopped"
    assert core.wait_for("agent disconnected")


def test_who_ends_decides_how_long_its_requests_have(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    """The core's own time is for its own end."""
    core, service = start_core("-drain-timeout=300ms"), start_service()
    agent = start_agent(core, service.url, "-subdomain=app", "-drain-timeout=20s")
    asking = Asking(core, "GET /slow?ms=2000")
    service.wait_request("/slow")
    agent.terminate()
    answer = asking.result()
    assert answer.status == 200
    assert agent.wait(5) == 0


def test_agent_that_was_started_to_outlive_its_terminal(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(), start_service()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does for its child
    try:
        agent = start_agent(core, service.url, "-subdomain=app")
    finally:
        signal.signal(signal.SIGHUP, before)
    agent.signal(signal.SIGHUP)
    assert status_of(core) == 200
    assert not agent.find("draining")


def test_agent_whose_terminal_is_closed(start_core: Start, start_service: StartService, tmp_path: Path) -> None:
    """It has nowhere to write any more, and drains all the same."""
    core, service = start_core("-agent-tls=false"), start_service()
    screen, terminal = os.openpty()
    agent = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-m", "tunnel.agent", f"-server=127.0.0.1:{core.agents[1]}", "-tls=false",
         f"-local={service.url}", "-subdomain=app", "-metrics-addr=", f"-token-file={core.token_file}"],
        stdin=terminal, stdout=terminal, stderr=terminal, env=clean_environment(), cwd=tmp_path,
    )  # fmt: skip
    os.close(terminal)
    try:
        core.wait_for("agent connected", timeout=30)
        asking = Asking(core, "GET /hold")
        service.wait_request("/hold")
        os.close(screen)
        poll(lambda: status_of(core) == 503, "no new requests for it", 5)
        service.release.set()
        assert asking.result().status == 200
        assert agent.wait(5) == 0
    finally:
        agent.kill()
        agent.wait()


def test_agent_with_a_request_that_never_ends(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url, "-subdomain=app", "-drain-timeout=300ms")
    asking = Asking(core)
    service.wait_request("/hang")
    agent.terminate()
    assert agent.wait(5) == 0
    answer = asking.result()
    assert (answer.status, answer.outcome) == (502, "link_lost")


# The terminal -----------------------------------------------------------------------------------------------------

ON_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
for number in range(3):
    os.dup2(terminal, number)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def read_until(terminal: int, text: str, seconds: float = 20) -> str:
    seen, deadline = "", time.monotonic() + seconds
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {text!r} in {seen!r}"
        seen += os.read(terminal, 65536).decode()
    return seen


@pytest.mark.parametrize("workers", [1, 2] if sys.platform.startswith("linux") else [1])
def test_a_core_ends_with_its_terminal(tmp_path: Path, workers: int) -> None:
    """Before, it went on where nobody saw it, and its ports were in use for the next one."""
    ours, theirs = os.openpty()
    flags = ["-public-addr=127.0.0.1:0", "-agent-addr=127.0.0.1:0", "-metrics-addr=", "-dashboard-addr="]
    program = ["-m", "tunnel.core", f"-data-dir={tmp_path}", f"-workers={workers}", *flags]
    core = subprocess.Popen([sys.executable, "-c", ON_TERMINAL, os.ttyname(theirs), *program], env=clean_environment())
    try:
        read_until(ours, "core ready")
        os.close(theirs)
        core.send_signal(signal.SIGHUP)
        read_until(ours, "certificates read again")
        os.close(ours)
        assert core.wait(10) == 0
    finally:
        core.kill()
        core.wait()
