"""Which Host a page answers to, so that no web site can reach it through a browser on this machine (DNS rebinding).

A page on a loopback address answers to loopback names and addresses only: a name of somebody else's that resolves to
127.0.0.1 gets 403. On any other address the operator has opened it, and probes and scrapers come under any name.
"""

from __future__ import annotations

from tunnel.net import is_loopback


def name_of(field: str) -> str:
    """The name or address in a Host field, without port and brackets."""
    if field.startswith("["):
        return field[1:].partition("]")[0]
    return field.rpartition(":")[0] if field.count(":") == 1 else field


def is_fitting(bound: str, host: str, origin: str) -> bool:
    """May a request with this Host and Origin ("" for none) be answered on a listener bound to this address?

    An Origin is sent by browsers for scripts; only a page's own is taken.
    """
    if origin and origin.partition("://")[2] != host:
        return False
    # HTTP/1.0 probes send no Host; browsers always do.
    return not host or not is_loopback(bound) or is_loopback(name_of(host))
