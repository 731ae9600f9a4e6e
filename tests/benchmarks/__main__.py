"""`nox -s benchmarks`, or `PYTHONPATH=tests python -m benchmarks`. CONTRIBUTING.md says what for."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import measures, results
from benchmarks.attribution import parts
from benchmarks.attribution.attribute import attribute
from benchmarks.compare import ROUNDS, compare
from benchmarks.figures import Figures
from benchmarks.growth import growth
from benchmarks.measures import FULL, QUICK, Effort
from benchmarks.others import FILE, Entry, Misnamed, read_entries, start_other
from benchmarks.processes import Failed
from benchmarks.results import Part
from benchmarks.servers import Servers, start_servers
from benchmarks.soak import soak
from benchmarks.tunnels import Ours, direct, floor, start_tunnel


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="nox -s benchmarks --", description="Without a word: run.")
    commands = made.add_subparsers(dest="command")
    run = commands.add_parser("run", help="measure all, or these parts, and write docs/benchmarks.*")
    run.add_argument("parts", nargs="*", choices=[*results.TITLES, []], metavar="PART", help=", ".join(results.TITLES))
    run.add_argument("-others", type=Path, default=FILE, help="other tunnels to measure, where installed")
    run.add_argument("-rounds", type=int, default=FULL.rounds)
    commands.add_parser("quick", help="less than a minute, to see where one is: 1 and 32 connections; writes nothing")
    commands.add_parser("table", help="write docs/benchmarks.md again from docs/benchmarks.json")
    where = commands.add_parser("attribute", help="where the CPU time of core and agent goes, µs a request by part")
    where.add_argument("-connections", type=int, default=32)
    where.add_argument("-seconds", type=float, default=15.0)
    where.add_argument("-flags", default="", help="for core and agent, as one word: '-layers='")
    against = commands.add_parser("compare", help="has it become slower? a commit against the files as they are")
    against.add_argument("old", metavar="REV")
    against.add_argument("new", metavar="REV", nargs="?", default="", help="instead of the files as they are")
    against.add_argument("-rounds", type=int, default=ROUNDS)
    long = commands.add_parser("soak", help="does it grow with time? minutes of everything at once; writes nothing")
    long.add_argument("minutes", type=float, nargs="?", default=5.0)
    commands.add_parser("growth", help="as run growth: more agents, more tunnels, bursts")
    return made


def measure(
    servers: Servers, parts: Sequence[str], effort: Effort, guests: Sequence[Entry]
) -> Iterator[tuple[str, Part]]:
    """These parts, each when it is there; printed."""
    with start_tunnel(servers) as ours:
        for name in parts:
            part = measure_part(servers, ours, name, effort, guests if name in measures.WITH_GUESTS else ())
            print(f"\n{results.shown(name, part)}", flush=True)
            yield name, part


def measure_part(servers: Servers, ours: Ours, name: str, effort: Effort, guests: Sequence[Entry]) -> Part:
    """Guests are started for it: one that broke in another part gets another chance."""
    with ExitStack() as stack:
        others = [stack.enter_context(start_other(servers, entry)) for entry in guests]
        local, through = [floor(servers), ours, *others], [direct(servers), ours, *others]
        work: dict[str, Callable[[], Figures]] = {
            "rates": lambda: measures.rates(local, effort),
            "apart": lambda: measures.apart(servers, effort),
            "tls": lambda: measures.tls(servers, effort),
            "latency": lambda: measures.latency(local, effort),
            "fresh": lambda: measures.fresh(local, effort),
            "bulk": lambda: measures.bulk(through, servers, effort),
            "mixed": lambda: measures.mixed(through, servers, effort),
            "memory": lambda: measures.memory(servers, effort),
            "layers": lambda: measures.layers(servers, effort),
            "startup": lambda: measures.startup(servers, effort),
            "growth": lambda: growth(servers, effort),
        }
        figures = work[name]()
        return Part(figures, [f"{one.name} gave up: {one.gave_up}" for one in others if one.gave_up])


def installed(path: Path) -> list[Entry]:
    entries = read_entries(path.read_text())
    missing = [entry.name for entry in entries if not entry.is_installed]
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)}")
    return [entry for entry in entries if entry.is_installed]


def run(given: argparse.Namespace, servers: Servers) -> int:
    if given.command == "attribute":
        attribute(servers, given.connections, given.seconds, given.flags.split())
        print("\n" + parts.show(parts.measure()))
    elif given.command == "compare":
        return 0 if compare(servers, given.old, given.new, given.rounds) else 1
    elif given.command == "soak":
        return 0 if soak(servers, given.minutes) else 1
    elif given.command == "quick":
        found = dict(measure(servers, ["rates", "latency"], QUICK, ()))
        print("\n" + "\n".join(results.reach(part.figures for part in found.values())))
    else:
        if given.command == "growth":
            given = parser().parse_args(["run", "growth"])
        effort = Effort(given.rounds, FULL.seconds)
        chosen = given.parts or list(results.TITLES)
        document: dict[str, Any] = {}
        for name, part in measure(servers, chosen, effort, installed(given.others)):
            document = results.save({name: part})
            results.write(document)  # who stops it keeps what is measured
        print("\n" + "\n".join(results.reach(part["figures"] for part in document.values())))
    return 0


def main(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments or ["run"])
    if given.command == "table":
        results.write(results.save({}))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with tempfile.TemporaryDirectory() as directory:
        try:
            with start_servers(Path(directory)) as servers:
                return run(given, servers)
        except (Failed, Misnamed) as exc:
            print(f"benchmarks: {exc}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
