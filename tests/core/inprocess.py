"""A core in this process: the real door, exchanger and registry on real sockets, links in memory, scripted agents.

Deadlines are met by calling a visitor's `tick` with a later time, so that no test waits for one.
"""

import logging
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any, cast

import h11
import pytest
import trio
import trustme

sys.path.insert(0, str(Path(__file__).parents[1] / "link"))

from linking import Line, lines, socket_pair

from tunnel.core.door import Door
from tunnel.core.exchange import Exchanger
from tunnel.core.forwarding import Forwarding
from tunnel.core.limits import Shares
from tunnel.core.proxied import ProxyHeaders
from tunnel.core.quick import Quick
from tunnel.core.quotas import Account, Limits
from tunnel.core.registry import AgentLink, Registry
from tunnel.core.visitor import Visitor
from tunnel.handler import ConnectVisit, Guard, Handler, LinkVisit, Observer, RequestVisit, StreamVisit
from tunnel.link.link import Link
from tunnel.link.stream import Stream
from tunnel.link.sweeper import Sweeper
from tunnel.net import Socket, with_tls
from tunnel.observers import Observers
from tunnel.ready import make_ready
from tunnel.wire.frames import Open, Response

Script = Callable[[Stream], Awaitable[None]]
DEFAULTS: dict[str, Any] = {
    "max_head": 65536, "max_target": 16384, "max_body": 0, "head_timeout": 10.0, "request_timeout": 30.0,
    "body_idle_timeout": 30.0, "server_timing": False,
}  # fmt: skip


#: requests may be served without their task (tunnel/core/quick.py); set by the fixture `way`
is_quick = False
#: visitors come over TLS; set by the fixture `way`
is_secure = False

#: of tests whose visitors end their direction, or to whom the door speaks before any TLS
without_tls = pytest.mark.parametrize("way", ["by its task", "quickly"], indirect=True)


@cache
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS of the door, and of a visitor who trusts it."""
    authority = trustme.CA()
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("app.example.com").configure_cert(ours)
    authority.configure_trust(theirs)
    return ours, theirs


class Names:
    """Stands for the accounts: who owns which name. `broken` is raised instead."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}
        self.broken: Exception | None = None

    async def owner_of(self, name: str, parent: object = None) -> str | None:
        await trio.lowlevel.checkpoint()
        if self.broken is not None:
            raise self.broken
        return self.owners.get(name)


class Core:
    """requests, streams: those that ended. Await `until` for what is to come."""

    def __init__(
        self,
        nursery: trio.Nursery,
        trusted: tuple[str, ...],
        options: dict[str, Any],
        proxies: tuple[str, ...],
        most_each: int,
    ) -> None:
        self.nursery = nursery
        self.names = Names()
        self.requests: list[RequestVisit] = []
        self.streams: list[StreamVisit] = []
        self.sockets: list[Socket] = []
        self.account = Account("acme", "acme")
        self.registry = Registry("example.com", 600)
        ended = {"request": self._ended, "stream": self._ended}
        observers = Observers([Guard("test", Observer({}, ended), 0, logging.getLogger("test"))])
        self.exchanger = Exchanger(
            self.registry,
            cast(Any, self.names),
            [observers if is_quick else self._layer],
            Forwarding(trusted, most_each),
            **{**DEFAULTS, **options},
        )
        self.shares = Shares(0, most_each)
        sweeper = Sweeper(lambda exc: None)
        self.problems: list[Exception] = []
        self.ready = make_ready(self.problems.append) if is_quick else None
        quick: Quick | None = None
        if self.ready is not None:
            assert self.exchanger.observers is not None
            quick = Quick(self.exchanger, self.exchanger.observers, self.ready, 60.0)
            nursery.start_soon(self.ready.run)
        self.door = Door(
            self.exchanger,
            sweeper,
            tls=cast(Any, SimpleNamespace(context=contexts()[0])) if is_secure else None,
            proxies=ProxyHeaders(proxies),
            shares=self.shares,
            handshake_timeout=10.0,
            keepalive_timeout=60.0,
            quick=quick,
        )

    def _ended(self, visit: Any, raised: object) -> None:
        (self.requests if isinstance(visit, RequestVisit) else self.streams).append(visit)

    def _layer(self, handler: Handler) -> Handler:
        async def layered(visit: Any) -> None:
            try:
                await handler(visit)
            finally:
                (self.requests if isinstance(visit, RequestVisit) else self.streams).append(visit)

        return layered

    async def agent(
        self, script: Script, name: str = "app", account: Account | None = None, max_streams: int = 100
    ) -> AgentLink:
        """An attached link whose agent answers each stream with the script."""
        near, far = lines()
        near.takes_now = True
        link, there = Link(True, 5, 15, ready=self.ready), Link(False, 5, 15)

        def on_opened(stream: Stream) -> None:
            assert there.nursery is not None
            there.nursery.start_soon(_scripted, script, stream)

        there.on_opened = on_opened
        self.nursery.start_soon(link.run, cast(Any, near))
        self.nursery.start_soon(there.run, cast(Any, far))
        while near.on_message is None or far.on_message is None:
            await trio.lowlevel.checkpoint()
        visit = LinkVisit(ConnectVisit("192.0.2.9:1", f"conn-{len(self.registry.links)}"))
        visit.agent_id = f"agent-{len(self.registry.links)}"
        agent = AgentLink(link, visit, account or self.account, max_streams)
        self.registry.attach(agent, name, "http", 0)
        return agent

    def visitor(self, address: str = "192.0.2.1", nursery: trio.Nursery | None = None) -> "Caller":
        """A new connection to the door. nursery: of the door's task."""
        near, far = socket_pair()
        (nursery or self.nursery).start_soon(self.door._serve, near, (address, 1))
        if is_secure:
            far = with_tls(far, contexts()[1], server_side=False, server_name="app.example.com")
        self.sockets += near, far
        return Caller(far)

    async def finished(self, count: int = 1) -> RequestVisit:
        """The last of so many requests."""
        await until(lambda: len(self.requests) >= count)
        return self.requests[count - 1]

    def tick(self, seconds: float = 0.0) -> None:
        """Let the sweeper come by, so many seconds from now."""
        for visitor in list(self.door.visitors):
            visitor.tick(monotonic() + seconds)

    def only_visitor(self) -> Visitor:
        (visitor,) = self.door.visitors
        return visitor


