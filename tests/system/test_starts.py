"""Starts that fail: one clear line, exit code 2 for what is wrong here, 1 for an agent that gives up; no traceback.

And the ways to trust a core's certificate, with the advice for each way in which that goes wrong.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from running import RunningAgent, RunningCore, clean_environment
from service import Service
from watching import ask, get, run_agent, run_core

pytestmark = pytest.mark.system

ANYWHERE = ("-public-addr=127.0.0.1:0", "-agent-addr=127.0.0.1:0", "-metrics-addr=127.0.0.1:0", "-dashboard-addr=")
ONCE = ("-max-retries=0", "-metrics-addr=", "-log-level=error")


def only_line(result: tuple[int, str, str], code: int = 2) -> str:
    """The one line that a failed start leaves."""
    found, out, err = result
    lines = [line for line in (out + err).splitlines() if line]
    assert found == code and len(lines) == 1 and "Traceback" not in lines[0], (found, lines)
    return lines[0]


def gives_up(core: RunningCore, *flags: str, server: str = "") -> str:
    """Why an agent that tries once fails; the other of its two lines says that it gives up."""
    server = server or f"127.0.0.1:{core.agents[1]}"
    code, out, err = run_agent(f"-server={server}", *ONCE, *flags, AGENT_TOKEN=core.token)
    lines = (out + err).splitlines()
    assert code == 1 and len(lines) == 2 and "Traceback" not in out + err, (code, lines)
    assert "giving up" in lines[1]
    return lines[0]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCore]:
    core = RunningCore(tmp_path_factory.mktemp("starts") / "core")
    yield core
    core.close()


# Exit code 2 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [run_core, run_agent])
def test_bad_flags_and_files(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert "-nosuch" in only_line(run("-nosuch"))
    assert "-log-level" in only_line(run("-log-level=loud"))
    (tmp_path / "unknown.toml").write_text("bogus = 1\n")
    line = only_line(run(f"-config={tmp_path / 'unknown.toml'}"))
    assert "unknown key bogus" in line and "unknown.toml" in line
    (tmp_path / "type.toml").write_text("request_timeout = true\n")
    assert "request_timeout" in only_line(run(f"-config={tmp_path / 'type.toml'}"))
    (tmp_path / "broken.toml").write_text("a = = b\n")
    assert "broken.toml" in only_line(run(f"-config={tmp_path / 'broken.toml'}"))
    assert "missing.toml" in only_line(run(f"-config={tmp_path / 'missing.toml'}"))


def test_port_in_use(tmp_path: Path, core: RunningCore) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        for flag in ("-public-addr", "-agent-addr", "-metrics-addr", "-dashboard-addr"):
            line = only_line(
                run_core(*ANYWHERE, f"-data-dir={tmp_path / 'data'}", f"{flag}={where}", "-log-level=error")
            )
            assert f"{flag}: {where} is in use" in line
        line = only_line(run_agent(*ONCE, f"-metrics-addr={where}", "-server=127.0.0.1:1"))
        assert f"-metrics-addr: {where} is in use" in line


def test_the_agents_command_outlives_a_start_that_failed(
    tmp_path: Path, start_agent: Callable[..., RunningAgent]
) -> None:
    """It is said at each start until an agent has come, by one process and by several."""
    data = tmp_path / "data"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = f"-metrics-addr=127.0.0.1:{taken.getsockname()[1]}"
        assert "is in use" in only_line(run_core(*ANYWHERE, f"-data-dir={data}", busy, "-log-level=error"))
    for flags in ((), ("-workers=2",)):
        core = RunningCore(data, *flags)
        said = core.wait_for("no agent has come yet: connect an agent with this command")["command"]
        assert str(core.token_file) in said and core.fingerprint in said
        core.close()
    core = RunningCore(data)
    start_agent(core, "http://127.0.0.1:9", "-subdomain=app").close()
    core.close()
    core = RunningCore(data)
    core.close()
    assert not [one for one in core.records if "connect an agent" in one["msg"]]


def test_unreadable_certificate_and_data_directory(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("this is no certificate\n")
    line = only_line(run_core(*ANYWHERE, f"-data-dir={tmp_path / 'd'}", f"-agent-cert={tmp_path / 'no.pem'}",
                              f"-agent-key={tmp_path / 'no.pem'}", "-log-level=error"))  # fmt: skip
    assert "-agent-cert" in line and "no.pem" in line
    assert "-agent-cert" in only_line(run_core(f"-agent-cert={tmp_path / 'missing.pem'}"))
    line = only_line(run_agent(f"-ca-cert={tmp_path / 'no.pem'}", *ONCE))
    assert "-ca-cert" in line and "no.pem" in line
    (tmp_path / "file").write_text("")
    line = only_line(run_core(*ANYWHERE, f"-data-dir={tmp_path / 'file'}"))
    assert "-data-dir" in line or str(tmp_path / "file") in line


def test_store_that_cannot_be_used(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "tunnel.db").write_bytes(b"this is no database" * 100)
    line = only_line(run_core(*ANYWHERE, f"-data-dir={directory}"))
    assert "store" in line


def test_a_data_directory_that_is_read_only(tmp_path: Path) -> None:
    """A new one, and one that was in use, as on a file system that was mounted so."""
    for name in ("new", "used"):
        directory = tmp_path / name
        directory.mkdir()
        if name == "used":
            core = RunningCore(directory)
            core.close()
            for path in directory.iterdir():
                path.chmod(0o400)
        directory.chmod(0o500)
        try:
            line = only_line(_run_without_privileges(f"-data-dir={directory}"))
            assert str(directory) in line
        finally:
            directory.chmod(0o700)


@pytest.mark.parametrize("words", [(), ("token", "list")])
def test_a_data_directory_of_somebody_else(words: tuple[str, ...], tmp_path: Path) -> None:
    """Whether a store is in it can't even be seen."""
    directory = tmp_path / "theirs"
    directory.mkdir()
    (directory / "tunnel.db").touch()
    directory.chmod(0)
    try:
        code, out, err = _run_without_privileges(f"-data-dir={directory}", *words)
    finally:
        directory.chmod(0o700)
    (line,) = (out + err).splitlines()
    assert code == (1 if words else 2)
    assert str(directory / "tunnel.db") in line and "Permission denied; be the user whose store it is" in line


