"""One public request: read its head, find its tunnel, open a stream, pass the bodies both ways, answer.

The visitor's own task does all of it; a second one exists only while a body is still coming in, or both ways at once
after an upgrade. Errors become answers in one place, `Exchanger.handle`: a Failure names its outcome, and the table in
tunnel/errors.py says what everybody is told.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING

import trio

from tunnel.core.database import StoreError
from tunnel.core.forwarding import Forwarding
from tunnel.core.hostnames import normalise_host
from tunnel.core.limits import Counts, no_refusals
from tunnel.core.quotas import Account
from tunnel.core.registry import AgentLink, Registry, Tunnel
from tunnel.core.visitor import ANSWER, BODY, HEAD, RAW, Visitor
from tunnel.errors import OUTCOMES, UNSENT, Failure
from tunnel.handler import Layer, RequestVisit, StreamVisit, wrap
from tunnel.http.answers import answer as make_answer
from tunnel.http.chunks import Chunks
from tunnel.http.heads import (
    CHUNKED,
    Head,
    check_relayed,
    check_trailers,
    forwarded_head,
    is_among,
    is_request_id,
    parse_request,
    split_words,
    upgrade_of,
)
from tunnel.http.response import has_no_body
from tunnel.link.stream import RawStream, Stream
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.wire import frames
from tunnel.wire.frames import NO_BODY, SMALL_BODY, UNKNOWN, Open, Response
from tunnel.wire.held import Held

if TYPE_CHECKING:
    from tunnel.core.accounts import Accounts
    from tunnel.core.elsewhere import Elsewhere

log = get_logger("tunnel.core")

FOREVER = float("inf")
_random = random.Random()
_EVENT_STREAM = re.compile(rb"(?i)\ncontent-type: text/event-stream")
_METHOD_BYTES = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_FIRST = _METHOD_BYTES | frozenset(b"\r")  # of a connection's next request
_METHOD = re.compile(rb"([A-Za-z-]{1,20}) ")
#: may be tried on another link once it is sure that no local service got them (RFC 9110, 9.2.2)
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
TRIES = 3  #: links that one request is offered to
REFUSED_METHODS = frozenset({b"CONNECT", b"TRACE"})
_USUAL_METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})
COALESCE = 64 * 1024  #: small parts that wait together are written together


class Request(RequestVisit):
    """A public request being handled."""

    __slots__ = (
        "aborted",
        "accept",
        "account",
        "body_over",
        "continued",
        "expired",
        "head",
        "head_written",
        "keep_alive",
        "reading",
        "refusal",
        "stream",
        "visitor",
        "writing",
    )

    def __init__(self, visitor: Visitor) -> None:
        super().__init__(visitor.address, visitor.proto)
        self.visitor = visitor
        self.head: Head | None = None
        self.accept = b""
        self.account: Account | None = None
        self.stream: Stream | None = None
        self.keep_alive = False
        self.body_over = False  # all of the request's body has been read
        self.head_written = False
        self.continued = False
        self.aborted = ""
        self.expired = False
        self.refusal: Exception | None = None  # why the head could not be read or was not taken
        self.reading = False  # waits for the visitor's body
        self.writing = False  # waits for the visitor to take bytes

    @property
    def is_waiting_for_100(self) -> bool:
        """The visitor sends no body before the local service asks for it."""
        return self.head is not None and self.head.expects_continue and not self.continued and not self.bytes_in

    def abort(self, text: str) -> None:
        """The visitor is gone: end the work at the agent."""
        self.aborted = text
        if self.stream is not None:
            self.stream.reset("visitor_aborted", text)
        self.visitor.socket.abort()

    def expire(self) -> None:
        """The deadline of the present phase has passed; whose fault that is depends on who is waited for."""
        self.expired = True
        if self.stream is None:
            self.visitor.socket.close()
        elif self.writing:
            self.abort("the visitor did not take the answer in time")
        elif self.reading and not self.is_waiting_for_100:
            self.stream.reset("request_timeout", "the request's body did not arrive in time")
        else:
            self.stream.reset("timeout", "no answer from the local service in time")


class _Stream(StreamVisit):
    """A request's stream, with what is needed to open it."""

    __slots__ = ("agent", "body", "complete", "request", "tunnel_entry")

    def __init__(self, request: Request, protocol: str, agent: AgentLink, tunnel: Tunnel) -> None:
        super().__init__(request, protocol)
        self.request = request
        self.agent = agent
        self.tunnel_entry = tunnel
        self.tunnel = tunnel.name
        self.connection_id = agent.visit.connection_id
        self.agent_id = agent.visit.agent_id
        self.account_id = agent.account.id
        self.method = request.method
        self.target = request.target
        self.request_id = request.request_id
        self.offset = agent.link.offset
        self.body = b""
        self.complete = True


