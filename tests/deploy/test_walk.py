"""DEPLOYMENT.md walked: its shell blocks run as they stand, in a directory that stands for the machine's root."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tunnel.monitoring.programs import find_programs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "system"))

from running import clean_environment, poll  # noqa: E402
from watching import free_port  # noqa: E402

pytestmark = pytest.mark.system
TEXT = (ROOT / "DEPLOYMENT.md").read_text()


def block(after: str) -> str:
    """The first block of commands after these words."""
    match = re.search(r"\n\n((?:    .*\n|\n(?=    ))+)", TEXT[TEXT.index(after) :])
    assert match is not None
    return re.sub(r"(?m)^    ", "", match[1])


def walk(script: str, root: Path, cwd: Path) -> str:
    """Run it, with /etc and the like below root, without sudo and systemd. Raises AssertionError if a line fails."""
    script = re.sub(r"\bsudo (-u \w+ )?", "", script)
    script = re.sub(r"(?<![\w/.])/(etc|var|opt)/", rf"{root}/\1/", script)
    script = re.sub(r"(?m)^(systemctl|journalctl|useradd) .*$", ": \\g<0>", script)
    script = re.sub(r" -g \w+", "", script)  # groups that this machine may not have
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", script], cwd=cwd, env=clean_environment(), capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The directory that an operator stands in: the checkout's deploy/, and what he has brought."""
    where = tmp_path / "checkout"
    where.mkdir()
    (where / "deploy").symlink_to(ROOT / "deploy")
    for name in ("slack_url", "pagerduty_key"):
        (where / name).write_text("https://hooks.example.com/x\n")
    return where


def test_prometheus_and_alertmanager_from_debian(checkout: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("etc/prometheus", "etc/default", "etc/systemd/system", "data"):
        (root / name).mkdir(parents=True)
    walk(block("**Prometheus and Alertmanager**"), root, checkout)
    for tool, command, file in (
        ("promtool", "check config", "prometheus.yml"),
        ("amtool", "check-config", "alertmanager.yml"),
    ):
        done = subprocess.run(
            [tool, *command.split(), root / "etc/prometheus" / file], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (root / "etc/alertmanager").iterdir()} == {"slack_url", "pagerduty_key"}
    for name, program, storage in (
        ("prometheus", "prometheus", "storage.tsdb.path"), ("prometheus-alertmanager", "alertmanager", "storage.path"),
    ):  # fmt: skip
        match = re.fullmatch(r'ARGS="(.*)"\n', (root / "etc/default" / name).read_text())
        assert match is not None
        port = free_port()
        flags, count = re.subn(r"(--web\.listen-address=127\.0\.0\.1:)\d+", rf"\g<1>{port}", match[1])
        assert count == 1
        config = root / "etc/prometheus" / f"{program}.yml"
        command = [find_programs()[program], f"--config.file={config}", f"--{storage}={root / 'data' / program}"]
        log = tmp_path / f"{program}.log"
        with log.open("wb") as out:
            process = subprocess.Popen([*command, *shlex.split(flags)], stdout=out, stderr=out)
        try:
            poll(lambda port=port: is_ready(port), f"{program} is ready: {log.read_text()}", 30, 0.1)
        finally:
            process.terminate()
            process.wait(20)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_the_core_and_an_agent_under_systemd(checkout: Path, tmp_path: Path) -> None:
    """Every file where the units look for it, and their command lines start what serves a request."""
    root = tmp_path / "root"
    for name in ("etc/systemd/system", "var/lib/tunnel", "opt/tunnel/bin"):
        (root / name).mkdir(parents=True)
    python = root / "opt/tunnel/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (checkout / "core.toml").write_text(block("`core.toml`:"))
    walk(block("## The core under systemd"), root, checkout)
    walk(block("The administration commands"), root, checkout)
    assert (checkout / "acme.token").read_text().startswith("tt_")
    core = start(root, "tunnel-core", root / "var/lib/tunnel", STATE_DIRECTORY=str(root / "var/lib/tunnel"))
    try:
        ready = wait_line(core, "core ready")
        fingerprint = re.search(r"sha256:[0-9a-f]{64}", ready)
        agents, public = re.search(r'"agents":"([^"]+)"', ready), re.search(r'"public":"([^"]+)"', ready)
        assert fingerprint and agents and public
        agent_toml = block("`agent.toml`:").replace("sha256:…", fingerprint[0])
        (checkout / "agent.toml").write_text(agent_toml.replace("tunnel.example.com:8443", agents[1]))
        walk(block("## Agents under systemd"), root, checkout)
        credentials = root / "run"
        credentials.mkdir()
        shutil.copy(root / "etc/tunnel/token", credentials / "token")
        agent = start(root, "tunnel-agent", tmp_path, CREDENTIALS_DIRECTORY=str(credentials))
        try:
            assert "https://web.tunnel.example.com" in wait_line(agent, "tunnel ready")
        finally:
            end(agent)
    finally:
        end(core)


def start(root: Path, unit: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """The unit's command line, on ports that are free."""
    text = (root / "etc/systemd/system" / f"{unit}.service").read_text()
    [line] = re.findall(r"(?m)^ExecStart=(.*)$", text)
    line = re.sub(r"\$\{(\w+)\}", lambda match: environment[match[1]], line)
    words = shlex.split(re.sub(r"(?<![\w/.])/(etc|opt)/", rf"{root}/\1/", line))
    names = ("public", "agent", "metrics", "dashboard") if unit == "tunnel-core" else ("metrics",)
    return subprocess.Popen(
        [*words, *(f"-{name}-addr=127.0.0.1:0" for name in names)], cwd=cwd, env=clean_environment(**environment),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip


def wait_line(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if f'"msg":"{words}"' in line:
            return line
    raise AssertionError("".join(seen))


def end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    assert process.stdout is not None
    with process.stdout as rest:
        rest.read()
    assert process.wait(30) == 0
