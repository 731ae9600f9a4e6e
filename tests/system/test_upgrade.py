"""A core hands over to its successor: visitors, open connections and agents notice nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from running import RunningAgent, RunningCore, address, clean_environment, poll
from service import Service
from visiting import Broken, Connection
from watching import get

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]

RATE = 300  #: requests a second, of all clients together
CLIENTS = 20
OPEN = 100  #: upgraded connections that stay open


class Client(threading.Thread):
    """Asks at a fixed rate on a kept connection, on a new one after `Connection: close` and every 40 requests."""

    def __init__(self, core: RunningCore, until: threading.Event) -> None:
        super().__init__(daemon=True)
        self._core, self._until = core, until
        self.statuses: list[int] = []
        self.failures: list[str] = []
        self.longest = 0.0
        self.start()

    def run(self) -> None:
        visitor: Connection | None = None
        began = time.monotonic()
        number = 0
        while not self._until.is_set():
            number += 1
            planned = began + number * CLIENTS / RATE
            time.sleep(max(0.0, planned - time.monotonic()))
            try:
                if visitor is None:
                    visitor = Connection(self._core.public, "app.localhost")
                answer = visitor.ask("GET /echo")
            except (Broken, OSError) as exc:
                self.failures.append(f"request {number}: {exc!r}")
                if visitor is not None:
                    visitor.close()
                visitor = None
                continue
            self.longest = max(self.longest, time.monotonic() - planned)
            self.statuses.append(answer.status)
            if answer["connection"].lower() == "close" or number % 40 == 0:
                visitor.close()
                visitor = None
        if visitor is not None:
            visitor.close()


def upgraded(core: RunningCore) -> Connection:
    visitor = Connection(core.public, "app.localhost")
    visitor.send(visitor.request("GET /upgrade", "Connection: Upgrade", "Upgrade: echo"))
    assert visitor.read_head().status == 101
    return visitor


def echoes(visitor: Connection, word: bytes) -> bool:
    visitor.send(word)
    return visitor.exactly(len(word)) == word


@contextmanager
def ended(core: RunningCore, after: int) -> Iterator[Callable[[], int]]:
    """What gives the process id of the core's successor, which is ended at last."""

    def pid() -> int:
        return int(core.wait_for("upgrade: successor started", after=after)["pid"])

    try:
        yield pid
    finally:
        for record in core.find("upgrade: successor started", after=after):
            os.kill(int(record["pid"]), signal.SIGTERM)
            poll(lambda: core.find("stopped", after=after)[1:], "the successor has ended", 20)


