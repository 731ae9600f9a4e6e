"""Listening sockets that were open before this process was: systemd's, or those of the core that this one follows.

With socket activation (sd_listen_fds(3)) systemd holds the ports, so that visitors wait instead of being refused while
the core starts again; `FileDescriptorName=` in the socket unit says which listener it is. A core that is upgraded
(tunnel/core/upgrade.py) leaves its sockets to its successor in the same way, with names in TUNNEL_HANDOVER.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping

from tunnel.errors import ConfigError
from tunnel.listening import listen

HANDOVER = "TUNNEL_HANDOVER"  #: JSON: {"channel": file descriptor, "sockets": {name: [file descriptors]}}
PUBLIC, HTTP, AGENTS, METRICS, DASHBOARD = "public", "http", "agents", "metrics", "dashboard"
NAMES = (PUBLIC, HTTP, AGENTS, METRICS, DASHBOARD)
_FIRST = 3  # SD_LISTEN_FDS_START


def tcp_name(account_id: str, tunnel: str) -> str:
    """What the socket of a TCP tunnel is called."""
    return f"tcp/{account_id}/{tunnel}"


class Inherited:
    """sockets: by listener's name. channel: to the core that hands over, None if nobody does."""

    def __init__(
        self, sockets: Mapping[str, list[socket.socket]] | None = None, channel: socket.socket | None = None
    ) -> None:
        self._sockets = dict(sockets or {})
        self.channel = channel

    def take(self, name: str) -> list[socket.socket]:
        """The sockets of this name, once; an empty list if there are none."""
        return self._sockets.pop(name, [])

    def listen(self, name: str, address: tuple[str, int], what: str) -> list[socket.socket]:
        """The inherited sockets of this name, else new ones. Raises ConfigError."""
        return self.take(name) or listen(*address, what)


def inherit(environ: Mapping[str, str]) -> Inherited:
    """What was left to this process. Raises ConfigError for sockets whose name says nothing to us."""
    if handover := environ.get(HANDOVER):
        left = json.loads(handover)
        sockets = {name: [adopt(number) for number in numbers] for name, numbers in left["sockets"].items()}
        return Inherited(sockets, socket.socket(fileno=left["channel"]))
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return Inherited()
    count = environ.get("LISTEN_FDS", "")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[socket.socket]] = {}
    for at in range(int(count) if count.isdecimal() else 0):
        name = names[at] if at < len(names) else ""
        if name not in NAMES:
            raise ConfigError(
                f"socket activation: systemd's socket is called {name!r}; "
                f"set FileDescriptorName= in its unit to one of {', '.join(NAMES)}"
            )
        found.setdefault(name, []).append(adopt(_FIRST + at))
    return Inherited(found)


def adopt(number: int) -> socket.socket:
    sock = socket.socket(fileno=number)
    sock.setblocking(False)
    sock.set_inheritable(False)
    return sock
