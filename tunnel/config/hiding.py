"""Secrets that were given as flags, taken out of the process's title: /proc/PID/cmdline and `ps` show it to everybody.

They have stood there for the moment that the program needed to start, so a file or the environment stays the better
place. Linux keeps the command line in the process's own memory, between two addresses that it tells in /proc; what is
written there is what others see. Elsewhere the title stays as it is. What the program itself knows of its arguments is
not changed: an upgrade starts the same command again, and that one hides them too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tunnel.config.options import program
from tunnel.config.sources import each_flag
from tunnel.errors import ConfigError

SHOWN = "a secret was given as a flag, which others could read for a moment: give it in a file or the environment"
MASK = b"*"
_PASSWORD = re.compile(r"://[^/@]*:[^@]*@|[?&]password=", re.IGNORECASE)
_ARG_START, _ARG_END = 47, 48  # proc(5), stat, counted from 0


def hide_secrets(argv: Sequence[str], role: str) -> list[str]:
    """Hide the values of secret flags; returns these flags. Never raises; nothing happens where there are none."""
    found = secrets_in(argv, role)
    if found and sys.platform == "linux":
        try:
            _overwrite([value.encode("utf-8", "surrogateescape") for _, value in found])
        except (OSError, ValueError, IndexError):
            pass  # no /proc: nobody sees anything there
    return [flag for flag, _ in found]


def secrets_in(argv: Sequence[str], role: str) -> list[tuple[str, str]]:
    """(flag, value) of what nobody else should see. A database's address is one if it has a password in it."""
    found: list[tuple[str, str]] = []
    try:
        for shown, entry, value, _ in each_flag(argv, program(role)):
            kind = entry.option.kind if entry is not None else None
            if kind is not None and kind.secret and value and (kind.word != "URL" or _PASSWORD.search(value)):
                found.append((shown, value))
    except ConfigError:
        pass  # of a flag behind them; whoever reads the settings says so
    return found


def _overwrite(values: list[bytes]) -> None:
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start, end = (int(fields[at - 2]) for at in (_ARG_START, _ARG_END))
    shown = Path("/proc/self/cmdline").read_bytes()
    if not 0 < start < end or end - start != len(shown):
        return
    import ctypes  # late: only where there is something to hide

    if ctypes.string_at(start, len(shown)) != shown:
        return
    at = 0
    for argument in shown.split(b"\0"):
        for value in values:
            if argument == value or (argument.startswith(b"-") and argument.endswith(b"=" + value)):
                ctypes.memmove(start + at + len(argument) - len(value), MASK * len(value), len(value))
        at += len(argument) + 1
