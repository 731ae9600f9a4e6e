"""Whether records in JSON were asked for, when the settings are wrong: who reads a log by machine wants to read why.

As far as it can be read, in the usual order: flags, environment, file. What is wrong elsewhere does not matter here,
and whatever can't be read asks for nothing.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence

from tunnel.config.kinds import SWITCH_WORDS
from tunnel.config.options import COMMANDS, program


def asks_for_json(argv: Sequence[str], env: Mapping[str, str], role: str) -> bool:
    """Never raises. An administration command has no log."""
    if role == "core" and any(word in COMMANDS for word in argv):
        return False
    prefix = program(role).prefix
    said = _flag(argv, "log_json", "true") or env.get(f"{prefix}LOG_JSON", "")
    if said:
        return SWITCH_WORDS.get(said.lower(), False)
    return _stands_in(_flag(argv, "config") or env.get(f"{prefix}CONFIG", ""))


def _flag(argv: Sequence[str], name: str, alone: str = "") -> str:
    """Its last value, or ""; `alone` is what a flag without `=` means, else its value is the next word."""
    found = ""
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        given, equals, text = word.lstrip("-").partition("=")
        if word.startswith("-") and given.replace("-", "_") == name:
            found = text if equals else alone or after
    return found


def _stands_in(path: str) -> bool:
    if not path:
        return False
    import tomllib  # late: only on the way to an error

    try:
        return tomllib.loads(pathlib.Path(path).read_text("utf-8")).get("log_json") is True
    except (OSError, ValueError, RecursionError):  # no text and no TOML are ValueErrors
        return False
