"""Two ends of a link in one process: transports over real sockets, relays that split bytes, and links on a line.

socket_pair → two connected Sockets over loopback TCP. transports(…) → the core's and the agent's end after a real
WebSocket handshake, each tapped or plain. Line: a transport that hands messages over in memory, for links that need no
sockets and may live on the autojump clock. linked(…) → two running Links on lines.
"""

from __future__ import annotations

import gc
import socket as stdlib_socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from tunnel.link import transport
from tunnel.link.link import Link
from tunnel.link.stream import RawStream, Stream
from tunnel.link.transport import Transport
from tunnel.net import Socket, tune
from tunnel.ready import Ready
from tunnel.wire.frames import NO_BODY, TCP, UNKNOWN, Open, Response

OPEN = Open(TCP, 0, 0, UNKNOWN, b"", b"")
OK = Response(200, UNKNOWN, 0, 0, b"OK\r\n")
NOTHING = Response(204, NO_BODY, 0, 0, b"OK\r\n")
OnMessage = Callable[[bytes], None]


def socket_pair() -> tuple[Socket, Socket]:
    """Two ends of a TCP connection over loopback."""
    with stdlib_socket.create_server(("127.0.0.1", 0)) as listener:
        one = stdlib_socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    tune(one)
    tune(other)
    return Socket(one), Socket(other)


async def dribble(source: Socket, target: Socket, singles: int) -> None:
    """Pass bytes on one at a time; after so many in a row of them what comes goes in pieces of a thousand."""
    try:
        while data := await source.recv(100_000):
            for at in range(min(singles, len(data))):
                await target.send(data[at : at + 1])
                await trio.lowlevel.checkpoint()
            for at in range(singles, len(data), 1000):
                await target.send(data[at : at + 1000])
                await trio.lowlevel.checkpoint()
        target.shutdown()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        source.close()
        target.close()


@dataclass
class Ends:
    """The core's and the agent's transport, and what has come to each. Await `changed` to see more."""

    core: Transport
    agent: Transport
    to_core: list[bytes] = field(default_factory=list)
    to_agent: list[bytes] = field(default_factory=list)
    core_end: str = ""
    agent_end: str = ""
    changed: trio.Event = field(default_factory=trio.Event)

    def note(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, holds: Callable[[], object]) -> None:
        with trio.fail_after(10):
            while not holds():
                await self.changed.wait()


class Way:
    """How `transports` are told of what comes. make: gives what tells them; None: their tasks wait."""

    make: Callable[[], Ready | None] = staticmethod(lambda: None)
    pair = staticmethod(socket_pair)


@asynccontextmanager
async def transports(core_tapped: bool, agent_tapped: bool, singles: int | None = None) -> AsyncIterator[Ends]:
    """Both ends after the handshake, delivering. singles: relay byte by byte between them (see dribble)."""
    near, far = Way.pair()
    relays = []
    if singles is not None:
        inner, outer = far, None
        outer, far = socket_pair()
        relays = [(inner, outer), (outer, inner)]
    to_core: list[bytes] = []
    to_agent: list[bytes] = []
    made: list[Transport] = []
    async with trio.open_nursery() as nursery:
        for source, target in relays:
            nursery.start_soon(dribble, source, target, singles or 0)

        async def accept() -> None:
            made.append(await transport.accept(nursery, near, to_core.append, core_tapped))

        with trio.fail_after(10):
            async with trio.open_nursery() as shaking:
                shaking.start_soon(accept)
                agent = await transport.connect(nursery, far, "core.test", to_agent.append, agent_tapped)
        ends = Ends(made[0], agent, to_core, to_agent)
        if (ready := Way.make()) is not None:
            nursery.start_soon(ready.run)
            for end in (ends.core, ends.agent):
                end.join(ready)
        nursery.start_soon(_deliver_core, ends)
        nursery.start_soon(_deliver_agent, ends)
        try:
            yield ends
        finally:
            nursery.cancel_scope.cancel()
            for socket in (near, far, *(socket for pair in relays for socket in pair)):
                socket.close()


async def _deliver_core(ends: Ends) -> None:
    def take(message: bytes) -> None:
        ends.to_core.append(message)
        ends.note()

    try:
        ends.core_end = await ends.core.deliver(take)
    except Exception as exc:
        ends.core_end = f"{type(exc).__name__}: {exc}"
    ends.note()


