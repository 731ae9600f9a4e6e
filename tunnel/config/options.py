"""The table of options: one entry per setting, derived from the settings' classes.

Flag, environment variable and file key of a setting follow from its name by one rule: `tracing.ratio` is the flag
`-tracing-ratio`, the variable `TUNNEL_TRACING_RATIO` (agent: `AGENT_…`), the key `ratio` in the table `[tracing]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

from tunnel.config.settings import (
    AcmeSettings,
    AgentSettings,
    CoreSettings,
    DatabaseSettings,
    MetricsSettings,
    Option,
    Settings,
    TracingSettings,
)

SECTIONS: dict[str, type[Settings]] = {
    "acme": AcmeSettings,
    "database": DatabaseSettings,
    "metrics": MetricsSettings,
    "tracing": TracingSettings,
}

#: words of the core's command line that are commands; without one the program serves
COMMANDS = ("account", "token", "tunnel", "usage", "migrate")


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting. name: dotted ("tracing.ratio"); flags, variables: all accepted names, the documented one first."""

    name: str
    default: Any
    option: Option
    flags: tuple[str, ...]
    variables: tuple[str, ...]

    @property
    def is_switch(self) -> bool:
        return self.option.kind.switch


@dataclass(frozen=True, slots=True)
class Program:
    """One of the two programs and its options."""

    role: str
    module: str
    prefix: str
    settings: type[Settings]
    entries: tuple[Entry, ...]

    @property
    def by_flag(self) -> dict[str, Entry]:
        """Entries by flag, spelled with underscores."""
        return {flag.replace("-", "_"): entry for entry in self.entries for flag in entry.flags}


def _entry(prefix: str, name: str, default: Any, option: Option) -> Entry:
    plain = name.replace(".", "_")
    names = [option.flag, plain] if option.flag else [plain]
    variables = [prefix + plain.upper()]
    if plain.startswith(prefix.lower()):  # AGENT_ID reads better than AGENT_AGENT_ID; both are taken
        variables.insert(0, plain.upper())
    return Entry(name, default, option, tuple(flag.replace("_", "-") for flag in names), tuple(variables))


def _options_of(hint: Any) -> list[Option]:
    """One for a setting, none for what is only known about one."""
    return [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Option)]


def _entries(prefix: str, settings: type[Settings], path: str = "") -> list[Entry]:
    found: list[Entry] = []
    defaults = settings()
    for name, hint in get_type_hints(settings, include_extras=True).items():
        if name in SECTIONS:
            found += _entries(prefix, SECTIONS[name], f"{name}.")
        elif name in settings.__struct_fields__ and (options := _options_of(hint)):
            (option,) = options
            found.append(_entry(prefix, path + name, getattr(defaults, name), option))
    return found


@cache
def program(role: str) -> Program:
    """The program "core" or "agent"."""
    prefix, settings = ("TUNNEL_", CoreSettings) if role == "core" else ("AGENT_", AgentSettings)
    return Program(role, f"tunnel.{role}", prefix, settings, tuple(_entries(prefix, settings)))
