"""What is asked of the kernel for each connection."""

from __future__ import annotations

import select
import socket

#: a peer that vanished is noticed after two minutes (the kernel's own: two hours), where nothing else has a deadline
_KEEPALIVE = [
    (getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
    if hasattr(socket, name)
]


def tune(sock: socket.socket) -> None:
    """No Nagle; notice peers that vanished without a word."""
    sock.setblocking(False)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    except OSError:
        pass


def limit_unsent(sock: socket.socket, size: int) -> None:
    """Let the kernel hold little that is unsent, so that urgent frames don't queue behind bulk there."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if hasattr(select, "epoll") else None)
    if option is not None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, option, size)
        except OSError:
            pass
