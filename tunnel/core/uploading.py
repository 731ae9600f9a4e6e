"""A request's body on its way to the agent, as it comes: counted, or cut out of its chunks."""

from __future__ import annotations

from time import monotonic

import trio

from tunnel.core.request import Request, RequestStream, pause
from tunnel.errors import Failure
from tunnel.http.chunks import Chunks
from tunnel.http.heads import CHUNKED
from tunnel.link.stream import Stream


class Uploader:
    """max_body: bytes, 0 for any number. idle_timeout: seconds between two parts; request_timeout: seconds that the
    answer may take from the last one on."""

    def __init__(self, *, max_body: int, request_timeout: float, idle_timeout: float) -> None:
        self._max_body = max_body
        self._request_timeout = request_timeout
        self._idle_timeout = idle_timeout

    async def upload(self, visit: RequestStream) -> None:
        """Pass the request's body on as it comes; what is wrong with it fails the stream and so the answer."""
        request = visit.request
        stream = request.stream
        assert stream is not None
        try:
            assert request.head is not None
            if request.head.length == CHUNKED:
                await self._pass_chunks(request, stream)
            else:
                await self._pass_counted(request, stream, request.head.length or 0)
            if "answered" not in request.marks:
                request.marks["uploaded"] = monotonic()
        except Failure as exc:
            if exc.outcome != "ok":  # ok: answered early, nobody wants the rest
                stream.reset(exc.outcome, exc.text)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if not stream.is_over:
                request.abort("the visitor closed the connection within the request's body")

    async def _pass_counted(self, request: Request, stream: Stream, length: int) -> None:
        visitor = request.visitor
        left = length
        while left:
            part = visitor.buffer or await self._read_body(request)
            visitor.buffer = part[left:]
            part = part[:left]
            left -= len(part)
            await self._send(request, stream, part, end=not left)
        request.body_over = True

    async def _pass_chunks(self, request: Request, stream: Stream) -> None:
        visitor = request.visitor
        chunks = Chunks("bad_request")
        data, visitor.buffer = visitor.buffer, b""
        while True:
            if part := await chunks.read(data):  # a frame for what came together, not one for each tiny chunk
                if self._max_body and request.bytes_in + len(part) > self._max_body:
                    raise Failure("body_too_large", f"{self._max_body} bytes are accepted")
                await self._send(request, stream, part)
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

    async def _send(self, request: Request, stream: Stream, part: bytes, end: bool = False) -> None:
        assert request.account is not None
        request.bytes_in += len(part)
        await stream.send(part, end=end)
        if not request.head_written:
            request.visitor.deadline = max(request.visitor.deadline, monotonic() + self._request_timeout)
        delay = request.account.take_bytes(len(part), 0)
        if delay:
            await pause(request, delay)
