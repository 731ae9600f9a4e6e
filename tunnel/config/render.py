"""The options shown: `--help` of each program, and the reference in Markdown (docs/CONFIGURATION.md)."""

from __future__ import annotations

import shutil
import textwrap

from tunnel.config.options import COMMANDS, Entry, Program, program

_WIDTH = 100
_COLUMN = 34

_WHAT = {
    "core": "Takes visitors' HTTP requests and passes them to agents. Without a command it serves.",
    "agent": "Dials the core and serves its requests from local services.",
}

#: settings that most people need, for the top of `--help`
OFTEN = {
    "core": (
        "base_domain", "public_addr", "public_cert", "public_key", "acme.agree", "http_addr", "agent_addr", "tcp_ports",
        "data_dir", "log_json", "config",
    ),
    "agent": (
        "server", "token_file", "server_fingerprint", "ca_cert", "local", "subdomain", "host_header", "metrics_addr",
        "log_json", "config",
    ),
}  # fmt: skip

_EXAMPLES = {
    "core": """\
Examples:
  python -m tunnel.core                                      it prints the agent's command
  python -m tunnel.core -base-domain t.example.com -public-cert full.pem -public-key key.pem
  python -m tunnel.core token create default >agent.token    a token for another agent""",
    "agent": """\
Examples:
  python -m tunnel.agent -token-file token -server-fingerprint sha256:... -local 3000
  python -m tunnel.agent -server t.example.com:8443 -token-file token -local api=8000,web=3000""",
}


def _groups(options: Program) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in options.entries:
        groups.setdefault(entry.option.group, []).append(entry)
    return groups


def _default(entry: Entry) -> str:
    return entry.option.kind.show(entry.default)


def render_help(options: Program, columns: int = 0) -> str:
    """The text of `--help`, as wide as that or the terminal, but not wider than is read well."""
    width = min(_WIDTH, columns or shutil.get_terminal_size((_WIDTH, 24)).columns)
    commands = " [command ...]" if options.role == "core" else ""
    lines = [f"Usage: python -m {options.module} [flags]{commands}", "", _WHAT[options.role]]
    if options.role == "core":
        lines += [f"Commands: {', '.join(COMMANDS)}; `python -m {options.module} account -h` says more."]
    lines += ["", _EXAMPLES[options.role], "", "Most used:"]
    by_name = {entry.name: entry for entry in options.entries}
    for name in OFTEN[options.role]:
        lines += _help_lines(by_name[name], width)
    for group, entries in _groups(options).items():
        rest = [entry for entry in entries if entry.name not in OFTEN[options.role]]
        lines += ["", f"{group}:"] if rest else []
        for entry in rest:
            lines += _help_lines(entry, width)
    lines += [
        "",
        *textwrap.wrap(
            "One dash or two. A value follows as -flag=value or -flag value; a boolean is -flag or -flag=false. "
            f"Each flag is also an environment variable ({options.prefix}LOG_LEVEL for -log-level) and a key of the "
            "TOML file (log_level); flags come before the environment, the environment before the file. "
            "Durations: 30s, 200ms, 5m, 1.5h, or seconds. Sizes: bytes, 64KiB, 10MiB.",
            width,
        ),
        "",
        "  -help, -h     this text",
        "  -version      the version",
    ]
    return "\n".join(lines) + "\n"


def _help_lines(entry: Entry, width: int) -> list[str]:
    word = "" if entry.is_switch else f" {entry.option.kind.word}"
    if "|" in word:
        word = " WORD"
    head = f"  -{entry.flags[0]}{word}"
    text = entry.option.help
    if "|" in entry.option.kind.word and not entry.is_switch:
        text += f": {entry.option.kind.word.replace('|', ', ')}"
    if default := _default(entry):
        text += f" (default {default})"
    body = textwrap.wrap(text, max(30, width - _COLUMN)) or [""]
    first = head if len(head) >= _COLUMN else f"{head:<{_COLUMN}}{body.pop(0)}"
    return [first] + [" " * _COLUMN + line for line in body]


_INTRO = """\
# Configuration

Every setting of both programs. This page is made from the programs themselves; a test keeps it current.

- **Order.** A flag comes before an environment variable, that before the TOML file (`-config FILE`, or
  `TUNNEL_CONFIG` and `AGENT_CONFIG`), that before the default.
- **Flags.** One dash or two, dashes or underscores within. A value follows as `-flag=value` or `-flag value`; a boolean
  is `-flag` or `-flag=false`, never followed by a word. Lists are separated by commas; such a flag may be repeated.
- **Environment.** An empty variable is as good as none. A variable with our prefix whose name is close to one of ours
  is refused as a slip of the pen; other unknown ones, and those that Kubernetes injects (`TUNNEL_CORE_SERVICE_HOST`,
  `TUNNEL_CORE_PORT=tcp://...`), are left alone.
- **File.** Keys as below; `tracing.ratio` is `ratio` in the table `[tracing]`. An unknown key or a wrong type is an
  error.
- **Secrets.** Better from a file (`-token-file`, `-jwt-secret-file`; the final line break is cut) or the environment
  than from a flag, which other users of the host can read until the program has taken it out of its title (on Linux;
  it warns of it). Giving both in the same place is an error; otherwise the higher source wins.
- **Values.** Durations: `30s`, `200ms`, `5m`, `1m30s`, `1.5h`, or a number of seconds. Sizes: bytes, or `64KiB`,
  `10MiB`, `5MB`. Addresses: `host:port`, `:port` (all interfaces), `[::1]:port`; port 0 lets the kernel choose. Files
  are found from the working directory.
"""


def reference() -> str:
    """docs/CONFIGURATION.md."""
    lines = [_INTRO]
    for role in ("core", "agent"):
        options = program(role)
        lines += [f"## The {role}", "", f"`python -m {options.module}`", ""]
        for group, entries in _groups(options).items():
            lines += [f"### {group}", ""]
            lines += ["| flag | environment | file | default | meaning |", "| --- | --- | --- | --- | --- |"]
            lines += [_row(entry) for entry in entries]
            lines.append("")
    return "\n".join(lines)


def _row(entry: Entry) -> str:
    word = entry.option.kind.word
    flag = f"`-{entry.flags[0]}`" if entry.is_switch else f"`-{entry.flags[0]} {word if '|' not in word else 'WORD'}`"
    default = f"`{shown}`" if (shown := _default(entry)) else "none"
    meaning = entry.option.help.replace("<", "&lt;")
    if "|" in word and not entry.is_switch:
        meaning += ": " + ", ".join(f"`{choice}`" for choice in word.split("|"))
    key = "none" if entry.name == "config" else f"`{entry.name}`"
    return f"| {flag} | `{entry.variables[0]}` | {key} | {default} | {meaning} |"
