"""`python -m tunnel`: one word in front of the programs. `up` is the way to try it; `core` and `agent` delegate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from tunnel import __version__
from tunnel.interrupts import leave, quietly

USAGE = """\
Usage: python -m tunnel up [PORT or URL]    try it: core and agent in one, on this machine
       python -m tunnel core [flags]        the public side, on a server (also: python -m tunnel.core)
       python -m tunnel agent [flags]       the side of the local services (also: python -m tunnel.agent)
       python -m tunnel --version
       python -m tunnel.monitoring up       `up` with Prometheus, Alertmanager and the alerts beside it

For instance:
       python -m tunnel up 3000 -subdomain app      http://localhost:3000 as http://app.localhost:8080
       python -m tunnel core account -h             accounts, tokens, limits, reserved names, usage

Each says more with --help.
"""
WORDS = ("up", "core", "agent", "help", "version")


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
        if words and words[0] in WORDS[:3]:
            return _main([words[0], "--help"])
        sys.stdout.write(USAGE)
        return 0
    if word.lstrip("-") == "version":
        print(f"tunnel {__version__}")
        return 0
    if word:
        print(f"tunnel: {explain_word(word)}", file=sys.stderr)
    else:
        sys.stderr.write(USAGE)
    return 2


def explain_word(word: str) -> str:
    """What to say of a first word that is none of ours: a command of the core, a service for `up`, a slip."""
    from tunnel.config.options import COMMANDS
    from tunnel.config.sources import near

    if word in COMMANDS:
        return f"{word} is a command of the core: tunnel core {word} ..."
    if word.isdigit() or "://" in word or word.startswith("localhost"):
        return f"to serve {word!a} write: tunnel up {word}"
    meant = near(word, WORDS)
    return f"{word!a} is none of up, core, agent; " + (f"did you mean {meant}?" if meant else "tunnel --help shows how")


if __name__ == "__main__":
    leave(main())
