"""What the processes of one program say to each other: messages over a Unix socket, with open files if need be.

A message is a *call*, which is answered, or is only told. What is told is handled in the order in which it was sent,
before anything that was sent later; a call whose handler waits is a task of its own. Frame: length of the body, serial
(0: told), what it is, number of files, body (msgpack). Files travel beside the bytes (SCM_RIGHTS, unix(7)) and are
ours from the moment they are sent: they are closed here once the kernel has them.

A process may have no room for a file: then the kernel drops it on the way (MSG_CTRUNC). Such a message is dropped when
it was told, and fails when it was a call: one connection is lost, never the channel. What waits here for an end that
reads nothing is bounded for the same reason.

Both ends are ours and start together from one release, so nothing here is versioned.
"""

from __future__ import annotations

import array
import errno
import os
import resource
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from inspect import isawaitable
from typing import Any, NamedTuple

import msgspec
import trio

from tunnel.errors import TunnelError
from tunnel.log import get_logger

log = get_logger("tunnel.workers")

MAX_EARLY = 10_000  #: messages that wait for somebody who handles them
MAX_FILES = 250  #: with one message; the kernel's own limit is SCM_MAX_FD, 253
MAX_WAITING = 1024  #: files that wait to be sent; never more than a quarter of those that we may have open
TELL_SECONDS = 10.0  #: between two records of files that were lost
RECEIVE = 256 * 1024
_HEADER = struct.Struct("!IIBB")
_CALL, _ANSWER, _FAILURE = 0, 1, 2
_UNSENT = 255  # number of files: there were some, and the sender could not send them
_LOST = "a process has no room for more open files"
_FILE = array.array("i").itemsize
_SPACE = socket.CMSG_SPACE((MAX_FILES + 3) * _FILE)

#: is given the message and the files that came with it, which are its own; what it returns is the answer
Handler = Callable[[Any, list[int]], Any]


class WithFiles(NamedTuple):
    """An answer that open files go with."""

    body: Any
    files: Sequence[int]


class ChannelLost(TunnelError):
    """The other process is gone, or it could not do what was asked: the text says which."""


