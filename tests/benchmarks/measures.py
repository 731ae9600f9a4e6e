"""What is done to the contenders, part by part. In each part they take turns, each round beginning with another one, so
that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from benchmarks.crowds import idle_agents, idle_visitors
from benchmarks.figures import (
    ALL_TRACED,
    APART,
    CONNECTIONS,
    MEASURED_LOGGED,
    NONE,
    OURS,
    PLAIN,
    TENTH_TRACED,
    Figures,
    note,
)
from benchmarks.load import cost, wrk
from benchmarks.openloop import paced
from benchmarks.others import serves
from benchmarks.processes import Failed, Process, clean_environment, poll, which
from benchmarks.servers import BIG, Servers
from benchmarks.tunnels import Contender, floor, start_agent, start_core, start_tunnel, wait_calm

RATE = 200.0  #: requests a second, of the open loop
MIB = 1024 * 1024
WITH_GUESTS = ("rates", "latency", "fresh", "bulk", "mixed")  #: parts that other tunnels take part in
BULK_SECONDS = 10  #: a transfer that is not over by then is measured by what came


@dataclass(frozen=True)
class Effort:
    """How long and how often."""

    rounds: int
    seconds: int
    connections: Sequence[int] = CONNECTIONS


FULL = Effort(5, 2)
QUICK = Effort(3, 1, (1, 32))


def turns(contenders: Sequence[Contender], rounds: int) -> Iterator[Contender]:
    """Those who have not given up."""
    for number in range(rounds):
        first = number % len(contenders)
        yield from (one for one in (*contenders[first:], *contenders[:first]) if not one.gave_up)


@contextmanager
def excused(one: Contender, figures: Figures) -> Iterator[None]:
    """A guest that fails in here gives up, and has no figures in this part."""
    try:
        yield
    except Failed as exc:
        if not one.is_guest:
            raise
        one.gave_up = str(exc).splitlines()[0]
        for values in figures.values():
            values.pop(one.name, None)


def rates(contenders: Sequence[Contender], effort: Effort) -> Figures:
    """Requests a second with kept connections, and what each process pays for one."""
    figures: Figures = {}
    for one in contenders:
        wrk(one.port, one.host, 8, 1)
    for connections in effort.connections:
        seen: Figures = {}  # a guest that gives up here keeps what it did with fewer
        for one in turns(contenders, effort.rounds):
            with excused(one, seen):
                processes = list(one.processes.values())
                load, paid = cost(partial(wrk, one.port, one.host, connections, effort.seconds), processes)
                note(seen, f"rps {connections}", one.name, load.rps)
                note(seen, f"p50 {connections}", one.name, load.p50)
                for role, micros in zip(one.processes, paid, strict=True):
                    note(seen, f"{role} cpu {connections}", one.name, micros)
        figures.update(seen)
    return figures


def apart(servers: Servers, effort: Effort) -> Figures:
    """Requests a second where core and agent have a processor each, as far as this machine has two."""
    figures: Figures = {}
    first, *others = sorted(os.sched_getaffinity(0))
    with start_tunnel(servers) as tunnel:
        pinned = [servers.floor, tunnel.core]
        try:
            for process in pinned:
                process.pin(first)
            tunnel.agent.pin(others[0] if others else first)
            for connections in APART:
                for one in turns([floor(servers), tunnel], effort.rounds):
                    load = wrk(one.port, one.host, connections, effort.seconds)
                    note(figures, f"apart {connections}", one.name, load.rps)
        finally:
            servers.floor.pin(first, *others)
    return figures


def tls(servers: Servers, effort: Effort) -> Figures:
    """What TLS costs, at each of the three places where it may be."""
    figures: Figures = {}
    public = (
        "-public-tls",
        "-public-cert",
        f"{servers.directory}/cert.pem",
        "-public-key",
        f"{servers.directory}/key.pem",
    )
    local = f"https://127.0.0.1:{servers.nginx_tls_port}"
    link = partial(start_tunnel, core_flags=("-agent-tls=true",), agent_flags=("-tls", "-tls-skip-verify"))
    with ExitStack() as stack:
        pairs: list[Contender] = [
            stack.enter_context(made)
            for made in (
                start_tunnel(servers, name=PLAIN),
                start_tunnel(servers, name="for visitors", core_flags=public),
                start_tunnel(servers, name="to the service", local=local),
                link(servers, name="on the link"),
            )
        ]
        for one in pairs:
            wrk(one.port, one.host, 8, 1, secure=one.secure)
        for one in turns(pairs, effort.rounds):
            processes = list(one.processes.values())
            work = partial(wrk, one.port, one.host, 32, effort.seconds, secure=one.secure)
            load, (core, agent) = cost(work, processes)
            note(figures, "tls rps", one.name, load.rps)
            note(figures, "tls server cpu", one.name, core)
            note(figures, "tls agent cpu", one.name, agent)
    return figures


def latency(contenders: Sequence[Contender], effort: Effort) -> Figures:
    """At a fixed rate that all can carry, from the planned send."""
    figures: Figures = {}
    for one in turns(contenders, effort.rounds):
        with excused(one, figures):
            found = paced(one.port, one.host, RATE, effort.seconds * 2)
            note(figures, "paced p50", one.name, found.p50)
            note(figures, "paced p99", one.name, found.p99)
            note(figures, "paced late", one.name, found.late_p99)
    return figures


def fresh(contenders: Sequence[Contender], effort: Effort) -> Figures:
    """A connection for each request, eight at a time."""
    figures: Figures = {}
    for one in turns(contenders, effort.rounds):
        with excused(one, figures):
            load = wrk(one.port, one.host, 8, effort.seconds, reconnect=True)
            if load.bad:
                raise Failed(f"{one.name}: {load.bad} of {load.requests} on new connections failed")
            note(figures, "fresh", one.name, load.rps)
    return figures


def bulk(contenders: Sequence[Contender], servers: Servers, effort: Effort) -> Figures:
    """One transfer at a time."""
    figures: Figures = {}
    for direction in ("down", "up"):
        for one in turns(contenders, effort.rounds):
            with excused(one, figures):
                processes = list(one.processes.values())
                before = [process.cpu() for process in processes]
                size, seconds = curl(one, servers, direction)
                note(figures, direction, one.name, size / seconds / 1e6)
                for role, process, start in zip(one.processes, processes, before, strict=True):
                    note(figures, f"{direction} {role} cpu", one.name, (process.cpu() - start) * 1000 / (size / MIB))
    return figures


def curl(one: Contender, servers: Servers, direction: str) -> tuple[int, float]:
    """Bytes and seconds of a transfer, which ends when it is complete or BULK_SECONDS are over."""
    upload = ("-T", str(servers.big), f"http://127.0.0.1:{one.port}/put")
    way = upload if direction == "up" else (f"http://127.0.0.1:{one.port}/big",)
    done = subprocess.run(
        [which("curl"), "-sS", "-o", os.devnull, "-H", f"Host: {one.host}", "-H", "Expect:",
         "--max-time", str(BULK_SECONDS), "-w", "%{http_code} %{size_download} %{size_upload} %{time_total}", *way],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    status, down, up, seconds = done.stdout.split()
    size = int(up if direction == "up" else down)
    is_cut = done.returncode == 28
    if not is_cut and (done.returncode or status[0] != "2" or size < BIG):
        raise Failed(f"{one.name}: 100 MiB {direction}: {done.stdout} {done.stderr}")
    return size, float(seconds)


def mixed(contenders: Sequence[Contender], servers: Servers, effort: Effort) -> Figures:
    """Small requests at a fixed rate while four downloads go on and on."""
    figures: Figures = {}
    for one in turns(contenders, effort.rounds):
        with excused(one, figures):
            with downloads(one, servers, 4):
                found = paced(one.port, one.host, RATE, effort.seconds * 2)
            note(figures, "mixed p50", one.name, found.p50)
            note(figures, "mixed p99", one.name, found.p99)
            note(figures, "mixed late", one.name, found.late_p99)
    return figures


@contextmanager
def downloads(one: Contender, servers: Servers, count: int) -> Iterator[None]:
    """So many at a time, each begun again when it is over."""
    url = f"http://127.0.0.1:{one.port}/big?[1-100000]"
    command = [which("curl"), "-sS", "-o", os.devnull, "-H", f"Host: {one.host}", url]
    started = [Process(*command, directory=servers.directory) for _ in range(count)]
    try:
        before = servers.nginx.cpu()
        poll(lambda: servers.nginx.cpu() > before, "downloads have begun", 20)
        yield
        ended = [process for process in started if not process.is_running]
        if ended:
            raise Failed(f"{one.name}: a download ended: {ended[0].output()}")
    finally:
        for process in started:
            process.stop()


def memory(servers: Servers, effort: Effort) -> Figures:
    """Resident memory at rest. Each round is a new core and a new agent."""
    figures: Figures = {}
    for _ in range(min(effort.rounds, 3)):
        with start_tunnel(servers, core_flags=("-max-handshakes=0", "-max-connections=2000")) as tunnel:
            wrk(tunnel.port, tunnel.host, 8, 1)
            wait_calm(list(tunnel.processes.values()))
            note(figures, "rss core", OURS, tunnel.core.rss() / MIB)
            note(figures, "rss agent", OURS, tunnel.agent.rss() / MIB)
            before = tunnel.core.rss()
            with idle_visitors(tunnel, 2000):
                wait_calm([tunnel.core])
                note(figures, "rss per visitor", OURS, (tunnel.core.rss() - before) / 2000 / 1024)
        with start_tunnel(servers, core_flags=("-max-handshakes=0", "-max-connections=2000")) as tunnel:
            wrk(tunnel.port, tunnel.host, 8, 1)
            wait_calm(list(tunnel.processes.values()))
            before = tunnel.core.rss()
            with idle_agents(servers, tunnel, 1000):
                wait_calm([tunnel.core])
                note(figures, "rss per agent", OURS, (tunnel.core.rss() - before) / 1000 / 1024)
    return figures


#: case → (flags, traced)
LAYERS: dict[str, tuple[tuple[str, ...], bool]] = {
    NONE: (("-layers=",), False),
    MEASURED_LOGGED: ((), False),
    TENTH_TRACED: (("-tracing-ratio", "0.1"), True),
    ALL_TRACED: (("-tracing-ratio", "1"), True),
}


def layers(servers: Servers, effort: Effort) -> Figures:
    """What observing costs: one pair of core and agent for each case, under load in turns."""
    figures: Figures = {}
    with ExitStack() as stack:
        pairs: list[Contender] = []
        for name, (flags, traced) in LAYERS.items():
            pairs.append(stack.enter_context(start_tunnel(servers, *flags, name=name, traced=traced)))
            wrk(pairs[-1].port, pairs[-1].host, 8, 1)
        for one in turns(pairs, effort.rounds * 2):
            _, paid = cost(partial(wrk, one.port, one.host, 32, effort.seconds), list(one.processes.values()))
            note(figures, "layers cpu", one.name, sum(paid))
    return figures


def startup(servers: Servers, effort: Effort) -> Figures:
    """With compiled modules in place, as after an installation."""
    figures: Figures = {}
    for _ in range(effort.rounds):
        for role in ("core", "agent"):
            note(figures, f"help {role}", OURS, timed(partial(run_help, servers, role)))
        began = time.monotonic()
        with start_core(servers) as core:
            note(figures, "core ready", OURS, time.monotonic() - began)
            began = time.monotonic()
            with start_agent(servers, core, until_ready=False):
                poll(partial(serves, core.port, "app.localhost"), "the first request is served", 20)
                note(figures, "first request", OURS, time.monotonic() - began)
    return figures


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def run_help(servers: Servers, role: str) -> None:
    subprocess.run(
        [sys.executable, "-m", f"tunnel.{role}", "--help"],
        stdout=subprocess.DEVNULL, check=True, cwd=servers.directory, env=clean_environment(),
    )  # fmt: skip
