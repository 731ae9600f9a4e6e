"""The answer on its way to the visitor: what came from the agent, with our framing and fields.

The common answer is small and all there when it is looked at: `answer_nowait`, one write. Everything else goes part by
part.
"""

from __future__ import annotations

from time import monotonic

import trio

from tunnel.core.joining import join
from tunnel.core.request import FOREVER, Request, RequestStream, owed, pause
from tunnel.core.visitor import BODY, RAW
from tunnel.errors import Failure
from tunnel.http.heads import check_relayed, check_trailers, is_among, upgrade_of
from tunnel.http.response import EVENT_STREAM, has_no_body
from tunnel.link.stream import RawStream, Stream
from tunnel.wire import frames
from tunnel.wire.frames import NO_BODY, SMALL_BODY, UNKNOWN, Response

COALESCE = 64 * 1024  #: small parts that wait together are written together, up to so many bytes


class Answerer:
    """idle_timeout: seconds between two parts of a body, and for the visitor to take one. server_timing: say where the
    time went (`Server-Timing`, `traceresponse`)."""

    def __init__(self, *, idle_timeout: float, server_timing: bool) -> None:
        self.is_draining = False  # connections end with their answer
        self._idle_timeout = idle_timeout
        self._server_timing = server_timing

    async def answer(self, visit: RequestStream) -> None:
        """Wait for the answer and pass it on. Raises Failure; trio.BrokenResourceError and ClosedResourceError when the
        visitor is gone."""
        request = visit.request
        stream = request.stream
        assert stream is not None
        if not visit.unsent:
            if stream.head is None and stream.failure is None and not stream.interims:
                await stream.wait_change()
            if self.answer_nowait(visit):
                return
        if visit.unsent:
            await self._send_whole(visit)
            return
        response = stream.head
        if response is None or stream.interims:
            response = await self._final(request, stream)
            self._note(request, response)
        assert isinstance(response, Response)
        if delay := owed(request):
            await pause(request, delay)
        if response.status == 101:
            await self._upgraded(visit, response)
            return
        request.status = response.status
        request.visitor.begin(BODY, self._idle_timeout)
        if has_no_body(request.method.encode(), response.status):
            await self._write_head(request, self._compose(request, response, bodiless=True))
        else:
            await self._relay(request, stream, response)

    def answer_nowait(self, visit: RequestStream) -> bool:
        """Pass on an answer that is small, all here, and taken by the visitor at once; False for any other, with which
        `answer` goes on. Raises as that."""
        request = visit.request
        stream = request.stream
        assert stream is not None
        response = stream.head
        if response is None or stream.interims:
            return False
        assert isinstance(response, Response)
        self._note(request, response)
        status = response.status
        if status == 101:
            return False
        if has_no_body(request.method.encode(), status):
            data, visit.delay = self._compose(request, response, bodiless=True), owed(request)
        elif stream.ended and not stream.trailers and stream.inbox_bytes <= SMALL_BODY:
            data, visit.delay = self._whole(request, stream, response)
        else:
            return False
        request.status = status
        if visit.delay:
            visit.unsent = data
            return False
        request.head_written = True
        sent = request.visitor.socket.send_nowait(data)
        if sent < len(data):
            visit.unsent = data[sent:]
            return False
        request.marks["first_byte"] = monotonic()
        return True

    async def _send_whole(self, visit: RequestStream) -> None:
        """What `answer_nowait` could not send, now or at all."""
        request = visit.request
        if visit.delay:
            await pause(request, visit.delay)  # still in the phase in which we look whether the visitor is there
            request.visitor.begin(BODY, self._idle_timeout)
        request.head_written = True
        request.visitor.phase = BODY
        await self._write_rest(request, visit.unsent, 0)
        request.marks["first_byte"] = monotonic()

    def _note(self, request: Request, response: Response) -> None:
        """The answer's head is here. Raises Failure if it can't be passed on."""
        request.marks["answered"] = monotonic()
        request.agent_us, request.local_us = response.agent_us, response.local_us
        check_relayed(response.head)

    async def _final(self, request: Request, stream: Stream) -> Response:
        """The final answer's head; interim ones are passed on."""
        while True:
            response = await stream.answer()
            if not frames.is_interim(response.status):
                return response
            check_relayed(response.head)
            if request.http_version == "1.1":
                request.continued = request.continued or response.status == 100
                await self._write(request, b"HTTP/1.1 %d %b\r\n" % (response.status, response.head))

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
            framing += self.timing(request)
        return b"HTTP/1.1 %d %b%bX-Request-Id: %b\r\n\r\n" % (
            response.status,
            response.head,
            framing,
            request.request_id.encode(),
        )

    def timing(self, request: Request) -> bytes:
        """Server-Timing up to the first byte (W3C), in milliseconds; traceresponse (W3C Trace Context, level 2).

        Nothing when that is off.
        """
        if not self._server_timing:
            return b""
        now, marks = monotonic(), request.marks
        opened = marks.get("opened", now)
        answered = marks.get("answered", now)
        uploaded = marks.get("uploaded", opened)
        waited = answered - uploaded
        text = f"Server-Timing: core;dur={(now - request.started - (answered - opened)) * 1e3:.2f}"
        if uploaded > opened:
            text += f", upload;dur={(uploaded - opened) * 1e3:.2f}"
        if request.agent_us < 0 and waited:  # no answer, and no word of where it is
            text += f", {'upload' if request.outcome == 'request_timeout' else 'remote'};dur={waited * 1e3:.2f}\r\n"
        else:
            agent = min(max(request.agent_us, 0) / 1e6, waited)
            local = min(max(request.local_us, 0) / 1e6, agent)
            text += (
                f", link;dur={(waited - agent) * 1e3:.2f}, agent;dur={(agent - local) * 1e3:.2f}, "
                f"local;dur={local * 1e3:.2f}\r\n"
            )
        if request.trace_id:
            text += f"traceresponse: 00-{request.trace_id}-{request.span_id}-{'01' if request.sampled else '00'}\r\n"
        return text.encode()

    def _whole(self, request: Request, stream: Stream, response: Response) -> tuple[bytes, float]:
        """The common small answer, all of which is here, and the seconds to wait before it leaves. Raises Failure."""
        session = stream.link.session
        body = session.next_part(stream)
        while stream.inbox:
            body += session.next_part(stream)
        size = request.bytes_out = len(body)
        head = self._compose(request, response, bodiless=False)
        if size != response.length:
            self._check_length(response, size, ended=True)
            if response.length == UNKNOWN and request.http_version == "1.1":
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body) if size else b"0\r\n\r\n"
        assert request.account is not None
        return head + body, request.account.take_bytes(0, size)

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
        request.event_stream = EVENT_STREAM.search(response.head) is not None
        idle = FOREVER if request.event_stream else self._idle_timeout
        first_event = request.event_stream
        if not stream.inbox:
            await self._write_head(request, head)
            head = b""
        visitor.deadline = monotonic() + idle
        session = stream.link.session
        while part := await stream.receive():
            while stream.inbox and len(part) + len(stream.inbox[0]) <= COALESCE:
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
                await pause(request, delay)
            visitor.deadline = monotonic() + idle
        self._check_length(response, request.bytes_out, ended=True)
        if chunked:
            if stream.trailers and not check_trailers(stream.trailers):
                raise Failure("local_broken", "the answer's trailer fields that came over the link are not valid")
            await self._write(request, head + b"0\r\n" + stream.trailers + b"\r\n")
        elif head:
            await self._write_head(request, head)

    async def write_last(self, request: Request, data: bytes) -> None:
        """An answer of our own, head and body."""
        if delay := owed(request):
            await pause(request, delay)
        request.visitor.begin(BODY, self._idle_timeout)
        await self._write_head(request, data)

    async def _write_head(self, request: Request, data: bytes) -> None:
        request.head_written = True
        await self._write(request, data)
        request.marks["first_byte"] = monotonic()

    async def _write(self, request: Request, data: bytes) -> None:
        """To the visitor; a visitor who takes nothing is cut off by the deadline."""
        sent = request.visitor.socket.send_nowait(data)
        if sent < len(data):
            await self._write_rest(request, data, sent)
        request.visitor.wrote = monotonic()

    async def _write_rest(self, request: Request, data: bytes, sent: int) -> None:
        visitor = request.visitor
        request.writing, visitor.unread = True, -1
        visitor.deadline = monotonic() + self._idle_timeout
        try:
            # In slices, so that the deadline moves on as long as the visitor takes something.
            rest = memoryview(data)[sent:]
            while rest:
                await visitor.socket.send(bytes(rest[:COALESCE]))
                rest = rest[COALESCE:]
                visitor.wrote = monotonic()
                visitor.deadline = visitor.wrote + self._idle_timeout
        finally:
            request.writing = False

    async def _upgraded(self, visit: RequestStream, response: Response) -> None:
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
            self.timing(request),
            request.request_id.encode(),
        )
        await self._write_head(request, head)
        request.marks["upgraded"] = monotonic()
        visitor.phase, visitor.deadline = RAW, FOREVER
        try:
            await join(RawStream(stream), visitor, request, account)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # A visitor that drops an upgraded connection is its normal end; a link or service that does is not.
            visitor.socket.abort()
            if stream.failure is not None and not request.aborted:
                stream.raise_failure()
