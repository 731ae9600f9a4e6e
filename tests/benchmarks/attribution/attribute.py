"""Where the CPU time of core and agent goes under load: µs a request by part of the work, and the dearest functions.

The main threads are sampled (`sampler.py`); what other threads use is counted by the kernel. One plain pair beside
the sampled one, under the same load in turns, shows what sampling itself costs.
"""

from __future__ import annotations

import json
import signal
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.attribution.groups import Stack, owners, shares
from benchmarks.load import cost, wrk
from benchmarks.processes import poll
from benchmarks.servers import Servers
from benchmarks.tunnels import Ours, Program, start_tunnel, wait_calm

SAMPLER = Path(__file__).with_name("sampler.py")
TOP = 20  #: functions that are printed
TURNS = 5  #: of plain and sampled


@dataclass
class Attributed:
    """One process under load, in µs a request: by group of its main thread, by other thread, and its functions."""

    groups: dict[str, float]
    threads: dict[str, float]
    functions: list[tuple[str, str, float]]
    samples: int

    @property
    def total(self) -> float:
        return sum(self.groups.values()) + sum(self.threads.values())


def read_report(text: str, requests: int) -> Attributed:
    """What a sampler wrote, over so many requests."""
    report = json.loads(text)
    stacks = [Stack(*one) for one in report["stacks"]]
    main = report["main"] / requests * 1e6
    threads: dict[str, float] = {}
    for name, seconds in report["threads"]:
        threads[name] = threads.get(name, 0.0) + seconds / requests * 1e6
    return Attributed(
        {group: share * main for group, share in shares(stacks).items()},
        {name: micros for name, micros in threads.items() if micros >= 0.05},
        [(name, group, share * main) for name, group, share in owners(stacks)],
        sum(stack.samples for stack in stacks),
    )


def attribute(servers: Servers, connections: int, seconds: float, flags: Sequence[str] = ()) -> None:
    """Measure and print."""
    turn = max(1, round(seconds / TURNS))
    sampling = Program(before=(str(SAMPLER), str(servers.directory)))
    with start_tunnel(servers, *flags) as plain, start_tunnel(servers, *flags, program=sampling) as sampled:
        pairs = [[pair.core, pair.agent] for pair in (plain, sampled)]
        for pair in (plain, sampled):
            wrk(pair.port, pair.host, connections, 1)
            wait_calm([pair.core, pair.agent])
        _signal(sampled, signal.SIGRTMIN + 1)
        paid: list[list[list[float]]] = [[], []]
        requests = 0
        for _ in range(TURNS):
            for pair, processes, costs in zip((plain, sampled), pairs, paid, strict=True):
                load, micros = cost(partial(wrk, pair.port, pair.host, connections, turn), processes)
                costs.append(micros)
                requests += load.requests if pair is sampled else 0
        wait_calm(pairs[1])  # what is done late belongs to the requests as well
        _signal(sampled, signal.SIGRTMIN + 2)
        for role in ("core", "agent"):
            report = servers.directory / f"tunnel.{role}.json"
            poll(report.exists, f"the {role}'s report", 10)
            column = ("core", "agent").index(role)
            undisturbed = statistics.mean(one[column] for one in paid[0])  # as the sampled one is a mean
            print("\n" + "\n".join(lines(role, read_report(report.read_text(), requests), undisturbed)))


def _signal(tunnel: Ours, number: int) -> None:
    for process in (tunnel.core, tunnel.agent):
        process.signal(number)


def lines(role: str, found: Attributed, undisturbed: float) -> list[str]:
    """The report as text. undisturbed: µs a request without sampling."""
    total = found.total
    rows = [
        f"{role}: {total:.1f} µs CPU a request ({undisturbed:.1f} without sampling), {found.samples} samples of the "
        "main thread"
    ]
    parts = {**found.groups, **{f"thread {name}": micros for name, micros in found.threads.items()}}
    for name, micros in parts.items():
        if micros:
            rows.append(f"  {name:24} {micros:7.1f} µs {micros / total:5.0%} {'█' * round(40 * micros / total)}")
    rows.append("  dearest functions, with what they call outside the table of parts:")
    rows += [f"    {micros:6.1f} µs  {name}  ({group})" for name, group, micros in found.functions[:TOP]]
    return rows