class Channel:
    """One end. handlers: by name of the message. `run` serves it; `tell` and `call` may be used before that."""

    def __init__(self, sock: socket.socket, handlers: Mapping[str, Handler]) -> None:
        sock.setblocking(False)
        self.handlers = dict(handlers)
        self._early: list[tuple[str, Any, list[int]]] = []  # told, and nobody handles it yet
        self._nursery: trio.Nursery | None = None  # while it runs
        self.is_lost = False
        self._sock = sock
        self._queue: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._held = 0  # files in it
        self._queued = trio.Event()
        self._serial = 0
        self._waiting: dict[int, tuple[trio.Event, list[Any]]] = {}
        self._buffer = bytearray()
        self._files: deque[list[int]] = deque()  # of each message that has some, maybe fewer than were sent
        self._lost, self._tell_at = 0, 0.0  # messages whose files were lost since the last record of it

    # Saying ---------------------------------------------------------------------------------------------------

    def tell(self, name: str, message: Any = None, files: Sequence[int] = ()) -> None:
        """Say it, now or as soon as the other end takes it. Nothing is said to an end that is gone."""
        self._send(0, _CALL, [name, message], files)

    async def call(self, name: str, message: Any = None, files: Sequence[int] = ()) -> Any:
        """The other's answer. Raises ChannelLost."""
        body, came = await self.call_for_files(name, message, files)
        close_files(came)
        return body

    async def call_for_files(self, name: str, message: Any = None, files: Sequence[int] = ()) -> WithFiles:
        """The other's answer, with the files that it sends. Raises ChannelLost."""
        self._serial += 1
        serial = self._serial
        answered = trio.Event()
        answer: list[Any] = []
        self._waiting[serial] = (answered, answer)
        try:
            self._send(serial, _CALL, [name, message], files)
            if self.is_lost:
                raise ChannelLost("the other process is gone")
            await answered.wait()
        finally:
            self._waiting.pop(serial, None)
        if not answer:
            raise ChannelLost("the other process is gone")
        what, body, came = answer
        if what == _FAILURE:
            raise ChannelLost(str(body))
        return WithFiles(body, came)

    def _send(self, serial: int, what: int, body: Any, files: Sequence[int]) -> None:
        assert len(files) <= MAX_FILES
        if self.is_lost:
            close_files(files)
            return
        data = msgspec.msgpack.encode(body)
        count = len(files)
        if count and self._held and self._held + count > _most_waiting():
            close_files(files)
            files, count = (), _UNSENT
        self._queue.append((memoryview(_HEADER.pack(len(data), serial, what, count) + data), files))
        self._held += len(files)
        if len(self._queue) == 1:
            self._flush()
        if self._queue:
            self._queued.set()

    def _flush(self) -> None:
        """Send what the kernel takes now. Files go with the first byte of their message."""
        while self._queue:
            data, files = self._queue[0]
            try:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
                sent = self._sock.sendmsg([data], ancillary)
            except BlockingIOError:
                return
            except OSError as exc:
                if files and exc.errno == errno.ETOOMANYREFS:  # of this user's files too many are on the way
                    self._let_go(files)
                    length, serial, what, _ = _HEADER.unpack_from(data)
                    unsent = _HEADER.pack(length, serial, what, _UNSENT)
                    self._queue[0] = (memoryview(unsent + data[_HEADER.size :]), ())
                    continue
                self._lose()
                return
            self._let_go(files)
            if sent < len(data):
                self._queue[0] = (data[sent:], ())
            else:
                self._queue.popleft()

    def _let_go(self, files: Sequence[int]) -> None:
        self._held -= len(files)
        close_files(files)

    async def _write(self) -> None:
        while not self.is_lost:
            await self._queued.wait()
            self._queued = trio.Event()
            while self._queue:
                try:
                    await trio.lowlevel.wait_writable(self._sock)
                except trio.ClosedResourceError:
                    return
                self._flush()

    def on(self, name: str, handler: Handler) -> None:
        """Handle this message from now on; what was told of its kind before there was a handler comes first."""
        self.handlers[name] = handler
        now = [one for one in self._early if one[0] == name]
        self._early = [one for one in self._early if one[0] != name]
        for _, message, files in now:
            self._handle(0, [name, message], files)

    # Hearing --------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until the other end is gone. Calls that are under way then are cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._write)
                task_status.started()
                while await self._receive():
                    for serial, what, body, files in self._messages():
                        if what == _CALL:
                            self._handle(serial, body, files)
                        elif serial in self._waiting:
                            answered, answer = self._waiting[serial]
                            answer += (what, body, files)
                            answered.set()
                        else:
                            close_files(files)  # nobody waits for it any more
                nursery.cancel_scope.cancel()
        finally:
            self._lose()

    async def _receive(self) -> bool:
        """Whether more has come; False at the end."""
        while not self.is_lost:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(RECEIVE, _SPACE, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                try:
                    await trio.lowlevel.wait_readable(self._sock)
                except trio.ClosedResourceError:
                    return False
                continue
            except OSError:
                return False
            came: list[int] = []
            for level, kind, value in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    came += array.array("i", value[: len(value) - len(value) % _FILE])
            if came or flags & socket.MSG_CTRUNC:  # of one message: a read ends behind the bytes that files go with
                self._files.append(came)
            self._buffer += data
            return bool(data)
        return False

    def _messages(self) -> list[tuple[int, int, Any, list[int]]]:
        found = []
        at, size = 0, len(self._buffer)
        while size - at >= _HEADER.size:
            length, serial, what, count = _HEADER.unpack_from(self._buffer, at)
            end = at + _HEADER.size + length
            if end > size:
                break
            body = msgspec.msgpack.decode(memoryview(self._buffer)[at + _HEADER.size : end].tobytes())
            at = end
            files = self._files.popleft() if 0 < count <= MAX_FILES and self._files else []
            if len(files) < count:
                close_files(files)
                self._note_lost()
                if what == _CALL:
                    if serial:
                        self._send(serial, _FAILURE, _LOST, ())
                    continue
                what, body, files = _FAILURE, _LOST, []
            found.append((serial, what, body, files))
        del self._buffer[:at]
        return found

    def _note_lost(self) -> None:
        self._lost += 1
        now = time.monotonic()
        if now >= self._tell_at:
            log.error("connections between processes dropped", count=self._lost, error=_LOST)
            self._lost, self._tell_at = 0, now + TELL_SECONDS

    def _handle(self, serial: int, body: Any, files: list[int]) -> None:
        name, message = body
        if not serial and name not in self.handlers and len(self._early) < MAX_EARLY:
            self._early.append((name, message, files))  # this end is still starting
            return
        try:
            result = self.handlers[name](message, files)
        except Exception as exc:
            self._fail(serial, name, exc)
            return
        if isawaitable(result):
            assert self._nursery is not None
            self._nursery.start_soon(self._finish, serial, name, result)
        else:
            self._answer(serial, result)

    async def _finish(self, serial: int, name: str, result: Any) -> None:
        try:
            answer = await result
        except Exception as exc:
            self._fail(serial, name, exc)
        else:
            self._answer(serial, answer)

    def _answer(self, serial: int, result: Any) -> None:
        body, files = result if isinstance(result, WithFiles) else (result, ())
        if serial:
            self._send(serial, _ANSWER, body, files)
        else:
            close_files(files)

    def _fail(self, serial: int, name: str, exc: Exception) -> None:
        if not isinstance(exc, TunnelError):
            log.error("a message between processes broke", message=name, error=exc)
        if serial:
            self._send(serial, _FAILURE, str(exc) or type(exc).__name__, ())

    def _lose(self) -> None:
        """Nothing can be said or heard any more: whoever waits for an answer is told so."""
        if self.is_lost:
            return
        self.is_lost = True
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        for _, files in self._queue:
            close_files(files)
        for files in self._files:
            close_files(files)
        for _, _, files in self._early:
            close_files(files)
        self._early.clear()
        self._queue.clear()
        self._held = 0
        self._files.clear()
        for answered, _ in self._waiting.values():
            answered.set()

    def close(self) -> None:
        self._lose()


def copies(numbers: Sequence[int]) -> list[int]:
    """Of open files, to be sent. Raises OSError; then there are none."""
    made: list[int] = []
    try:
        for number in numbers:
            made.append(os.dup(number))
    except OSError:
        close_files(made)
        raise
    return made


def _most_waiting() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_WAITING if limit == resource.RLIM_INFINITY else min(MAX_WAITING, limit // 4)


def close_files(files: Sequence[int]) -> None:
    for number in files:
        os.close(number)
