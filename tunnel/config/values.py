"""Readers of single values: durations, sizes, addresses, port ranges, host names.

All raise ValueError with words that complete "-flag: ...": what was expected, never the value itself, which may be a
secret.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,12})?")
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_UNITS = {name: base**power for name, base, power in (
    ("PiB", 1024, 5), ("TiB", 1024, 4), ("GiB", 1024, 3), ("MiB", 1024, 2), ("KiB", 1024, 1),
    ("PB", 1000, 5), ("TB", 1000, 4), ("GB", 1000, 3), ("MB", 1000, 2), ("kB", 1000, 1), ("B", 1, 1),
)}  # fmt: skip
_BYTES = {name.lower(): size for name, size in _UNITS.items()}
_SIZE = re.compile(rf"([0-9]{{1,19}}(?:\.[0-9]{{1,6}})?) ?({'|'.join(_BYTES)})?")
_HOST = re.compile(r"(?=.{1,254}\Z)(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")


def parse_duration(value: object) -> float:
    """Seconds of "30s", "200ms", "1m30s", "1.5h", or of a bare number (seconds). Raises ValueError."""
    expected = ValueError("expected a duration such as 30s, 200ms, 5m or 1.5h")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value) if -1 < value < 1e12 else -1.0
    elif not isinstance(value, str):
        raise expected
    elif _NUMBER.fullmatch(value):
        seconds = float(value)
    elif re.fullmatch(f"(?:{_DURATION.pattern})+", value):
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(value))
    else:
        raise expected
    if not 0 <= seconds < 1e12:
        raise expected
    return seconds


def parse_size(value: object) -> int:
    """Bytes of "10MiB", "64 KiB", "5MB" or of a bare number. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63:
        return value
    match = _SIZE.fullmatch(value.lower()) if isinstance(value, str) and value.isascii() else None
    if match is None:
        raise ValueError("expected a size in bytes, or with a unit such as 64KiB or 10MiB")
    size, rest = scale(match[1], _BYTES[match[2] or "b"])
    if rest or size >= 1 << 63:
        raise ValueError("expected a whole number of bytes")
    return size


def scale(number: str, unit: int) -> tuple[int, bool]:
    """A decimal number of units as a whole number, rounded down; and whether something was cut off."""
    whole, _, fraction = number.partition(".")
    size, rest = divmod(int(whole + fraction) * unit, 10 ** len(fraction))
    return size, rest > 0


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of "host:port", ":port" (host "": all interfaces) or "[::1]:port". Port 0: the kernel chooses.

    Raises ValueError, which says what was expected.
    """
    expected = "expected an address such as 127.0.0.1:8080, :8080 or [::1]:8080"
    host, colon, port_text = text.rpartition(":")
    if not colon:
        raise ValueError(f"{expected} (the port is missing)")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        _check_ipv6(host)
    elif ":" in host:
        raise ValueError(f"{expected} (an IPv6 address stands in brackets)")
    elif host and not _HOST.fullmatch(host):  # a longer label would be an error of its own where it is looked up
        raise ValueError(f"{expected} (this is not a host name)")
    if not (port_text.isascii() and port_text.isdigit()) or int(port_text) > 65535:
        raise ValueError(f"{expected} (a port is a number from 0 to 65535)")
    return host, int(port_text)


def _check_ipv6(host: str) -> None:
    import ipaddress  # late: only here and for trusted proxies

    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        raise ValueError("expected an IPv6 address in the brackets, such as [::1]:8080") from None


def parse_ports(text: str) -> range:
    """The public ports of TCP tunnels: "20000-20100", "20000", "0" (range(0, 1): kernel-chosen) or "" (empty)."""
    if not text:
        return range(0)
    first, dash, last = text.partition("-")
    if not re.fullmatch(r"[0-9]{1,5}(-[0-9]{1,5})?", text):
        raise ValueError("expected a range of ports such as 20000-20100, or 0 for any free port")
    low, high = int(first), int(last if dash else first)
    if not low <= high <= 65535 or (dash and low == 0):
        raise ValueError("expected a range of ports from 1 to 65535, the lower first")
    return range(low, high + 1)


def parse_domain(text: str, example: str = "a host name such as tunnel.example.com") -> str:
    """A host name in lower case without the final dot. Raises ValueError."""
    name = text.lower().removesuffix(".")
    if not _DOMAIN.fullmatch(name) or len(name) > 253:
        raise ValueError(f"expected {example} (letters, digits, dots and inner dashes)")
    return name


def parse_tunnel_name(text: str) -> str:
    """A subdomain, or a whole host name, as `parse_domain`."""
    return parse_domain(text, "a name such as app, or a whole host name such as www.example.org")


def show_duration(seconds: float) -> str:
    if seconds and seconds < 1:
        return f"{seconds * 1000:g}ms"
    for unit, length in (("h", 3600), ("m", 60)):
        if seconds and seconds >= 2 * length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s"


def show_size(size: int) -> str:
    """All of it, as short as it can be said, which is as people say it: "64KiB", "500GB", "1.5GiB", "1025B"."""
    exact = []
    for unit, length in _UNITS.items():
        thousandths, rest = divmod(size * 1000, length)
        if size >= length and not rest:
            whole, fraction = divmod(thousandths, 1000)
            exact.append(f"{whole}.{fraction:03}".rstrip("0").rstrip(".") + unit)
    return min(exact, key=len) if exact else "0"


def show_about(size: int, *, is_binary: bool = False) -> str:
    """A measured size, to four digits: "1.234GB"; "0B" for none."""
    units = [(unit, length) for unit, length in _UNITS.items() if unit == "B" or unit.endswith("iB") == is_binary]
    unit, length = next((one for one in units if size >= one[1]), ("B", 1))
    return f"{size}B" if unit == "B" else f"{size / length:.4g}{unit}"
