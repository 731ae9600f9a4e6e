"""One link on Trio: the reader feeds the session, the writer sends what it has queued, the sweeper keeps it alive.

Only the writer sends, and it takes all that was queued by the time it runs, so what many tasks queue in one turn of
the run loop leaves as one message. What is queued while `ready` tells sockets leaves when all are told, if the kernel
takes it at once; else the writer goes on with it. The reader (the task in which the transport delivers) never waits:
it files frames and wakes whoever waits for them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic

import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from tunnel.errors import OUTCOMES, WireError
from tunnel.link.stream import Stream
from tunnel.link.tasks import leaves
from tunnel.link.transport import Transport
from tunnel.net import limit_unsent
from tunnel.ready import Ready
from tunnel.wire import control, frames
from tunnel.wire.held import Held
from tunnel.wire.session import CONTROL, OPENED, TOLD, Session

UNSENT = 128 * 1024  #: bytes of bulk the kernel may hold unsent, in front of urgent frames
MAX_CONTROL = 64  #: control frames nobody has taken yet
MAX_CONTROL_BYTES = 256 * 1024  #: bytes in them
FROM_CORE = frozenset({frames.WELCOME, frames.REFUSED})  #: control frames that the end which opens streams may not get
FROM_AGENT = frozenset({frames.HELLO, frames.REPORT})  #: and the other may not
MAX_UNSENT = 65536  #: frames, in front of bulk, that wait for an end which does not read; and some for each stream
MAX_PONGS = 64  #: answers to pings that wait for the writer; a peer that pings and does not read would fill memory


def wall_us() -> int:
    return time.time_ns() // 1000


class Link:
    """opens: this end opens streams (the core).

    on_opened is called with each stream the other end opened. held: what all links hold together. most_window: the
    largest window that this end takes of a WELCOME. rtt, offset: the newest heartbeat's round trip and the other
    clock's lead, seconds. round_trips: those not yet taken by `statistics`, bounded.
    """

    def __init__(
        self,
        opens: bool,
        heartbeat: float,
        heartbeat_timeout: float,
        on_opened: Callable[[Stream], None] | None = None,
        held: Held | None = None,
        ready: Ready | None = None,
        most_window: int = frames.MOST_WINDOW,
    ) -> None:
        self.session = Session(opens, partial(Stream, link=self), self._on_queued, held)
        self.rtt = 0.0
        self.offset = 0.0
        self.round_trips: deque[float] = deque(maxlen=1000)
        self.heartbeats_sent = 0
        self.heartbeats_failed = 0
        self.end_reason = ""
        self.breach: WireError | None = None  # how the other end broke the protocol, if that ended the link
        self.ended = trio.Event()  # `run` has returned
        self.on_opened = on_opened
        self.is_welcomed = False  # a WELCOME has come: from here on the core may open streams
        self.nursery: trio.Nursery | None = None  # while it runs; owns the tasks of streams that the other end opened
        self._most_window = most_window
        self._not_taken = FROM_CORE if opens else FROM_AGENT
        self._transport: Transport | None = None
        self._heartbeat = heartbeat
        self._heartbeat_timeout = heartbeat_timeout
        self._last_heard = monotonic()
        self._next_ping = self._last_heard  # the first at once, so that rtt and offset are known early
        self._pings: dict[int, float] = {}
        self._token = 0
        self._pongs = 0
        self._writer: Task | None = None
        self._ready = ready
        self._will_flush = False
        self._closing = False
        self._is_over = False
        self._scope = trio.CancelScope()
        self._controls: deque[tuple[int, bytes]] = deque()
        self._control_bytes = 0
        self._controls_changed = trio.Event()

    # The reader -----------------------------------------------------------------------------------------------

    def on_message(self, message: bytes) -> int:
        """Take in one message; says how many frames were in it. Never waits, never raises: a broken protocol ends the
        link."""
        if self._is_over:
            return 0  # the WebSocket's reader may have more for a link that has ended
        self._last_heard = monotonic()
        session = self.session
        before = session.frames_in
        try:
            events = session.receive(message)
        except WireError as exc:
            self._break(exc)
            return 0
        try:
            for kind, stream, value in events:
                if kind == OPENED:
                    if self.on_opened is not None:
                        self.on_opened(stream)  # type: ignore[arg-type]  # made by `Stream` above
                elif kind == CONTROL:
                    self._on_control(*value)  # type: ignore[misc]
                elif kind == TOLD:
                    stream.told = (self._last_heard, *value)  # type: ignore[union-attr, misc]
                else:
                    stream.wake()  # type: ignore[union-attr]
        except WireError as exc:
            session.frames_bad += 1
            self._break(exc)
        return session.frames_in - before

    def _break(self, exc: WireError) -> None:
        if not self.end_reason:
            self.breach = exc
        self.end(f"the other end broke the link protocol: {exc}")

    def _on_control(self, kind: int, payload: bytes) -> None:
        if kind == frames.PING:
            self._pongs += 1
            if self._pongs > MAX_PONGS:
                raise WireError("pings come faster than their answers are taken")
            self.session.control(frames.PONG, control.pack_pong(payload, wall_us()))
        elif kind == frames.PONG:
            token, sent, answered = control.unpack_pong(payload)
            at = self._pings.pop(token, None)
            if at is not None:
                self.rtt = monotonic() - at
                self.offset = (answered - (sent + wall_us()) / 2) / 1e6
                self.round_trips.append(self.rtt)
        else:
            if kind in self._not_taken:
                raise WireError(f"{frames.NAMES[kind]} came from the end that must not send it")
            if kind == frames.WELCOME and not self.is_welcomed:
                self.is_welcomed = True
                welcome = control.decode(control.Welcome, payload)  # at once: streams may be in the same message
                if welcome.link_window > self._most_window:
                    most = f"the {self._most_window} that this agent takes (-max-buffer)"
                    raise WireError(f"a link's window of {welcome.link_window} bytes is more than {most}")
                self.session.set_windows(welcome.stream_window, welcome.link_window)
            self._control_bytes += len(payload)
            if len(self._controls) >= MAX_CONTROL or self._control_bytes > MAX_CONTROL_BYTES:
                raise WireError("too many control frames")
            self._controls.append((kind, payload))
            self._controls_changed.set()

    async def receive_control(self) -> tuple[int, bytes]:
        """The next control frame (not ping or pong). Raises trio.EndOfChannel when the link has ended."""
        while not self._controls:
            if self.end_reason:
                raise trio.EndOfChannel
            self._controls_changed = trio.Event()
            await self._controls_changed.wait()
        kind, payload = self._controls.popleft()
        self._control_bytes -= len(payload)
        return kind, payload

    # The writer -----------------------------------------------------------------------------------------------

    def _on_queued(self) -> None:
        if self._writer is None or self._will_flush:
            return
        if self._ready is not None and self._ready.is_telling:
            self._will_flush = True
            self._ready.after(self._flush)
        else:
            self._wake_writer()

    def _wake_writer(self) -> None:
        task = self._writer
        if task is not None:
            self._writer = None
            reschedule(task)

    def _flush(self) -> None:
        """Send what is queued in the writer's place, as far as that goes without waiting."""
        self._will_flush = False
        transport, session = self._transport, self.session
        if self._writer is None or transport is None or not session.has_queued:
            return
        if session.has_bulk or not transport.can_send_now:
            self._wake_writer()
            return
        message, _ = session.take()
        self._pongs = 0
        try:
            transport.send_now(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.end("the connection was lost")
            return
        if session.has_queued or transport.has_rest:
            self._wake_writer()

    async def _write(self, transport: Transport) -> None:
        def abort(_: object) -> Abort:
            self._writer = None
            return Abort.SUCCEEDED

        session = self.session
        while True:
            if transport.has_rest:
                await transport.send_rest()
                continue
            if not session.has_queued:
                if self._closing:
                    await transport.close(self.end_reason)
                    return
                self._writer = current_task()
                await wait_task_rescheduled(abort)
                continue
            message, drained = session.take()
            self._pongs = 0
            if message:
                await transport.send(message)
            if drained:
                for stream in drained:
                    stream.wake_sender()  # type: ignore[attr-defined]  # made by `Stream` above
                await trio.lowlevel.checkpoint()  # urgent frames queued meanwhile go before the next bulk

    # Life -----------------------------------------------------------------------------------------------------

    async def run(self, transport: Transport) -> None:
        """Serve until the link ends, whoever ends it; then every stream fails with link_lost. `end_reason` says why."""
        self._transport = transport
        limit_unsent(transport.socket.sock, UNSENT)
        if self._ready is not None:
            transport.join(self._ready)
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self.nursery = nursery
                    nursery.start_soon(self._guarded_write, transport)
                    reason = await transport.deliver(self.on_message)
                    self.end(reason)
        except* WireError as group:  # below the frames: text, or what is no WebSocket
            self.session.frames_bad += 1
            self._break(next(iter(leaves(group))))
        except* (trio.BrokenResourceError, trio.ClosedResourceError) as group:
            self._note_end(str(group.exceptions[0]) or "the connection was lost")
        finally:
            self._note_end("cancelled")
            self._is_over = True
            self.nursery = None
            self.fail_streams("link_lost", self.end_reason)
            self.session.close()
            if self.breach is not None:
                with trio.CancelScope(shield=True):
                    await transport.break_off(self.end_reason)
            transport.socket.close()
            self.ended.set()

    async def _guarded_write(self, transport: Transport) -> None:
        try:
            await self._write(transport)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.end("the connection was lost")
        else:
            self._scope.cancel()

    def end(self, reason: str) -> None:
        """End the link now; queued frames are lost."""
        self._is_over = True
        self._note_end(reason)
        self._scope.cancel()

    def close(self, reason: str) -> None:
        """End the link politely: what is queued is sent first, then a WebSocket close."""
        self._note_end(reason)
        self._closing = True
        self._wake_writer()

    def _note_end(self, reason: str) -> None:
        if not self.end_reason:
            self.end_reason = reason
        self._controls_changed.set()

    def fail_streams(self, outcome: str, text: str) -> None:
        unsent = self.session.unsent_opens()
        for stream in self.session.fail_all(OUTCOMES[outcome].code, text):
            stream.unsent = stream.id in unsent  # type: ignore[attr-defined]  # made by `Stream` above
            stream.wake()

    def is_quiet(self, now: float) -> bool:
        """Whether a heartbeat is overdue: maybe the other end is gone."""
        return now - self._last_heard > 1.5 * self._heartbeat + 0.5

    def alive_until(self, now: float) -> float:
        """Until when the other end is known to have been there."""
        return self._last_heard if self.is_quiet(now) else now

    def tick(self, now: float) -> None:
        """Called by the sweeper: heartbeats out, silence noticed."""
        if now - self._last_heard > self._heartbeat_timeout:
            self.heartbeats_failed += 1
            self.end(f"no heartbeat for {self._heartbeat_timeout:g} s")
        elif self.session.is_used_up:
            self.end("it has used up its stream numbers")
        elif self.session.in_front > MAX_UNSENT + 4 * len(self.session.streams):
            self.end("the other end does not read what it is sent")
        elif now >= self._next_ping:
            self._next_ping = now + self._heartbeat
            self._token += 1
            for token in [t for t, at in self._pings.items() if now - at > self._heartbeat_timeout]:
                del self._pings[token]
                self.heartbeats_failed += 1
            self._pings[self._token] = now
            self.heartbeats_sent += 1
            self.session.control(frames.PING, control.pack_ping(self._token, wall_us()))
