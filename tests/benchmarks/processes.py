"""Processes that are measured: CPU time and memory from /proc, and an end that comes whatever happens.

Each runs in a session of its own, so that Ctrl-C reaches the harness alone, which ends them in order; and the kernel
kills them should the harness die before that (`setpriv --pdeathsig`). CPU and memory are those of the whole session:
a program that works with several processes is charged for all of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
START_TIMEOUT = 60.0  #: seconds


class Failed(Exception):
    """What was to be measured could not be."""


def which(name: str) -> str:
    """Where a program is. Raises Failed."""
    found = find(name)
    if found is None:
        raise Failed(f"{name} is missing; scripts/packages installs it")
    return found


def find(name: str) -> str | None:
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


def clean_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Ours without what would configure the programs, or give them other code than they are to run."""
    foreign = ("TUNNEL_", "AGENT_", "OTEL_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, **(extra or {})}


def poll(condition: Callable[[], Any], what: str, seconds: float = START_TIMEOUT, interval: float = 0.01) -> Any:
    """The first truthy value of `condition`. Raises Failed after so long."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise Failed(f"not within {seconds:g} s: {what}")
        time.sleep(interval)
    return value


class Process:
    """What it writes goes into a file, whose reader costs nothing while it is measured."""

    def __init__(self, *command: str, directory: Path, env: dict[str, str] | None = None) -> None:
        self.name = Path(command[0]).name
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        # `directory`: `python -m` looks there first, so it must not be a checkout.
        self._popen = subprocess.Popen(
            [which("setpriv"), "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL, stdout=self._output,
            stderr=subprocess.STDOUT, env=clean_environment(env), start_new_session=True, cwd=directory,
        )  # fmt: skip
        self.pid = self._popen.pid

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    # What it wrote

    def output(self, most: int = 1_000_000) -> str:
        """The newest part of it."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), most, max(0, size - most)).decode("utf-8", "replace")

    def wait_line(self, pattern: str, seconds: float = START_TIMEOUT) -> re.Match[str]:
        """Until there is a line like that. Raises Failed when it ends or takes too long."""

        def look() -> re.Match[str] | None:
            running = self.is_running
            found = next((match for line in self.output().splitlines() if (match := re.search(pattern, line))), None)
            if found is None and not running:
                raise Failed(f"{self.name} ended before {pattern!r}:\n{self.output()[-4000:]}")
            return found

        found: re.Match[str] = poll(look, f"{pattern!r} from {self.name}: {self.output()[-4000:]}", seconds)
        return found

    def wait_record(self, msg: str, seconds: float = START_TIMEOUT) -> dict[str, Any]:
        """The first JSON line with this message."""
        record: dict[str, Any] = json.loads(self.wait_line(rf'"msg": ?"{msg}"', seconds).string)
        return record

    def last_failure(self) -> str:
        """The last ERROR record of its log."""
        return next((line for line in reversed(self.output().splitlines()) if '"ERROR"' in line), "")

    # What it uses

    def _stats(self) -> Iterator[list[str]]:
        """/proc/PID/stat from the third field on, of each process in the session."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if fields[3] == str(self.pid):
                yield fields

    def cpu(self) -> float:
        """Seconds of CPU used so far, by all threads, and by children that were waited for."""
        return sum(int(ticks) for fields in self._stats() for ticks in fields[11:15]) / TICKS

    def rss(self) -> int:
        """Resident bytes."""
        return sum(int(fields[21]) for fields in self._stats()) * PAGE

    def pin(self, *processors: int) -> None:
        """Let all its threads run on these processors only."""
        for path in Path(f"/proc/{self.pid}/task").iterdir():
            os.sched_setaffinity(int(path.name), processors)

    # Its end

    def signal(self, number: int) -> None:
        if self.is_running:
            self._popen.send_signal(number)

    def stop(self, seconds: float = 10.0) -> None:
        """SIGTERM, and SIGKILL for whatever of its session is there after so long."""
        self.signal(signal.SIGTERM)
        try:
            self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._popen.wait()
            self._output.close()
