"""The streams of a link, served from local services: one task a stream, one exchange with the local service in it.

The most common streams need no task (tunnel/agent/quick.py, by the same functions); where one turns out to need more, a
task goes on from there (`go_on`).

What can happen, in this order: (1) the head that came is not valid; (2) the service can't be reached (local_refused);
(3) it breaks off or says what is not HTTP (local_broken); (4) it is too slow (timeout); (5) the core resets the stream
because the visitor left. 1 to 4 reset the stream with that outcome, so that the core can tell the visitor whose fault
it was; 5 cancels the task and with it the connection to the service.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

import trio

from tunnel.agent.joining import broken, join
from tunnel.agent.local import LocalExchanger
from tunnel.agent.served import LocalRequest, ServedStream
from tunnel.errors import BY_CODE, OUTCOMES, Failure
from tunnel.handler import Layer, wrap
from tunnel.http.client import Service
from tunnel.http.forwarded import Forwarded, read_forwarded
from tunnel.http.heads import VALUE
from tunnel.link.stream import RawStream, Stream
from tunnel.link.sweeper import Sweeper
from tunnel.link.workers import Cancellable
from tunnel.log import get_logger
from tunnel.observers import only_observers
from tunnel.wire import frames
from tunnel.wire.frames import UNKNOWN, Open, Response

if TYPE_CHECKING:
    from tunnel.link.link import Link

log = get_logger("tunnel.agent")

#: what a context may bring into requests, for it comes from the core and nobody else has looked at it
_CONTEXT_LINE = re.compile(
    rb"(request-id|traceparent|tracestate|baggage|b3|x-b3-(?:traceid|spanid|parentspanid|sampled|flags)): ("
    + VALUE
    + rb")"
)
_USUAL_CONTEXT = re.compile(rb"request-id: ([!-~]*)\r\n(?:traceparent: ([!-~]*)\r\n)?")
NO_TEXT = b"OK\r\n"


class Forwarder:
    """Serves streams with `services`, in the order of the tunnels that the core granted."""

    def __init__(self, layers: Sequence[Layer], sweeper: Sweeper, request_timeout: float) -> None:
        self.active = 0
        self._idle: trio.Event | None = None  # while somebody waits for that
        self.local = LocalExchanger(request_timeout)
        self._handle = wrap(self._serve, layers)
        self._handle_local = wrap(self.local.exchange, layers)
        self.observers = only_observers(layers)  # None: a layer needs a coroutine around each stream
        self._go_on, self._go_on_local = self._handle, self._handle_local
        if self.observers is not None:
            self._go_on = self.observers.go_on(self._serve)
            self._go_on_local = self.observers.go_on(self.local.exchange)
        self._sweeper = sweeper

    async def serve(
        self, link: Link, stream: Stream, services: Sequence[Service], agent_id: str, scope: Cancellable
    ) -> None:
        """One stream from its opening to its end. `scope` is around this call: cancelled when the stream fails."""
        opened = stream.head
        assert isinstance(opened, Open)
        if stream.failure is not None:  # reset before we came to it
            link.session.forget(stream)
            return
        if opened.tunnel >= len(services):
            stream.reset("no_tunnel", "the agent does not serve this tunnel")
            return
        visit = self.begin(stream, opened, services[opened.tunnel], agent_id, scope)
        try:
            await self._handle(visit)
        except Exception as exc:
            self._break(visit, exc)
        finally:
            self.end(visit)

    async def go_on(self, visit: ServedStream, scope: Cancellable) -> None:
        """One that was begun without a task, observers told and all. `scope`: as for `serve`."""
        stream = visit.stream
        visit.scope = scope
        stream.on_failure = scope.cancel
        if stream.failure is not None or visit.timed_out:
            scope.cancel()
        try:
            await self._go_on(visit)
        except Exception as exc:
            self._break(visit, exc)
        finally:
            self.end(visit)

    def begin(self, stream: Stream, opened: Open, service: Service, agent_id: str, scope: Cancellable) -> ServedStream:
        """A stream that is served from now on; `end` follows in any case. `scope` hears of its failure."""
        visit = ServedStream(
            None,
            frames.PROTOCOLS[opened.protocol],
            stream_id=stream.id,
            agent_id=agent_id,
            stream=stream,
            opened=opened,
            service=service,
            scope=scope,
        )
        if opened.context:
            _read_context(visit, opened.context)
        stream.on_failure = scope.cancel
        self._sweeper.add(visit)
        self.active += 1
        return visit

    def end(self, visit: ServedStream) -> None:
        self.active -= 1
        if self._idle is not None and not self.active:
            self._idle.set()
        self._sweeper.discard(visit)
        visit.stream.on_failure = None
        visit.local = visit.scope = None  # no cycle is left for the garbage collector
        visit.stream.link.session.forget(visit.stream)  # of a body that nobody took to its end

    @staticmethod
    def _break(visit: ServedStream, exc: Exception) -> None:
        """A bug here costs this one stream."""
        log.error("stream broke", stream=visit.stream_id, error=exc, **visit.trace_fields)
        visit.stream.reset("internal", "the agent failed on this stream")

    async def wait_idle(self) -> None:
        """Wait until no stream is being served."""
        while self.active:
            self._idle = trio.Event()
            await self._idle.wait()

    async def _serve(self, visit: ServedStream) -> None:
        """The innermost handler of a stream; it sets the outcome and answers with it."""
        stream = visit.stream
        try:
            await self._dispatch(visit)
            self.succeeded(visit)
        except Failure as exc:
            visit.outcome = exc.outcome
            visit.error = exc.text if OUTCOMES[exc.outcome].failed else ""
            visit.tell_waiting(monotonic())
            stream.reset(exc.outcome, exc.text)
        except trio.Cancelled:
            self.name_cancellation(visit)
            raise

    @staticmethod
    def succeeded(visit: ServedStream) -> None:
        visit.outcome = "ok"
        if not visit.stream.is_over:
            # Answered before the request's body was complete: nobody needs the rest.
            visit.stream.reset("ok", "the answer is complete")

    def name_cancellation(self, visit: ServedStream) -> None:
        stream = visit.stream
        if visit.timed_out:
            visit.outcome = "timeout"
            visit.error = self.local.explain_timeout(visit)
            visit.tell_waiting(monotonic())
            stream.reset("timeout", visit.error)
        elif stream.failure is not None:
            row = BY_CODE.get(stream.failure[0], OUTCOMES["link_lost"])
            visit.outcome = row.name
            visit.error = stream.failure[1] or row.title if row.failed else ""
        elif stream.link.end_reason:
            visit.outcome = "link_lost"
            visit.error = f"the link ended: {stream.link.end_reason}"
        else:
            visit.outcome = "draining"
            visit.error = "the agent stopped"
            stream.reset("draining", "the agent is shutting down")

    async def _dispatch(self, visit: ServedStream) -> None:
        protocol = visit.opened.protocol
        if protocol in (frames.HTTP, frames.UPGRADE):
            local, handle = visit.local, self._go_on_local
            if local is None:
                local, handle = make_local(visit, read_forwarded(visit.opened.head)), self._handle_local
                visit.local = local
            try:
                await handle(local)
            finally:
                leave(local)
        elif protocol == frames.TCP:
            await self._raw(visit)
        else:
            socket = await visit.service.connect()
            socket.close()
            visit.stream.link.session.respond(visit.stream, Response(204, frames.NO_BODY, 0, 0, NO_TEXT), end=True)

    # TCP and upgraded streams ---------------------------------------------------------------------------------

    async def _raw(self, visit: ServedStream) -> None:
        socket = await visit.service.connect()
        stream = visit.stream
        try:
            stream.link.session.respond(stream, Response(200, UNKNOWN, 0, 0, NO_TEXT))
            await join(RawStream(stream), socket, visit)
        except trio.BrokenResourceError as exc:
            raise broken(stream, visit.service) from exc
        finally:
            socket.close()


def make_local(visit: ServedStream, head: Forwarded) -> LocalRequest:
    """The request in a stream, for its local service."""
    visit.method = head.method.decode()
    visit.target = head.target.decode("ascii")
    local = LocalRequest(visit, visit.service.address, visit.service.scheme, visit=visit, head=head)
    if visit.headers:
        local.headers = dict(visit.headers)  # trace context goes on, also where no layer looks at it
    if visit.service.host_header:
        local.headers["host"] = visit.service.host_header
    return local


def leave(local: LocalRequest) -> None:
    """It is over: what it came to is told of its stream, too."""
    visit = local.visit
    visit.status = local.status
    visit.bytes_in, visit.bytes_out = local.bytes_in, local.bytes_out
    local.problem = None  # its traceback knows this


def _read_context(visit: ServedStream, context: bytes) -> None:
    if (usual := _USUAL_CONTEXT.fullmatch(context)) is not None:
        request_id, traceparent = usual.groups()
        visit.request_id = request_id.decode("ascii")
        if traceparent is not None:
            visit.headers["traceparent"] = traceparent.decode("ascii")
        return
    for line in context.split(b"\r\n"):
        if (match := _CONTEXT_LINE.fullmatch(line)) is None:
            continue
        name, value = match[1].decode("ascii"), match[2].decode("latin-1")
        if name == "request-id":
            visit.request_id = value
        else:
            visit.headers[name] = value
