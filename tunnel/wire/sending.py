"""Streams from the side of who sends: opened, answered, fed, ended, given up."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

from tunnel.errors import LocalWireError
from tunnel.wire import frames, states
from tunnel.wire.credit import Credit
from tunnel.wire.frames import END, HEADER, Open, Response
from tunnel.wire.held import Held
from tunnel.wire.stream import Stream
from tunnel.wire.windows import FLOOR

LAST_ID = 0xFFFFFFFF  #: the greatest number of a stream
SPARE_IDS = 1 << 20  #: that a link has left when it is given up for want of them: far more than it takes until then


class Sending(Credit):
    """opens, make_stream: as for `Session`."""

    def __init__(
        self, opens: bool, make_stream: Callable[[int], Stream], on_queued: Callable[[], None], held: Held
    ) -> None:
        super().__init__(on_queued, held)
        self._opens = opens
        self._make_stream = make_stream
        self._last_id = 0
        self._unread: WeakSet[Stream] = WeakSet()  # over, but with much in the inbox

    def open(self, opened: Open, body: bytes = b"", end: bool = False) -> Stream:
        """Open a stream, with the beginning (at most SMALL_BODY) or all of its body. Raises LocalWireError."""
        if not self._opens or self._last_id == LAST_ID:
            raise LocalWireError("this end can't open a stream")
        if len(opened.head) > frames.MAX_HEAD or len(opened.context) > frames.MAX_CONTEXT:
            raise LocalWireError("the request's head is longer than the link carries")
        stream_id = self._last_id = self._last_id + 1
        stream = self._make_stream(stream_id)
        stream.credit = stream.receivable = self._window.stream
        stream.out = states.DONE if end else states.BODY
        if body:
            self._spend(stream, len(body))
        self.streams[stream_id] = stream
        payload = frames.pack_open(opened, body)
        self._queue(HEADER.pack(frames.OPEN, END if end else 0, stream_id, len(payload)) + payload)
        return stream

    @property
    def is_used_up(self) -> bool:
        """Whether nearly all numbers of streams are taken (tunnel/SPEC.md, "Streams"): this link had better end."""
        return self._opens and self._last_id > LAST_ID - SPARE_IDS

    def respond(self, stream: Stream, response: Response, body: bytes = b"", end: bool = False) -> None:
        """Send a response's head, interim or final, with the beginning or all of its body. Raises LocalWireError."""
        if len(response.head) > frames.MAX_HEAD:
            raise LocalWireError("the answer's head is longer than the link carries")
        move = states.INTERIM if frames.is_interim(response.status) else states.HEAD
        stream.out = states.after_sending(stream.out, move)
        if end:
            stream.out = states.DONE
        self._spend(stream, len(body))
        payload = frames.pack_response(response, body)
        self._queue(HEADER.pack(frames.RESPONSE, END if end else 0, stream.id, len(payload)) + payload)
        if end:
            self._drop_if_over(stream)

    def send_data(self, stream: Stream, part: bytes, end: bool = False) -> None:
        """Queue a part of the body, at most `sendable()` bytes. Raises LocalWireError."""
        if part:
            stream.out = states.after_sending(stream.out, states.PART)
        if end:
            stream.out = states.after_sending(stream.out, states.FINISH)
        self._spend(stream, len(part))
        self._queue_in_order(stream, HEADER.pack(frames.DATA, END if end else 0, stream.id, len(part)) + part)
        if end:
            self._drop_if_over(stream)

    def send_trailers(self, stream: Stream, fields: bytes) -> None:
        """End our half with trailer fields. Raises LocalWireError."""
        if len(fields) > frames.MAX_TRAILERS:
            raise LocalWireError("trailer fields are longer than the link carries")
        stream.out = states.after_sending(stream.out, states.FINISH)
        self._queue_in_order(stream, frames.frame(frames.TRAILERS, stream.id, fields))
        self._drop_if_over(stream)

    def tell_waiting(self, stream: Stream, agent_us: int, local_us: int) -> None:
        """The acceptor: the local service is being waited for. Nothing is said of a stream that is over."""
        if stream.id in self.streams:
            told = frames.WAITING_BODY.pack(min(agent_us, frames.MOST_US), min(local_us, frames.MOST_US))
            self._queue(frames.frame(frames.WAITING, stream.id, told))

    def reset(self, stream: Stream, code: int, text: str = "") -> None:
        """Give a stream up, at any time; nothing more is taken from it. When it is over that is all this does:
        who still reads finds that it has failed, unless all was taken.

        Code 0 follows what is queued (we have said all and want no more); any other overtakes and drops it.
        """
        if stream.id in self.streams:
            part = frames.frame(
                frames.RESET, stream.id, frames.RESET_HEAD.pack(code) + text.encode()[: frames.MAX_TEXT]
            )
            if code == 0:
                self._queue_in_order(stream, part)
                self._mark_failed(stream, code, text)
            else:
                self.fail(stream, code, text)
                self._queue(part)
        if stream.inbox and stream.failure is None:
            stream.failure = (code, text)  # over, but not taken to its end
        self.forget(stream)

    def fail(self, stream: Stream, code: int, text: str) -> None:
        """Mark a stream as failed without telling the other end (it knows, or is gone)."""
        if stream.failure is None:
            self._mark_failed(stream, code, text)
            self._forget_pending(stream)
            if self._has_new_credit:
                for other in self._take_starved():
                    other.wake()

    def fail_all(self, code: int, text: str) -> list[Stream]:
        """As `fail`, for all streams; says which. Nobody waits for credit any more, so nobody is looked at for it."""
        self._starved.clear()
        streams = list(self.streams.values())
        for stream in streams:
            self.fail(stream, code, text)
        return streams

    def _mark_failed(self, stream: Stream, code: int, text: str) -> None:
        stream.failure = (code, text)
        stream.inn = stream.out = states.DONE
        self.streams.pop(stream.id, None)
        self._starved.discard(stream)

    def _forget_pending(self, stream: Stream) -> None:
        """Frames never sent need no credit at the other end, but ours was spent: take it back.

        What is still in the inbox stays readable for its owner (a broken answer is passed on up to the break).
        """
        for part in stream.pending:
            if part[0] == frames.DATA:
                self._credit += len(part) - 10
                stream.credit += len(part) - 10
                self._has_new_credit = True
            self.queued_bytes -= len(part)
            self.held.bytes -= len(part)
        stream.pending.clear()
        stream.pending_bytes = 0

    def _drop_if_over(self, stream: Stream) -> None:
        if stream.out == states.DONE and stream.inn == states.DONE:
            self.streams.pop(stream.id, None)
            if stream.inbox_bytes >= FLOOR:
                self._unread.add(stream)
