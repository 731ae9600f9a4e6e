"""A machine in trouble (docs/FAULTS.md): no file descriptors, no room for logs, a store that is locked or gone."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from crewing import pids
from running import RunningAgent, RunningCore, clean_environment, poll
from service import Service
from visiting import Connection
from watching import ask, free_port, get, status_of

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_core_out_of_files(
    start_core: Start, start_agent: StartAgent, start_service: StartService, ending: ExitStack
) -> None:
    core, service = start_core(), start_service()
    start_agent(core, service.url, "-subdomain=app")
    kept = ending.enter_context(Connection(core.public, "app.localhost"))
    assert kept.ask("GET /echo").status == 200
    before = resource.prlimit(core.pid, resource.RLIMIT_NOFILE)
    open_files = len(list(Path(f"/proc/{core.pid}/fd").iterdir()))
    resource.prlimit(core.pid, resource.RLIMIT_NOFILE, (open_files, before[1]))
    waiting = ending.enter_context(Connection(core.public, "app.localhost"))
    waiting.send(waiting.request("GET /echo"))
    core.wait_for("can't accept visitors now", error="Too many open files")
    used, began = cpu_seconds(core.pid), time.monotonic()
    poll(lambda: time.monotonic() - began > 1 and kept.ask("GET /echo").status == 200, "who is in is served", 5, 0.2)
    assert cpu_seconds(core.pid) - used < 0.5
    assert len(core.find("can't accept visitors now")) == 1
    resource.prlimit(core.pid, resource.RLIMIT_NOFILE, before)
    assert waiting.read().status == 200
    assert core.wait_for("visitors are accepted again")


def test_agent_out_of_files(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    assert sum(1 for _ in agent.find("tunnel ready")) == 1
    before = resource.prlimit(agent.pid, resource.RLIMIT_NOFILE)
    open_now = {int(path.name) for path in Path(f"/proc/{agent.pid}/fd").iterdir()}
    # the lowest number that is free, for a descriptor may have been closed below others
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (min(set(range(len(open_now) + 1)) - open_now), before[1]))
    answer = ask(core, "GET /echo", "Accept: application/json")
    assert answer.outcome == "overloaded" and b"Too many open files" in answer.body
    assert not agent.find("link ended")
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, before)
    assert status_of(core) == 200


def test_as_many_files_as_the_system_allows(start_core: Start, start_agent: StartAgent, ending: ExitStack) -> None:
    """Shells and containers start programs with 1,024, far below what they may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as lowered:
        lowered.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        core = start_core("-workers=2", "-log-level=debug")
        agent = start_agent(core, "http://127.0.0.1:1", "-workers=2", "-log-level=debug")
    most = hard if 0 < hard < 2**20 else 2**20
    for program in (core, agent):
        for pid in (program.pid, *pids(program).values()):
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (most, hard)
        [said] = program.find("more files may be open")
        assert (said["before"], said["allowed"], said["level"]) == (1024, most, "DEBUG")
        assert not program.find("fewer files may be open than the limits allow connections")


@pytest.mark.parametrize(
    ("module", "flags", "needed", "advice"),
    [
        ("tunnel.core", ["-public-addr=127.0.0.1:0", "-agent-addr=127.0.0.1:0", "-dashboard-addr=", "-max-attaching=50",
                         "-max-connections=50"], 10_700, "or set -max-visitors=100"),
        ("tunnel.agent", ["-server=127.0.0.1:1", "-max-retries=0"], 1300,
         "this one takes 500 requests at a time, and tells the core so"),
    ],
    ids=["core", "agent"],
)  # fmt: skip
def test_limits_that_the_system_does_not_allow_are_named(
    module: str, flags: list[str], needed: int, advice: str, tmp_path: Path
) -> None:
    data = [f"-data-dir={tmp_path}"] if module == "tunnel.core" else []
    program = subprocess.Popen(
        ["sh", "-c", 'ulimit -n 800 && exec "$@"', "sh", sys.executable, "-m", module, "-log-json", "-metrics-addr=",
         *flags, *data],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean_environment(AGENT_TOKEN="tt_none"),
    )  # fmt: skip
    try:
        assert program.stdout is not None
        record = next(one for one in map(json.loads, program.stdout) if one["level"] == "WARNING")
        assert record["msg"] == "fewer files may be open than the limits allow connections"
        assert (record["allowed"], record["needed"]) == (800, needed)
        assert record["advice"].startswith("allow more before the start") and record["advice"].endswith(advice)
        program.terminate()
        assert not [one for one in map(json.loads, program.stdout) if one.get("needed")], "said again"
    finally:
        program.kill()
        program.communicate()


