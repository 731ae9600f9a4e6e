"""A worker's view of the other workers of its core: who serves what, and how connections get to where they belong.

All of it goes through the supervisor (tunnel/core/supervisor.py):

- *names*: each worker says which tunnels it has links for; an agent hears its welcome only when all know of it.
- *visitors*: one whose tunnel has no link here, or none with room for it, but one at another worker is passed on with
  its connection and what was read of it. The other worker goes on as if it had accepted it, so its next requests go
  there at once. Under TLS the connection can't leave the process that has the keys: then its bytes are passed on, over
  a socket pair. A connection is passed on at most MAX_HOPS times.
- *agents*: a new connection that names another worker (tunnel/core/hints.py) is passed on before a byte of it is read.
- *links*: limits on agents' connections count an agent once, whatever worker its links are at.
"""

from __future__ import annotations

import os
import random
import socket as stdlib_socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import trio

from tunnel.core.board import Board, Row
from tunnel.core.hints import wanted_worker
from tunnel.core.registry import Registry, Tunnel
from tunnel.core.visitor import RAW
from tunnel.errors import Refused
from tunnel.http.heads import Head
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.net import GONE, Socket, socket_of
from tunnel.workers.channel import ChannelLost
from tunnel.workers.member import Member

if TYPE_CHECKING:
    from tunnel.core.door import Door
    from tunnel.core.gate import Gate
    from tunnel.core.request import Request
    from tunnel.core.tcp import Ports
    from tunnel.core.visitor import Visitor

log = get_logger("tunnel.core")

MAX_HOPS = 3
KNOWN_SECONDS = 2.0  #: for the other workers to hear of a name; one that stands still must not keep agents out


class Siblings:
    """Implements `Elsewhere`. names: by tunnel name, which other workers serve it: number → (account, protocol). board:
    what all of them count together."""

    def __init__(self, member: Member, registry: Registry, count: int) -> None:
        self.number = member.number
        self.count = count
        self.core: str = member.orders["core"]
        self.names: dict[str, dict[int, tuple[str, str]]] = {}
        self.board = Board(member.files[-1], count, member.number, member.orders["key"])
        self._channel = member.channel
        self._registry = registry
        self._random = random.Random()
        registry.on_change = self._on_change
        for number, names in member.orders["names"]:
            self._learn({"worker": number, "up": names}, [])
        member.on("names", self._learn)
        member.on("sync", lambda message, files: None)

    def receive(self, member: Member, door: Door, gate: Gate, ports: Ports, nursery: trio.Nursery) -> None:
        """From now on take connections that others pass on; they are tasks of `nursery`, the server's."""

        def visitor(message: Any, files: list[int]) -> None:
            address, proto, data, hops = message
            nursery.start_soon(door.adopt, socket_of(files[0]), address, proto, data, hops)

        def tcp_visitor(message: Any, files: list[int]) -> None:
            name, address, hops = message
            nursery.start_soon(ports.adopt, socket_of(files[0]), address, name, hops)

        def agent(message: Any, files: list[int]) -> None:
            nursery.start_soon(gate.adopt, socket_of(files[0]), tuple(message))

        member.on("visitor", visitor)
        member.on("tcp visitor", tcp_visitor)
        member.on("agent", agent)

    # Names ------------------------------------------------------------------------------------------------------

    def _on_change(self, tunnel: Tunnel, is_up: bool) -> None:
        if is_up:
            self._channel.tell("names", {"up": [[tunnel.name, tunnel.account_id, tunnel.protocol]]})
        else:
            self._channel.tell("names", {"down": [tunnel.name], "held": tunnel.held_until > 0})

    def _learn(self, message: Any, files: list[int]) -> None:
        """Another worker serves these names now, or no longer; `gone`: it has ended."""
        number = message["worker"]
        for name, account_id, protocol in message.get("up", ()):
            self.names.setdefault(name, {})[number] = (account_id, protocol)
        gone = list(self.names) if message.get("gone") else message.get("down", ())
        for name in gone:
            servers = self.names.get(name)
            if servers is not None and servers.pop(number, None) is not None and not servers:
                del self.names[name]

    async def announce(self) -> None:
        """Return when the others know what is served here."""
        with trio.move_on_after(KNOWN_SECONDS):
            try:
                await self._channel.call("sync")
            except ChannelLost:
                pass

    def check_free(self, name: str, protocol: str, account_id: str) -> None:
        """Raises Refused(name_taken), as `Registry.check_free` does for links here."""
        for owner, used in self.names.get(name, {}).values():
            if owner != account_id:
                raise Refused("name_taken", f"the name {name} is in use by another account; choose another one")
            if used != protocol:
                raise Refused("name_taken", f"the name {name} is in use for {used.upper()} by another agent")

    # Visitors ---------------------------------------------------------------------------------------------------

    def serves(self, request: Request) -> bool:
        if not self.names or request.refusal is not None or request.head is None:
            return False
        tunnel = self._registry.find(request.host)
        visitor = request.visitor
        crowd = "" if visitor.is_proxy else visitor.crowd  # a proxy's is that of the request before
        if tunnel is not None and any(link.has_room_for(crowd) for link in tunnel.links):
            return False
        return self._find(self._registry.name_of(request.host), "http", visitor.hops) is not None

    def _find(self, name: str, protocol: str, hops: int) -> int | None:
        """A worker that serves the tunnel; any of several."""
        if hops >= MAX_HOPS:
            return None
        numbers = [number for number, (_, used) in self.names.get(name, {}).items() if used == protocol]
        return self._random.choice(numbers) if numbers else None

    async def take(self, request: Request) -> bool:
        visitor = request.visitor
        number = self._find(self._registry.name_of(request.host), "http", visitor.hops)
        if number is None:
            return False
        assert request.head is not None
        data = head_bytes(request.head) + visitor.buffer
        message = [number, visitor.address, visitor.proto, data, visitor.hops + 1]
        try:
            if visitor.socket.is_plain:
                self._channel.tell("visitor", message, [os.dup(visitor.socket.sock.fileno())])
                visitor.socket.close()
                return True
            near, far = stdlib_socket.socketpair()
        except OSError:  # no room for another file: it gets its answer here
            return False
        self._channel.tell("visitor", message, [far.detach()])
        near.setblocking(False)
        visitor.phase, visitor.deadline = RAW, float("inf")
        await _relay(visitor.socket, Socket(near))
        return True

    def take_tcp(self, visitor: Visitor, name: str) -> bool:
        """Take over a TCP tunnel's visitor, for whom no link here has room; its socket is closed here then."""
        number = self._find(name, "tcp", visitor.hops)
        if number is None:
            return False
        message = [number, name, visitor.address, visitor.hops + 1]
        try:
            self._channel.tell("tcp visitor", message, [os.dup(visitor.socket.sock.fileno())])
        except OSError:
            return False
        visitor.socket.close()
        return True

    # Agents -----------------------------------------------------------------------------------------------------

    async def pass_agent(self, socket: Socket, address: Any) -> bool:
        """Whether the connection is meant for another worker, and on its way there."""
        number = await wanted_worker(socket)
        if number is None or number == self.number or number >= self.count:
            return False
        try:
            self._channel.tell("agent", [number, list(address)], [os.dup(socket.sock.fileno())])
        except OSError:
            return False
        socket.close()
        return True

    async def admit(self, account_id: str, instance: str, connection_id: str, limit: float, most: int) -> None:
        """Count a link. Raises Refused: connection_quota, too_many_connections, unavailable."""
        try:
            refused = await self._channel.call("admit", [account_id, instance, connection_id, limit, most])
        except ChannelLost as exc:
            self.drop(connection_id)
            raise Refused("unavailable", str(exc)) from exc
        except BaseException:  # given up: it may be counted by now, and nobody is to use it
            self.drop(connection_id)
            raise
        if refused is not None:
            raise Refused(*refused)

    def drop(self, connection_id: str) -> None:
        self._channel.tell("drop", connection_id)

    # Ports ------------------------------------------------------------------------------------------------------

    async def take_port(self, account_id: str, name: str, most: float) -> list[stdlib_socket.socket]:
        try:
            refused, files = await self._channel.call_for_files("port", [account_id, name, most])
        except ChannelLost as exc:
            raise Refused("no_port", str(exc)) from exc
        if refused:
            raise Refused(*refused)
        sockets = [stdlib_socket.socket(fileno=number) for number in files]
        for sock in sockets:
            sock.setblocking(False)
        return sockets

    async def ask_row(self, account_id: str) -> int:
        try:
            number: int = await self._channel.call("row", account_id)
        except ChannelLost:
            number = -1  # the supervisor is gone, and this worker is about to be
        return number

    def give_row_back(self, account_id: str) -> None:
        self._channel.tell("row back", account_id)

    def give_port_back(self, account_id: str, name: str) -> None:
        self._channel.tell("port back", [account_id, name])


