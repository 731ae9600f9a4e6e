"""A local service is asked: over a kept connection, or a new one; then the head of its answer is read."""

from __future__ import annotations

from time import monotonic

import trio

from tunnel.agent.answering import Answering
from tunnel.agent.served import LocalRequest, ServedStream
from tunnel.errors import Failure
from tunnel.http.client import Service
from tunnel.http.forwarded import local_head
from tunnel.http.response import MAX_HEAD, Answer, find_head, parse_answer
from tunnel.link.stream import Stream
from tunnel.net import Socket
from tunnel.wire import frames
from tunnel.wire.frames import Open

#: methods that may be sent again when a kept connection turns out to be dead (RFC 9110, 9.2.2)
IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})
_ALERT = b"\x15\x03"  # how TLS says that it did not understand (RFC 8446, 5.1 and 6)


class Asking(Answering):
    """request_timeout: seconds to the head of an answer."""

    def __init__(self, request_timeout: float) -> None:
        self._request_timeout = request_timeout

    def compose(self, local: LocalRequest) -> bytes:
        """A request that is all here (`is_whole`), as it is sent. Raises Failure."""
        opened = local.visit.opened
        body = _whole_body(local.visit.stream)
        local.bytes_in = len(body)
        return local_head(local.head, local.headers, opened.length) + body

    async def _ask(self, local: LocalRequest, request: bytes) -> Answer:
        """Send a whole request and read the answer's head; once more if a kept connection was dead all along.

        Dead all along: closed by the service before any byte of the request came to it. All else may have been seen
        by the service and is never sent again, whatever the method.
        """
        service, method = local.visit.service, local.head.method
        socket, sent = local.socket, local.sent  # where it was begun
        if socket is None:
            socket = local.socket = service.take_idle()
        if socket is not None:
            try:
                if not local.request:
                    sent = socket.send_nowait(request)
                elif local.problem is not None:
                    raise local.problem
                elif sent < 0:
                    raise trio.BrokenResourceError
                if sent < len(request):
                    await socket.send(request[sent:])
                part = await socket.recv_later() if local.part is None else local.part
                return self._whole_head(local, part) or await self._read_head(local, socket, part)
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
            return await self._read_head(local, socket, await socket.recv_later())
        except trio.BrokenResourceError as exc:
            raise Failure("local_broken", f"{service.address} broke the connection off ({exc})") from exc

    def _whole_head(self, local: LocalRequest, data: bytes) -> Answer | None:
        """The final answer's head, if it is whole in the first bytes that came. Raises Failure."""
        end = data.find(b"\r\n\r\n") + 4
        if 4 <= end <= MAX_HEAD:
            answer = parse_answer(data, end, local.head.method)
            if not frames.is_interim(answer.status):
                local.marks["first_byte"] = monotonic()
                local.status = answer.status
                return answer
        return None

    async def _read_head(self, local: LocalRequest, socket: Socket, part: bytes) -> Answer:
        """The final answer's head, of which `part` is the beginning; interim ones are passed on.

        Raises Failure, trio.BrokenResourceError.
        """
        data = b""
        interims = 0
        while True:
            if not part:
                if not data:
                    raise Failure("local_broken", _nothing(local.visit.service))
                raise Failure("local_broken", f"{local.address} closed the connection within the answer's head")
            data = data + part if data else part
            if data.startswith(_ALERT):
                raise Failure("local_broken", explain_tls(local.visit.service))
            if len(data) > 4 * MAX_HEAD and not find_head(data):
                raise Failure("local_broken", f"{local.address} sends no end of the answer's head")
            while data and (end := find_head(data)):
                answer = parse_answer(data, end, local.head.method)
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
            part = await socket.recv()

    def _limit(self, opened: Open) -> float:
        """Seconds to the answer's head."""
        return min(self._request_timeout, opened.deadline_ms / 1000 or self._request_timeout)

    def explain_timeout(self, visit: ServedStream) -> str:
        """Whose time-out it was, for the shorter one counts."""
        mine, limit = self._request_timeout, self._limit(visit.opened)
        theirs = visit.opened.deadline_ms / 1000
        whose = "the core's" if limit < mine else "the core's and the agent's" if limit == theirs else "the agent's"
        return f"{visit.service.address} did not answer within {limit:g} s ({whose} -request-timeout)"


def is_whole(stream: Stream, opened: Open) -> bool:
    """Whether the request's body is all here, or there is none."""
    return stream.ended and not stream.trailers and opened.length >= frames.NO_BODY


def _nothing(service: Service) -> str:
    return f"{service.address} closed the connection without an answer"


def explain_tls(service: Service) -> str:
    return f"{service.address} speaks TLS; give it as https://{service.address}"


def _whole_body(stream: Stream) -> bytes:
    session = stream.link.session
    body = session.next_part(stream)
    while part := session.next_part(stream):
        body += part
    return body
