"""`nox -s benchmarks`, or `PYTHONPATH=tests python -m benchmarks`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.attribution.attribute import attribute
from benchmarks.processes import Failed
from benchmarks.servers import start_servers


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="nox -s benchmarks --", description=__doc__)
    commands = made.add_subparsers(dest="command")
    one = commands.add_parser("attribute", help="where the CPU time of core and agent goes, µs a request by part")
    one.add_argument("-connections", type=int, default=32)
    one.add_argument("-seconds", type=float, default=15.0)
    one.add_argument("-flags", default="", help="for core and agent, as one word: '-layers='")
    return made


def main(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with tempfile.TemporaryDirectory() as directory:
        try:
            with start_servers(Path(directory)) as servers:
                attribute(servers, given.connections, given.seconds, given.flags.split())
        except Failed as exc:
            print(f"benchmarks: {exc}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
