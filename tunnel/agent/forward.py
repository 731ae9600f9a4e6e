"""The streams of a link, served from local services: one task a stream, one exchange with the local service in it.

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

from tunnel.errors import BY_CODE, OUTCOMES, Failure
from tunnel.handler import Layer, LocalVisit, StreamVisit, wrap
from tunnel.http.chunks import Chunks
from tunnel.http.client import Service
from tunnel.http.heads import check_forwarded, check_trailers, is_among, upgrade_of
from tunnel.http.response import MAX_HEAD, Answer, find_head, parse_answer
from tunnel.link.stream import RawStream, Stream
from tunnel.link.sweeper import Sweeper
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.net import Socket
from tunnel.wire import frames
from tunnel.wire.frames import UNKNOWN, Open, Response

if TYPE_CHECKING:
    from tunnel.link.link import Link

log = get_logger("tunnel.agent")

#: methods that may be sent again when a kept connection turns out to be dead (RFC 9110, 9.2.2)
IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})
_EVENT_STREAM = re.compile(rb"(?i)\ncontent-type: text/event-stream")
NO_TEXT = b"OK\r\n"


class _Stream(StreamVisit):
    """A stream being served, with its deadline for the sweeper."""

    __slots__ = ("deadline", "opened", "scope", "service", "stream", "timed_out")

    def __init__(self, stream: Stream, opened: Open, service: Service, scope: trio.CancelScope) -> None:
        super().__init__(None, frames.PROTOCOLS[opened.protocol])
        self.stream = stream
        self.opened = opened
        self.service = service
        self.scope = scope
        self.deadline = float("inf")
        self.timed_out = False

    def tick(self, now: float) -> None:
        if now > self.deadline:
            self.deadline = float("inf")
            self.timed_out = True
            self.scope.cancel()


class _Local(LocalVisit):
    """An exchange with the local service."""

    __slots__ = ("body", "head", "socket", "visit")

    def __init__(self, visit: _Stream, scheme: str) -> None:
        super().__init__(visit, visit.service.address, scheme)
        self.visit = visit
        self.head = b""
        self.body = b""
        self.socket: Socket | None = None


class Forwarder:
    """Serves streams with `services`, in the order of the tunnels that the core granted."""

    def __init__(self, layers: Sequence[Layer], sweeper: Sweeper, request_timeout: float) -> None:
        self.active = 0
        self._idle = trio.Event()
        self._handle = wrap(self._serve, layers)
        self._handle_local = wrap(self._exchange, layers)
        self._sweeper = sweeper
        self._request_timeout = request_timeout

    async def serve(
        self, link: Link, stream: Stream, services: Sequence[Service], agent_id: str, scope: trio.CancelScope
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
        visit = _Stream(stream, opened, services[opened.tunnel], scope)
        visit.stream_id = stream.id
        visit.agent_id = agent_id
        if opened.context:
            _read_context(visit, opened.context)
        stream.on_failure = scope.cancel
        self._sweeper.add(visit)
        self.active += 1
        try:
            await self._handle(visit)
        except Exception as exc:  # a bug here costs this one stream
            log.error("stream broke", stream=stream.id, error=exc)
            stream.reset("internal", "the agent failed on this stream")
        finally:
            self.active -= 1
            if not self.active:
                self._idle.set()
            self._sweeper.discard(visit)
            stream.on_failure = None
            link.session.forget(stream)  # of a body that nobody took to its end

    async def wait_idle(self) -> None:
        """Wait until no stream is being served."""
        while self.active:
            self._idle = trio.Event()
            await self._idle.wait()

    async def _serve(self, visit: _Stream) -> None:
        """The innermost handler of a stream; it sets the outcome and answers with it."""
        stream = visit.stream
        try:
            await self._dispatch(visit)
            visit.outcome = "ok"
            if not stream.is_over:
                # Answered before the request's body was complete: nobody needs the rest.
                stream.reset("ok", "the answer is complete")
        except Failure as exc:
            visit.outcome = exc.outcome
            visit.error = exc.text if OUTCOMES[exc.outcome].failed else ""
            stream.reset(exc.outcome, exc.text)
        except trio.Cancelled:
            self._name_cancellation(visit)
            raise

    def _name_cancellation(self, visit: _Stream) -> None:
        stream = visit.stream
        if visit.timed_out:
            visit.outcome = "timeout"
            visit.error = f"{visit.service.address} did not answer in time"
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

    async def _dispatch(self, visit: _Stream) -> None:
        protocol = visit.opened.protocol
        if protocol in (frames.HTTP, frames.UPGRADE):
            method, target = check_forwarded(visit.opened.head)
            visit.method = method.decode()
            visit.target = target.decode("latin-1")
            local = _Local(visit, "http")
            local.head = visit.opened.head
            if visit.headers:
                local.headers = dict(visit.headers)  # trace context goes on, also where no layer looks at it
            try:
                await self._handle_local(local)
            finally:
                visit.status = local.status
                visit.bytes_in = local.bytes_in
                visit.bytes_out = local.bytes_out
        elif protocol == frames.TCP:
            await self._raw(visit)
        else:
            socket = await visit.service.connect()
            socket.close()
            visit.stream.link.session.respond(visit.stream, Response(204, frames.NO_BODY, 0, 0, NO_TEXT), end=True)

    # TCP and upgraded streams ---------------------------------------------------------------------------------

    async def _raw(self, visit: _Stream) -> None:
        socket = await visit.service.connect()
        stream = visit.stream
        try:
            stream.link.session.respond(stream, Response(200, UNKNOWN, 0, 0, NO_TEXT))
            await join(RawStream(stream), socket, visit)
        except trio.BrokenResourceError as exc:
            raise _broken(stream, visit.service) from exc
        finally:
            socket.close()

    # HTTP -----------------------------------------------------------------------------------------------------

    async def _exchange(self, local: _Local) -> None:
        """The innermost handler of a local request."""
        try:
            await self._request(local)
            local.outcome = "ok"
        except Failure as exc:
            local.outcome = exc.outcome
            local.error = exc.text
            raise
        except trio.Cancelled:
            visit = local.visit
            if visit.timed_out:
                local.outcome, local.error = "timeout", f"{local.address} did not answer in time"
            else:
                failure = visit.stream.failure
                local.outcome = BY_CODE[failure[0]].name if failure and failure[0] in BY_CODE else "link_lost"
            raise

    async def _request(self, local: _Local) -> None:
        visit = local.visit
        stream, opened = visit.stream, visit.opened
        visit.deadline = visit.started + self._limit(opened)
        head = _local_head(local.head, local.headers, opened.length)
        method = local.head[: local.head.index(b" ")]
        try:
            # Before an upgrade there is no body; what comes on the stream then is for `_upgraded` alone.
            upgrading = opened.protocol == frames.UPGRADE
            if upgrading or (stream.ended and not stream.trailers and opened.length >= frames.NO_BODY):
                body = b"" if upgrading else _whole_body(stream)
                local.bytes_in = len(body)
                answer, socket = await self._ask(local, method, head + body)
                await self._relay(local, socket, answer)
            else:
                await self._streamed(local, method, head)
        finally:
            if local.socket is not None:
                local.socket.close()

    def _limit(self, opened: Open) -> float:
        """Seconds to the answer's head."""
        return min(self._request_timeout, opened.deadline_ms / 1000 or self._request_timeout)

    async def _ask(self, local: _Local, method: bytes, request: bytes) -> tuple[Answer, Socket]:
        """Send a whole request and read the answer's head; once more if a kept connection was dead all along.

        Dead all along: closed by the service before any byte of the request came to it. All else may have been seen
        by the service and is never sent again, whatever the method.
        """
        service = local.visit.service
        socket = service.take_idle()
        if socket is not None:
            local.socket = socket
            sent = -1
            try:
                sent = socket.send_nowait(request)
                if sent < len(request):
                    await socket.send(request[sent:])
                return await self._read_head(local, socket, method), socket
            except trio.BrokenResourceError as exc:
                if sent >= 0 or method not in IDEMPOTENT:
                    raise Failure("local_broken", f"{service.address} broke the connection off") from exc
            except Failure as exc:
                # "nothing" is _read_head's word for an end without a byte
                if method not in IDEMPOTENT or exc.text != _nothing(service) or not socket.is_unread(len(request)):
                    raise
            socket.close()
        local.socket = socket = await service.connect()
        local.marks["connected"] = monotonic()
        try:
            await socket.send(request)
            return await self._read_head(local, socket, method), socket
        except trio.BrokenResourceError as exc:
            raise Failure("local_broken", f"{service.address} broke the connection off ({exc})") from exc

    async def _read_head(self, local: _Local, socket: Socket, method: bytes) -> Answer:
        """The answer's head; interim ones are passed on. Raises Failure, trio.BrokenResourceError."""
        data = b""
        interims = 0
        while True:
            end = find_head(data) if data else 0
            if end:
                answer = parse_answer(data, end, method)
                if not frames.is_interim(answer.status):
                    local.marks["first_byte"] = monotonic()
                    local.status = answer.status
                    return answer
                interims += 1
                if interims > frames.MAX_INTERIMS:
                    raise Failure(
                        "local_broken", f"{local.address} sends more than {frames.MAX_INTERIMS} interim answers"
                    )
                self._respond(local, answer, b"", False)
                data = answer.rest
                continue
            part = await (socket.recv() if data else socket.recv_later())
            if not part:
                if not data:
                    raise Failure("local_broken", _nothing(local.visit.service))
                raise Failure("local_broken", f"{local.address} closed the connection within the answer's head")
            data = data + part if data else part
            if len(data) > 4 * MAX_HEAD and not find_head(data):
                raise Failure("local_broken", f"{local.address} sends no end of the answer's head")

    def _respond(self, local: _Local, answer: Answer, body: bytes, end: bool) -> None:
        visit = local.visit
        now = monotonic()
        response = Response(
            answer.status,
            answer.length,
            int((now - visit.started) * 1e6),
            int((now - local.started) * 1e6),
            answer.head,
        )
        if end:
            local.marks["last_byte"] = visit.marks["last_byte"] = now
        if visit.stream.failure is None:
            visit.stream.link.session.respond(visit.stream, response, body, end)

    async def _relay(self, local: _Local, socket: Socket, answer: Answer) -> None:
        """Pass the answer on, head and body; the connection is kept if it may be."""
        visit = local.visit
        visit.deadline = float("inf")
        session = visit.stream.link.session
        if answer.status == 101:
            await self._upgraded(local, socket, answer)
            return
        rest = answer.rest
        if answer.length <= len(rest) and not answer.chunked and answer.length != UNKNOWN:
            # The common small answer: all of it is here. (A HEAD's length is no body.)
            whole = 0 if _is_bodiless(local, answer) else max(answer.length, 0)
            if session.can_carry(visit.stream, whole):
                body = rest[:whole]
                local.bytes_out = whole
                self._respond(local, answer, body, True)
                if answer.keep_alive and len(rest) == whole:
                    local.visit.service.keep(socket)
                    local.socket = None
                return
        if _is_bodiless(local, answer):
            self._respond(local, answer, b"", True)
            if answer.keep_alive and not rest:
                local.visit.service.keep(socket)
                local.socket = None
            return
        self._respond(local, answer, b"", False)
        if _EVENT_STREAM.search(answer.head):
            local.marks["event"] = local.marks["first_byte"]  # it may go on all day: durations end here
        if answer.chunked:
            clean = await self._relay_chunks(local, socket, answer)
        elif answer.length >= 0:
            clean = await self._relay_counted(local, socket, answer)
        else:
            clean = await self._relay_to_end(local, socket, answer)
        # What is left to do here is no part of the exchange: at the core it may be over before.
        local.marks["last_byte"] = visit.marks["last_byte"] = monotonic()
        if clean and answer.keep_alive:
            local.visit.service.keep(socket)
            local.socket = None

    async def _relay_counted(self, local: _Local, socket: Socket, answer: Answer) -> bool:
        stream = local.visit.stream
        part, left = answer.rest, answer.length
        while True:
            clean = len(part) <= left
            if not clean:
                part = part[:left]
            if part:
                left -= len(part)
                local.bytes_out += len(part)
                await stream.send(part, end=not left)
                if not left:
                    return clean
            part = await self._receive(local, socket)
            if not part:
                raise Failure(
                    "local_broken", f"{local.address} broke off after {answer.length - left} of {answer.length} bytes"
                )

    async def _relay_chunks(self, local: _Local, socket: Socket, answer: Answer) -> bool:
        stream = local.visit.stream
        chunks = Chunks()
        data = answer.rest
        while True:
            if part := b"".join(chunks.feed(data)):
                local.bytes_out += len(part)
                await stream.send(part)
            if chunks.ended:
                stream.finish(chunks.trailers)
                return not chunks.rest
            data = await self._receive(local, socket)
            if not data:
                raise Failure("local_broken", f"{local.address} broke off in the middle of a chunked answer")

    async def _relay_to_end(self, local: _Local, socket: Socket, answer: Answer) -> bool:
        stream = local.visit.stream
        part = answer.rest
        while True:
            if part:
                local.bytes_out += len(part)
                await stream.send(part)
            part = await self._receive(local, socket)
            if not part:
                stream.finish()
                return False

    async def _receive(self, local: _Local, socket: Socket) -> bytes:
        try:
            return await socket.recv()
        except trio.BrokenResourceError as exc:
            raise Failure("local_broken", f"{local.address} broke off within the answer ({exc})") from exc

    async def _upgraded(self, local: _Local, socket: Socket, answer: Answer) -> None:
        visit = local.visit
        asked = upgrade_of(visit.opened.head) if visit.opened.protocol == frames.UPGRADE else b""
        if not is_among(answer.upgrade, asked):
            raise Failure("local_broken", f"{local.address} switched protocols unasked")
        local.marks["upgraded"] = monotonic()
        self._respond(local, answer, b"", False)
        try:
            if answer.rest:
                local.bytes_out += len(answer.rest)
                await visit.stream.send(answer.rest)
            await join(RawStream(visit.stream), socket, local)
        except trio.BrokenResourceError as exc:
            raise _broken(visit.stream, visit.service) from exc

    # Requests whose body is not here yet ----------------------------------------------------------------------

    async def _streamed(self, local: _Local, method: bytes, head: bytes) -> None:
        """Send the body as it comes while the answer may already be on its way."""
        service = local.visit.service
        # A fresh connection: a body that is gone can't be sent again if a kept one turns out to be dead.
        local.socket = socket = await service.connect()
        local.marks["connected"] = monotonic()
        complete = False

        async def upload() -> None:
            nonlocal complete
            try:
                await self._upload(local, socket)
                complete = True
            except trio.BrokenResourceError:
                pass  # the service stopped reading; what it has to say comes in the answer, or its absence

        async with open_pair() as nursery:
            try:
                await socket.send(head)
            except trio.BrokenResourceError as exc:
                raise Failure("local_broken", f"{service.address} broke the connection off ({exc})") from exc
            nursery.start_soon(upload)
            try:
                answer = await self._read_head(local, socket, method)
            except trio.BrokenResourceError as exc:
                raise Failure("local_broken", f"{service.address} broke the connection off ({exc})") from exc
            await self._relay(local, socket, answer._replace(keep_alive=answer.keep_alive and complete))
            nursery.cancel_scope.cancel()

    async def _upload(self, local: _Local, socket: Socket) -> None:
        visit = local.visit
        stream = visit.stream
        chunked = visit.opened.length == UNKNOWN
        while True:
            visit.deadline = float("inf")  # the visitor is waited for, and the core watches that
            part = await stream.receive()
            if not local.status:
                visit.deadline = monotonic() + self._limit(visit.opened)
            if not part:
                break
            local.bytes_in += len(part)
            await socket.send(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
        if chunked:
            if stream.trailers and not check_trailers(stream.trailers):
                raise Failure("bad_request", "the request's trailer fields that came over the link are not valid")
            await socket.send(b"0\r\n" + stream.trailers + b"\r\n")
        elif 0 <= visit.opened.length != local.bytes_in:
            raise Failure("bad_request", "the request's body is not as long as it said")


async def join(stream: RawStream, socket: Socket, visit: StreamVisit | LocalVisit) -> None:
    """Raw bytes both ways until both directions ended. Raises trio.BrokenResourceError."""

    async def inwards() -> None:
        while data := await stream.receive_some():
            visit.bytes_in += len(data)
            await socket.send(data)
        socket.shutdown()

    async with open_pair() as nursery:
        nursery.start_soon(inwards)
        while data := await socket.recv():
            visit.bytes_out += len(data)
            await stream.send_all(data)
        await stream.send_eof()


def _broken(stream: Stream, service: Service) -> Failure:
    """Which side a raw connection broke on."""
    if stream.failure is not None:
        row = BY_CODE.get(stream.failure[0], OUTCOMES["link_lost"])
        return Failure(row.name, stream.failure[1])
    return Failure("local_broken", f"{service.address} broke the connection off")


def _nothing(service: Service) -> str:
    return f"{service.address} closed the connection without an answer"


def _is_bodiless(local: _Local, answer: Answer) -> bool:
    return local.method == "HEAD" or answer.status in (204, 304) or answer.length == frames.NO_BODY


def _whole_body(stream: Stream) -> bytes:
    session = stream.link.session
    body = session.next_part(stream)
    while part := session.next_part(stream):
        body += part
    return body


def _read_context(visit: StreamVisit, context: bytes) -> None:
    for line in context.decode("latin-1").split("\r\n"):
        name, found, value = line.partition(": ")
        if found:
            visit.headers[name] = value
    visit.request_id = visit.headers.pop("request-id", "")


def _local_head(head: bytes, extra: dict[str, str], length: int) -> bytes:
    """The head as the local service gets it: a layer's fields in place of those of the same name, and our framing."""
    if extra:
        present = head.lower()
        for name, value in extra.items():
            field = name.encode("latin-1", "replace") + b": "
            if b"\n" + field in present:  # names in `headers` are lower case
                head = re.sub(rb"(?im)^" + re.escape(field) + rb"[^\r\n]*\r\n", b"", head)
            head += field + value.encode("latin-1", "replace") + b"\r\n"
    if length >= 0:
        return head + b"Content-Length: %d\r\n\r\n" % length
    if length == UNKNOWN:
        return head + b"Transfer-Encoding: chunked\r\n\r\n"
    return head + b"\r\n"
