"""The tap: the byte stream below trio-websocket, which takes whole binary messages out of it and puts them in.

What it takes is read by the task of trio-websocket's reader, or where `ready` tells of the socket, with no task at all.
"""

from __future__ import annotations

import struct

import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from tunnel.link.websocket import CLOSE, Framing
from tunnel.net import Socket
from tunnel.ready import Ready

BREACH = 1002  #: close code: protocol error (RFC 6455, 7.4.1)
RECEIVE = 256 * 1024  #: bytes read at once while bulk comes
FIRST = 64 * 1024  #: else: what is larger malloc may map and unmap each time


class Tap(Framing, trio.abc.Stream):
    """The stream given to trio-websocket. Once `on_message` is set, whole binary messages go there (RFC 6455, 5.2).

    It extends the framing and does not call it as a part of its own: each message would pay for that.
    """

    def __init__(self, socket: Socket, client: bool) -> None:
        super().__init__(client)
        self._socket = socket
        self._lock = trio.StrictFIFOLock()
        self._is_more = True  # there may be something to read already
        self._is_bulk = False  # the last read brought much
        self._has_ended = False  # `ready` has told of the end, which it does once: read up to it
        self._is_joined = False  # `ready` tells of the socket
        self._reader: Task | None = None  # which waits until it does
        self._rest = b""  # for trio-websocket: what is not ours of what was read without it
        self._said_close = False
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