class Exchanger:
    """Handles requests. on_finished hears of each one that ended (for a live status)."""

    def __init__(
        self,
        registry: Registry,
        accounts: Accounts,
        layers: Sequence[Layer],
        forwarding: Forwarding,
        *,
        max_head: int,
        max_target: int,
        max_body: int,
        head_timeout: float,
        request_timeout: float,
        body_idle_timeout: float,
        server_timing: bool,
        max_fields: int = 0,
        max_requests: int = 0,
        refusals: Counts | None = None,
        held: Held | None = None,
    ) -> None:
        self.active = 0  # requests and TCP connections under way
        self._idle = trio.Event()
        self.bytes_in = 0
        self.bytes_out = 0
        self.is_draining = False
        self.on_finished: Callable[[RequestVisit], None] | None = None
        self.elsewhere: Elsewhere | None = None  # other processes of this core
        self.handle_request = wrap(self.handle, layers)
        self._handle_stream = wrap(self._stream, layers)
        self._registry = registry
        self._accounts = accounts
        self.refusals = no_refusals() if refusals is None else refusals
        self.forwarding = forwarding
        self._held = Held() if held is None else held
        self._max_fields = max_fields
        self._max_requests = max_requests
        self._max_head = max_head
        self._max_target = max_target
        self._max_body = max_body
        self._head_timeout = head_timeout
        self._request_timeout = request_timeout
        self._idle_timeout = body_idle_timeout
        self._server_timing = server_timing

    async def serve(self, visitor: Visitor) -> bool:
        """One request on a connection that has sent its first bytes; says whether the connection may go on."""
        request = Request(visitor)
        visitor.request = request
        visitor.served += 1
        visitor.begin(HEAD, self._head_timeout)
        self.active += 1
        try:
            await self._receive_head(request)
            elsewhere = self.elsewhere
            if elsewhere is not None and elsewhere.serves(request) and await elsewhere.take(request):
                return False
            await self.handle_request(request)
        finally:
            self.finished()
            visitor.request = None
            self.bytes_in += request.bytes_in
            self.bytes_out += request.bytes_out
            if self.on_finished is not None:
                self.on_finished(request)
        return request.keep_alive

    def finished(self) -> None:
        """One of the `active` has ended."""
        self.active -= 1
        if not self.active:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until nothing is under way."""
        while self.active:
            self._idle = trio.Event()
            await self._idle.wait()

    async def handle(self, request: Request) -> None:
        """The innermost handler of a request. Raises nothing but Cancelled."""
        try:
            if request.refusal is not None:
                raise request.refusal
            await self._forward(request)
            request.outcome = "ok"
            if request.status >= 500 and not request.error:
                request.error = f"the local service answered {request.status}"
        except Failure as exc:
            await self._fail(request, exc)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            request.keep_alive = False
            if request.expired and not request.aborted:
                await self._fail(request, Failure("request_timeout"))
            else:
                await self._fail(request, Failure("visitor_aborted", request.aborted))
        except trio.Cancelled:
            self._cut(request)
            raise
        except Exception as exc:
            log.error("request broke", request_id=request.request_id, error=exc)
            await self._fail(request, Failure("internal"))

    # The head -------------------------------------------------------------------------------------------------

    async def _receive_head(self, request: Request) -> None:
        """Before the layers are entered: they look at what it says, whose trace it is for one thing."""
        try:
            await self._read_head(request)
        except Exception as exc:
            request.refusal = exc  # `handle` answers
        except trio.Cancelled:
            self._cut(request)
            raise

    async def _read_head(self, request: Request) -> None:
        visitor = request.visitor
        data = visitor.buffer
        first = _FIRST
        while True:
            if first is _FIRST and data.startswith(b"\r\n"):
                data = data[2:]  # RFC 9112, 2.2: an empty line before the request is skipped, one
                first = _METHOD_BYTES
            if data and data[0] not in first:
                self._name(request, b"")
                what = "it is TLS, and this port speaks plain HTTP" if data[0] == 0x16 else "it begins with no method"
                raise Failure("bad_request", what)
            end = data.find(b"\r\n\r\n") + 4
            if end >= 4 and end <= self._max_head:
                break
            if end >= 4 or len(data) > self._max_head:
                self._name(request, data)
                line = data.find(b"\r\n")
                if line < 0 or line > self._max_target + 64:
                    raise Failure("uri_too_long", f"the address is longer than {self._max_target} bytes")
                raise Failure("head_too_large", f"the head is larger than {self._max_head} bytes")
            if b"\n\n" in data or b"\n\r\n" in data:  # CRLF CRLF is not in it
                self._name(request, data)
                raise Failure("bad_request", "a line does not end with CRLF")
            try:
                part = await visitor.socket.recv()
            except trio.ClosedResourceError:
                if not request.expired:
                    raise
                self._name(request, data)  # the deadline only woke us: there is somebody to tell
                raise Failure("request_timeout", "the request's head did not arrive in time") from None
            if not part:
                if data:
                    self._name(request, data)
                    request.aborted = "the visitor closed the connection within the request's head"
                raise trio.BrokenResourceError
            data += part
        visitor.buffer = data[end:]
        visitor.deadline = FOREVER
        raw = data[:end]
        try:
            head = parse_request(raw, self._max_target)
        except Failure:
            self._name(request, raw)
            raise
        self._take_head(request, head)

    def _name(self, request: Request, data: bytes) -> None:
        """Facts for the log and the answer of a request whose head was not understood."""
        match = _METHOD.match(data)
        request.method = match[1].decode().upper() if match else "-"
        request.request_id = make_request_id()

    def _take_head(self, request: Request, head: Head) -> None:
        request.marks["head"] = monotonic()
        request.head = head
        request.method = head.method.decode()
        request.target = head.target.decode("latin-1")
        request.http_version = head.version.decode()
        for name, _, value in head.fields:
            if name == b"x-request-id" and is_request_id(value):
                request.request_id = value.decode()
            elif name == b"accept":
                request.accept = value
        if not request.request_id:
            request.request_id = make_request_id()
        request.request_headers = [(name, value) for _, name, value in head.fields]
        request.body_over = head.length is None or head.length == 0
        if self._max_fields and len(head.fields) > self._max_fields:
            text = f"the head has {len(head.fields)} fields; {self._max_fields} are accepted"
            raise Failure("head_too_large", text, limit="header_count")
        words = head.connection
        request.keep_alive = b"close" not in words and (head.version == b"1.1" or b"keep-alive" in words)
        if b"upgrade" in words:
            # Granted or not: who is in front of us may take what follows, a body too, for the new protocol's.
            request.keep_alive = False
        if request.keep_alive and 0 < self._max_requests <= request.visitor.served:
            request.keep_alive = False
            self.refusals["connection_requests"] += 1
        try:
            # HTTP/1.0 needs no Host (RFC 9112, 3.2); then no tunnel is named.
            request.host = normalise_host(head.host) if head.host or head.version == b"1.1" else ""
        except ValueError as exc:
            raise Failure("bad_request", str(exc)) from exc
        if head.method not in _USUAL_METHODS:
            _check_method(head.method)

    # Where to -------------------------------------------------------------------------------------------------

    async def _forward(self, request: Request) -> None:
        head = request.head
        assert head is not None
        tunnel = self._registry.find(request.host)
        if tunnel is None or tunnel.protocol != "http" or not tunnel.links:
            await self._explain_missing(request, tunnel)
            return
        request.tunnel = tunnel.name
        account = tunnel.links[0].account
        request.account = account
        request.account_id = account.id
        self.check_memory()
        account.admit_request()
        if self._max_body and head.length is not None and head.length > self._max_body:
            raise Failure("body_too_large", f"{head.length} bytes; {self._max_body} are accepted")
        protocol = "upgrade" if head.upgrade and self._takes_upgrade(request, head) else "http"
        stream = _Stream(request, protocol, self._assign(request, tunnel), tunnel)
        self._take_small_body(request, stream)
        tried: list[AgentLink] = []
        while True:
            try:
                await self._handle_stream(stream)
                return
            except Failure as exc:
                tried.append(stream.agent)
                if not self._may_try_again(stream, exc, tried):
                    raise
            again = _Stream(request, protocol, self._assign(request, tunnel, tried), tunnel)
            again.body, stream = stream.body, again

    def _takes_upgrade(self, request: Request, head: Head) -> bool:
        """Whether the upgrade is passed on. Raises Failure for data that could be the new protocol's already."""
        if b"upgrade" not in head.connection or not request.body_over or not _may_upgrade(head):
            return False
        if request.visitor.buffer:
            raise Failure("bad_request", "data follows a request for an upgrade before its answer")
        return True

    def check_memory(self) -> None:
        """Raises Failure while the links hold as many bytes as they may."""
        if self._held.is_full:
            raise Failure("overloaded", "the core holds as many unread bytes as it may", retry_after=1, limit="buffer")

    def _assign(self, request: Request, tunnel: Tunnel, tried: Sequence[AgentLink] = ()) -> AgentLink:
        agent = tunnel.choose(tried)
        request.agent_id = agent.visit.agent_id
        request.connection_id = agent.visit.connection_id
        return agent

    def _may_try_again(self, visit: _Stream, failure: Failure, tried: Sequence[AgentLink]) -> bool:
        """Whether another link may have the request: surely no local service got it, and all of it is still here.

        Sure is (1) an agent that says so by the outcome of its reset, (2) a link that ended before the OPEN had left
        its queue. A link that ended later may have brought the request: that is never sent twice.
        """
        request, stream = visit.request, visit.request.stream
        if request.method not in IDEMPOTENT or not visit.complete or request.head_written or request.aborted:
            return False
        if stream is None or not (stream.unsent or (failure.outcome in UNSENT and stream.failure is not None)):
            return False
        others = any(one.has_room and one not in tried for one in visit.tunnel_entry.links)
        return others and len(tried) < TRIES and not request.expired and not self.is_draining

    async def _explain_missing(self, request: Request, tunnel: Tunnel | None) -> None:
        """Raises Failure: no_agent for a name that is reserved or held, no_tunnel for one that nobody has."""
        name = tunnel.name if tunnel is not None else self._registry.name_of(request.host)
        if tunnel is not None and tunnel.protocol != "http":
            raise Failure("no_tunnel", f"{name} is a TCP tunnel on port {tunnel.port}")
        try:
            owner = tunnel.account_id if tunnel is not None else await self._accounts.owner_of(name, parent=request)
        except StoreError as exc:
            text = "nobody serves this name now, and the store does not answer whose it is"
            raise Failure("internal", text, retry_after=5) from exc
        if owner is not None:
            request.tunnel = name
            raise Failure("no_agent", f"no agent is connected for {name}", retry_after=5)
        raise Failure("no_tunnel", f"nothing is served under {request.host}" if request.host else "no host was named")

    def _take_small_body(self, request: Request, stream: _Stream) -> None:
        """A body that is here already and small rides in the opening frame."""
        head, visitor = request.head, request.visitor
        assert head is not None
        length = head.length or 0
        if length == 0:
            return
        if 0 < length <= SMALL_BODY and len(visitor.buffer) >= length and not head.expects_continue:
            stream.body, visitor.buffer = visitor.buffer[:length], visitor.buffer[length:]
            request.body_over = True
        else:
            stream.complete = False

    # The stream -----------------------------------------------------------------------------------------------

    async def _stream(self, visit: _Stream) -> None:
        """The innermost handler of a stream."""
        request = visit.request
        try:
            self._open(visit)
            if visit.complete:
                await self._answer(visit)
            else:
                async with open_pair() as nursery:
                    nursery.start_soon(self._upload, visit)
                    await self._answer(visit)
                    nursery.cancel_scope.cancel()
            visit.outcome = "ok"
        except Failure as exc:
            visit.outcome = exc.outcome
            visit.error = (exc.text or OUTCOMES[exc.outcome].title) if OUTCOMES[exc.outcome].failed else ""
            raise
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            visit.outcome = "visitor_aborted"
            raise
        except trio.Cancelled:
            visit.outcome = "draining"
            raise
        finally:
            visit.status = request.status
            visit.bytes_in, visit.bytes_out = request.bytes_in, request.bytes_out
            stream = request.stream
            if stream is not None and (not stream.is_over or stream.inbox):
                stream.reset(visit.outcome or "internal")

    def _open(self, visit: _Stream) -> None:
        request = visit.request
        head, agent = request.head, visit.agent
        assert head is not None
        context = f"request-id: {request.request_id}\r\n"
        for name, value in visit.headers.items():
            if len(context) + len(name) + len(value) < frames.MAX_CONTEXT - 4:
                context += f"{name}: {value}\r\n"
        is_upgrade = visit.protocol == "upgrade"
        length = NO_BODY if head.length is None else UNKNOWN if head.length == CHUNKED else head.length
        forwarded = forwarded_head(head, self.forwarding.fields(request), upgrade=is_upgrade)
        if len(forwarded) > frames.MAX_HEAD:
            raise Failure("head_too_large", f"the link carries heads of {frames.MAX_HEAD} bytes")
        opened = Open(
            frames.UPGRADE if is_upgrade else frames.HTTP,
            agent.indexes[visit.tunnel],
            int(self._request_timeout * 1000),
            length,
            context.encode("latin-1", "replace"),
            forwarded,
        )
        session = agent.link.session
        end = visit.complete and not is_upgrade
        if visit.body and not session.can_carry(None, len(visit.body)):
            raise Failure("overloaded", "the link to the agent is full", retry_after=1, limit="link_buffer")
        stream = session.open(opened, visit.body, end)
        if visit.body and not request.bytes_in:  # not again on a second link
            request.bytes_in = len(visit.body)
            assert request.account is not None
            request.account.take_bytes(request.bytes_in, 0)  # what it owes is waited for with the answer
        request.stream = stream  # type: ignore[assignment]  # made by Link._make_stream
        visit.stream_id = stream.id
        request.marks["opened"] = monotonic()
        request.visitor.begin(ANSWER, self._request_timeout)

    async def _upload(self, visit: _Stream) -> None:
        """Pass the request's body on as it comes; what is wrong with it fails the stream and so the answer."""
        request = visit.request
        stream = request.stream
        assert stream is not None
        try:
            assert request.head is not None
            if request.head.length == CHUNKED:
                await self._upload_chunks(request, stream)
            else:
                await self._upload_counted(request, stream, request.head.length or 0)
        except Failure as exc:
            if exc.outcome != "ok":  # ok: answered early, nobody wants the rest
                stream.reset(exc.outcome, exc.text)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if not stream.is_over:
                request.abort("the visitor closed the connection within the request's body")

    async def _upload_counted(self, request: Request, stream: Stream, length: int) -> None:
        visitor = request.visitor
        left = length
        while left:
            part = visitor.buffer or await self._read_body(request)
            visitor.buffer = part[left:]
            part = part[:left]
            left -= len(part)
            await self._pass_up(request, stream, part, end=not left)
        request.body_over = True

    async def _upload_chunks(self, request: Request, stream: Stream) -> None:
        visitor = request.visitor
        chunks = Chunks("bad_request")
        data, visitor.buffer = visitor.buffer, b""
        while True:
            if part := b"".join(chunks.feed(data)):  # a frame for what came together, not one for each tiny chunk
                if self._max_body and request.bytes_in + len(part) > self._max_body:
                    raise Failure("body_too_large", f"{self._max_body} bytes are accepted")
                await self._pass_up(request, stream, part)
            if chunks.ended:
                visitor.buffer = chunks.rest
                stream.finish(chunks.trailers)
                request.body_over = True
                return
            data = await self._read_body(request)

    async def _read_body(self, request: Request) -> bytes:
        request.reading = True
        request.visitor.deadline = max(request.visitor.deadline, monotonic() + self._idle_timeout)
        try:
            part = await request.visitor.socket.recv()
        finally:
            request.reading = False
        if not part:
            raise trio.BrokenResourceError
        return part

    async def _pass_up(self, request: Request, stream: Stream, part: bytes, end: bool = False) -> None:
        assert request.account is not None
        request.bytes_in += len(part)
        await stream.send(part, end=end)
        if not request.head_written:
            request.visitor.deadline = max(request.visitor.deadline, monotonic() + self._request_timeout)
        delay = request.account.take_bytes(len(part), 0)
        if delay:
            await self._pause(request, delay)

    async def _pause(self, request: Request, delay: float) -> None:
        request.visitor.deadline += delay
        await trio.sleep(delay)

    # The answer -----------------------------------------------------------------------------------------------

    async def _answer(self, visit: _Stream) -> None:
        request = visit.request
        stream = request.stream
        assert stream is not None
        visitor = request.visitor
        while True:
            response = await stream.answer()
            if not frames.is_interim(response.status):
                break
            check_relayed(response.head)
            if request.http_version == "1.1":
                request.continued = request.continued or response.status == 100
                await self._write(request, b"HTTP/1.1 %d %b\r\n" % (response.status, response.head))
        request.marks["answered"] = monotonic()
        request.agent_us, request.local_us = response.agent_us, response.local_us
        check_relayed(response.head)
        if response.status == 101:
            await self._upgraded(visit, response)
            return
        request.status = response.status
        method = request.method.encode()
        bodiless = has_no_body(method, response.status)
        visitor.begin(BODY, self._idle_timeout)
        if bodiless:
            await self._write_head(request, self._compose(request, response, bodiless=True))
            return
        if stream.ended and not stream.trailers and stream.inbox_bytes <= SMALL_BODY:
            await self._write_whole(request, stream, response)
            return
        await self._relay(request, stream, response)

    def _compose(self, request: Request, response: Response, *, bodiless: bool) -> bytes:
        """The answer's head: what came from the agent, checked before, with our framing and fields."""
        if not request.body_over:
            request.keep_alive = False
        length = response.length
        if length >= 0 and response.status != 204:
            framing = b"Content-Length: %d\r\n" % length
        elif bodiless:
            framing = b""
        elif length == NO_BODY:
            framing = b"Content-Length: 0\r\n"
        elif request.http_version == "1.1":
            framing = b"Transfer-Encoding: chunked\r\n"
        else:
            framing = b""
            request.keep_alive = False
        if self.is_draining:
            request.keep_alive = False
        if response.status == 426:
            framing += b"Connection: Upgrade\r\n"
        if not request.keep_alive:
            framing += b"Connection: close\r\n"
        elif request.http_version == "1.0":
            framing += b"Connection: keep-alive\r\n"
        if self._server_timing:
            framing += self._timing(request)
        return b"HTTP/1.1 %d %b%bX-Request-Id: %b\r\n\r\n" % (
            response.status,
            response.head,
            framing,
            request.request_id.encode(),
        )

    def _timing(self, request: Request) -> bytes:
        """Server-Timing up to the first byte (W3C), in milliseconds; traceresponse (W3C Trace Context, level 2)."""
        now = monotonic()
        opened = request.marks.get("opened", now)
        waited = request.marks.get("answered", now) - opened
        agent = min(max(request.agent_us, 0) / 1e6, waited)
        local = min(max(request.local_us, 0) / 1e6, agent)
        core = now - request.started - waited
        text = (
            f"Server-Timing: core;dur={core * 1e3:.2f}, link;dur={(waited - agent) * 1e3:.2f}, "
            f"agent;dur={(agent - local) * 1e3:.2f}, local;dur={local * 1e3:.2f}\r\n"
        )
        if request.trace_id:
            text += f"traceresponse: 00-{request.trace_id}-{request.span_id}-{'01' if request.sampled else '00'}\r\n"
        return text.encode()

    async def _write_whole(self, request: Request, stream: Stream, response: Response) -> None:
        """The common small answer: all of it is here, and leaves in one write."""
        session = stream.link.session
        body = session.next_part(stream)
        while part := session.next_part(stream):
            body += part
        size = len(body)
        self._check_length(response, size, ended=True)
        request.bytes_out = size
        head = self._compose(request, response, bodiless=False)
        if response.length == UNKNOWN and request.http_version == "1.1":
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body) if size else b"0\r\n\r\n"
        assert request.account is not None
        delay = request.account.take_bytes(0, size)
        if delay:
            await self._pause(request, delay)
        await self._write_head(request, head + body)

    def _check_length(self, response: Response, size: int, *, ended: bool) -> None:
        """Raises Failure when the body is not as long as its head said."""
        length = max(response.length, 0) if response.length != UNKNOWN else size
        if size > length or (ended and size != length):
            raise Failure("local_broken", f"the answer's body has {size} bytes, its head said {length}")

    async def _relay(self, request: Request, stream: Stream, response: Response) -> None:
        visitor, account = request.visitor, request.account
        assert account is not None
        head = self._compose(request, response, bodiless=False)
        chunked = response.length == UNKNOWN and request.http_version == "1.1"
        request.event_stream = _EVENT_STREAM.search(response.head) is not None
        idle = FOREVER if request.event_stream else self._idle_timeout
        first_event = request.event_stream
        if not stream.inbox:
            await self._write_head(request, head)
            head = b""
        visitor.deadline = monotonic() + idle
        session = stream.link.session
        while part := await stream.receive():
            while stream.inbox and len(part) < COALESCE:
                part += session.next_part(stream)
            request.bytes_out += len(part)
            self._check_length(response, request.bytes_out, ended=False)
            data = b"%x\r\n%b\r\n" % (len(part), part) if chunked else part
            if head:
                await self._write_head(request, head + data)
                head = b""
            else:
                await self._write(request, data)
            if first_event:
                first_event = False
                request.marks["event"] = monotonic()
            delay = account.take_bytes(0, len(part))
            if delay:
                await self._pause(request, delay)
            visitor.deadline = monotonic() + idle
        self._check_length(response, request.bytes_out, ended=True)
        if chunked:
            if stream.trailers and not check_trailers(stream.trailers):
                raise Failure("local_broken", "the answer's trailer fields that came over the link are not valid")
            await self._write(request, head + b"0\r\n" + stream.trailers + b"\r\n")
        elif head:
            await self._write_head(request, head)

    async def _write_head(self, request: Request, data: bytes) -> None:
        request.head_written = True
        await self._write(request, data)
        request.marks["first_byte"] = monotonic()

    async def _write(self, request: Request, data: bytes) -> None:
        """To the visitor; a visitor who takes nothing is cut off by the deadline."""
        visitor = request.visitor
        sent = visitor.socket.send_nowait(data)
        if sent < len(data):
            request.writing = True
            visitor.deadline = monotonic() + self._idle_timeout
            try:
                # In slices, so that the deadline moves on as long as the visitor takes something.
                rest = memoryview(data)[sent:]
                while rest:
                    await visitor.socket.send(bytes(rest[:COALESCE]))
                    rest = rest[COALESCE:]
                    visitor.deadline = monotonic() + self._idle_timeout
            finally:
                request.writing = False
        visitor.wrote = monotonic()

    async def _upgraded(self, visit: _Stream, response: Response) -> None:
        """After a 101: raw bytes both ways until both directions ended."""
        request = visit.request
        stream, visitor, account = request.stream, request.visitor, request.account
        assert stream is not None and account is not None
        assert request.head is not None
        if visit.protocol != "upgrade" or not is_among(upgrade_of(response.head), request.head.upgrade):
            raise Failure("local_broken", "the local service switched protocols unasked")
        request.status = 101
        request.keep_alive = False
        head = b"HTTP/1.1 101 %bConnection: Upgrade\r\n%bX-Request-Id: %b\r\n\r\n" % (
            response.head,
            self._timing(request) if self._server_timing else b"",
            request.request_id.encode(),
        )
        await self._write_head(request, head)
        request.marks["upgraded"] = monotonic()
        visitor.phase, visitor.deadline = RAW, FOREVER
        try:
            await self.join(RawStream(stream), visitor, request, account)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # A visitor that drops an upgraded connection is its normal end; a link or service that does is not.
            visitor.socket.abort()
            if stream.failure is not None and not request.aborted:
                stream.raise_failure()

    async def join(
        self, stream: RawStream, visitor: Visitor, visit: RequestVisit | StreamVisit, account: Account
    ) -> None:
        """Raw bytes both ways, with half-close and shaping. Raises as `RawStream` and `Socket` do."""

        async def inwards() -> None:
            data, visitor.buffer = visitor.buffer, b""
            while data := data or await visitor.socket.recv():
                visit.bytes_in += len(data)
                await stream.send_all(data)
                delay = account.take_bytes(len(data), 0)
                if delay:
                    await trio.sleep(delay)
                data = b""
            await stream.send_eof()

        async with open_pair() as nursery:
            nursery.start_soon(inwards)
            while data := await stream.receive_some():
                visit.bytes_out += len(data)
                await visitor.socket.send(data)
                delay = account.take_bytes(0, len(data))
                if delay:
                    await trio.sleep(delay)
            visitor.socket.shutdown()

    # When it fails --------------------------------------------------------------------------------------------

    async def _fail(self, request: Request, failure: Failure) -> None:
        """The one place where a failure becomes an answer."""
        row = OUTCOMES[failure.outcome]
        if row.name == "ok":
            row = OUTCOMES["link_lost"]  # the agent said "done" before it answered
        request.outcome = row.name
        if failure.limit:
            self.refusals[failure.limit] += 1
        if row.failed:
            request.error = failure.text or row.title
        if request.head_written:
            # Too late for another answer: break this one off so that nobody takes it for complete.
            request.keep_alive = False
            if request.status == 101 or row.name == "visitor_aborted":
                request.status = request.status if request.status == 101 else row.status
            request.visitor.socket.abort()
            return
        request.status = failure.status or row.status
        if row.name == "visitor_aborted":
            request.keep_alive = False
            return
        self._skip_small_body(request)
        if not request.body_over or row.name in (
            "bad_request",
            "request_timeout",
            "head_too_large",
            "uri_too_long",
            "method_not_allowed",
        ):
            request.keep_alive = False
        _, head, body = make_answer(
            row.name,
            request_id=request.request_id,
            accept=request.accept,
            method=request.method,
            host=request.host,
            detail=failure.text,
            retry_after=failure.retry_after,
            status=failure.status,
            http_version=request.http_version,
            close=not request.keep_alive,
        )
        if self._server_timing:
            head = head[:-2] + self._timing(request) + b"\r\n"
        if request.http_version == "1.0":
            request.keep_alive = False
        request.visitor.begin(BODY, self._idle_timeout)
        try:
            await self._write_head(request, head + body)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            request.keep_alive = False

    def _skip_small_body(self, request: Request) -> None:
        """A body that is here already need not cost the connection."""
        head, visitor = request.head, request.visitor
        if head is None or request.body_over or request.bytes_in:
            return
        length = head.length or 0
        if 0 < length <= len(visitor.buffer):
            visitor.buffer = visitor.buffer[length:]
            request.body_over = True

    def _cut(self, request: Request) -> None:
        """The drain's deadline has come: answer at once if there is no answer yet, else break off."""
        request.keep_alive = False
        request.outcome = "draining"
        request.error = OUTCOMES["draining"].title
        if request.stream is not None:
            request.stream.reset("draining", "the core is shutting down")
        if request.method and not request.head_written:
            request.status = OUTCOMES["draining"].status
            _, head, body = make_answer(
                "draining", request_id=request.request_id, accept=request.accept, method=request.method, close=True
            )
            try:
                request.visitor.socket.send_nowait(head + body)
                request.visitor.socket.close()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
        else:
            request.visitor.socket.abort()


def _check_method(method: bytes) -> None:
    """In any case: to some services "connect" is CONNECT, and an answer to "head" would end where nobody knows."""
    upper = method.upper()
    if upper in REFUSED_METHODS:
        raise Failure("method_not_allowed", f"{upper.decode()} is not passed through the tunnel")
    if upper == b"HEAD":
        raise Failure("bad_request", "the method HEAD is written in capitals")


def _may_upgrade(head: Head) -> bool:
    """Not from HTTP/1.0 (RFC 9110, 7.8), and not to h2c, which would pass requests by that nobody has checked."""
    return head.version == b"1.1" and not any(
        word.startswith((b"h2", b"http", b"tls")) for word in split_words(head.upgrade.lower())
    )


def make_request_id() -> str:
    """Unique, not secret: 64 random bits."""
    return f"{_random.getrandbits(64):016x}"
