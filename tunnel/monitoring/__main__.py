"""`python -m tunnel.monitoring up`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from tunnel.interrupts import leave, quietly

USAGE = """\
Usage: python -m tunnel.monitoring up [PORT or URL]    a tunnel on this machine, with Prometheus and Alertmanager

`up --help` says more.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: that of the word; 2 for an unknown one."""
    return quietly(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    word = words.pop(0) if words else ""
    if word == "up":
        from tunnel.monitoring.up import main as up_main

        return up_main(words)
    if word.lstrip("-") in ("help", "h") and word:
        sys.stdout.write(USAGE)
        return 0
    if word:
        print(f"tunnel.monitoring: {word!a} is not known; there is only `up`", file=sys.stderr)
    else:
        sys.stderr.write(USAGE)
    return 2


if __name__ == "__main__":
    leave(main())
