"""Real cores and agents for the system tests: started, watched through their JSON log, and always ended.

A program is `sys.executable -m tunnel.core|agent -log-json` with every address on loopback and every port the kernel's.
A thread reads its records (standard output) into `records`; tests wait for one with `wait_for`, never by sleeping:

    core = RunningCore(tmp_path / "core", "-tcp-ports=0")          # returns when it is ready
    core.public, core.agents, core.metrics, core.dashboard         # (host, port)
    core.token, core.token_file, core.fingerprint, core.data_dir
    core.command("account", "create", "acme").stdout               # python -m tunnel.core -data-dir D account …
    again = core.again()                                           # after its end: same data directory, same ports
    agent = RunningAgent(core, "http://127.0.0.1:8000", "-subdomain=app")  # returns when its tunnels are ready
    agent.tunnels, agent.metrics, agent.id                         # {name: url}, (host, port), its -agent-id
    record = core.wait_for("agent connected", agent_id="a")        # raises AssertionError with the log after `timeout`
    seen = core.mark(); ...; core.wait_for("request", after=seen)  # only records after the mark
    core.find("request", outcome="ok")                             # those there now
    core.terminate(); core.wait()                                  # SIGTERM; the exit code
    core.kill(); core.stop(); core.cont(); agent.stop_cont(0.5)    # SIGKILL, SIGSTOP, SIGCONT
    core.rss()                                                     # resident bytes now
    core.close()                                                   # SIGTERM; asserts exit code 0 and a clean stderr

`close` comes by itself when the program was made with the fixtures `start_core`, `start_agent` (conftest.py here).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Address = tuple[str, int]
Record = dict[str, Any]
START_TIMEOUT = 30.0  #: seconds; two busy cores start several programs


def poll(condition: Callable[[], Any], what: str, timeout: float = 10.0, interval: float = 0.01) -> Any:
    """The first truthy value of `condition`. Raises AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(interval)
    return value


def clean_environment(**extra: str) -> dict[str, str]:
    """Ours without what configures the programs under test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TUNNEL_", "AGENT_", "OTEL_"))}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **extra}


def address(text: str) -> Address:
    """("127.0.0.1", 80) of "127.0.0.1:80" or of a URL."""
    match = re.search(r"(?:^|//)\[?([^/\]]+?)\]?:(\d+)", text)
    assert match is not None, text
    return match[1], int(match[2])


class Program:
    """A process of ours and what it has logged."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: dict[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.records: list[Record] = []
        self.lines: list[str] = []  # those records as they were written
        self.other_lines: list[str] = []  # lines on standard output that are no JSON
        self.error_text = ""
        self.expected_code = 0
        self.expected_broken_layers = 0
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=clean_environment(**(environment or {})), cwd=directory, encoding="utf-8",
        )  # fmt: skip
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_records, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def __repr__(self) -> str:
        return f"<{self.name} {self.pid}>"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    # The log

    def _read_records(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                record = json.loads(line)
            except ValueError:
                self.other_lines.append(line)
                continue
            with self._changed:
                self.lines.append(line)
                self.records.append(record)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.error_text += line

    def mark(self) -> int:
        """Where the log is now, for `after`."""
        return len(self.records)

    def find(self, msg: str, *, after: int = 0, **fields: object) -> list[Record]:
        wanted = {"msg": msg, **fields}
        return [one for one in self.records[after:] if all(one.get(name) == value for name, value in wanted.items())]

    def wait_for(self, msg: str, *, timeout: float = 10.0, after: int = 0, **fields: object) -> Record:
        """The first record with this message and these fields. Raises AssertionError with the log's end."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not (found := self.find(msg, after=after, **fields)):
                left = deadline - time.monotonic()
                if left <= 0 or (not self.is_running and not self._readers[0].is_alive()):
                    raise AssertionError(f"{self} did not log {msg!r} {fields} within {timeout:g} s\n{self.tail()}")
                self._changed.wait(min(left, 0.1))
        return found[0]

    def tail(self) -> str:
        lines = [json.dumps(record, ensure_ascii=False) for record in self.records[-40:]]
        return "\n".join([*lines, *self.other_lines[-20:], self.error_text[-4000:]])

    # Life

    def signal(self, number: int) -> None:
        if self.is_running:
            self.process.send_signal(number)

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.expected_code = -signal.SIGKILL
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> None:
        self.signal(signal.SIGSTOP)

    def cont(self) -> None:
        self.signal(signal.SIGCONT)

    def stop_cont(self, seconds: float) -> None:
        """Standing still for so long."""
        self.stop()
        time.sleep(seconds)
        self.cont()

    def wait(self, timeout: float = 20.0) -> int:
        """The exit code, once it has ended and all it wrote is read."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} has not ended within {timeout:g} s\n{self.tail()}") from None
        for reader in self._readers:
            reader.join(timeout)
        return code

    def close(self) -> None:
        """End it if it still runs; check how it ended: `expected_code` (0) and nothing on standard error."""
        try:
            self.cont()
            self.terminate()
            code = self.wait()
            assert code == self.expected_code, f"{self} ended with {code}\n{self.tail()}"
            assert "Traceback" not in self.error_text and "Warning" not in self.error_text, self.error_text
            off = [one for one in self.records if one.get("msg") == "layer switched off"]
            assert len(off) == self.expected_broken_layers, off
            broken = [one for one in self.records if "Traceback" in str(one)]
            assert not broken, broken
        finally:
            if self.is_running:
                self.process.kill()
                self.process.wait()
            for pipe in (self.process.stdout, self.process.stderr):
                assert pipe is not None
                pipe.close()

    def rss(self) -> int:
        """Resident memory, bytes."""
        match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert match is not None
        return int(match[1]) * 1024


