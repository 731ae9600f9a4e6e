"""One end of a link, sans-IO: messages in, events out, messages out.

`receive()` checks a message's frames against the table and the windows and files them under their streams; what it
returns is who must look. Everything to be sent is queued by the `send_…` methods and leaves through `take()`, which
makes one message of all that waits.

A session is one thing in four rooms, each of which goes on from the one before: what waits to be sent (outbox.py),
credit (credit.py), streams that are opened, fed and given up (sending.py), and here what comes. They are classes that
extend one another and no parts that call one another, for each frame would pay for that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tunnel.errors import OF_AGENTS, OUTCOMES, WireError
from tunnel.wire import frames, states
from tunnel.wire.frames import END
from tunnel.wire.held import Held
from tunnel.wire.outbox import SMALL_FRAME
from tunnel.wire.sending import Sending
from tunnel.wire.stream import NOTHING, Stream

CRUMB = 512  #: parts below this are joined where they wait: an object a byte would hold 40 times the window

_FROM_AGENTS = frozenset(OUTCOMES[name].code for name in OF_AGENTS)

# Kinds of event: (kind, stream or None, value).
OPENED, ANSWERED, BODY, FAILED, CONTROL = "opened", "answered", "body", "failed", "control"
TOLD = "told"  #: what a WAITING says: (agent µs, local µs)
Event = tuple[str, Stream | None, object]


class Session(Sending):
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
        super().__init__(opens, make_stream, on_queued, Held() if held is None else held)
        self.frames_in = 0
        self.frames_bad = 0
        self.held.holders.add(self)

    def close(self) -> None:
        """The link has ended."""
        self.drop()
        self.held.holders.discard(self)

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

    # What all sessions together hold --------------------------------------------------------------------------

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
