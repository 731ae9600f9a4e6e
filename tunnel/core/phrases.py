"""The words of the administration commands: their grammar (argparse), the values in them, and how answers look.

Flags take one dash or two, `-flag value` or `-flag=value`. Values are read after the grammar, so a bad number is
"cannot be done" (exit code 1) and an unknown word "asked wrongly" (2). Everything raises ValueError with one line.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar, NoReturn

from tunnel.config.helping import OneDash, explain, two_dashes
from tunnel.config.values import parse_duration, parse_tunnel_name, scale

_ACCOUNT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_MONTH = re.compile(r"[0-9]{4}-(0[1-9]|1[0-2])")
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,6})?)\s*([kmgtp]?)(i?)b?(?:/s)?", re.IGNORECASE)
_LONG = {"d": 86400.0, "w": 7 * 86400.0}
_MOST = (1 << 63) - 1  # of the store's integers


@dataclass(frozen=True)
class Limit:
    """One limit: its column, flag, title in answers, and kind of number. default: the core's flag that says what holds
    for an account without it."""

    column: str
    flag: str
    title: str
    help: str
    is_size: bool = False
    is_whole: bool = True
    least: float = 1
    most: float = _MOST
    default: str = ""
    ALL: ClassVar[Sequence[Limit]]

    def parse(self, text: str) -> float | int | None:
        """The limit of a flag's text; None for "none"."""
        if text.lower() == "none":
            return None
        kind = "a size such as 10MiB" if self.is_size else "a whole number" if self.is_whole else "a number"
        bad = ValueError(f"-{self.flag} {text}: expected {kind} from {self.least:g}, or none")
        try:
            value = parse_size(text) if self.is_size else int(text) if self.is_whole else float(text)
        except ValueError:
            raise bad from None
        if not (math.isfinite(value) and self.least <= value <= self.most):
            raise bad
        return value


Limit.ALL = (
    Limit(
        "max_connections", "connections", "connections", "agents of the account at a time",
        least=0, most=1 << 30, default="-max-connections-per-account",
    ),
    Limit(
        "max_names", "names", "names", "that its agents serve or hold, reserved ones aside; 0: reserved ones only",
        least=0, most=1 << 30, default="-max-names-per-account",
    ),
    Limit(
        "max_ports", "ports", "TCP ports", "of its TCP tunnels",
        least=0, most=1 << 30, default="-max-ports-per-account",
    ),
    Limit(
        "requests_per_second", "requests-per-second", "requests a second", "a rate; fractions are fine",
        is_whole=False, least=0.001, most=1e9,
    ),
    Limit(
        "requests_burst", "requests-burst", "requests in a burst", "at once after a pause; none: twice the rate",
        most=1 << 30,
    ),
    Limit("requests_per_month", "requests-per-month", "requests a month", "a calendar month, UTC", least=0),
    Limit(
        "bandwidth_bytes_per_second", "bandwidth", "bytes a second", "both directions together, shaped", is_size=True
    ),
    Limit(
        "bandwidth_bytes_per_month", "bandwidth-per-month", "bytes a month", "both directions together; then refused",
        is_size=True, least=0,
    ),
)  # fmt: skip


# Values ------------------------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Bytes of "10MiB", "1TiB", "500kB", "10M" (= MiB), "1000"; "/s" may follow."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text} is not a size such as 64KiB, 10MiB or 1TiB")
    number, unit, binary = match[1], match[2].lower(), match[3]
    base = 1000 if unit and not binary and "b" in text.lower() else 1024
    return scale(number, base ** " kmgtp".index(unit or " "))[0]


def parse_expiry(text: str | None) -> float:
    """Seconds of "30d", "2w", "12h", "90m"; infinite for nothing or "none"."""
    if text is None or text.lower() == "none":
        return math.inf
    try:
        factor = _LONG.get(text[-1:].lower())
        seconds = parse_duration(text) if factor is None else float(text[:-1]) * factor
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e10:
        raise ValueError(f"-expires {text}: expected a duration such as 30d, 2w or 12h, or none")
    return seconds


def parse_name(kind: str, text: str) -> str:
    """A name in its normal form. kind: "account", or "tunnel" (a subdomain or a full host name)."""
    if kind == "tunnel":
        try:
            return parse_tunnel_name(text)
        except ValueError as exc:
            raise ValueError(f"{text!r}: {exc}") from None
    if not _ACCOUNT.fullmatch(text):
        raise ValueError("an account's name has 1 to 63 lower-case letters, digits and inner dashes")
    return text