class SiblingRows:
    """An `AccountRows`: the supervisor says which row is an account's."""

    def __init__(self, siblings: Siblings) -> None:
        self._siblings = siblings

    async def take(self, account_id: str) -> Row | None:
        number = await self._siblings.ask_row(account_id)
        return self._siblings.board.row(number) if number >= 0 else None

    def give_back(self, account_id: str) -> None:
        self._siblings.give_row_back(account_id)


class SiblingPorts:
    """A `PortSource`: the supervisor's ports."""

    def __init__(self, siblings: Siblings) -> None:
        self._siblings = siblings

    async def take(self, account_id: str, name: str, most: float) -> list[stdlib_socket.socket]:
        return await self._siblings.take_port(account_id, name, most)

    def give_back(self, account_id: str, name: str) -> None:
        self._siblings.give_port_back(account_id, name)

    def sockets(self) -> dict[str, list[stdlib_socket.socket]]:
        return {}

    @property
    def by_account(self) -> dict[str, int]:
        return {}  # the supervisor knows


def head_bytes(head: Head) -> bytes:
    """A checked head as bytes that say the same to whoever parses them."""
    lines = [b"%s %s HTTP/%s" % (head.method, head.target, head.version)]
    lines += [b"%s: %s" % (name, value) for _, name, value in head.fields]
    if head.host and not any(name == b"host" for name, _, _ in head.fields):
        lines.append(b"Host: " + head.host)  # it stood in an absolute target
    return b"\r\n".join((*lines, b"", b""))


async def _relay(visitor: Socket, sibling: Socket) -> None:
    """Bytes both ways until both directions have ended, or one of the ends is gone."""
    try:
        async with open_pair() as nursery:
            nursery.start_soon(_copy, visitor, sibling)
            while data := await sibling.recv():
                await visitor.send(data)
            if sibling.peer() == GONE:
                visitor.abort()  # it did not end its answer: nor may we make an end of it
            else:
                await visitor.finish()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        visitor.abort()
    finally:
        sibling.close()
        visitor.close()


async def _copy(source: Socket, target: Socket) -> None:
    while data := await source.recv():
        await target.send(data)
    await target.finish()


__all__: Sequence[str] = ["SiblingPorts", "Siblings", "head_bytes"]
