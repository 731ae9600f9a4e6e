"""One end of a link, sans-IO: messages in, events out, messages out.

`receive()` checks a message's frames against the table and the windows and files them under their streams; what it
returns is who must look. Everything to be sent is queued by the `send_…` methods and leaves through `take()`, which
makes one message of all that waits: link control and small frames first, then the bulk of the streams in turn, so that
a small answer passes a large download. Within one stream the order holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from weakref import WeakSet

from tunnel.errors import OF_AGENTS, OUTCOMES, LocalWireError, WireError
from tunnel.wire import frames, states
from tunnel.wire.frames import END, HEADER, Open, Response
from tunnel.wire.held import Held
from tunnel.wire.stream import NOTHING, Stream
from tunnel.wire.windows import EARLY, EARLY_LINK, FLOOR, SHARE, Windows

SMALL_FRAME = 4 * 1024  #: a frame up to this size passes the bulk of other streams
CRUMB = 512  #: parts below this are joined where they wait: an object a byte would hold 40 times the window
MOST_IN_FRONT = frames.MAX_FRAMES // 2  #: frames that wait ahead of bulk, and fit one message: more is not urgent
MOST_PENDING = 256  #: parts of one stream that wait: small ones cost more than their bytes
BULK_PER_MESSAGE = 64 * 1024  #: bulk in one message; more waits for the next, behind what is urgent by then

LAST_ID = 0xFFFFFFFF  #: the greatest number of a stream
SPARE_IDS = 1 << 20  #: that a link has left when it is given up for want of them: far more than it takes until then

_FROM_AGENTS = frozenset(OUTCOMES[name].code for name in OF_AGENTS)

# Kinds of event: (kind, stream or None, value).
OPENED, ANSWERED, BODY, FAILED, CONTROL = "opened", "answered", "body", "failed", "control"
TOLD = "told"  #: what a WAITING says: (agent µs, local µs)
Event = tuple[str, Stream | None, object]


class Session:
    """opens: this end opens streams (the core); the other accepts them (the agent).

    on_queued is called when something waits for `take()`; it must only note the fact. held: shared with the program's
    other sessions.
    """

    def __init__(
        self,
        opens: bool,
        make_stream: Callable[[int], Stream] = Stream,
        on_queued: Callable[[], None] = lambda: None,
        held: Held | None = None,
    ) -> None:
        self.streams: dict[int, Stream] = {}
        self.frames_in = 0
        self.frames_out = 0
        self.frames_bad = 0
        self.queued_bytes = 0
        self.held = Held() if held is None else held
        self.held.holders.add(self)
        self._is_closed = False
        self._opens = opens
        self._make_stream = make_stream
        self._on_queued = on_queued
        self._last_id = 0
        self._window = Windows()  # the same in both directions
        self._credit = self._receivable = self._window.link
        self._consumed = 0  # of the link's credit, not given back
        self._short = self._window.short
        self._set_short(False)
        self._urgent: list[bytes] = []
        self._unread: WeakSet[Stream] = WeakSet()  # over, but with much in the inbox
        self._ring: deque[Stream] = deque()  # streams with pending frames, each once
        self._starved: set[Stream] = set()  # streams that wait for the link's credit
        self._has_new_credit = False  # nobody has looked yet whether it is enough for one of these

    def set_windows(self, stream: int, link: int) -> None:
        """Windows of this link, both directions, instead of the usual ones. Raises WireError for impossible ones.

        Before anything was sent or taken; streams that came in the same message as the welcome may be there already.
        """
        if not frames.LEAST_WINDOW <= stream <= link <= frames.MOST_WINDOW:
            raise WireError(f"windows of {stream} bytes a stream and {link} a link are not possible")
        wider, link_wider = stream - self._window.stream, link - self._window.link
        self._window = Windows(stream, link)
        self._short = self._window.short
        self._credit += link_wider
        self._receivable += link_wider
        for one in self.streams.values():
            one.credit += wider
            one.receivable += wider
        if self._receivable < 0 or any(one.receivable < 0 for one in self.streams.values()):
            raise WireError("more body came than the window allows", "stream_buffer")
        self._set_short(self._receivable < self._window.short)

    # Receiving ------------------------------------------------------------------------------------------------

    def receive(self, message: bytes) -> list[Event]:
        """Take in one message. Raises WireError when the other end broke the protocol: the link must end."""
        events: list[Event] = []
        count = 0
        try:
            if len(message) > frames.MAX_MESSAGE:
                raise WireError("the message is too long")
            for kind, flags, stream_id, payload in frames.split(message):
                count += 1
                if kind == frames.DATA:
                    self._receive_data(events, flags, stream_id, payload)
                elif kind == frames.OPEN:
                    self._receive_open(events, flags, stream_id, payload)
                elif kind == frames.RESPONSE:
                    self._receive_response(events, flags, stream_id, payload)
                elif kind == frames.WINDOW:
                    self._receive_window(events, stream_id, payload)
                elif kind == frames.RESET:
                    self._receive_reset(events, stream_id, payload)
                elif kind == frames.TRAILERS:
                    self._receive_trailers(events, stream_id, payload)
                elif kind == frames.WAITING:
                    self._receive_waiting(events, stream_id, payload)
                elif kind in frames.NAMES:
                    if len(payload) > frames.MAX_TALK:
                        raise WireError(f"a {frames.NAMES[kind]} frame is too long")
                    events.append((CONTROL, None, (kind, payload)))
                # Unknown types are skipped, so that a later version may add some (SPEC.md, Versions).
        except WireError:
            self.frames_bad += 1
            raise
        finally:
            self.frames_in += count
        if self._has_new_credit:  # once a message: there may be thousands of WINDOWs in it, and thousands who starve
            events += [(BODY, starved, None) for starved in self._take_starved()]
        return events

    def _find(self, stream_id: int) -> Stream | None:
        """The stream, or None when it is over here and the frame crossed our reset or end."""
        stream = self.streams.get(stream_id)
        if stream is None and (stream_id == 0 or stream_id > self._last_id):
            raise WireError(f"a frame came for stream {stream_id}, which was never opened")
        return stream

    def _receive_open(self, events: list[Event], flags: int, stream_id: int, payload: bytes) -> None:
        if self._opens or stream_id <= self._last_id:
            raise WireError(f"stream {stream_id} can't be opened by the other end")
        self._last_id = stream_id
        stream = self._make_stream(stream_id)
        stream.credit = stream.receivable = self._window.stream
        stream.out = states.IDLE
        stream.head, body = frames.unpack_open(payload)
        stream.inn = states.after_receiving(stream.inn, states.HEAD)
        self.streams[stream_id] = stream
        if body or flags & END:
            self._add_part(stream, flags, body)
        events.append((OPENED, stream, None))

    def _receive_response(self, events: list[Event], flags: int, stream_id: int, payload: bytes) -> None:
        stream = self._find(stream_id)
        response, body = frames.unpack_response(payload)
        if stream is None:
            self._discard(len(body))
            return
        if not self._opens:
            raise WireError("a RESPONSE came from the end that opens streams")
        if frames.is_interim(response.status):
            stream.inn = states.after_receiving(stream.inn, states.INTERIM)
            if body or flags & END:
                raise WireError("an interim RESPONSE has a body or an end")
            waiting = sum(len(one.head) for one in stream.interims) + len(response.head)
            if (
                len(stream.interims) >= frames.MAX_INTERIMS or waiting > frames.MAX_HEAD
            ):  # the local service's doing, so it costs this stream only
                self.reset(stream, OUTCOMES["local_broken"].code, "too many interim responses")
            else:
                stream.interims = (*stream.interims, response)
        else:
            stream.inn = states.after_receiving(stream.inn, states.HEAD)
            stream.head = response
            if body or flags & END:
                self._add_part(stream, flags, body)
        events.append((ANSWERED, stream, None))

    def _receive_data(self, events: list[Event], flags: int, stream_id: int, payload: bytes) -> None:
        stream = self._find(stream_id)
        if len(payload) > frames.MAX_DATA:
            raise WireError("a DATA frame is too long")
        if stream is None:
            self._discard(len(payload))
            return
        self._add_part(stream, flags, payload)
        events.append((BODY, stream, None))

    def _add_part(self, stream: Stream, flags: int, payload: bytes) -> None:
        if payload:
            size = len(payload)
            stream.inn = states.after_receiving(stream.inn, states.PART)
            stream.receivable -= size
            if stream.receivable < 0:
                raise WireError("more body came than the window allows", "stream_buffer")
            self._receivable -= size
            if self._receivable < self._short:
                self._run_short()
            inbox = stream.inbox
            if inbox is NOTHING:
                stream.inbox = deque((payload,))
            elif size < CRUMB and inbox and len(inbox[-1]) < SMALL_FRAME:
                inbox[-1] += payload
            else:
                inbox.append(payload)
            stream.inbox_bytes += size
            held = self.held
            held.bytes += size
            if held.bytes > held.alarm > 0:
                held.check()
                if stream.failure is not None:
                    return
        if flags & END:
            stream.inn = states.after_receiving(stream.inn, states.FINISH)
            stream.ended = True
            self._drop_if_over(stream)

    def holding(self) -> list[Stream]:
        """Those that may hold much."""
        return [*self.streams.values(), *self._unread]

    def give_up(self, stream: Stream) -> None:
        """All sessions together hold too much (held.py), and this stream has to go."""
        code, text = OUTCOMES["overloaded"].code, "there is no memory for more unread bytes"
        if stream.id not in self.streams:
            self._mark_failed(stream, code, text)
        stream.ended = False  # what is thrown away now was not taken: nobody may take the body for complete
        self.reset(stream, code, text)
        stream.wake()

    def _receive_trailers(self, events: list[Event], stream_id: int, payload: bytes) -> None:
        stream = self._find(stream_id)
        if len(payload) > frames.MAX_TRAILERS:
            raise WireError("a TRAILERS frame is too long")
        if stream is not None:
            stream.inn = states.after_receiving(stream.inn, states.FINISH)
            stream.trailers = payload
            stream.ended = True
            self._drop_if_over(stream)
            events.append((BODY, stream, None))

    def _receive_reset(self, events: list[Event], stream_id: int, payload: bytes) -> None:
        stream = self._find(stream_id)
        if stream is not None:
            if not payload:
                raise WireError("a RESET frame is cut off")
            text = payload[1 : 1 + frames.MAX_TEXT].decode("utf-8", "replace")
            code = payload[0]
            if self._opens and code not in _FROM_AGENTS:
                code = OUTCOMES["link_lost"].code
            self._mark_failed(stream, code, text)
            self._forget_pending(stream)
            events.append((FAILED, stream, None))

    def _receive_waiting(self, events: list[Event], stream_id: int, payload: bytes) -> None:
        stream = self._find(stream_id)
        if len(payload) != frames.WAITING_BODY.size or not self._opens:
            raise WireError("a WAITING frame must have eight bytes, and comes from the end that accepts streams")
        if stream is not None:
            events.append((TOLD, stream, frames.WAITING_BODY.unpack(payload)))

    def _receive_window(self, events: list[Event], stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise WireError("a WINDOW frame must have four bytes")
        (credit,) = frames.WINDOW_BODY.unpack(payload)
        if not credit:
            raise WireError("a WINDOW frame gives no credit")
        if stream_id == 0:
            self._credit += credit
            if self._credit > self._window.link:
                raise WireError("the link's window grew past its size")
            self._has_new_credit = True
            return
        stream = self._find(stream_id)
        if stream is not None:
            stream.credit += credit
            stream.moved += credit
            if stream.credit > self._window.stream:
                raise WireError("a stream's window grew past its size")
            events.append((BODY, stream, None))

    def _discard(self, size: int) -> None:
        """Body for a stream that is over: nobody will take it, so its link credit goes back here."""
        self._take_in(size)
        self._give_back(size)

    def _take_in(self, size: int) -> None:
        self._receivable -= size
        if self._receivable < self._short:
            self._run_short()

    def _run_short(self) -> None:
        """Little is left of the link's window, or less than nothing: that raises WireError."""
        if self._receivable < 0:
            raise WireError("more body came than the window allows", "link_buffer")
        if not self._is_short:
            self._set_short(True)
            for stream in self.streams.values():
                if stream.consumed >= EARLY:
                    self._return_credit(stream)
            self._give_back(0)

    def _set_short(self, is_short: bool) -> None:
        """While little is left of the link's window every bit of credit counts, else few frames do."""
        self._is_short = is_short
        self._return_at = EARLY if is_short else self._window.step
        self._link_return_at = min(EARLY_LINK, self._window.link // 8) if is_short else self._window.link // 8

    # Taking what came -----------------------------------------------------------------------------------------

    def next_part(self, stream: Stream) -> bytes:
        """The next part of the body, b"" when there is none now. Its credit goes back to the sender."""
        if not stream.inbox:
            return b""
        part = stream.inbox.popleft()
        size = len(part)
        stream.inbox_bytes -= size
        self.held.bytes -= size
        self._give_back(size)
        stream.consumed += size
        if stream.consumed >= self._return_at:
            self._return_credit(stream)
        return part

    def _return_credit(self, stream: Stream) -> None:
        if not stream.ended and stream.failure is None:
            stream.receivable += stream.consumed
            stream.moved += stream.consumed
            self._queue(frames.frame(frames.WINDOW, stream.id, frames.WINDOW_BODY.pack(stream.consumed)))
            stream.consumed = 0

    def _give_back(self, size: int) -> None:
        self._consumed += size
        if self._consumed >= self._link_return_at:
            self._receivable += self._consumed
            self._queue(frames.frame(frames.WINDOW, 0, frames.WINDOW_BODY.pack(self._consumed)))
            self._consumed = 0
            if self._is_short and self._receivable > self._window.short + self._window.link // 16:
                self._set_short(False)

    # Sending --------------------------------------------------------------------------------------------------

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

    def can_carry(self, stream: Stream | None, size: int) -> bool:
        """Whether a body of this size may ride in the stream's first frame."""
        return size <= frames.SMALL_BODY and size <= (self._credit if stream is None else self._room(stream))

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

    def sendable(self, stream: Stream) -> int:
        """How many bytes of body may be queued now; 0: wait for `wake()`."""
        if stream.pending_bytes > 2 * frames.MAX_DATA or len(stream.pending) >= MOST_PENDING:
            return 0
        size = self._room(stream)
        if size > 0:
            return size
        if stream.credit:
            self._starved.add(stream)
        return 0

    def _room(self, stream: Stream) -> int:
        """What the stream may send by its own credit, the link's, and its share of that (0 or less: nothing now)."""
        share = max((self._credit - self._window.kept) // SHARE, FLOOR)
        under_way = self._window.stream - stream.credit
        return min(stream.credit, self._credit, frames.MAX_DATA, share - under_way)

    def _take_starved(self) -> list[Stream]:
        """Those that the link's credit held up and that may send now."""
        self._has_new_credit = False
        ready = [stream for stream in self._starved if self._room(stream) > 0]
        self._starved.difference_update(ready)
        return ready

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

    def tell_waiting(self, stream: Stream, agent_us: int, local_us: int) -> None:
        """The acceptor: the local service is being waited for. Nothing is said of a stream that is over."""
        if stream.id in self.streams:
            told = frames.WAITING_BODY.pack(min(agent_us, frames.MOST_US), min(local_us, frames.MOST_US))
            self._queue(frames.frame(frames.WAITING, stream.id, told))

    def control(self, kind: int, payload: bytes) -> None:
        """Queue a frame of the link itself."""
        self._queue(frames.frame(kind, 0, payload))

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

    def unsent_opens(self) -> set[int]:
        """Numbers of the streams whose OPEN is still queued here: the other end cannot have heard of them."""
        return {HEADER.unpack_from(part)[2] for part in self._urgent if part[0] == frames.OPEN}

    def forget(self, stream: Stream) -> None:
        """Nobody will take what is left in the inbox: its link credit goes back to the other end."""
        if stream.inbox:
            stream.inbox.clear()
            stream.ended = False  # nobody may take what was taken for the whole
            size, stream.inbox_bytes = stream.inbox_bytes, 0
            self.held.bytes -= size
            self._give_back(size)

    def _mark_failed(self, stream: Stream, code: int, text: str) -> None:
        stream.failure = (code, text)
        stream.inn = stream.out = states.DONE
        self.streams.pop(stream.id, None)
        self._starved.discard(stream)

    def _forget_pending(self, stream: Stream) -> None:
        """Frames never sent need no credit at the other end, but ours was spent: take it back for the link.

        What is still in the inbox stays readable for its owner (a broken answer is passed on up to the break).
        """
        for part in stream.pending:
            if part[0] == frames.DATA:
                self._credit += len(part) - 10
                self._has_new_credit = True
            self.queued_bytes -= len(part)
            self.held.bytes -= len(part)
        stream.pending.clear()
        stream.pending_bytes = 0

    def _spend(self, stream: Stream, size: int) -> None:
        if size:
            if size > stream.credit or size > self._credit:
                raise LocalWireError("sending more body than the window allows")
            stream.credit -= size
            self._credit -= size

    def _drop_if_over(self, stream: Stream) -> None:
        if stream.out == states.DONE and stream.inn == states.DONE:
            self.streams.pop(stream.id, None)
            if stream.inbox_bytes >= FLOOR:
                self._unread.add(stream)

    # The queue ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing leaves any more: what waits is dropped, and so is what is still queued later."""
        self._is_closed = True
        self.held.holders.discard(self)
        self.held.bytes -= self.queued_bytes
        self.queued_bytes = 0
        self._urgent.clear()
        self._ring.clear()

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
    def in_front(self) -> int:
        """Frames that wait ahead of bulk."""
        return len(self._urgent)

    @property
    def has_bulk(self) -> bool:
        return bool(self._ring)
