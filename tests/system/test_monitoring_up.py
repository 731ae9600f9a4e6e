"""`python -m tunnel.monitoring up` with the real Prometheus and Alertmanager, and from an installed wheel."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from running import clean_environment, poll

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
BOUND = 30.0  # seconds for what takes one or two
FLAGS = ("-public-addr=localhost:0", "-prometheus-addr=127.0.0.1:0", "-alertmanager-addr=127.0.0.1:0")


class Native:
    """A running native mode. Its children, found in /proc, must have ended with it."""

    def __init__(self, directory: Path, *words: str) -> None:
        directory.mkdir(exist_ok=True)
        self.out, self.err, self.data_dir = directory / "out", directory / "err", directory / "data"
        command = [sys.executable, "-P", "-m", "tunnel.monitoring", "up", f"-data-dir={self.data_dir}", *FLAGS, *words]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=clean_environment()
            )

    def wait_up(self) -> None:
        poll(lambda: "boards " in self.out.read_text() or self.process.poll() is not None, "it is up", BOUND)
        assert self.process.poll() is None, self.err.read_text()

    def url(self, word: str) -> str:
        """The address on the line that has this word behind it."""
        line = next(line for line in self.out.read_text().splitlines() if word in line)
        parts = line.replace(",", " ").split()
        return next(one for one, after in itertools.pairwise(parts) if after.startswith(word))

    @property
    def children(self) -> dict[str, int]:
        """Name → process id of the programs beside it."""
        found = {}
        for listed in Path(f"/proc/{self.process.pid}/task").glob("*/children"):  # a worker thread started them
            for text in listed.read_text().split():
                found[Path(f"/proc/{text}/comm").read_text().strip()] = int(text)
        return found

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(BOUND)


@contextmanager
def running(directory: Path, *words: str) -> Iterator[Native]:
    native = Native(directory, *words)
    try:
        yield native
    finally:
        if native.process.poll() is None:  # it failed: leave nothing behind
            with suppress(subprocess.TimeoutExpired):
                native.end()
            native.process.kill()
            native.process.wait()


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


def test_a_tunnel_that_is_watched(tmp_path: Path) -> None:
    with running(tmp_path, "-scrape-interval=1s") as native:
        native.wait_up()
        assert native.out.read_text().startswith("http://hello.localhost:")
        assert [line.split(":")[0] for line in native.err.read_text().splitlines()] == ["alertmanager"] * 2 + [
            "prometheus"
        ] * 2
        prometheus, alertmanager = native.url("(Prometheus").rstrip("/"), native.url("(Alertmanager)")
        check_targets(prometheus)
        check_rules(prometheus)
        poll(lambda: get(f"{prometheus}/api/v1/alertmanagers")["data"]["activeAlertmanagers"], "it is told", BOUND, 0.1)
        assert get(f"{alertmanager}/api/v2/status")["cluster"]["status"] == "disabled"
        check_counts(native, prometheus)
        assert {"prometheus", "prometheus-aler"} == native.children.keys()  # 15 characters and no more
        children = native.children.values()
        began = time.monotonic()
        assert native.end(signal.SIGHUP) == 0, native.err.read_text()  # its terminal is closed; SIGINT: below
        assert time.monotonic() - began < 15
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
        assert len(native.err.read_text().splitlines()) == 4
    flags = Path(native.data_dir / "prometheus" / "prometheus.log").read_text()
    assert "SIGTERM" in flags  # it was asked to stop, not killed


def check_targets(prometheus: str) -> None:
    def all_up() -> bool:
        targets = get(f"{prometheus}/api/v1/targets")["data"]["activeTargets"]
        found = {one["scrapePool"] for one in targets if one["health"] == "up"}
        return found == {"tunnel-core", "tunnel-agents", "tunnel-agent", "prometheus", "alertmanager"}

    poll(all_up, "all five jobs are up", BOUND, 0.1)


def check_rules(prometheus: str) -> None:
    """Our rules are loaded."""
    groups = get(f"{prometheus}/api/v1/rules")["data"]["groups"]
    alerts = {rule["name"] for group in groups for rule in group["rules"] if rule["type"] == "alerting"}
    assert {"TunnelCoreDown", "AgentDisconnected", "HighErrorRate"} <= alerts


def check_counts(native: Native, prometheus: str) -> None:
    """A visitor's requests are in Prometheus; the public name is given by Host, for not every resolver knows it."""
    public = urllib.parse.urlsplit(native.out.read_text().splitlines()[0])
    for _ in range(3):
        request = urllib.request.Request(f"http://localhost:{public.port}/", headers={"Host": public.netloc})
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert answer.status == 200
    query = urllib.parse.quote('sum(tunnel_requests_total{code="200"})')

    def count() -> float:
        result = get(f"{prometheus}/api/v1/query?query={query}")["data"]["result"]
        return float(result[0]["value"][1]) if result else 0

    poll(lambda: count() == 3, "three requests are counted", BOUND, 0.1)


def test_it_is_ended_while_it_starts(tmp_path: Path) -> None:
    with running(tmp_path) as native:
        poll(lambda: "prometheus-aler" in native.children, "the first of them", BOUND)
        children = native.children.values()
        assert native.end() == 0
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
        assert "Traceback" not in native.err.read_text()
    assert native.out.read_text() == ""


def test_a_child_that_dies_ends_it_with_one_line(tmp_path: Path) -> None:
    with running(tmp_path) as native:
        native.wait_up()
        shown = len(native.err.read_text().splitlines())
        children = native.children
        os.kill(children["prometheus-aler"], signal.SIGKILL)
        assert native.process.wait(BOUND) == 1
        [line] = native.err.read_text().splitlines()[shown:]
        assert line.startswith("tunnel.monitoring up: alertmanager was ended by signal 9: ")
        assert not Path(f"/proc/{children['prometheus']}").exists()


def test_a_child_that_can_not_begin_says_why(tmp_path: Path) -> None:
    data = tmp_path / "data" / "prometheus" / "data"
    data.parent.mkdir(parents=True)
    data.write_text("in its way")
    with running(tmp_path) as native:
        assert native.process.wait(BOUND) == 1
        lines = native.err.read_text().splitlines()
        assert lines[-1].startswith("tunnel.monitoring up: prometheus ended with code ")
        assert "active query log" in lines[-1], lines
        assert str(tmp_path / "data" / "prometheus" / "prometheus.log") in lines[-1]
        assert "Traceback" not in "".join(lines)
        assert native.out.read_text() == ""


def test_an_installed_package_brings_the_files(tmp_path: Path) -> None:
    """A wheel, installed into an environment of its own: no checkout is near it."""
    source, wheels, environment = tmp_path / "source", tmp_path / "wheels", tmp_path / "environment"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "tunnel", "observability", "deploy"):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheels}", str(source))
    run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    [wheel] = wheels.glob("*.whl")
    python = str(environment / "bin" / "python")
    run(*pip, "--python", python, "install", "--no-deps", str(wheel))
    code = "import sys; sys.path.append(sys.argv[1]); from tunnel.monitoring import files; print(files.find_deploy())"
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    deploy = Path(run(python, "-P", "-c", code, libraries).strip())
    assert environment in deploy.parents
    for name in ("prometheus/rules/core.yml", "alertmanager/alertmanager.yml", "grafana/dashboards/tunnel-core.json"):
        assert (deploy / name).read_text() == (ROOT / "deploy" / name).read_text()


def run(*command: str) -> str:
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, encoding="utf-8", timeout=120, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
