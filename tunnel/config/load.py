"""Loading: flags over environment over file over defaults; then secrets from files, then what must fit together."""

from __future__ import annotations

import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from tunnel.config.local import parse_local
from tunnel.config.options import SECTIONS, Entry, Program, program
from tunnel.config.settings import AgentSettings, CoreSettings, Settings
from tunnel.config.sources import (
    HELP,
    Given,
    Values,
    check_command,
    read_environment,
    read_file,
    read_flags,
    split,
    wants,
)
from tunnel.config.values import parse_address, show_duration
from tunnel.errors import ConfigError

#: (setting, file that holds it)
_SECRET_FILES = (
    ("token", "token_file"),
    ("jwt_secret", "jwt_secret_file"),
    ("dashboard_token", "dashboard_token_file"),
    ("server_fingerprint", "server_fingerprint_file"),
)
_FILES = frozenset(file for _, file in _SECRET_FILES)
#: two names of one thing: whichever the higher source gives, hides both in the lower ones
_PAIRS = (*_SECRET_FILES, ("metrics_port", "metrics_addr"))
_MASK = re.compile(r"tt_|eyJ|://[^/]*@")
#: what may have a "/" in it and is no path: 24 random bytes or more in base64
_RANDOM = re.compile(r"(?=.*[0-9])(?=.*[A-Z])(?=.*[a-z])[A-Za-z0-9+/=_-]{32,}")


def load_core(argv: Sequence[str], env: Mapping[str, str]) -> CoreSettings:
    """The core's settings from its global flags (`split_command`) and environment.

    Raises ConfigError with one line that names the flag, variable or key; SystemExit(0) after -help and -version.
    """
    options = program("core")
    given = _gather(options, argv, env)
    _turn_tls_on(given)
    settings = cast(CoreSettings, _build(options, given))
    _check_heartbeat(options, given, settings)
    _check_pair(options, given, "agent_cert", "agent_key")
    _check_pair(options, given, "public_cert", "public_key")
    _check_public_tls(options, given, settings)
    if settings.max_target > settings.max_head:
        raise ConfigError(
            f"{_name(options, given, 'max_target')} must not be larger than {_name(options, given, 'max_head')}"
        )
    return settings


