"""Does it grow with time? Some minutes of everything at once, in cycles; after each, in calm, one looks at both.

In a cycle: small requests on kept and on new connections, downloads, uploads, visitors who leave in the middle, names
that nobody serves, and agents that come and go. What is looked at are memory, open files, Trio's tasks and Python's
blocks, when the garbage collector has been there: failures leave cycles, which wait for it. Caches and the allocator
fill at first; whether it grows then is asked of the second half.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.crowds import idle_agents, sample
from benchmarks.growth import ROOM, uploads
from benchmarks.load import wrk
from benchmarks.measures import MIB, downloads
from benchmarks.processes import Failed, Process
from benchmarks.servers import Servers
from benchmarks.tunnels import Ours, Program, start_tunnel, wait_calm

LEAVERS = 50  #: visitors of a cycle who leave in the middle

COLLECTING = """
import gc, runpy, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: gc.collect())
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""  #: runs a module whose garbage is collected at SIGUSR1


@dataclass(frozen=True)
class Watched:
    """slack: what it may differ by; part: as a part of itself as well."""

    name: str
    slack: float
    part: float


WATCHED = (
    Watched("resident, MiB", 2, 0.02),
    Watched("open files", 4, 0),
    Watched("tasks", 4, 0),
    Watched("blocks", 3000, 0.01),
)


def grew(values: Sequence[float], watched: Watched) -> float:
    """By how much more than it may: the last quarter's median over the third's, both of the second half. 0: not."""
    quarter = len(values) // 4
    if not quarter:
        raise ValueError("four values at least")
    before = statistics.median(values[-2 * quarter : -quarter])
    after = statistics.median(values[-quarter:])
    return max(0.0, after - before - max(watched.slack, watched.part * before))


def soak(servers: Servers, minutes: float) -> bool:
    """Run and print; whether nothing grew."""
    with start_tunnel(servers, core_flags=ROOM, program=Program(before=("-c", COLLECTING))) as tunnel:
        agent_metrics = str(tunnel.agent.wait_record("metrics and health")["url"])
        seen: dict[str, dict[str, list[float]]] = {"core": {}, "agent": {}}
        end = time.monotonic() + minutes * 60
        while time.monotonic() < end or len(seen["core"].get("tasks", ())) < 8:
            cycle(servers, tunnel)
            wait_calm(list(tunnel.processes.values()), 60)
            for role, process, url in (
                ("core", tunnel.core, tunnel.metrics_url),
                ("agent", tunnel.agent, agent_metrics),
            ):
                for watched, value in zip(WATCHED, look(process, url), strict=True):
                    seen[role].setdefault(watched.name, []).append(value)
            print(".", end="", flush=True)
    print(f" {len(seen['core']['tasks'])} cycles")
    return report(seen)


def report(seen: dict[str, dict[str, list[float]]]) -> bool:
    """Print what was seen; whether nothing grew."""
    is_steady = True
    for role, by_name in seen.items():
        for watched in WATCHED:
            values = by_name[watched.name]
            more = grew(values, watched)
            is_steady = is_steady and not more
            shown = [values[round(at * (len(values) - 1) / 4)] for at in range(5)]
            course = " → ".join(f"{value:,.0f}" for value in shown)
            verdict = f"GREW by {more:,.1f} more than it may" if more else "steady"
            print(f"  {role:6} {watched.name:14} {course}   {verdict}")
    return is_steady


def look(process: Process, metrics_url: str) -> tuple[float, ...]:
    os.kill(process.pid, signal.SIGUSR1)
    sample(metrics_url, "trio_tasks_living")  # it has been there when this is answered
    return (
        process.rss() / MIB,
        sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir()),
        sample(metrics_url, "trio_tasks_living"),
        sample(metrics_url, "python_allocated_blocks"),
    )


def cycle(servers: Servers, tunnel: Ours) -> None:
    """About ten seconds."""
    with downloads(tunnel, servers, 2), uploads(tunnel, servers, 2), idle_agents(servers, tunnel, 20):
        check(tunnel, wrk(tunnel.port, tunnel.host, 64, 3).bad)
        check(tunnel, wrk(tunnel.port, tunnel.host, 8, 1, reconnect=True).bad)
        leave_in_the_middle(tunnel)
        wrk(tunnel.port, "nobody.localhost", 8, 1)  # all are bad


def check(tunnel: Ours, bad: int) -> None:
    if bad:
        raise Failed(f"{bad} requests failed: {tunnel.core.last_failure()}")


def leave_in_the_middle(tunnel: Ours) -> None:
    """Of a request's head, of a request's body, of an answer."""
    head = f"POST /put HTTP/1.1\r\nHost: {tunnel.host}\r\nContent-Length: 1000000\r\n\r\n".encode()
    download = f"GET /big HTTP/1.1\r\nHost: {tunnel.host}\r\n\r\n".encode()
    for number in range(LEAVERS):
        with socket.create_connection(("127.0.0.1", tunnel.port)) as visitor:
            kind = number % 3
            visitor.sendall((head[:20], head + b"x" * 1000, download)[kind])
            if kind == 2:
                visitor.recv(1000)
