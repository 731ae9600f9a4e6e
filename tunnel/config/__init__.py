"""Configuration of both programs: settings from flags, environment and a TOML file, checked, in frozen structs.

`settings.py` is the one table of options; all else (parsing, help, reference, checks) is derived from it. Whatever is
wrong is a `tunnel.errors.ConfigError` with one line that says where and what to do.
"""

from __future__ import annotations

from tunnel.config.load import data_dir, load_agent, load_core, sections, split_command
from tunnel.config.local import LocalService, parse_local
from tunnel.config.options import COMMANDS
from tunnel.config.settings import AgentSettings, CoreSettings, DatabaseSettings, MetricsSettings, TracingSettings
from tunnel.config.values import parse_address, parse_duration, parse_ports, parse_size

__all__ = [
    "COMMANDS",
    "AgentSettings",
    "CoreSettings",
    "DatabaseSettings",
    "LocalService",
    "MetricsSettings",
    "TracingSettings",
    "data_dir",
    "load_agent",
    "load_core",
    "parse_address",
    "parse_duration",
    "parse_local",
    "parse_ports",
    "parse_size",
    "reference",
    "sections",
    "split_command",
]


def reference() -> str:
    """All settings of both programs as Markdown: docs/CONFIGURATION.md."""
    from tunnel.config import render  # late: only the documents need it

    return render.reference()