@pytest.mark.parametrize("output", ["full disk", "stopped reader"])
def test_logs_that_nobody_takes(tmp_path: Path, output: str) -> None:
    public, metrics = free_port(), free_port()
    read, write = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY)
    core = subprocess.Popen(
        [sys.executable, "-m", "tunnel.core", "-log-json", "-log-level=debug", f"-data-dir={tmp_path / 'core'}",
         f"-public-addr=127.0.0.1:{public}", f"-metrics-addr=127.0.0.1:{metrics}", "-agent-addr=127.0.0.1:0",
         "-dashboard-addr=127.0.0.1:0"],
        stdout=full if output == "full disk" else write, stderr=subprocess.DEVNULL, env=clean_environment(),
    )  # fmt: skip
    try:
        for fd in (write, full):
            os.close(fd)

        def dropped() -> int:
            found = re.search(r'"dropped": *(\d+)', get(("127.0.0.1", metrics), "/health/detailed")[1])
            assert found is not None
            return int(found[1])

        def ready() -> bool:
            try:
                return get(("127.0.0.1", metrics), "/readyz")[0] == 200
            except OSError:
                return False

        poll(ready, "the core is ready", 30)
        slowest = 0.0
        with Connection(("127.0.0.1", public), "nobody.localhost") as visitor:
            for _ in range(1000):
                began = time.monotonic()
                assert visitor.ask("GET /" + "x" * 7000).status == 404
                slowest = max(slowest, time.monotonic() - began)
        assert slowest < 1
        if output == "stopped reader":
            _flood(public)  # beyond what waits for the reader
        poll(lambda: dropped() > 0, "lost records are counted", 10, 0.1)
        if output == "stopped reader":
            lost = _read_until_lost(read)
            assert 0 < lost <= dropped()
        core.terminate()
        assert core.wait(15) == 0
    finally:
        core.kill()
        core.wait()
        os.close(read)


def _flood(public: int, requests: int = 20_000) -> None:
    """Many requests for a name that nobody has, one behind the other; each makes a line of some 400 bytes."""
    with socket.create_connection(("127.0.0.1", public), 30) as visitor:
        sender = threading.Thread(
            target=visitor.sendall,
            args=(b"GET /%b HTTP/1.1\r\nHost: nobody.localhost\r\n\r\n" % (b"x" * 200) * requests,),
        )
        sender.start()
        answers, tail = 0, b""
        while answers < requests:
            data = visitor.recv(1 << 20)
            assert data, f"{answers} answers"
            answers += (tail + data).count(b"HTTP/1.1 404 ")
            tail = data[-12:]
        sender.join()


def _read_until_lost(read: int) -> int:
    """How many records the program says that it has lost, once its output is read again."""
    data, deadline = b"", time.monotonic() + 20
    while b"log records dropped" not in data:
        assert time.monotonic() < deadline
        data = data[-100_000:] + os.read(read, 1 << 20)
    data += os.read(read, 1 << 20) if not data.endswith(b"\n") else b""
    [line] = [json.loads(one) for one in data.splitlines() if b"log records dropped" in one]
    return int(line["dropped"])


def test_a_locked_store(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(), start_service()
    start_agent(core, service.url, "-subdomain=app")
    lock = sqlite3.connect(core.data_dir / "tunnel.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        assert status_of(core) == 200
        assert get(core.metrics, "/healthz")[0] == 200
        assert ask(core, "GET /", host="nobody.localhost").status == 404
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    [used] = json.loads(core.command("usage", "default", "-json").stdout)
    poll(lambda: json.loads(core.command("usage", "default", "-json").stdout)[0]["requests"] == 1,
         f"the use is written, after {used}", 15, 0.5)  # fmt: skip


def test_a_store_that_is_gone(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(), start_service()
    start_agent(core, service.url, "-subdomain=app")
    path = core.data_dir / "tunnel.db"
    away = path.with_name("away.db")
    path.rename(away)
    assert "removed or replaced" in core.wait_for("store unreachable", timeout=5)["error"]
    assert not path.exists()
    assert get(core.metrics, "/readyz")[0] == 503
    assert status_of(core) == 200
    answer = ask(core, "GET /", host="nobody.localhost")
    assert (answer.status, answer.outcome) == (500, "internal")
    assert not core.find("request broke")
    away.rename(path)
    core.wait_for("store answers again", timeout=5)
    assert ask(core, "GET /", host="nobody.localhost").status == 404
