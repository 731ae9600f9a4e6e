"""What carries the link's messages: trio-websocket, with or without a tap under it.

Plain: every message goes through trio-websocket (and wsproto). Tapped: trio-websocket does the handshake, pings and
close; whole binary messages are cut out of the byte stream below it and framed straight into it (tap.py). At the first
frame that is neither (a fragment, text, a close, what is wrong) the tap steps aside for good and trio-websocket sees
all that follows, so that messages keep their order and its word on errors counts. Both speak RFC 6455 and interoperate;
the plain one is the reference (tests/link/test_transport.py holds them against each other). The tap saves about 5 µs
a message under load, 50 µs at one request a time, and doubles bulk speed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio_websocket

from tunnel.errors import WireError
from tunnel.link.tap import BREACH, RECEIVE, Tap
from tunnel.link.tasks import open_pair
from tunnel.link.websocket import OnMessage
from tunnel.net import Socket
from tunnel.ready import Ready
from tunnel.wire.frames import MAX_MESSAGE

PATH = "/link"
LAST_WORD = 0.05  #: seconds for trio-websocket to make sense of what came before the connection was closed
PARTING = 0.5  #: seconds that an end which broke the protocol has to read why the link ends
FOUND_HERE = {1002, 1007, 1009}  #: codes with which our own reader ends a connection
CLOSED_EARLY = "the connection was closed during the WebSocket handshake"


class Transport:
    """Messages over one WebSocket. `tapped` chooses the fast way."""

    def __init__(self, ws: trio_websocket.WebSocketConnection, tap: Tap, socket: Socket, tapped: bool) -> None:
        self._ws = ws
        self._tap = tap
        self._tapped = tapped
        self.socket = socket

    async def send(self, message: bytes) -> None:
        """Raises trio.BrokenResourceError or trio.ClosedResourceError when the connection is gone."""
        if self._tapped:
            await self._tap.send_message(message)
            return
        try:
            await self._ws.send_message(message)
        except trio_websocket.ConnectionClosed as exc:
            raise trio.BrokenResourceError(str(exc)) from exc

    @property
    def can_send_now(self) -> bool:
        return self._tapped and self._tap.can_send_now

    def send_now(self, message: bytes) -> None:
        """As `send`, without waiting, where `can_send_now`. If it `has_rest` then, `send_rest` must come soon. Raises
        as `send`."""
        self._tap.send_now(message)

    @property
    def has_rest(self) -> bool:
        return bool(self._tap.unsent)

    async def send_rest(self) -> None:
        """What `send_now` has left. Raises as `send`."""
        await self._tap.send_rest()

    async def deliver(self, on_message: OnMessage) -> str:
        """Hand every message to `on_message` until the connection ends; returns why it ended, in words."""
        if self._tapped:
            self._tap.on_message = on_message
        try:
            while True:
                message = await self._ws.get_message()
                if isinstance(message, str):
                    raise WireError("a text message came")
                on_message(message)
        except trio_websocket.ConnectionClosed as exc:
            reason = exc.reason
            if self._tap.breach:
                raise WireError(self._tap.breach, "attaching_bytes") from None
            if reason is None or reason.code == 1006:
                return "the connection was lost"
            told = f"({reason.code}{' ' + reason.reason if reason.reason else ''})"
            if reason.code in FOUND_HERE and not self._ws._for_testing_peer_closed_connection.is_set():
                raise WireError(f"its WebSocket frames are wrong {told}") from None
            return f"closed by the other end {told}"

    async def ping(self) -> None:
        """Return when the other end's WebSocket has answered, or the connection has ended."""
        try:
            await self._ws.ping()
        except trio_websocket.ConnectionClosed:
            pass

    def join(self, ready: Ready) -> None:
        """Messages are delivered where `ready` tells of them, without waking a task, once `deliver` runs."""
        if self._tapped:
            self._tap.join(ready)

    def welcome(self) -> None:
        """The other end may send as much as the protocol allows from now on."""
        self._tap.allowance = None

    async def close(self, reason: str) -> None:
        """Close politely, within two seconds, then for good."""
        self._tap.is_closing = True
        with trio.move_on_after(2):
            await self._ws.aclose(1000, reason[:100])
        self.socket.close()

    async def break_off(self, reason: str) -> None:
        """The other end broke the protocol: tell it why, and give it a moment to read that."""
        if self._tap.say_close(BREACH, reason):
            with trio.move_on_after(PARTING):
                await self._tap.lost.wait()


@asynccontextmanager
async def _while_connected(tap: Tap) -> AsyncIterator[None]:
    """A handshake ends when the connection does; trio-websocket alone would wait for ever.

    Raises trio.BrokenResourceError.
    """

    async def watch() -> None:
        await tap.lost.wait()
        if tap.breach:
            raise WireError(tap.breach, "attaching_bytes")
        await trio.sleep(LAST_WORD)
        raise trio.BrokenResourceError(CLOSED_EARLY)

    async with open_pair() as nursery:
        nursery.start_soon(watch)
        yield
        nursery.cancel_scope.cancel()


async def accept(
    nursery: trio.Nursery,
    socket: Socket,
    on_message: OnMessage,
    tapped: bool = True,
    allowance: int | None = None,
) -> Transport:
    """The core's end. trio-websocket's reader runs in `nursery`, the one of this agent's connection.

    allowance: bytes that the other end may send until `Transport.welcome`. Raises WireError when it sends more, and
    when it does not ask for our path.
    """
    tap = Tap(socket, client=False)
    tap.allowance = allowance
    async with _while_connected(tap):
        request = await trio_websocket.wrap_server_stream(
            nursery, tap, max_message_size=MAX_MESSAGE, message_queue_size=16, receive_buffer_size=RECEIVE
        )
    try:
        if request.path.partition("?")[0] != PATH:
            await request.reject(
                404, body=b"This is a tunnel core's address for agents; visitors use the public one.\n"
            )
            raise WireError(f"the WebSocket handshake asks for another path than {PATH}")
        if tapped:
            tap.on_message = on_message
        ws = await request.accept()
    except trio_websocket.ConnectionClosed:
        raise trio.BrokenResourceError(CLOSED_EARLY) from None
    return Transport(ws, tap, socket, tapped)


async def connect(
    nursery: trio.Nursery, socket: Socket, host: str, on_message: OnMessage, tapped: bool = True, query: str = ""
) -> Transport:
    """The agent's end. query: of the GET. Raises trio_websocket.HandshakeError, trio.BrokenResourceError."""
    tap = Tap(socket, client=True)
    async with _while_connected(tap):
        ws = await trio_websocket.wrap_client_stream(
            nursery,
            tap,  # type: ignore[arg-type]  # any trio.abc.Stream will do
            host,
            f"{PATH}?{query}" if query else PATH,
            max_message_size=MAX_MESSAGE,
            message_queue_size=16,
            receive_buffer_size=RECEIVE,
        )
    if tapped:
        tap.on_message = on_message
    return Transport(ws, tap, socket, tapped)