def load_agent(argv: Sequence[str], env: Mapping[str, str]) -> AgentSettings:
    """The agent's settings. Raises as `load_core`; -local is checked too."""
    options = program("agent")
    given = _gather(options, argv, env)
    settings = cast(AgentSettings, _build(options, given))
    _check_heartbeat(options, given, settings)
    parse_local(settings.local, settings.subdomain)
    for name in ("ca_cert", "server_fingerprint"):
        for switch, wrong in (("tls", False), ("tls_skip_verify", True)):
            if getattr(settings, name) and getattr(settings, switch) is wrong:
                raise ConfigError(
                    f"{_name(options, given, name)} says how to check the core's certificate, "
                    f"but {_name(options, given, switch)} says not to: keep one"
                )
    return settings


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The core's command line as (global flags, words of the command); no words: serve.

    Raises ConfigError: an unknown flag, a missing value, a first word that is no command.
    """
    options = program("core")
    if wants(argv, HELP | {"version"}, options):
        return list(argv), []
    flags, words = split(argv, options)
    check_command(words, flags)
    return flags, words


def data_dir(settings: CoreSettings) -> pathlib.Path:
    """Where store, keys and certificate live; not created here. Raises ConfigError if there is no such place."""
    if settings.data_dir:
        return pathlib.Path(settings.data_dir).expanduser()
    if sys.platform == "linux" and os.geteuid() == 0:
        return pathlib.Path("/var/lib/tunnel")  # the place of a system service's state (FHS 5.8)
    import platformdirs  # late: 5 ms that --help need not pay

    path = pathlib.Path(platformdirs.user_state_dir("tunnel", appauthor=False))
    if not path.is_absolute():
        raise ConfigError("there is no home directory to keep state in: give -data-dir")
    return path


def sections(settings: CoreSettings | AgentSettings) -> dict[str, dict[str, Any]]:
    """What plug-ins may see (`Host.options`), as plain values, without secrets."""
    return {
        "log": {"level": settings.log_level, "json": settings.log_json},
        "metrics": {name: getattr(settings.metrics, name) for name in settings.metrics.__struct_fields__},
        "tracing": {name: getattr(settings.tracing, name) for name in settings.tracing.__struct_fields__},
    }


# Steps ----------------------------------------------------------------------------------------------------------


def _gather(options: Program, argv: Sequence[str], env: Mapping[str, str]) -> Values:
    """What was given, from the highest source that gives it; converted."""
    _answer_quiet_flags(options, argv)
    flags, variables = read_flags(argv, options), read_environment(env, options)
    entries = {entry.name: entry for entry in options.entries}
    config = flags.get("config") or variables.get("config")
    path = _convert(entries["config"], config) if config else ""
    sources = [flags, variables, read_file(path, options) if path else {}]
    for source in sources:
        for secret, file in _SECRET_FILES:
            if secret in source and file in source:
                raise ConfigError(f"{source[secret].origin} and {source[file].origin} exclude each other: keep one")
    merged: Values = {}
    for source in sources:
        hidden = {name for pair in _PAIRS for name in pair if merged.keys() & set(pair)}
        merged.update({name: given for name, given in source.items() if name not in merged and name not in hidden})
    for name, given in merged.items():
        merged[name] = Given(_convert(entries[name], given), given.origin, given.is_text)
    _read_secrets(entries, merged)
    _agree_on_metrics(options, merged)
    return merged


def _answer_quiet_flags(options: Program, argv: Sequence[str]) -> None:
    if wants(argv, HELP, options):
        from tunnel.config.render import render_help

        _print(render_help(options))
    if wants(argv, frozenset({"version"}), options):
        from tunnel import __version__

        _print(f"tunnel-{options.role} {__version__}\n")


def _print(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `--help | head`; what is left in the buffer must not complain at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def _convert(entry: Entry, given: Given) -> Any:
    kind = entry.option.kind
    try:
        raw = kind.from_text(given.value) if kind.from_text and given.is_text else given.value
        return kind.check(raw)
    except ValueError as exc:
        is_hidden = kind.secret or entry.name in _FILES or not isinstance(given.value, (str, int, float, bool))
        shown = "" if is_hidden else _quote(given.value)
        raise ConfigError(f"{given.origin}: {exc}{shown}") from None


def _quote(value: object) -> str:
    """`, not "…"` for a value that is surely no secret; short and on one line."""
    text = value if isinstance(value, str) else str(value).lower()
    if _MASK.search(text) or len(text) > 80:
        return ""
    return f", not {text!a}" if isinstance(value, str) else f", not {text}"


def _read_secrets(entries: Mapping[str, Entry], merged: Values) -> None:
    for secret, file in _SECRET_FILES:
        given = merged.get(file)
        if given is None or not given.value:
            continue
        try:
            text = pathlib.Path(given.value).read_text("utf-8").rstrip("\r\n")
        except OSError as exc:
            raise ConfigError(_unreadable(entries[secret], given, exc)) from None
        except ValueError:
            raise ConfigError(f"{given.origin}: {given.value} does not hold text") from None
        if not text.strip() or "\n" in text:
            raise ConfigError(f"{given.origin}: {given.value} must hold the value on one line, and nothing else")
        read = Given(text, f"{given.origin}: {given.value}", True)
        merged[secret] = Given(_convert(entries[secret], read), given.origin, True)


def _unreadable(secret: Entry, given: Given, exc: OSError) -> str:
    """Of a secret's file. What stands in its place may be the secret itself, and is not shown then."""
    reason = exc.strerror or type(exc).__name__
    is_path = os.sep in given.value or os.path.lexists(given.value)
    if is_path and not _MASK.search(given.value) and not _RANDOM.fullmatch(given.value):
        return f"{given.origin}: {given.value} cannot be read ({reason})"
    return (
        f"{given.origin}: the file cannot be read ({reason}); it takes a file's name, "
        f"the value itself goes into -{secret.flags[0]} or {secret.variables[0]}"
    )


