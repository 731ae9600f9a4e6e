"""What carries the link's messages: trio-websocket, with or without a tap under it.

Plain: every message goes through trio-websocket (and wsproto). Tapped: trio-websocket does the handshake, pings and
close; whole binary messages are cut out of the byte stream below it and framed straight into it. At the first frame
that is neither (a fragment, text, a close, what is wrong) the tap steps aside for good and trio-websocket sees all
that follows, so that messages keep their order and its word on errors counts. Both speak RFC 6455 and interoperate;
the plain one is the reference (tests/link/test_transport.py holds them against each other). The tap saves about 5 µs
a message under load, 50 µs at one request a time, and doubles bulk speed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
import trio_websocket
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from tunnel.errors import WireError
from tunnel.link.tasks import open_pair
from tunnel.net import Socket
from tunnel.ready import Ready
from tunnel.wire.frames import MAX_MESSAGE

try:
    from websockets.speedups import apply_mask
except ImportError:  # no wheel for this platform
    from websockets.utils import apply_mask

PATH = "/link"
LAST_WORD = 0.05  #: seconds for trio-websocket to make sense of what came before the connection was closed
PARTING = 0.5  #: seconds that an end which broke the protocol has to read why the link ends
OPCODE_BINARY = 0x02
CLOSE = 0x88
FOUND_HERE = {1002, 1007, 1009}  #: codes with which our own reader ends a connection
BREACH = 1002  #: close code: protocol error (RFC 6455, 7.4.1)
PING = 0x89
PINGS = (PING, 0x8A)  #: ping and pong, which may stand anywhere
FIN = 0x80
MASKED = 0x80
MASKS = 64  #: masking keys taken from the system's source at once (RFC 6455, 5.3: unpredictable, each used once)
RECEIVE = 256 * 1024  #: bytes read at once while bulk comes
FIRST = 64 * 1024  #: else: what is larger malloc may map and unmap each time
TURN = 1024  #: messages and frames in them that are dealt with in a row; then others have their turn
CLOSED_EARLY = "the connection was closed during the WebSocket handshake"

OnMessage = Callable[[bytes], int | None]  #: returns how many frames were in it, if it knows


class Tap(trio.abc.Stream):
    """The stream given to trio-websocket. Once `on_message` is set, whole binary messages go there (RFC 6455, 5.2)."""

    def __init__(self, socket: Socket, client: bool) -> None:
        self.on_message: OnMessage | None = None
        self._socket = socket
        self._client = client
        self._lock = trio.StrictFIFOLock()
        self._parts: list[bytes] = []  # of a message that is not whole yet
        self._have = 0  # bytes in them
        self._need = 0  # bytes at which it is whole, as far as is known
        self._is_behind = False  # whole messages may be in `_parts`: the turn was over
        self._aside = False
        self._masks = b""  # random, not used yet
        self._is_more = True  # there may be something to read already
        self._is_bulk = False  # the last read brought much
        self._has_ended = False  # `ready` has told of the end, which it does once: read up to it
        self._is_joined = False  # `ready` tells of the socket
        self._reader: Task | None = None  # which waits until it does
        self._rest = b""  # for trio-websocket: what is not ours of what was read without it
        self._said_close = False
        self.is_closing = False  # trio-websocket is saying its close
        self.allowance: int | None = None  # bytes it may still send; None: any number
        self.unsent = b""  # of a frame that has begun to leave: nothing may come between
        self.breach = ""  # how the other end went beyond its allowance
        self.lost = trio.Event()  # the other end has closed, or the connection broke

    # What trio-websocket calls

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while True:
            if self._is_joined and not (self._is_more or self._is_behind):
                await self._park()
            elif self._is_joined or self._is_behind:
                await trio.lowlevel.checkpoint()  # the last read was full, or much to do: others have their turn
            if self._rest:
                rest, self._rest = self._rest, b""
                return rest
            if self._is_behind:
                if rest := self._add(b""):
                    return rest
                continue
            size = RECEIVE if self._is_more else FIRST
            if self.allowance is not None:
                size = min(size, self.allowance + 1)
            try:
                data = await self._receive(size)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.lost.set()
                raise
            if data is None:
                self._is_more = False
                continue
            rest = self._take(data, size)
            if rest or not data:
                return rest

    async def _receive(self, size: int) -> bytes | None:
        """The next bytes; None where `ready` will tell of them."""
        if self._is_joined:
            return self._socket.recv_nowait(size)
        return await (self._socket.recv(size) if self._is_more else self._socket.recv_later(size))

    def _take(self, data: bytes, size: int) -> bytes:
        """Deal with what was read when `size` bytes were asked for; returns what is trio-websocket's."""
        # TLS gives a record at a time.
        self._is_more = len(data) == size or not self._socket.is_plain or self._has_ended
        self._is_bulk = len(data) >= FIRST
        if not data:
            self.lost.set()
        if self.allowance is not None:
            self._spend(len(data))
        if self.on_message is None or self._aside or not data:
            return data
        return self._add(data)

    def join(self, ready: Ready) -> None:
        """From now on what comes is read where `ready` tells of it, and the task of trio-websocket's reader is woken
        for what is not ours, for bulk, and for the end."""
        self._is_joined = ready.add(self._socket, self._on_ready)

    def _on_ready(self, has_ended: bool) -> None:
        self._is_more = True
        self._has_ended |= has_ended
        if self._reader is None or (not has_ended and self._read_now()):
            return
        reader, self._reader = self._reader, None
        if reader is not None:
            reschedule(reader)

    def _read_now(self) -> bool:
        """Take what has come; False if the task has to go on."""
        if self._is_bulk or self.on_message is None or self._aside or self.allowance is not None:
            return False
        left = FIRST if self._socket.is_plain else RECEIVE
        while left > 0:
            try:
                data = self._socket.recv_nowait(FIRST)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return False  # it will see that for itself, as it will the end
            if data is None:
                self._is_more = False
                return True
            if not data:
                return False
            self._rest = self._take(data, FIRST)
            if self._rest or self._is_behind:
                return False
            if not self._is_more:
                return True
            left -= len(data)
        return False

    async def _park(self) -> None:
        def abort(_: object) -> Abort:
            self._reader = None
            return Abort.SUCCEEDED

        self._reader = current_task()
        await wait_task_rescheduled(abort)

    def _spend(self, size: int) -> None:
        assert self.allowance is not None
        self.allowance -= size
        if self.allowance < 0:
            self.breach = "more came before the welcome than a hello needs"
            self.lost.set()
            raise trio.BrokenResourceError(self.breach)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._said_close = self._said_close or bytes(data[:1]) == bytes((CLOSE,))
        async with self._lock:
            await self._send(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await self._socket.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        if self._aside and not self._said_close:  # wsproto found something wrong, which trio-websocket tells nobody
            self.say_close(BREACH, "this is not the WebSocket protocol")
        await self._socket.aclose()

    # The tap

    def say_close(self, code: int, reason: str) -> bool:
        """Put a close frame behind what is out, without waiting; False where that can't be (half a message is out)."""
        if self.unsent or self._lock.locked() or self._said_close or self._socket.is_closed:
            return False
        self._said_close = True
        data = self._frame(struct.pack("!H", code) + reason.encode()[:120].decode("utf-8", "ignore").encode(), CLOSE)
        try:
            return self._socket.send_nowait(data) == len(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False

    async def send_message(self, message: bytes) -> None:
        """One whole binary message; the frame is never left half sent unless the connection is given up."""
        data = self._frame(message)
        lock = self._lock
        if self.unsent or lock.locked():
            async with lock:
                await self._send(data)
            return
        sent = self._socket.send_nowait(data)
        if sent == len(data):  # nearly always
            return
        lock.acquire_nowait()
        try:
            await self._send(data[sent:])
        finally:
            lock.release()

    @property
    def can_send_now(self) -> bool:
        """Whether nobody is in the middle of a frame."""
        return not (self.unsent or self._lock.locked())

    def send_now(self, message: bytes) -> None:
        """One whole binary message, without waiting. What the kernel does not take is `unsent`, and leaves with
        `send_rest` or whatever is sent next."""
        data = self._frame(message)
        sent = self._socket.send_nowait(data)
        if sent < len(data):
            self.unsent = data[sent:]

    async def send_rest(self) -> None:
        async with self._lock:
            await self._send(b"")

    async def _send(self, data: bytes) -> None:
        if self.unsent:
            data, self.unsent = self.unsent + data, b""
        try:
            await self._socket.send(data)
        except trio.Cancelled:
            self._socket.close()  # a part of it may be out: nothing may follow
            raise

    def _frame(self, message: bytes, first: int = FIN | OPCODE_BINARY) -> bytes:
        size = len(message)
        mask_bit = MASKED if self._client else 0
        if size < 126:
            head = bytes((first, mask_bit | size))
        elif size < 65536:
            head = struct.pack("!BBH", first, mask_bit | 126, size)
        else:
            head = struct.pack("!BBQ", first, mask_bit | 127, size)
        if not self._client:
            return head + message
        if not self._masks:
            self._masks = os.urandom(4 * MASKS)
        key, self._masks = self._masks[:4], self._masks[4:]
        return b"".join((head, key, apply_mask(message, key)))

    def _add(self, data: bytes) -> bytes:
        """As `_cut`, with what is left from before. It is joined once, when a message is whole: one that comes in tiny
        pieces must not be copied for each."""
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return b""
            data, self._parts = b"".join(self._parts), []
        return self._cut(data)

    def _cut(self, data: bytes) -> bytes:
        """Deliver the whole binary messages in `data`; returns what is trio-websocket's, raw.

        After a turn's work the rest waits for the next call, `_is_behind`.

        Of several pings the last is enough (RFC 6455, 5.5.3). None behind our close: trio-websocket would break on it,
        as on one that it comes to after its close in the same piece.
        """
        assert self.on_message is not None
        others: list[bytes] = []
        ping = b""
        at, size, need = 0, len(data), 0
        left = TURN
        self._is_behind = False
        while size - at >= 2:
            first, second = data[at], data[at + 1]
            length, start = second & 0x7F, at + 2
            if length == 126:
                start += 2
                if start > size:
                    break
                length = int.from_bytes(data[at + 2 : start], "big")
            elif length == 127:
                start += 8
                if start > size:
                    break
                length = int.from_bytes(data[at + 2 : start], "big")
            masked = second & MASKED
            if masked:
                start += 4
            end = start + length
            good = bool(masked) != self._client and length <= (125 if first in PINGS else MAX_MESSAGE)
            ours = first == FIN | OPCODE_BINARY
            if not good or (not ours and first not in PINGS):
                self._aside = True
                others.append(data[at:])
                at = size
                break
            if end > size:
                need = end - at
                break
            if left <= 0:
                self._is_behind = True
                break
            if ours:
                if masked:
                    count = self.on_message(apply_mask(memoryview(data)[start:end], data[start - 4 : start]))
                else:
                    count = self.on_message(data[start:end])
                left -= 1 + (count or 0)
            elif first == PING:
                ping = data[at:end]
                left -= 1
            else:
                others.append(data[at:end])
                left -= 1
            at = end
        if at < size:
            self._parts, self._have, self._need = [data[at:]], size - at, need
        if ping and not self.is_closing:
            others.insert(0, ping)  # before what ends the connection, if that is here too
        return b"".join(others)


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