async def _scripted(script: Script, stream: Stream) -> None:
    try:
        await script(stream)
    except Exception as exc:  # what the other end did to it is what the test is about
        stream.reset("internal", f"{type(exc).__name__}: {exc}")


async def until(holds: Callable[[], object]) -> None:
    """Give way until it holds; fails after 10 s."""
    with trio.fail_after(10):
        while not holds():
            await trio.lowlevel.checkpoint()


class Caller:
    """A visitor's end of a connection, read by h11. A TLS handshake that is needed comes with the first `send`."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self.buffer = b""

    async def send(self, data: bytes) -> None:
        await self.socket.send(data)

    async def get(self, target: str = "/", host: str = "app.example.com", *fields: str) -> "Answer":
        await self.send(head("GET", target, host, *fields))
        return await self.answer()

    async def answer(self, method: str = "GET") -> "Answer":
        """The next answer; method "UPGRADE": a 101 may be it. Raises h11.RemoteProtocolError when it breaks off."""
        client = h11.Connection(h11.CLIENT)
        upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket")] if method == "UPGRADE" else []
        client.send(h11.Request(method=method, target="/", headers=[("Host", "a"), *upgrade]))
        client.send(h11.EndOfMessage())
        answer = Answer()
        if self.buffer:
            client.receive_data(self.buffer)
        with trio.fail_after(10):
            while True:
                event = client.next_event()
                if event is h11.NEED_DATA:
                    client.receive_data(await self.socket.recv())
                elif isinstance(event, h11.InformationalResponse):
                    answer.interims.append(event.status_code)
                    if event.status_code == 101:
                        answer.status, answer.fields = 101, dict(event.headers)
                        self.buffer = client.trailing_data[0]
                        return answer
                elif isinstance(event, h11.Response):
                    answer.status, answer.fields = event.status_code, dict(event.headers)
                    answer.all_fields = list(event.headers.raw_items())
                elif isinstance(event, h11.Data):
                    answer.body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    answer.trailers = dict(event.headers)
                    self.buffer = client.trailing_data[0]
                    return answer
                else:
                    raise h11.RemoteProtocolError(f"{event} instead of an answer")

    async def rest(self) -> bytes:
        """All that comes until the connection ends. Raises trio.BrokenResourceError when that is a reset."""
        data, self.buffer = self.buffer, b""
        with trio.fail_after(10):
            while part := await self.socket.recv():
                data += part
        return data


class Answer:
    def __init__(self) -> None:
        self.status = 0
        self.fields: dict[bytes, bytes] = {}
        self.all_fields: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.trailers: dict[bytes, bytes] = {}
        self.interims: list[int] = []

    @property
    def outcome(self) -> str:
        return self.fields.get(b"x-tunnel-outcome", b"").decode()


def head(method: str = "GET", target: str = "/", host: str = "app.example.com", *fields: str) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", *([f"Host: {host}"] if host else []), *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def respond(
    stream: Stream,
    body: bytes = b"",
    end: bool = True,
    status: int = 200,
    length: int | None = None,
    fields: bytes = b"",
) -> None:
    """The agent's answer; its length is that of the body unless another is said."""
    size = len(body) if length is None else length
    stream.link.session.respond(stream, Response(status, size, 900, 500, b"OK\r\n" + fields), body, end)


async def body_of(stream: Stream) -> bytes:
    body = b""
    while part := await stream.receive():
        body += part
    return body


def opened(stream: Stream) -> Open:
    assert isinstance(stream.head, Open)
    return stream.head


@asynccontextmanager
async def core(
    *, trusted: tuple[str, ...] = (), proxies: tuple[str, ...] = (), most_each: int = 0, **options: Any
) -> AsyncIterator[Core]:
    """A core for one test; what still runs at its end is cancelled. proxies: who sends PROXY protocol headers."""
    async with trio.open_nursery() as nursery:
        made = Core(nursery, trusted, options, proxies, most_each)
        try:
            yield made
        finally:
            nursery.cancel_scope.cancel()
            for socket in made.sockets:
                socket.close()
        assert made.problems == []


__all__ = ["Answer", "Caller", "Core", "Limits", "Line", "body_of", "core", "head", "opened", "respond", "until"]
