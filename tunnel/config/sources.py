"""Where settings come from: the command line, the environment, a TOML file. Each gives raw values with their origin.

A raw value is text (flags, environment) or what TOML held. An origin is how an error names the place: "-heartbeat",
"TUNNEL_HEARTBEAT", "heartbeat in /etc/tunnel.toml". No error shows a value that could be a secret.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunnel.config.kinds import SWITCH_WORDS
from tunnel.config.options import COMMANDS, Entry, Program, program
from tunnel.errors import ConfigError

#: what Kubernetes (and Docker's old links) put into every container for each service of the namespace
_INJECTED = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_INJECTED_VALUE = re.compile(r"(tcp|udp|sctp)://")
HELP = frozenset({"h", "help"})
_QUIET = frozenset({*HELP, "version"})  # flags without a value that are no settings


@dataclass(frozen=True, slots=True)
class Given:
    """One value as it was given. is_text: from a flag or variable, so TOML's types don't apply."""

    value: Any = field(repr=False)
    origin: str
    is_text: bool


Values = dict[str, Given]


def near(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known word that was probably meant, or ""; dashes, dots and underscores count for nothing."""
    import difflib  # late: only on the way to an error

    names = {re.sub(r"[-_.]", "", name.lower()): name for name in known}
    plain = re.sub(r"[-_.]", "", word.lower())
    return names[close[0]] if (close := difflib.get_close_matches(plain, names, 1, cutoff)) else ""


def each_flag(argv: Sequence[str], options: Program) -> Iterator[tuple[str, Entry | None, str | None, int]]:
    """(flag as written, its entry, its value, index after it) of each flag, up to the first other word."""
    by_flag = options.by_flag
    index = 0
    while index < len(argv):
        word = argv[index]
        name, equals, text = word.lstrip("-").partition("=")
        if not word.startswith("-") or word in ("-", "--") or word.startswith("---"):
            return
        index += 1
        shown = f"-{name}"
        entry = by_flag.get(name.replace("-", "_"))
        if entry is None and not (name in _QUIET and not equals):
            raise ConfigError(_unknown_flag(shown, options))
        value: str | None = text if equals else None
        if value is None and entry is not None:
            if entry.is_switch:
                value = "true"
            elif index == len(argv) or _is_flag(argv[index], by_flag):
                raise ConfigError(f"{shown}: the value is missing; write {shown}={entry.option.kind.word}")
            else:
                value = argv[index]
                index += 1
        yield shown, entry, value, index


def _is_flag(word: str, by_flag: Mapping[str, Entry]) -> bool:
    name = word.lstrip("-").partition("=")[0]
    return word.startswith("-") and (name.replace("-", "_") in by_flag or name in _QUIET)


def _unknown_flag(shown: str, options: Program) -> str:
    name = shown[1:].replace("-", "_")
    if not re.fullmatch(r"(?!tt_)[a-z_]{1,40}", name):  # no flag looks like this, but a secret may
        shown = ""
    other = program("agent" if options.role == "core" else "core")
    if name in other.by_flag:
        return f"{shown} is a flag of the {other.role} (python -m {other.module}), not of the {options.role}"
    meant = near(name, options.by_flag)
    hint = f"did you mean -{meant.replace('_', '-')}?" if meant else f"python -m {options.module} -help lists all"
    return f"unknown flag {shown}; {hint}".replace(" ;", ";")


def _is_harmless(word: str) -> bool:
    """Safe to repeat in an error: no secret looks like this."""
    return bool(re.fullmatch(r"[a-z-]{1,20}", word))


def split(argv: Sequence[str], options: Program) -> tuple[list[str], list[str]]:
    end = 0
    for _shown, _entry, _value, index in each_flag(argv, options):
        end = index
    words = list(argv[end:])
    if words[:1] == ["--"]:
        words = words[1:]
    return list(argv[:end]), words


def check_command(words: Sequence[str], flags: Sequence[str]) -> None:
    """Raises ConfigError when the first word is no command."""
    if words and words[0] not in COMMANDS:
        _check_switch(flags[-1] if flags else "", words[0])
        raise ConfigError(_unexpected(words[0], COMMANDS))


def _check_switch(flag: str, word: str) -> None:
    """Raises ConfigError when the word was meant as the value of the boolean before it."""
    if word.lower() in SWITCH_WORDS and flag.startswith("-") and "=" not in flag:
        raise ConfigError(f"a boolean takes no word after it: write {flag}={word.lower()}")


