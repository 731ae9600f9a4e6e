"""A stream on Trio: the wire's state, and the one or two tasks that wait for it to change."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from tunnel.errors import BY_CODE, OUTCOMES, Failure
from tunnel.wire.frames import Response
from tunnel.wire.states import BODY
from tunnel.wire.stream import Stream as WireStream

if TYPE_CHECKING:
    from tunnel.link.link import Link


class Stream(WireStream, kw_only=True):
    """One task may wait for what arrives, another for room to send.

    Waiting is a task parked in a slot, not a channel or an event: a condition is looked at, and if it does not hold
    the task parks without a checkpoint in between, so no wake-up is lost.
    """

    link: Link
    on_failure: Callable[[], object] | None = None  # called when it fails, for who waits on something else
    on_change: Callable[[], object] | None = None  # called instead of waking a task; it must not raise
    unsent: bool = False  # it failed before its OPEN had left: the other end never heard of it
    told: tuple[float, int, int] | None = None  # the newest WAITING: when it came, and its agent and local µs
    _receiver: Task | None = None
    _sender: Task | None = None

    def wake(self) -> None:
        if self.on_change is not None:
            self.on_change()
            return
        if self.failure is not None and self.on_failure is not None:
            self.on_failure()
        task = self._receiver
        if task is not None:
            self._receiver = None
            reschedule(task)
        self.wake_sender()

    def wake_sender(self) -> None:
        task = self._sender
        if task is not None:
            self._sender = None
            reschedule(task)

    async def wait_change(self) -> None:
        """Wait until something arrives, the stream ends or fails."""

        def abort(_: object) -> Abort:
            self._receiver = None
            return Abort.SUCCEEDED

        if self._receiver is not None:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._receiver = current_task()
        await wait_task_rescheduled(abort)

    async def _wait_room(self) -> None:
        def abort(_: object) -> Abort:
            self._sender = None
            return Abort.SUCCEEDED

        if self._sender is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sender = current_task()
        await wait_task_rescheduled(abort)

    def raise_failure(self) -> NoReturn:
        """Raises the Failure that the stream ended with."""
        assert self.failure is not None
        code, text = self.failure
        row = BY_CODE.get(code, OUTCOMES["internal"])
        raise Failure(row.name, text)

    async def answer(self) -> Response:
        """The opener: the next head, interim or final. Raises Failure."""
        while True:
            if self.interims:
                first, *rest = self.interims
                self.interims = tuple(rest)
                return first
            if self.head is not None:
                assert isinstance(self.head, Response)
                return self.head
            if self.failure is not None:
                self.raise_failure()
            await self.wait_change()

    async def receive(self) -> bytes:
        """The next part of the body, b"" at its end. Raises Failure once all that came before it is taken."""
        while True:
            part = self.link.session.next_part(self)
            if part:
                return part
            if self.ended:
                return b""
            if self.failure is not None:
                self.raise_failure()
            await self.wait_change()

    async def send(self, data: bytes, end: bool = False) -> None:
        """Send body, cut to the windows; returns when all is queued within them. Raises Failure."""
        session = self.link.session
        at, size = 0, len(data)
        while at < size:
            if self.failure is not None:
                self.raise_failure()
            room = session.sendable(self)
            if room == 0:
                await self._wait_room()
                continue
            part = data[at : at + room] if at or room < size else data
            at += len(part)
            session.send_data(self, part, end and at == size)
        if end and not size:
            self.finish()

    def finish(self, trailers: bytes = b"") -> None:
        """End our half. Raises Failure when the stream has failed."""
        if self.failure is not None:
            self.raise_failure()
        if trailers:
            self.link.session.send_trailers(self, trailers)
        else:
            self.link.session.send_data(self, b"", True)

    def reset(self, outcome: str, text: str = "") -> None:
        """Give the stream up with this outcome, here and at the other end; who waits on it gets Failure."""
        self.link.session.reset(self, OUTCOMES[outcome].code, text)
        self.wake()


class RawStream(trio.abc.HalfCloseableStream):
    """An upgraded or TCP stream as a trio stream: raw bytes both ways, with half-close.

    Closing it ends our half and gives the other's up: what was sent still arrives. Raises trio.BrokenResourceError
    when the stream failed.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._closed = False
        self._rest = b""
        self._sending = False
        self._receiving = False
        self._eof_sent = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            self._check_open()
            if not self._rest:
                self._rest = await self._run(self._stream.receive())
            size = max_bytes or len(self._rest)
            part, self._rest = self._rest[:size], self._rest[size:]
            return part
        finally:
            self._receiving = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            self._check_open()
            if self._eof_sent:
                raise trio.ClosedResourceError("the end was sent already")
            await self._run(self._stream.send(bytes(data)))
        finally:
            self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            self._check_open()
            while not self._stream.link.session.sendable(self._stream) and self._stream.failure is None:
                await self._stream._wait_room()
            self._check_open()
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        await trio.lowlevel.checkpoint()
        self._check_open()
        if not self._eof_sent:
            self._eof_sent = True
            try:
                self._stream.finish()
            except Failure as exc:
                raise trio.BrokenResourceError(str(exc)) from exc

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            stream = self._stream
            if stream.out == BODY:
                stream.finish()
            stream.reset("ok", "the connection was closed")

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed here")

    async def _run(self, waiting: object) -> bytes:
        try:
            return await waiting  # type: ignore[misc,no-any-return]  # a coroutine of Stream
        except Failure as exc:
            self._check_open()
            raise trio.BrokenResourceError(str(exc)) from exc
