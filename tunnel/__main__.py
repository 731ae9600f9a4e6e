"""`python -m tunnel`: one word in front of the programs. `up` is the way to try it; `core` and `agent` delegate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from tunnel import __version__
from tunnel.interrupts import leave, quietly

USAGE = """\
Usage: python -m tunnel up [PORT or URL]    try it: core and agent in one, on this machine
       python -m tunnel core [flags]        the public side (also: python -m tunnel.core)
       python -m tunnel agent [flags]       the side of the local services (also: python -m tunnel.agent)
       python -m tunnel --version
       python -m tunnel.monitoring up       `up` with Prometheus, Alertmanager and the alerts beside it

Each says more with --help.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: the program's; 2 for an unknown word."""
    return quietly(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    word = words.pop(0) if words else ""
    if word == "up":
        from tunnel.up import main as up_main

        return up_main(words)
    if word == "core":
        from tunnel.core.__main__ import main as core_main

        return core_main(words)
    if word == "agent":
        from tunnel.agent.__main__ import main as agent_main

        return agent_main(words)
    if word.lstrip("-") in ("help", "h") and word:
        sys.stdout.write(USAGE)
        return 0
    if word in ("-version", "--version"):
        print(f"tunnel {__version__}")
        return 0
    if word:
        print(f"tunnel: {word!a} is none of up, core, agent", file=sys.stderr)
    sys.stderr.write(USAGE)
    return 2


if __name__ == "__main__":
    leave(main())
