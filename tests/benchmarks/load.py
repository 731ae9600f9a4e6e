"""Closed-loop load: wrk for requests, curl for bulk."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Failed, Process, which


@dataclass
class Load:
    """One run of wrk: answers a second, latency percentiles in ms, how many answers, how many that were not 2xx."""

    rps: float
    p50: float
    p99: float
    requests: int
    bad: int


def wrk(
    port: int,
    host: str,
    connections: int,
    seconds: int,
    path: str = "/k1",
    *,
    secure: bool = False,
    reconnect: bool = False,
    script: Path | None = None,
) -> Load:
    """wrk for so long (whole seconds). Connections are kept alive, or each is used for one request only.

    secure: over TLS. script: makes the requests instead.
    """
    command = [
        which("wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "10s",
        "-H", f"Host: {host}", *(("-H", "Connection: close") if reconnect else ()),
        *(("-s", str(script)) if script else ()),
        f"http{'s' if secure else ''}://127.0.0.1:{port}{path}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 60)
    return read_wrk(done.stdout)


def read_wrk(text: str) -> Load:
    """What wrk printed. Raises Failed for what is not its report."""

    def found(pattern: str) -> str:
        match = re.search(pattern, text)
        if match is None:
            raise Failed(f"wrk said: {text}")
        return match[1]

    def counted(pattern: str) -> int:
        match = re.search(pattern, text)
        return int(match[1]) if match else 0

    socket_errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    # A server that closes after its answer, as it was asked to, is a "read error" to wrk: those do not count.
    failed = int(socket_errors[1]) + int(socket_errors[3]) + int(socket_errors[4]) if socket_errors else 0
    return Load(
        float(found(r"Requests/sec:\s+([\d.]+)")),
        milliseconds(found(r"\s50%\s+([\d.]+\w+)")),
        milliseconds(found(r"\s99%\s+([\d.]+\w+)")),
        int(found(r"(\d+) requests in")),
        counted(r"Non-2xx or 3xx responses: (\d+)") + failed,
    )


def milliseconds(text: str) -> float:
    """12.5us, 3.1ms, 1.2s, 1.1m"""
    match = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text)
    if match is None:
        raise Failed(f"no duration: {text}")
    return float(match[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}[match[2]]


def cost(load: Callable[[], Load], processes: Sequence[Process]) -> tuple[Load, list[float]]:
    """A load, and what each process paid for it: CPU µs a request. Raises Failed when an answer was bad."""
    before = [one.cpu() for one in processes]
    done = load()
    paid = [one.cpu() - start for one, start in zip(processes, before, strict=True)]
    if done.bad or not done.requests:
        reasons = "; ".join(reason for one in processes if (reason := one.last_failure()))
        raise Failed(f"{done.bad} of {done.requests} answers were bad {reasons}".rstrip())
    return done, [seconds / done.requests * 1e6 for seconds in paid]