async def _deliver_agent(ends: Ends) -> None:
    def take(message: bytes) -> None:
        ends.to_agent.append(message)
        ends.note()

    try:
        ends.agent_end = await ends.agent.deliver(take)
    except Exception as exc:
        ends.agent_end = f"{type(exc).__name__}: {exc}"
    ends.note()


class _NoSocket:
    """Where a Link looks for its transport's socket."""

    def __init__(self) -> None:
        self.sock = self

    def setsockopt(self, *option: object) -> None:
        pass

    def close(self) -> None:
        pass


class Line:
    """A transport in memory: what is sent arrives at the other end in the same turn, unless it is cut or held."""

    def __init__(self) -> None:
        self.socket = _NoSocket()
        self.other: Line = self
        self.sent: list[bytes] = []
        self.has_rest = False
        self.takes_now = False  # also what is sent without waiting
        self.is_cut = False  # what is sent is lost, without a word
        self.held: trio.Event | None = None  # `send` waits for it
        self.on_message: OnMessage | None = None
        self._early: list[bytes] = []
        self._ended = trio.Event()
        self._reason = ""

    async def send(self, message: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.held is not None:
            await self.held.wait()
        self.send_now(message)

    @property
    def can_send_now(self) -> bool:
        return self.takes_now and self.held is None

    def send_now(self, message: bytes) -> None:
        self.sent.append(message)
        if not self.is_cut:
            if self.other.on_message is None:
                self.other._early.append(message)
            else:
                self.other.on_message(message)

    def join(self, ready: Ready) -> None:
        """It has no socket that anybody could tell of."""

    async def deliver(self, on_message: OnMessage) -> str:
        self.on_message = on_message
        for message in self._early:
            on_message(message)
        await self._ended.wait()
        return self._reason

    async def close(self, reason: str) -> None:
        self.other.end(f"closed by the other end (1000 {reason})")
        await trio.lowlevel.checkpoint()

    async def break_off(self, reason: str) -> None:
        self.other.end(f"closed by the other end (1002 {reason})")
        await trio.lowlevel.checkpoint()

    def end(self, reason: str) -> None:
        self._reason = reason
        self._ended.set()


def lines() -> tuple[Any, Any]:
    """Two ends of one line; to a Link they are its Transport."""
    one, other = Line(), Line()
    one.other, other.other = other, one
    return one, other


@dataclass
class Linked:
    core: Link
    agent: Link
    core_line: Line
    agent_line: Line
    opened: list[Stream]

    async def open(self) -> tuple[Stream, Stream]:
        """A stream, at the core's and the agent's end; the agent has not answered."""
        before = len(self.opened)
        stream = self.core.session.open(OPEN)
        assert isinstance(stream, Stream)
        while len(self.opened) == before:
            await trio.lowlevel.checkpoint()
        return stream, self.opened[-1]

    async def open_raw(self) -> tuple[RawStream, RawStream]:
        """A stream of raw bytes: the core's end and the agent's."""
        stream, there = await self.open()
        self.agent.session.respond(there, OK)
        await stream.answer()
        return RawStream(stream), RawStream(there)


@asynccontextmanager
async def linked(heartbeat: float = 5, heartbeat_timeout: float = 15) -> AsyncIterator[Linked]:
    """Two links that run, on lines."""
    opened: list[Stream] = []
    core = Link(True, heartbeat, heartbeat_timeout)
    agent = Link(False, heartbeat, heartbeat_timeout, opened.append)
    core_line, agent_line = lines()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(core.run, core_line)
        nursery.start_soon(agent.run, agent_line)
        while core_line.on_message is None or agent_line.on_message is None:
            await trio.lowlevel.checkpoint()
        yield Linked(core, agent, core_line, agent_line, opened)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def really_linked() -> AsyncIterator[Linked]:
    """Two links over a real connection and a real handshake; the lines are not in use."""
    opened: list[Stream] = []
    core, agent = Link(True, 5, 15), Link(False, 5, 15, opened.append)
    near, far = socket_pair()
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            nursery.start_soon(core.run, await transport.accept(nursery, near, core.on_message))

        async with trio.open_nursery() as shaking:
            shaking.start_soon(accept)
            nursery.start_soon(agent.run, await transport.connect(nursery, far, "core.test", agent.on_message))
        yield Linked(core, agent, *lines(), opened)
        nursery.cancel_scope.cancel()


@contextmanager
def no_cycles(*kinds: type) -> Iterator[None]:
    """In the block nothing of these kinds is left that only the garbage collector would find."""
    gc.collect()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [type(one).__name__ for one in gc.garbage if isinstance(one, kinds)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []
