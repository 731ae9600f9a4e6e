"""Kinds of values: how a setting's text or TOML value becomes a checked Python value, and how it is shown.

Flags and environment variables are always text; a TOML file has types. A kind therefore has two steps: `from_text`
turns text into what TOML would have held (only where that is not text), `check` does the rest for both. Both raise
ValueError as the readers in `values.py` do.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tunnel.config.values import (
    parse_address,
    parse_domain,
    parse_duration,
    parse_ports,
    parse_size,
    parse_tunnel_name,
    show_duration,
    show_size,
)

SWITCH_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

#: seconds; the link carries time-outs as 32 bits of milliseconds, which is 1193 hours
LONGEST = 1000 * 3600.0
YEARS = 10 * 365 * 24 * 3600.0  #: the longest of what stays in the store

_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class Kind:
    """word: the value's name in help. secret: never shown. switch: a boolean. repeats: a flag given twice adds up."""

    word: str
    check: Callable[[Any], Any]
    from_text: Callable[[str], Any] | None = None
    show: Callable[[Any], str] = str
    secret: bool = False
    switch: bool = False
    repeats: bool = False


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("expected a text")
    if _FORBIDDEN.search(value):
        raise ValueError("expected a text on one line, without control characters")
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _switch_text(text: str) -> bool:
    if text.lower() not in SWITCH_WORDS:
        raise ValueError("expected true or false")
    return SWITCH_WORDS[text.lower()]


def _show_switch(value: Any) -> str:
    return "true" if value else "false"


