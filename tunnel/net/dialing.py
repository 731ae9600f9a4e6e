"""Connections to others: a name's addresses tried one after another, and the reason in few words where none is made."""

from __future__ import annotations

import errno
import os
import socket
import ssl

import trio

from tunnel.net.addresses import LOOPBACK, is_localhost
from tunnel.net.options import tune
from tunnel.net.sockets import Socket

OUT_OF_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
OUR_OWN_TROUBLE = frozenset(map(os.strerror, OUT_OF_FILES))  #: reasons of our process, not of the other end


async def dial(host: str, port: int) -> Socket:
    """Connect, trying a name's addresses in Trio's way; for localhost both loopback addresses, also where the resolver
    knows one of them only. Raises OSError."""
    if not is_localhost(host):
        return await _dial(host, port)
    try:
        infos = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        infos = []
    addresses = list(dict.fromkeys([*(str(info[4][0]) for info in infos), *LOOPBACK]))
    reasons: list[str] = []
    for address in addresses:
        try:
            return await _dial(address, port)
        except OSError as exc:
            reasons.append(reason_of(exc))
            if reasons[-1] in OUR_OWN_TROUBLE:
                raise
    refused = os.strerror(errno.ECONNREFUSED)  # says more than that there is no IPv6 here
    raise OSError(f"{refused if refused in reasons else reasons[0]} (tried {' and '.join(addresses)})")


async def _dial(host: str, port: int) -> Socket:
    try:
        stream = await trio.open_tcp_stream(host, port)
    except BaseExceptionGroup as group:
        # Cancelled while it connects, a nursery in there makes a group of it, which nobody takes for Cancelled.
        leaf: BaseException = group
        while isinstance(leaf, BaseExceptionGroup) and group.split(trio.Cancelled)[1] is None:
            leaf = leaf.exceptions[0]
        raise leaf from None
    sock = socket.socket(fileno=stream.socket.detach())
    tune(sock)
    return Socket(sock)


def reason_of(exc: BaseException) -> str:
    """Why a connection failed, in the system's few words: Trio puts one OSError an address in a group."""
    inner: BaseException = exc.__cause__ if exc.__cause__ is not None else exc
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[-1]
    if isinstance(inner, ssl.SSLError):
        return str(inner.reason or inner)
    if isinstance(inner, OSError):
        if inner.errno is not None and not isinstance(inner, socket.gaierror):
            return os.strerror(inner.errno)
        return inner.strerror or str(inner)
    return str(inner) or type(inner).__name__
