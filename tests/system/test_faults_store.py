"""The store in trouble (docs/FAULTS.md): a PostgreSQL that is late, gone or takes no writes, a disk that takes none."""

from __future__ import annotations

import importlib.util
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from running import Program, RunningAgent, RunningCore, poll
from service import Service
from watching import Relay, ask, get, status_of

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    path = Path(__file__).parents[1] / "core" / "postgres.py"
    spec = importlib.util.spec_from_file_location("tests_core_postgres_for_faults", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.PostgreSQL()
    yield made
    made.remove()


@pytest.fixture
def postgresql(server: Any) -> Iterator[Any]:
    """One that runs again after the test."""
    yield server
    if not server.is_running:
        server.start()


def waiting_core(directory: Path, url: str, ending: ExitStack, *flags: str) -> Program:
    """A core as it was started; it is not ready yet."""
    core = Program(
        "core",
        ["-m", "tunnel.core", "-log-json", f"-data-dir={directory}", "-public-addr=127.0.0.1:0",
         "-agent-addr=127.0.0.1:0", "-metrics-addr=", "-dashboard-addr=", *flags],
        {"TUNNEL_DATABASE_URL": url},
    )  # fmt: skip
    ending.callback(core.close)
    return core


def test_a_database_that_starts_later_than_we_do(postgresql: Any, tmp_path: Path, ending: ExitStack) -> None:
    url = postgresql.database()
    postgresql.stop()
    core = waiting_core(tmp_path, url, ending)
    first = core.wait_for("the store is away, trying again", timeout=20)
    assert first["level"] == "WARNING" and "refused" in first["cause"]
    postgresql.start()
    core.wait_for("core ready", timeout=10)
    assert 1 <= len(core.find("the store is away, trying again")) <= 6


def test_a_core_that_waits_for_its_database_can_be_stopped(postgresql: Any, tmp_path: Path, ending: ExitStack) -> None:
    url = postgresql.database()
    postgresql.stop()
    core = waiting_core(tmp_path, url, ending)
    core.wait_for("the store is away, trying again", timeout=20)
    core.terminate()
    assert core.wait(5) == 0
    assert not core.find("core ready")


def test_a_wrong_password_is_not_waited_for(postgresql: Any, tmp_path: Path, ending: ExitStack) -> None:
    core = waiting_core(tmp_path, postgresql.database().replace("pg-secret-word", "guessed"), ending)
    core.expected_code = 2
    assert core.wait(20) == 2
    assert "password authentication failed" in core.find("can't start")[0]["error"]
    assert not core.find("the store is away, trying again")


def test_a_database_that_goes_and_comes_back(
    postgresql: Any, start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    """Served tunnels go on, use is kept; who attaches now hears that it should try again."""
    service = start_service()
    core = start_core("-auth-timeout=5s", environment={"TUNNEL_DATABASE_URL": postgresql.database()})
    start_agent(core, service.url, "-subdomain=app")
    postgresql.stop()
    core.wait_for("store unreachable", timeout=15)
    assert [status_of(core) for _ in range(20)] == [200] * 20
    assert get(core.metrics, "/healthz")[0] == 200 and get(core.metrics, "/readyz")[0] == 503
    assert 'tunnel_readiness_check{check="store"} 0.0\n' in get(core.metrics, "/metrics")[1]
    late = start_agent(core, service.url, "-subdomain=late", ready=False, agent_id="late")
    assert late.wait_for("connection refused", timeout=15)["reason"] == "unavailable"
    assert ask(core, "GET /", host="nobody.localhost").outcome == "internal"
    postgresql.start()
    core.wait_for("store answers again", timeout=15)
    late.wait_ready(timeout=20)
    poll(lambda: _used(core) >= 20, "the use of the outage is written", 20, 0.5)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_core_ends_in_time_though_its_database_hangs(
    postgresql: Any, start_core: Start, start_agent: StartAgent, start_service: StartService, signals: int
) -> None:
    """It takes connections and says nothing: nothing tells that from one that is slow but time."""
    service, url = start_service(), postgresql.database()
    with Relay(("127.0.0.1", postgresql.port)) as relay:
        through = url.replace(f":{postgresql.port}/", f":{relay.address[1]}/")
        core = start_core("-drain-timeout=20s", environment={"TUNNEL_DATABASE_URL": through})
        start_agent(core, service.url, "-subdomain=app")
        relay.hold()
        assert [ask(core, "POST /echo", body=b"x" * 100).status for _ in range(20)] == [200] * 20
        core.wait_for("store unreachable", timeout=15)
        began = time.monotonic()
        for _ in range(signals):
            core.terminate()
            time.sleep(0.2)
        assert core.wait(15) == 0
        assert time.monotonic() - began < 6
        lost = core.find("usage is lost")
        assert [(one["requests"], one["bytes_in"], one["bytes_out"]) for one in lost] == [(20, 2000, 2000)]
        assert "did not answer" in lost[0]["error"]


def test_a_database_that_takes_no_writes(
    postgresql: Any, start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    """As a standby after a failover: what is read goes on, what is written waits."""
    service, url = start_service(), postgresql.database()
    core = start_core(environment={"TUNNEL_DATABASE_URL": url})
    start_agent(core, service.url, "-subdomain=app")
    name = url.rpartition("/")[2]

    def set_read_only(value: str) -> None:
        with psycopg.connect(postgresql.url("postgres"), autocommit=True) as admin:
            admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {value}")
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])

    set_read_only("on")
    assert [status_of(core) for _ in range(20)] == [200] * 20
    assert "read-only" in core.wait_for("usage not written", timeout=15)["error"]
    late = start_agent(core, service.url, "-subdomain=late", ready=False, agent_id="late")
    assert late.wait_for("connection refused", timeout=15)["reason"] == "unavailable"
    assert ask(core, "GET /", host="nobody.localhost").status == 404
    set_read_only("off")
    core.wait_for("usage is written again", timeout=15)
    late.wait_ready(timeout=20)
    poll(lambda: _used(core) >= 20, "the use is written", 20, 0.5)


def test_a_disk_that_takes_no_writes(
    start_core: Start, start_agent: StartAgent, start_service: StartService, ending: ExitStack
) -> None:
    """Full, or mounted read-only: the kernel refuses every write to a file (here: none may grow)."""
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    before = resource.prlimit(core.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(core.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    ending.callback(lambda: core.is_running and resource.prlimit(core.pid, resource.RLIMIT_FSIZE, before))
    assert [status_of(core) for _ in range(20)] == [200] * 20
    core.wait_for("usage not written", timeout=15)
    late = start_agent(core, service.url, "-subdomain=late", ready=False, agent_id="late")
    assert late.wait_for("connection refused", timeout=15)["reason"] == "unavailable"
    assert ask(core, "GET /", host="nobody.localhost").status == 404
    assert agent.is_running and not agent.find("link ended")
    resource.prlimit(core.pid, resource.RLIMIT_FSIZE, before)
    core.wait_for("usage is written again", timeout=15)
    late.wait_ready(timeout=20)
    poll(lambda: json.loads(core.command("usage", "default", "-json").stdout)[0]["requests"] == 20, "all is written", 9)


def _used(core: RunningCore) -> int:
    assert core.environment is not None
    with psycopg.connect(core.environment["TUNNEL_DATABASE_URL"]) as conn:
        [row] = conn.execute("SELECT coalesce(sum(requests), 0) FROM usage")
        return int(row[0])