def _is_integer_text(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise ValueError("expected a whole number")
    return int(text)


def integer(low: int, high: int | None = None) -> Kind:
    """A whole number from low to high."""
    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise ValueError(f"expected a whole number {bounds}")
        return value

    return Kind("N", check, _is_integer_text)


def _ratio(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError("expected a number from 0 to 1")
    return float(value)


def _ratio_text(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("expected a number from 0 to 1") from None


def choice(*words: str, **aliases: str) -> Kind:
    """One of a few words, in any case; aliases are accepted and replaced."""

    def check(value: Any) -> str:
        word = value.lower() if isinstance(value, str) else ""
        word = aliases.get(word, word)
        if word not in words:
            raise ValueError(f"expected one of {', '.join(words)}")
        return word

    return Kind("|".join(words), check)


def duration(low: float, high: float = LONGEST) -> Kind:
    """Seconds from low to high."""

    def check(value: Any) -> float:
        seconds = parse_duration(value)
        if seconds < low:
            raise ValueError(f"expected a duration of at least {show_duration(low)}")
        if seconds > high:
            raise ValueError(f"expected a duration of at most {show_duration(high)}")
        return seconds

    return Kind("DURATION", check, show=show_duration)


def size(low: int) -> Kind:
    def check(value: Any) -> int:
        number = parse_size(value)
        if number < low:
            raise ValueError(f"expected at least {low} bytes")
        return number

    return Kind("SIZE", check, show=show_size)


def _address(value: Any) -> str:
    text = _text(value)
    parse_address(text)
    return text


def _address_or_none(value: Any) -> str:
    return _address(value) if value != "" else ""


_SERVER = "expected the core's agent address as host:port, such as tunnel.example.com:8443"


def _server(value: Any) -> str:
    text = _text(value)
    if "://" in text:
        raise ValueError("expected the core's agent address as host:port, without a scheme")
    try:
        host, port = parse_address(text)
    except ValueError as exc:
        reason = str(exc).partition(" (")[2].rstrip(")")
        raise ValueError(f"{_SERVER}{f' ({reason})' if reason else ''}") from None
    if not host or not port:
        raise ValueError(_SERVER)
    return text


def _ports(value: Any) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)
    parse_ports(text)
    return text


def _file(value: Any) -> str:
    """A file that can be read; relative to the working directory. "" is none."""
    text = _text(value)
    if text:
        try:
            with pathlib.Path(text).open("rb"):
                pass
        except OSError as exc:
            raise ValueError(f"expected a file that can be read ({exc.strerror or type(exc).__name__})") from None
    return text


def _words(value: Any) -> tuple[str, ...]:
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise ValueError("expected a list of words")
    return tuple(_text(word.strip()) for word in words if word.strip())


def _networks(value: Any) -> tuple[str, ...]:
    words = _words(value)
    if words:
        import ipaddress

        try:
            return tuple(str(ipaddress.ip_network(word, strict=False)) for word in words)
        except ValueError:
            raise ValueError("expected IP addresses or networks such as 10.0.0.0/8,::1") from None
    return words


def _propagators(value: Any) -> tuple[str, ...]:
    known = ("tracecontext", "baggage", "b3", "b3multi")
    words = _words(value)
    if not set(words) <= set(known):
        raise ValueError(f"expected some of {', '.join(known)}")
    return words


def _subdomain(value: Any) -> str:
    return parse_tunnel_name(_text(value)) if value != "" else ""


def url(example: str, *, is_plain_allowed: bool = True, may_be_empty: bool = True) -> Kind:
    """A URL without query, user and final slash."""
    scheme = "https?" if is_plain_allowed else "https"

    def check(value: Any) -> str:
        text = _text(value).removesuffix("/")
        match = re.fullmatch(rf"{scheme}://(?:\[[0-9A-Fa-f:.]+\]|[^/?#@:\[\]\s]+)(?::([0-9]+))?(?:/[^?#\s]*)?", text)
        if match is None and (text or not may_be_empty):
            raise ValueError(f"expected a URL such as {example}")
        if match is not None and match[1] and not 0 < int(match[1][:6]) < 65536:
            raise ValueError(f"expected a URL such as {example} (a port is a number from 1 to 65535)")
        return text

    return Kind("URL", check)


def _database(value: Any) -> str:
    text = _text(value)
    if text and not re.match(r"(sqlite|postgres(ql)?)(\+[a-z0-9]+)?://", text):
        raise ValueError("expected a database URL such as postgresql://user@host/name or sqlite:////path/tunnel.db")
    return text


def _fingerprint(value: Any) -> str:
    text = _text(value).lower().removeprefix("sha256:").replace(":", "")
    if text and not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError("expected the SHA-256 fingerprint that the core prints (64 hexadecimal digits)")
    return text


def _identifier(value: Any) -> str:
    text = _text(value)
    if text and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise ValueError("expected up to 64 letters, digits, dots, dashes and underscores")
    return text


def _domain(value: Any) -> str:
    return parse_domain(_text(value))


def _hosts(value: Any) -> tuple[str, ...]:
    names = _words(value)
    if any("*" in name for name in names):
        raise ValueError("expected host names without a wildcard: those need a DNS challenge (DEPLOYMENT.md)")
    found = tuple(parse_domain(name) for name in names)
    if not all("." in name for name in found):
        raise ValueError("expected full host names such as www.example.com")
    return found


def _host_header(value: Any) -> str:
    """What a Host field may be, "local" for the service's own, or nothing."""
    text = _text(value).lower()
    try:
        parse_address(text if re.search(r":[0-9]+$", text) else f"{text}:80")
        is_valid = not text.startswith(":")
    except ValueError:
        is_valid = False
    if text and not is_valid:
        raise ValueError("expected local, or a host name such as app.test or app.test:3000")
    return text


def _email(value: Any) -> str:
    text = _text(value)
    if text and not re.fullmatch(r"[!-?A-~]{1,64}@[A-Za-z0-9.-]{1,253}", text):
        raise ValueError("expected an e-mail address such as admin@example.com")
    return text


TEXT = Kind("TEXT", _text)
SECRET = Kind("SECRET", _text, secret=True)
SWITCH = Kind("true|false", _switch, _switch_text, _show_switch, switch=True)
RATIO = Kind("0..1", _ratio, _ratio_text, lambda value: f"{value:g}")
ADDRESS = Kind("HOST:PORT", _address)
ADDRESS_OR_NONE = Kind("HOST:PORT", _address_or_none)
SERVER = Kind("HOST:PORT", _server)
PORTS = Kind("PORTS", _ports)
FILE = Kind("FILE", _file)
PATH = Kind("FILE", _text)  # read, and so checked, later
DIRECTORY = Kind("DIR", _text)
WORDS = Kind("WORDS", _words, show=",".join, repeats=True)
NETWORKS = Kind("NETWORKS", _networks, show=",".join, repeats=True)
PROPAGATORS = Kind("WORDS", _propagators, show=",".join, repeats=True)
LOCAL = Kind("SERVICES", _text, repeats=True)
SUBDOMAIN = Kind("NAME", _subdomain)
DOMAIN = Kind("DOMAIN", _domain)
HOSTS = Kind("NAMES", _hosts, show=",".join, repeats=True)
HOST_HEADER = Kind("HOST", _host_header)
EMAIL = Kind("ADDRESS", _email)
PUBLIC_URL = url("https://tunnel.example.com")
ENDPOINT = url("http://localhost:4318")
AUTHORITY = url("https://acme.example.com/directory", is_plain_allowed=False, may_be_empty=False)
DATABASE = Kind("URL", _database, secret=True)  # it may hold a password
FINGERPRINT = Kind("SHA256", _fingerprint)
IDENTIFIER = Kind("NAME", _identifier)
LEVEL = choice("debug", "info", "warning", "error", warn="warning")