def show_time(at: float | None) -> str | None:
    """RFC 3339, UTC, to the second."""
    return None if at is None else datetime.fromtimestamp(int(at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def show_table(header: Sequence[str], rows: Sequence[Sequence[str | None]]) -> str:
    """Columns padded to their widest cell; header may be empty."""
    lines = [list(header)] if header else []
    lines += [[cell or "-" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


# Grammar -----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as all errors are; argparse would print the usage first."""
        asked = self.prog.partition("[FLAGS] ")[2]
        command = self.prog.replace(" [FLAGS]", "")
        said = explain(self, message)
        how = "" if said.endswith("?") else f"; {command} -h shows how"
        self.exit(2, f"tunnel core: {asked + ': ' if asked else ''}{said}{how}\n")


def parse_commands(words: Sequence[str]) -> argparse.Namespace | int:
    """What was asked (command, action, json and the command's own words), or the exit code if that was all."""
    try:
        options, unknown = _parser().parse_known_args(two_dashes(words))
        if unknown:  # said by the command's own parser, which knows what could be meant
            options.parser.error(f"unrecognized arguments: {unknown[0]}")
        if options.command == "account" and options.action == "limit" and not _has_limit(options):
            options.parser.error(
                "say which limit (`account show` shows them): -" + ", -".join(limit.flag for limit in Limit.ALL)
            )
        if options.command == "usage" and options.month and not _MONTH.fullmatch(options.month):
            options.parser.error("-month is a year and a month such as 2026-11")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 2
    return options


def _has_limit(options: argparse.Namespace) -> bool:
    return any(getattr(options, limit.column) is not None for limit in Limit.ALL)


def _flag(parser: argparse.ArgumentParser, name: str, metavar: str, help: str, dest: str = "") -> None:
    parser.add_argument(f"-{name}", f"--{name}", metavar=metavar, help=help, dest=dest or name)


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="python -m tunnel.core [FLAGS]", usage="python -m tunnel.core [FLAGS] COMMAND …", allow_abbrev=False
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, prog="python -m tunnel.core [FLAGS]"
    )
    account = _group(commands, "account", "make, list, limit, disable and delete accounts")
    _action(account, "create", "make an account; it has no limits", "name")
    _action(account, "list", "all accounts, with this month's usage")
    _action(account, "show", "one account: limits, usage, tokens, names", "name")
    limit = _action(account, "limit", "set limits; `none` removes one; the others stay", "name")
    for each in Limit.ALL:
        metavar = "SIZE" if each.is_size else "N"
        _flag(limit, each.flag, metavar, f"{each.title}: {each.help}", each.column)
    _action(account, "disable", "refuse the account and cut its agents off", "name")
    _action(account, "enable", "take it again", "name")
    _action(account, "delete", "with its tokens, names and usage", "name")

    token = _group(commands, "token", "make, list and revoke agents' tokens")
    create = _action(token, "create", "make a token and print it, once", "account")
    create.add_argument("-name", "--name", metavar="NAME", default="", help="a note for the list")
    _flag(create, "expires", "DURATION", "such as 30d, 2w, 12h (default: never)")
    _action(token, "list", "tokens, without the secret part", "account?")
    _action(token, "revoke", "refuse a token and cut off the agents that use it", "token")

    tunnel = _group(commands, "tunnel", "reserve names for accounts")
    _action(tunnel, "reserve", "a subdomain or a full host name", "name", "account")
    _action(
        tunnel, "release", "it is its account's as long as that serves it, and the core's -name-hold longer", "name"
    )
    _action(tunnel, "list", "reserved names, and those claimed by agents")

    usage = _action(commands, "usage", "requests and bytes of a month", "account?")
    _flag(usage, "month", "YYYY-MM", "default: this month, UTC")
    migrate = _action(commands, "migrate", "make the store, or bring its schema to the newest version")
    for command in (usage, migrate):
        command.set_defaults(action="")
    return parser


#: positional arguments: what is shown for them, and their help
_WORDS = {
    "name": ("NAME", "its name"),
    "account": ("ACCOUNT", "an account's name or id"),
    "token": ("TOKEN", "its id, or the beginning of the id or of the token"),
}


_EXAMPLES = {
    "account": ("account create acme", "account limit acme -connections 5 -bandwidth-per-month 500GB"),
    "token": ("token create acme -expires 90d >acme.token", "token list acme"),
    "tunnel": ("tunnel reserve app acme", "tunnel list"),
    "usage": ("usage", "usage acme -month 2026-11"),
    "migrate": ("-database-url postgresql://tunnel@db/tunnel migrate",),
}


def _epilog(command: str) -> str:
    """Examples of a command, and what is the same for all."""
    lines = [f"  python -m tunnel.core {one}" for one in _EXAMPLES[command]]
    store = "FLAGS are the core's: give the -data-dir, -config or -database-url that it has."
    return "\n".join(["Examples:", *lines, "", store])


def _group(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help: str
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    group = commands.add_parser(
        name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=_epilog(name), formatter_class=OneDash,
        allow_abbrev=False,
    )  # fmt: skip
    return group.add_subparsers(dest="action", metavar="ACTION", required=True)


def _action(
    group: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help: str, *words: str
) -> argparse.ArgumentParser:
    asked = group._prog_prefix.rpartition("] ")[2]  # "account" of an action, the program's name of a command
    parser = group.add_parser(
        name, help=help, description=f"{help[0].upper()}{help[1:]}.", formatter_class=OneDash, allow_abbrev=False,
        epilog=_epilog(asked if asked in _EXAMPLES else name),
    )  # fmt: skip
    for word in words:
        metavar, about = _WORDS[word.rstrip("?")]
        parser.add_argument(word.rstrip("?"), metavar=metavar, help=about, nargs="?" if word.endswith("?") else None)
    parser.add_argument("-json", "--json", action="store_true", help="answer as JSON on standard output")
    parser.set_defaults(parser=parser)
    return parser