class RunningCore(Program):
    """A core that is ready. ports: (public, agents, metrics, dashboard), 0 for any that is free.

    flags win over what stands here. Environment variables go in `environment`.
    """

    def __init__(
        self,
        data_dir: Path,
        *flags: str,
        ports: Sequence[int] = (0, 0, 0, 0),
        environment: dict[str, str] | None = None,
        start: Sequence[str] = ("-m", "tunnel.core"),
        directory: Path | None = None,
    ) -> None:
        names = ("-public-addr", "-agent-addr", "-metrics-addr", "-dashboard-addr")
        given = [f"{name}=127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)]
        given = [one for one in given if not any(flag.split("=")[0] == one.split("=")[0] for flag in flags)]
        super().__init__("core", [*start, "-log-json", f"-data-dir={data_dir}", *given, *flags], environment, directory)
        self.data_dir = data_dir
        self.flags = flags
        self.environment = environment
        try:
            ready = self.wait_for("core ready", timeout=START_TIMEOUT)
        except BaseException:
            self.process.kill()
            raise
        self.public = address(ready["public"])
        self.agents = address(ready["agents"])
        self.http = address(ready["http"]) if "http" in ready else ("", 0)
        self.metrics = address(ready["metrics"])
        self.dashboard = address(ready["status"])
        self.fingerprint: str = ready["fingerprint"] if ready["fingerprint"].startswith("sha256:") else ""
        self.token_file = data_dir / "default.token"

    @property
    def token(self) -> str:
        return self.token_file.read_text().strip()

    def again(self, *flags: str) -> RunningCore:
        """A new core in this one's place: same data directory, ports and flags (and these)."""
        ports = [self.public[1], self.agents[1], self.metrics[1], self.dashboard[1]]
        return RunningCore(self.data_dir, *self.flags, *flags, ports=ports, environment=self.environment)

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`python -m tunnel.core -data-dir D WORDS…`. Raises AssertionError when it fails and `check` holds."""
        done = subprocess.run(
            [sys.executable, "-m", "tunnel.core", f"-data-dir={self.data_dir}", *words],
            env=clean_environment(), capture_output=True, encoding="utf-8", timeout=30, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def new_token(self, account: str) -> str:
        """A token of this account, which is made if need be."""
        self.command("account", "create", account, check=False)
        return self.command("token", "create", account).stdout.strip()


class RunningAgent(Program):
    """An agent; with `ready` (the default) it has its tunnels. local: the value of -local; token: "" is default's."""

    def __init__(
        self,
        core: RunningCore,
        local: str,
        *flags: str,
        token: str = "",
        agent_id: str = "agent",
        ready: bool = True,
        environment: dict[str, str] | None = None,
        start: Sequence[str] = ("-m", "tunnel.agent"),
        directory: Path | None = None,
    ) -> None:
        trust = f"-server-fingerprint={core.fingerprint}" if core.fingerprint else "-tls=false"
        super().__init__(
            "agent",
            [*start, "-log-json", f"-server=127.0.0.1:{core.agents[1]}", trust, f"-local={local}",
             f"-agent-id={agent_id}", "-metrics-addr=127.0.0.1:0", *flags],
            {"AGENT_TOKEN": token or core.token, **(environment or {})},
            directory,
        )  # fmt: skip
        self.core = core
        self.id = agent_id
        self._count = local.count(",") + 1
        if ready:
            try:
                self.wait_ready()
            except BaseException:
                self.process.kill()
                raise

    def wait_ready(self, *, timeout: float = START_TIMEOUT, after: int = 0) -> None:
        """Until every tunnel is announced (after this mark)."""
        try:
            poll(lambda: len(self.find("tunnel ready", after=after)) >= self._count or not self.is_running,
                 f"{self} is ready", timeout)  # fmt: skip
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.tail()}\n{self.core.tail()}") from None
        assert self.is_running, self.tail()

    @property
    def tunnels(self) -> dict[str, str]:
        """Name → URL, as the newest link has them."""
        return {one["tunnel"]: one["url"] for one in self.find("tunnel ready")}

    @property
    def metrics(self) -> Address:
        return address(self.wait_for("metrics and health")["url"])