def _run_without_privileges(*flags: str) -> tuple[int, str, str]:
    """Root may write anywhere; take that away where we are root."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*drop, sys.executable, "-m", "tunnel.core", *ANYWHERE, *flags], env=clean_environment(), timeout=30,
        stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


# Exit code 1 -----------------------------------------------------------------------------------------------------


def test_a_store_that_stays_away(tmp_path: Path) -> None:
    code, out, err = run_core(
        *ANYWHERE, f"-data-dir={tmp_path / 'x'}", "-database-wait=3s",
        TUNNEL_DATABASE_URL="postgresql://u:hush@127.0.0.1:1/x",
    )  # fmt: skip
    lines = (out + err).splitlines()
    assert code == 1, lines
    assert "trying again" in lines[0] and "can't start" in lines[-1] and "refused" in lines[-1]
    assert 3 <= len(lines) <= 4 and "hush" not in out + err


def test_an_unreachable_core() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{free.getsockname()[1]}"
        code, out, err = run_agent(f"-server={server}", "-max-retries=2", "-metrics-addr=", AGENT_TOKEN="x")
    lines = (out + err).splitlines()
    assert code == 1
    assert sum("can't reach the core" in line for line in lines) == 1  # said once, for all three
    assert "giving up" in lines[-1] and "after 3 attempts" in lines[-1]


def test_certificates_that_are_not_trusted(core: RunningCore) -> None:
    unknown = gives_up(core)
    assert "not trusted" in unknown and "-server-fingerprint" in unknown and "-ca-cert" in unknown
    wrong = gives_up(core, "-server-fingerprint=sha256:" + "0" * 64)
    assert core.fingerprint in wrong and "somebody is in between" in wrong


def test_tls_on_one_end_only(core: RunningCore, start_core: Callable[..., RunningCore]) -> None:
    assert "does the core expect TLS (-tls)?" in gives_up(core, "-tls=false")
    plain = start_core("-agent-tls=false")
    assert "does the core have TLS" in gives_up(plain, f"-server-fingerprint={core.fingerprint}")
    # The visitors' address instead of the agents': both with and without TLS.
    wrong = gives_up(plain, "-tls=false", server=f"127.0.0.1:{plain.public[1]}")
    assert "no tunnel core's address for agents" in wrong
    assert plain.is_running and core.is_running


def test_a_certificate_of_ones_own(
    tmp_path: Path, start_core: Callable[..., RunningCore], start_agent: Callable[..., RunningAgent]
) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    stranger.cert_pem.write_to_path(tmp_path / "stranger.pem")
    core = start_core(f"-agent-cert={tmp_path / 'cert.pem'}", f"-agent-key={tmp_path / 'key.pem'}")
    service = Service()
    try:
        start_agent(core, service.url, "-subdomain=app", "-server-fingerprint=", f"-ca-cert={tmp_path / 'ca.pem'}")
        assert ask(core, "GET /echo").status == 200
        start_agent(core, service.url, "-subdomain=pinned", agent_id="pinned")
        start_agent(core, service.url, "-subdomain=trusting", "-server-fingerprint=", "-tls-skip-verify", agent_id="b")
    finally:
        service.close()
    assert "not trusted" in gives_up(core, f"-ca-cert={tmp_path / 'stranger.pem'}")
    other = gives_up(core, f"-ca-cert={tmp_path / 'ca.pem'}", server=f"127.0.0.2:{core.agents[1]}")
    assert "can't reach" in other


def test_what_a_core_writes_is_its_owners_alone(start_core: Callable[..., RunningCore], tmp_path: Path) -> None:
    """Whatever the umask lets others do."""
    before = os.umask(0)
    try:
        core = start_core("-dashboard-addr=0.0.0.0:0", f"-invite-dir={tmp_path / 'invite'}")
    finally:
        os.umask(before)
    written = [*core.data_dir.rglob("*"), *(tmp_path / "invite").rglob("*")]
    names = {path.name for path in written}
    assert names >= {"tunnel.db", "tunnel.db-wal", "default.token", "dashboard.token", "agent-link.key", "token"}
    open_to_others = [path for path in (core.data_dir, *written) if path.stat().st_mode & 0o077]
    assert not open_to_others


def test_a_status_page_for_others_needs_its_token(start_core: Callable[..., RunningCore]) -> None:
    core = start_core("-dashboard-addr=0.0.0.0:0")
    where = ("127.0.0.1", core.dashboard[1])
    assert get(where, "/readyz")[0] == 200
    assert get(where, "/status")[0] == 401
    assert get(where, "/health/detailed")[0] == 401
    file = Path(core.wait_for("the status page needs a token, others can reach it")["file"])
    assert file.stat().st_mode & 0o777 == 0o600
    token = file.read_text().strip()
    assert get(where, "/status", Authorization=f"Bearer {token}")[0] == 200
    assert token not in "".join(core.lines)
