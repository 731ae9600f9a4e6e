"""argparse in our words: flags with one dash in help, errors that say in one line what to do."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence

from tunnel.config.sources import near

WIDTH = 100  #: columns at most; a terminal may have fewer


def width() -> int:
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)


class OneDash(argparse.RawDescriptionHelpFormatter):
    """Each flag once; that two dashes do as well need not be said of each."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=width())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if action.dest == "help":
            return "-h, --help"
        flag = action.option_strings[0]
        return flag if action.nargs == 0 else f"{flag} {action.metavar or action.dest.upper()}"


def two_dashes(words: Sequence[str]) -> list[str]:
    """A command line in which each flag has two: behind one argparse takes the beginning of a flag for all of it,
    whatever `allow_abbrev` says."""
    return [f"-{word}" if re.match(r"-[A-Za-z]{2}", word) else word for word in words]


def explain(parser: argparse.ArgumentParser, message: str) -> str:
    """What argparse complains of: (1) a word or flag that is not known, (2) one that is missing, (3) a wrong choice."""
    if found := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
        word = found[1].partition("=")[0]
        if not word.startswith("-"):
            return f"unexpected argument {word!a}"
        word = "-" + word.lstrip("-")
        flags = [flag for flag in parser._option_string_actions if not flag.startswith("--")]
        begun = [flag for flag in flags if flag.startswith(word)]
        meant = begun[0] if len(begun) == 1 else near(word, flags)
        return f"unknown flag {word}" + (f"; did you mean {meant}?" if meant else "")
    if found := re.fullmatch(r"the following arguments are required: (.*)", message):
        *others, last = found[1].split(", ")
        return f"{', '.join(others)} and {last} are missing" if others else f"{last} is missing"
    if found := re.fullmatch(r"argument (\S+?)(?:/\S+)?: (.*)", message, re.DOTALL):
        return f"{found[1]}: {_explain_value(found[2])}"
    return message


def _explain_value(message: str) -> str:
    if found := re.fullmatch(r"invalid choice: (.*?) \(choose from (.*)\)", message, re.DOTALL):
        known = found[2].replace("'", "")
        meant = near(found[1], known.split(", "))
        return f"{found[1]} is none of {known}" + (f"; did you mean {meant}?" if meant else "")
    return "the value is missing" if message == "expected one argument" else message
