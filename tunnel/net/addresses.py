"""Addresses: which names mean this machine, and how an address is written."""

from __future__ import annotations

import ipaddress
from typing import Any

LOOPBACK = ("127.0.0.1", "::1")


def is_localhost(host: str) -> bool:
    """A name that means this machine, whatever a resolver says (RFC 6761, 6.3)."""
    name = host.lower().removesuffix(".")
    return name == "localhost" or name.endswith(".localhost")


def is_loopback(host: str) -> bool:
    """Whether a name or address (IPv6 without brackets) means this machine whatever a resolver says."""
    if is_localhost(host):
        return True
    try:
        address = ipaddress.ip_address(host.removesuffix("."))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def address_text(address: Any) -> str:
    """host:port of a socket address, IPv4-mapped addresses in their own form."""
    host = address[0].removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
