"""Listening sockets: bound, or an error that says what to do; and what accepts on them for ever."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from tunnel.errors import ConfigError
from tunnel.net import OUT_OF_FILES, Socket, tune


class InUseError(ConfigError):
    """Another program listens there."""


def listen(host: str, port: int, what: str, backlog: int = 1024) -> list[socket.socket]:
    """Bound, listening sockets: all interfaces for host "", every address of a name otherwise.

    With port 0 the kernel chooses one, the same for all. Raises ConfigError that names what the address is for,
    InUseError where another program has it.
    """
    try:
        if host:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            places = list(dict.fromkeys((info[0], info[4][0]) for info in infos))
        else:
            places = [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")]
    except (socket.gaierror, UnicodeError) as exc:  # the latter for what can't be a name
        reason = exc.strerror if isinstance(exc, OSError) else "not a host name"
        raise ConfigError(f"{what}: can't resolve {host!r} ({reason}); give an address") from exc
    opened: list[socket.socket] = []
    problem: OSError | None = None
    for family, address in places:
        try:
            sock = _bind(family, str(address), port, backlog, dual=not host)
        except OSError as exc:
            problem = exc
            continue
        opened.append(sock)
        port = sock.getsockname()[1]
        if not host and family == socket.AF_INET6:
            break  # it takes IPv4 as well
    if not opened:
        is_in_use = problem is not None and problem.errno == errno.EADDRINUSE
        raise (InUseError if is_in_use else ConfigError)(_cannot_listen(what, host, port, problem))
    return opened


def _bind(family: int, address: str, port: int, backlog: int, dual: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        sock.bind((address, port))
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _cannot_listen(what: str, host: str, port: int, problem: OSError | None) -> str:
    where = f"{host or '*'}:{port}"
    if problem is not None and problem.errno == errno.EADDRINUSE:
        return f"{what}: {where} is in use by another program; stop it or choose another address"
    if problem is not None and problem.errno in (errno.EACCES, errno.EPERM):
        return f"{what}: not allowed to listen on {where}; use a port above 1023 or grant CAP_NET_BIND_SERVICE"
    return f"{what}: can't listen on {where} ({problem.strerror if problem else 'no address'})"


async def accept_each(
    listener: socket.socket,
    handle: Callable[[Socket, Any], Awaitable[None]],
    nursery: trio.Nursery,
    on_problem: Callable[[OSError | None], None],
    turn: Callable[[], float] | None = None,
) -> None:
    """Accept for ever, a task of `nursery` for each connection: the handlers outlive this accepting task.

    on_problem hears once when nothing can be accepted (out of files or memory), and with None when it goes on. turn:
    where other processes accept from the same listener, the seconds to leave the next connection to them.
    """
    in_trouble = False
    try:
        while True:
            if turn is not None:
                await trio.lowlevel.wait_readable(listener)
                if pause := turn():
                    await trio.sleep(pause)
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(listener)
            except OSError as exc:
                if exc.errno in OUT_OF_FILES:
                    if not in_trouble:
                        in_trouble = True
                        on_problem(exc)
                    await trio.sleep(0.1)
                # Anything else is about that one connection, which was gone before we took it.
            else:
                if in_trouble:
                    in_trouble = False
                    on_problem(None)
                tune(sock)
                nursery.start_soon(handle, Socket(sock), address)
    finally:
        trio.lowlevel.notify_closing(listener)
        listener.close()
