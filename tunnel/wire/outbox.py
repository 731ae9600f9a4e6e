"""What waits to be sent on a link, and the messages that are made of it.

Link control and small frames leave first, then the bulk of the streams in turn, so that a small answer passes a large
download. Within one stream the order holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tunnel.wire import frames
from tunnel.wire.held import Held
from tunnel.wire.stream import NOTHING, Stream

SMALL_FRAME = 4 * 1024  #: a frame up to this size passes the bulk of other streams
MOST_IN_FRONT = frames.MAX_FRAMES // 2  #: frames that wait ahead of bulk, and fit one message: more is not urgent
BULK_PER_MESSAGE = 64 * 1024  #: bulk in one message; more waits for the next, behind what is urgent by then


class Outbox:
    """on_queued is called when something waits for `take()`; it must only note the fact. held: counts what waits."""

    def __init__(self, on_queued: Callable[[], None], held: Held) -> None:
        self.frames_out = 0
        self.queued_bytes = 0
        self.held = held
        self._is_closed = False
        self._on_queued = on_queued
        self._urgent: list[bytes] = []
        self._ring: deque[Stream] = deque()  # streams with pending frames, each once

    def control(self, kind: int, payload: bytes) -> None:
        """Queue a frame of the link itself."""
        self._queue(frames.frame(kind, 0, payload))

    def _queue(self, part: bytes) -> None:
        if self._is_closed:
            return
        size = len(part)
        self._urgent.append(part)
        self.queued_bytes += size
        self.held.bytes += size
        self._on_queued()

    def _queue_in_order(self, stream: Stream, part: bytes) -> None:
        if self._is_closed:
            return
        if not stream.pending:
            if len(part) <= SMALL_FRAME and len(self._urgent) < MOST_IN_FRONT:
                self._queue(part)
                return
            self._ring.append(stream)
        if stream.pending is NOTHING:
            stream.pending = deque()
        stream.pending.append(part)
        stream.pending_bytes += len(part)
        self.queued_bytes += len(part)
        self.held.bytes += len(part)
        self._on_queued()

    def take(self) -> tuple[bytes, list[Stream]]:
        """The next message, b"" when nothing waits, and the streams that may queue more because of it."""
        parts = self._urgent
        self._urgent = []
        size = sum(map(len, parts))
        limit = size + BULK_PER_MESSAGE
        most = MOST_IN_FRONT
        drained: list[Stream] = []
        # Urgent frames are small and bounded by the streams there are; should they pile up, they leave in several
        # messages.
        if size > frames.MAX_MESSAGE // 2 or len(parts) > most:
            parts, size = self._cut(parts, most)
            limit = 0
        while self._ring and size < limit and len(parts) < most:
            stream = self._ring.popleft()
            if not stream.pending:
                continue
            part = stream.pending.popleft()
            stream.pending_bytes -= len(part)
            parts.append(part)
            size += len(part)
            if stream.pending:
                self._ring.append(stream)
            drained.append(stream)
        self.frames_out += len(parts)
        self.queued_bytes -= size
        self.held.bytes -= size
        return b"".join(parts), drained

    def _cut(self, parts: list[bytes], most: int) -> tuple[list[bytes], int]:
        """The first parts, at most so many, that fit half a message; the rest goes back to the front of the queue."""
        size = 0
        for index, part in enumerate(parts):
            if index == most or (size and size + len(part) > frames.MAX_MESSAGE // 2):
                self._urgent = parts[index:]
                return parts[:index], size
            size += len(part)
        return parts, size

    @property
    def has_queued(self) -> bool:
        return bool(self._urgent or self._ring)

    @property
    def has_bulk(self) -> bool:
        return bool(self._ring)

    @property
    def in_front(self) -> int:
        """Frames that wait ahead of bulk."""
        return len(self._urgent)

    def unsent_opens(self) -> set[int]:
        """Numbers of the streams whose OPEN is still queued here: the other end cannot have heard of them."""
        return {frames.HEADER.unpack_from(part)[2] for part in self._urgent if part[0] == frames.OPEN}

    def drop(self) -> None:
        """Nothing leaves any more: what waits is dropped, and so is what is still queued later."""
        self._is_closed = True
        self.held.bytes -= self.queued_bytes
        self.queued_bytes = 0
        self._urgent.clear()
        self._ring.clear()