def _agree_on_metrics(options: Program, merged: Values) -> None:
    """`-metrics-port` is short for `-metrics-addr=127.0.0.1:PORT`; with both, the port must be the same."""
    if options.role != "agent":
        return
    addr, port = merged.get("metrics_addr"), merged.get("metrics_port")
    if addr is not None and addr.value:
        number = parse_address(addr.value)[1]
        if port is not None and port.value != number:
            raise ConfigError(f"{port.origin} and {addr.origin} name different ports: keep one")
        merged["metrics_port"] = Given(number, addr.origin, True)
    elif port is not None and addr is None:
        merged["metrics_addr"] = Given(f"127.0.0.1:{port.value}", port.origin, True)
    if origin := addr or port:
        merged["is_metrics_addr_given"] = Given(True, origin.origin, False)


def _turn_tls_on(merged: Values) -> None:
    """Whoever gives a certificate for visitors means TLS, unless -public-tls=false says otherwise."""
    for name in ("public_cert", "public_cert_dir"):
        certificate = merged.get(name)
        if certificate is not None and certificate.value and "public_tls" not in merged:
            merged["public_tls"] = Given(True, certificate.origin, certificate.is_text)


def _build(options: Program, merged: Values) -> Settings:
    top: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, given in merged.items():
        section, dot, inner = name.partition(".")
        if dot:
            nested.setdefault(section, {})[inner] = given.value
        else:
            top[name] = given.value
    for section, fields in nested.items():
        top[section] = SECTIONS[section](**fields)
    return options.settings(**top)


# Checks across settings -----------------------------------------------------------------------------------------


def _name(options: Program, given: Values, name: str) -> str:
    """How to name a setting in an error: its origin, or its flag where it has its default."""
    return given[name].origin if name in given else f"-{name.replace('_', '-')}"


def _check_heartbeat(options: Program, given: Values, settings: CoreSettings | AgentSettings) -> None:
    if settings.heartbeat >= settings.heartbeat_timeout:
        raise ConfigError(
            f"{_name(options, given, 'heartbeat')} ({show_duration(settings.heartbeat)}) must be shorter than "
            f"{_name(options, given, 'heartbeat_timeout')} ({show_duration(settings.heartbeat_timeout)})"
        )


def _check_public_tls(options: Program, given: Values, settings: CoreSettings) -> None:
    tls, plain, agree = (_name(options, given, name) for name in ("public_tls", "http_addr", "acme.agree"))
    if settings.acme.agree:
        if not settings.public_tls:
            raise ConfigError(f"{agree} needs -public-tls: certificates are for visitors who come to the core by TLS")
        if not settings.http_addr:
            raise ConfigError(f"{agree} needs -http-addr, such as :80, where the authority comes to look")
    elif others := [name for name in given if name.startswith("acme.") and name != "acme.agree"]:
        raise ConfigError(
            f"{given[others[0]].origin} needs -acme-agree, which says that you accept the authority's terms"
        )
    if settings.http_addr and not settings.public_tls:
        raise ConfigError(f"{plain} needs TLS for visitors, -public-cert or -public-tls: it sends them there")
    if settings.public_tls and not (settings.public_cert or settings.public_cert_dir or settings.acme.agree):
        raise ConfigError(f"{tls} needs -public-cert and -public-key, or -public-cert-dir, or -acme-agree")


def _check_pair(options: Program, given: Values, first: str, second: str) -> None:
    for one, other in ((first, second), (second, first)):
        if (value := given.get(one)) is not None and value.value and not (other in given and given[other].value):
            raise ConfigError(f"{value.origin} needs -{other.replace('_', '-')} too")