def _unexpected(word: str, commands: Sequence[str]) -> str:
    shown = f' "{word}"' if _is_harmless(word) else ""
    if not commands:
        return f"unexpected argument{shown}; settings are given as -flag=value"
    meant = near(word, commands)
    return f"unknown command{shown}; " + (f"did you mean {meant}?" if meant else f"there are {', '.join(commands)}")


def wants(argv: Sequence[str], names: frozenset[str], options: Program) -> bool:
    """Is one of these quiet flags among the flags? Errors elsewhere on the line do not matter then."""
    try:
        for shown, entry, _value, _index in each_flag(argv, options):
            if entry is None and shown[1:] in names:
                return True
    except ConfigError:
        return any(word.lstrip("-") in names for word in argv if word.startswith("-"))
    return False


def read_flags(argv: Sequence[str], options: Program) -> Values:
    """The command line. Raises ConfigError: unknown flag, missing value, a word that belongs to nothing."""
    given: Values = {}
    end = 0
    last = ""
    for shown, entry, value, index in each_flag(argv, options):
        end, last = index, argv[index - 1]
        if entry is None:
            continue
        before = given.get(entry.name)
        if before is not None and entry.option.kind.repeats:
            value = f"{before.value},{value}"
        given[entry.name] = Given(value, shown, True)
    rest = argv[end:]
    if rest:
        _check_switch(last, rest[0])
    if rest and list(rest) != ["--"]:
        raise ConfigError(_unexpected(rest[0], ()))
    return given


def read_environment(env: Mapping[str, str], options: Program) -> Values:
    """Variables with the program's prefix. An empty one is as good as none.

    Unknown names: those that Kubernetes injects are harmless, those close to one of ours are taken for a slip of the
    pen (ConfigError), all others for somebody else's.
    """
    entries = {variable: entry for entry in options.entries for variable in entry.variables}
    given: Values = {}
    for name, value in env.items():
        if not name.startswith(options.prefix) or value == "" or _INJECTED.search(name):
            continue
        if name.endswith("_PORT") and _INJECTED_VALUE.match(value):
            continue
        entry = entries.get(name)
        if entry is None:
            if meant := near(name.removeprefix(options.prefix), [_stem(known, options) for known in entries], 0.85):
                raise ConfigError(f"unknown environment variable {name}; did you mean {options.prefix}{meant}?")
        elif entry.name in given and given[entry.name].value != value:
            raise ConfigError(f"{name} and {given[entry.name].origin} are the same setting: keep one")
        else:
            given[entry.name] = Given(value, name, True)
    return given


def _stem(variable: str, options: Program) -> str:
    return variable.removeprefix(options.prefix)


def read_file(path: str, options: Program) -> Values:
    """A TOML file. Raises ConfigError: unreadable, no TOML, an unknown key."""
    import tomllib  # late: only where there is a file

    try:
        tree = tomllib.loads(pathlib.Path(path).read_text("utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: the settings file cannot be read ({exc.strerror or type(exc).__name__})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the settings file is not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        reason = " ".join(str(exc).split()) or "nested too deeply"
        raise ConfigError(f"{path}: the settings file is not valid TOML ({reason})") from None
    entries = {entry.name: entry for entry in options.entries}
    sections = {name.partition(".")[0] for name in entries if "." in name}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key in sections and not isinstance(value, dict):
            raise ConfigError(f"{key} in {path}: expected a table, [{key}]")
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": item for inner, item in value.items()} or {})
            if not value and key not in sections:
                flat[key] = value
        else:
            flat[key] = value
    given: Values = {}
    for name, value in flat.items():
        if name == "config":
            raise ConfigError(f"config in {path}: a settings file cannot name another one; remove the key")
        if name not in entries:
            raise ConfigError(_unknown_key(name, path, options, entries))
        given[name] = Given(value, f"{name} in {path}", False)
    return given


def _unknown_key(name: str, path: str, options: Program, entries: Iterable[str]) -> str:
    shown = name if re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", name) else "with odd characters"
    other = program("agent" if options.role == "core" else "core")
    if any(name == entry.name for entry in other.entries):
        return f"unknown key {shown} in {path}; it is a setting of the {other.role}, not of the {options.role}"
    meant = near(name, entries)
    hint = f"did you mean {meant}?" if meant else "remove it; docs/CONFIGURATION.md lists all keys"
    return f"unknown key {shown} in {path}; {hint}"
