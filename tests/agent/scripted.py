"""A local service that does as it is told, and a forwarder on a real link in memory in front of it."""

import logging
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any, cast

import trio
import trustme

sys.path.insert(0, str(Path(__file__).parents[1] / "link"))

from linking import lines

from tunnel.agent.forward import Forwarder
from tunnel.agent.quick import Quick, UnderWay
from tunnel.agent.served import ServedStream
from tunnel.handler import Guard, Handler, LocalVisit, Observer, StreamVisit
from tunnel.http.client import Service
from tunnel.link.link import Link
from tunnel.link.stream import Stream
from tunnel.link.sweeper import Sweeper
from tunnel.observers import Observers
from tunnel.ready import make_ready
from tunnel.wire.frames import HTTP, NO_BODY, UNKNOWN, Open, Response

Talk = Callable[["Peer"], Awaitable[None]]


class Peer:
    """One connection as the local service has it."""

    def __init__(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream
        self.data = b""

    async def until(self, mark: bytes) -> bytes:
        """What comes up to and with the mark."""
        while mark not in self.data:
            part = await self.stream.receive_some()
            if not part:
                raise trio.BrokenResourceError(f"the agent closed; so far: {self.data!r}")
            self.data += part
        at = self.data.index(mark) + len(mark)
        taken, self.data = self.data[:at], self.data[at:]
        return taken

    async def head(self) -> bytes:
        return await self.until(b"\r\n\r\n")

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def wait_gone(self) -> None:
        """Until the agent has closed the connection."""
        try:
            while await self.stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass


#: streams may be served without a task (tunnel/agent/quick.py); set by the fixture `way`
is_quick = False
#: the local service speaks TLS; set by tests
is_secure = False


@cache
def context() -> ssl.SSLContext:
    """TLS of the local service."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(made)
    return made


class Rig:
    """streams, locals: the visits that ended, in order. connections: how many the service has had."""

    def __init__(self, nursery: trio.Nursery, request_timeout: float, layers: Sequence[Callable[..., Any]]) -> None:
        self.nursery = nursery
        self.streams: list[StreamVisit] = []
        self.locals: list[LocalVisit] = []
        self.connections = 0
        self.talks: list[Talk] = []
        self.items: list[Any] = []
        self.sweeper = Sweeper(lambda exc: None)
        self.core = Link(True, 5, 15)
        ended = {"stream": self._ended, "local": self._ended}
        observers = Observers([Guard("test", Observer({}, ended), 0, logging.getLogger("test"))])
        self.is_quick = is_quick and not layers
        mine: list[Any] = [observers if self.is_quick else self._layer]
        self.forwarder = Forwarder([*mine, *layers], self.sweeper, request_timeout)
        self.problems: list[Exception] = []
        self.ready = make_ready(self.problems.append)
        self.agent = Link(False, 5, 15, self._on_opened, ready=self.ready)
        self.quick: Quick | None = None
        self.under_way: UnderWay = {}
        self.served_quickly = self.handed_over = 0
        self.service = Service("127.0.0.1", 1, False)

    def _layer(self, handler: Handler) -> Handler:
        async def layered(visit: Any) -> None:
            try:
                await handler(visit)
            finally:
                (self.locals if isinstance(visit, LocalVisit) else self.streams).append(visit)

        return layered

    def _ended(self, visit: Any, raised: object) -> None:
        (self.locals if isinstance(visit, LocalVisit) else self.streams).append(visit)

    def _on_opened(self, stream: Stream) -> None:
        assert self.agent.nursery is not None
        if self.quick is None and self.is_quick:
            assert self.ready is not None and self.forwarder.observers is not None
            self.quick = Quick(self.forwarder, self.forwarder.observers, self.ready, self._hand_over, self.under_way)
            self.agent.nursery.start_soon(self.quick.run)
        if self.quick is not None and self.quick.begin(stream, [self.service], "agent-1"):
            self.served_quickly += 1
        else:
            self.agent.nursery.start_soon(self._serve, stream)

    def _hand_over(self, visit: ServedStream) -> None:
        self.handed_over += 1
        assert self.agent.nursery is not None
        self.agent.nursery.start_soon(self._go_on, visit)

    async def _go_on(self, visit: ServedStream) -> None:
        with trio.CancelScope() as scope:
            await self.forwarder.go_on(visit, scope)

    async def _serve(self, stream: Stream) -> None:
        with trio.CancelScope() as scope:
            await self.forwarder.serve(self.agent, stream, [self.service], "agent-1", scope)

    async def _talk(self, stream: trio.SocketStream) -> None:
        talk = self.talks[min(self.connections, len(self.talks) - 1)]
        self.connections += 1
        try:
            await talk(Peer(trio.SSLStream(stream, context(), server_side=True) if is_secure else stream))
        except trio.BrokenResourceError:
            pass

    async def start(self) -> None:
        near, far = lines()
        far.takes_now = True
        if self.ready is not None:
            self.nursery.start_soon(self.ready.run)
        self.nursery.start_soon(self.core.run, cast(Any, near))
        self.nursery.start_soon(self.agent.run, cast(Any, far))
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.nursery.start_soon(trio.serve_listeners, self._talk, [listener])
        self.service = Service("127.0.0.1", listener.socket.getsockname()[1], is_secure)
        while near.on_message is None or far.on_message is None:
            await trio.lowlevel.checkpoint()

    def open(
        self,
        first: bytes = b"GET /",
        *fields: bytes,
        body: bytes | None = None,
        length: int | None = None,
        protocol: int = HTTP,
        context: bytes = b"request-id: r-1\r\n",
        tunnel: int = 0,
        deadline_ms: int = 30_000,
    ) -> Stream:
        """A visitor's stream. body: all of it, in the opening frame. length: what is said of one that follows.
        deadline_ms: the core's time-out."""
        head = b"".join(line + b"\r\n" for line in (first + b" HTTP/1.1", b"Host: a.localhost", *fields))
        whole = length is None
        size = length if length is not None else NO_BODY if body is None else len(body)
        opened = Open(protocol, tunnel, deadline_ms, size, context, head if protocol < 2 else b"")
        stream = self.core.session.open(opened, body or b"", whole)
        assert isinstance(stream, Stream)
        return stream

    async def ask(self, first: bytes = b"GET /", *fields: bytes, **options: Any) -> tuple[Response, bytes]:
        """A whole exchange: (head, body). Raises Failure."""
        return await answer_of(self.open(first, *fields, **options))

    async def done(self, count: int = 1) -> tuple[StreamVisit, LocalVisit]:
        """The visits of the stream that ended last, of so many."""
        with trio.fail_after(10):
            while len(self.streams) < count:
                await trio.lowlevel.checkpoint()
        return self.streams[-1], self.locals[-1]

    def tick(self, seconds: float) -> None:
        """Let the sweeper come by, so many seconds from now."""
        for item in list(self.sweeper._items):
            item.tick(monotonic() + seconds)


async def answer_of(stream: Stream) -> tuple[Response, bytes]:
    with trio.fail_after(10):
        response = await stream.answer()
        body = b""
        while part := await stream.receive():
            body += part
    return response, body


@asynccontextmanager
async def rig(
    *talks: Talk, request_timeout: float = 30.0, layers: Sequence[Callable[..., Any]] = ()
) -> AsyncIterator[Rig]:
    """talks: what the service does on its first connection, second, …; the last one for all that follow."""
    async with trio.open_nursery() as nursery:
        made = Rig(nursery, request_timeout, layers)
        made.talks = list(talks)
        await made.start()
        yield made
        made.service.close()
        nursery.cancel_scope.cancel()
        assert made.problems == []


__all__ = ["NO_BODY", "UNKNOWN", "Peer", "Rig", "answer_of", "rig"]
