"""Who gives TCP tunnels their ports: this process itself, or the supervisor that keeps them for several workers.

A name gets its last port again if it is free.
"""

from __future__ import annotations

import socket
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Protocol

from tunnel.core.inherited import Inherited, tcp_name
from tunnel.core.quotas import over_limit
from tunnel.errors import ConfigError, Refused
from tunnel.listening import listen

MAX_LAST = 10_000  #: names whose last port is remembered


class PortSource(Protocol):
    async def take(self, account_id: str, name: str, most: float) -> list[socket.socket]:
        """Listening sockets for a tunnel, the caller's own. most: tunnels that the account may have ports for. Raises
        Refused (no_port, port_quota)."""

    def give_back(self, account_id: str, name: str) -> None:
        """Nobody listens for it here any more."""

    def sockets(self) -> dict[str, list[socket.socket]]:
        """Those given out now, by what a successor calls them."""

    @property
    def by_account(self) -> Mapping[str, int]:
        """Tunnels that have ports from here, as far as is known here."""


class OwnPorts:
    """ports: the range to give out, range(0, 1) for any the kernel has."""

    def __init__(self, host: str, ports: range, inherited: Inherited) -> None:
        self._host = host
        self._ports = ports
        self._inherited = inherited
        self._given: dict[str, list[socket.socket]] = {}
        self._last: OrderedDict[tuple[str, str], int] = OrderedDict()
        self.by_account: Counter[str] = Counter()  # tunnels that have ports

    async def take(self, account_id: str, name: str, most: float) -> list[socket.socket]:
        return self.take_nowait(account_id, name, most)

    def take_nowait(self, account_id: str, name: str, most: float) -> list[socket.socket]:
        if not self._ports:
            raise Refused("no_port", "this core gives no ports to TCP tunnels (its operator sets -tcp-ports)")
        key, whose = tcp_name(account_id, name), (account_id, name)
        is_new = key not in self._given
        if is_new and self.by_account[account_id] >= most:
            raise Refused("port_quota", over_limit("ports", most, account_id))
        sockets = self._inherited.take(key) or self._listen(self._last.get(whose, 0))
        self._given[key] = sockets
        self.by_account[account_id] += is_new
        self._last[whose] = sockets[0].getsockname()[1]
        self._last.move_to_end(whose)
        if len(self._last) > MAX_LAST:
            self._last.popitem(last=False)
        return sockets

    def give_back(self, account_id: str, name: str) -> None:
        if self._given.pop(tcp_name(account_id, name), None) is None:
            return
        self.by_account[account_id] -= 1
        if not self.by_account[account_id]:
            del self.by_account[account_id]

    def sockets(self) -> dict[str, list[socket.socket]]:
        return dict(self._given)

    def _listen(self, last: int) -> list[socket.socket]:
        candidates = list(self._ports)
        if last and (last in self._ports or self._ports == range(1)):
            candidates.insert(0, last)
        for port in candidates:
            try:
                return listen(self._host, port, "-tcp-ports")
            except ConfigError:
                continue
        raise Refused("no_port", "all ports for TCP tunnels are taken; the core's operator can open more (-tcp-ports)")


class SharedPorts:
    """The ports of several workers, in their supervisor, which holds them as long as one of the workers does."""

    def __init__(self, source: OwnPorts) -> None:
        self._source = source
        self._users: dict[tuple[str, str], set[str]] = {}
        self._open: dict[tuple[str, str], list[socket.socket]] = {}

    def take(self, worker: str, account_id: str, name: str, most: float) -> Sequence[socket.socket]:
        """worker: who listens. Raises Refused (no_port, port_quota)."""
        key = account_id, name
        if key not in self._open:
            self._open[key] = self._source.take_nowait(account_id, name, most)
        self._users.setdefault(key, set()).add(worker)
        return self._open[key]

    def give_back(self, worker: str, account_id: str, name: str) -> None:
        key = account_id, name
        users = self._users.get(key, set())
        users.discard(worker)
        if not users and key in self._open:
            del self._users[key]
            for sock in self._open.pop(key):
                sock.close()
            self._source.give_back(account_id, name)

    def drop(self, worker: str) -> None:
        """The worker is gone."""
        for account_id, name in [key for key, users in self._users.items() if worker in users]:
            self.give_back(worker, account_id, name)

    def sockets(self) -> dict[str, list[socket.socket]]:
        return self._source.sockets()

    @property
    def by_account(self) -> Mapping[str, int]:
        return self._source.by_account

    def close_all(self) -> None:
        for sockets in self._open.values():
            for sock in sockets:
                sock.close()
        self._open.clear()
        self._users.clear()