def test_under_load_nothing_is_lost(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core("-drain-timeout=6s", "-tcp-ports=0"), start_service()
    host, number = address(service.url)
    agent = start_agent(core, f"app={service.url},raw=tcp://{host}:{number}")
    port = address(agent.tunnels["raw"])[1]
    stop = threading.Event()
    seen = core.mark()
    with ended(core, seen) as successor_pid, ExitStack() as stack:
        stack.callback(stop.set)
        held = [stack.enter_context(upgraded(core)) for _ in range(OPEN)]
        clients = [Client(core, stop) for _ in range(CLIENTS)]
        poll(lambda: all(len(client.statuses) > 5 for client in clients), "the load runs")
        core.signal(signal.SIGUSR2)
        pid = successor_pid()
        core.wait_for("core ready", after=seen)
        agent.wait_for("the core sends us away")
        # The old core goes on with what it has, the new one takes what comes.
        assert all(echoes(visitor, b"still here %d" % at) for at, visitor in enumerate(held))
        assert core.is_running
        with socket.create_connection(("127.0.0.1", port), 5) as raw:
            raw.sendall(b"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert raw.recv(65536).startswith(b"HTTP/1.1 200")
        counted = sum(len(client.statuses) for client in clients)
        poll(lambda: sum(len(client.statuses) for client in clients) > counted + RATE, "the load goes on")
        assert core.process.wait(20) == 0  # the drain's deadline cuts the upgraded connections, nothing else
        counted = sum(len(client.statuses) for client in clients)
        poll(lambda: sum(len(client.statuses) for client in clients) > counted + RATE / 2, "and on")
        stop.set()
        for client in clients:
            client.join(10)
        assert get(core.metrics, "/readyz")[0] == 200
        os.kill(pid, 0)
    assert [client.failures for client in clients] == [[]] * CLIENTS
    assert {status for client in clients for status in client.statuses} == {200}
    assert max(client.longest for client in clients) < 5
    assert {record["outcome"] for record in core.find("request", after=seen, path="/echo")} == {"ok"}
    assert not core.find("upgrade: not all agents came")
    assert len(core.find("stopped", after=seen)) == 2


def test_a_successor_that_does_not_start_changes_nothing(
    start_core: Start, start_agent: StartAgent, start_service: StartService, tmp_path: Path
) -> None:
    config = tmp_path / "core.toml"
    config.write_text('log_level = "info"\n')
    core, service = start_core(f"-config={config}"), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    config.write_text("max_head = 5\nnonsense = 1\n")
    core.signal(signal.SIGUSR2)
    failed = core.wait_for("upgrade failed, this core goes on")
    assert "exit code 2" in failed["error"]
    with Connection(core.public, "app.localhost") as visitor:
        assert visitor.ask("GET /echo").status == 200
    assert not agent.find("the core sends us away")
    # and the next one, with the mistake mended, works
    config.write_text('log_level = "info"\n')
    seen = core.mark()
    with ended(core, seen):
        core.signal(signal.SIGUSR2)
        core.wait_for("core ready", after=seen)
        assert core.process.wait(20) == 0
        with Connection(core.public, "app.localhost") as visitor:
            assert visitor.ask("GET /echo").status == 200


def test_stopped_in_the_middle_both_end(start_core: Start) -> None:
    core = start_core()
    seen = core.mark()
    core.signal(signal.SIGUSR2)
    pid = int(core.wait_for("upgrade: successor started", after=seen)["pid"])
    core.terminate()
    assert core.wait(20) == 0  # its output ends only when the successor has ended too
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


ACTIVATE = """
import os, socket, sys
names = ("public", "agents", "metrics", "dashboard")
sockets = []
for at, name in enumerate(names):
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0)); sock.listen(64)
    sockets.append(sock)
print(*(sock.getsockname()[1] for sock in sockets), flush=True)
for at, sock in enumerate(sockets):
    os.dup2(sock.fileno(), 60 + at, inheritable=False)
for at in range(len(sockets)):
    os.dup2(60 + at, 3 + at, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=sys.argv[1])
os.execv(sys.executable, [sys.executable, "-m", "tunnel.core", "-log-json", *sys.argv[2:]])
"""


def test_socket_activation(tmp_path: Path) -> None:
    """As systemd does it: sockets from 3 on, names in LISTEN_FDNAMES."""
    command = [sys.executable, "-c", ACTIVATE, "public:agents:metrics:dashboard", f"-data-dir={tmp_path}",
               "-public-addr=127.0.0.1:1", "-agent-addr=127.0.0.1:1", "-metrics-addr=127.0.0.1:1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=clean_environment(), encoding="utf-8")
    try:
        assert process.stdout is not None
        public, _, metrics, dashboard = (int(port) for port in process.stdout.readline().split())
        # Who comes before the core is up waits, and is answered.
        with Connection(("127.0.0.1", public), "nobody.localhost", 20) as visitor:
            assert visitor.ask("GET /").status == 404
        assert get(("127.0.0.1", metrics), "/healthz")[0] == 200
        assert get(("127.0.0.1", dashboard), "/")[0] == 200
    finally:
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 0


def test_an_activated_socket_needs_a_name(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ACTIVATE, "public:agents:tunnel.socket:dashboard", f"-data-dir={tmp_path}"]
    done = subprocess.run(
        command, capture_output=True, env=clean_environment(), encoding="utf-8", timeout=30, check=False
    )
    assert done.returncode == 2
    assert "FileDescriptorName=" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
