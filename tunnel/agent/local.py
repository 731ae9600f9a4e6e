"""A request of a stream and its answer, with the local service: asked over a kept connection or a new one.

The common exchange is a whole request, a kept connection, and a small answer that comes in one piece: `begin`, and
when it is here `finish`, which wait for nothing. tunnel/agent/quick.py calls them without a task; then one may go on
with what they have left. Everything else (bodies that are still coming, long answers, upgrades, interim answers) goes
the long way beside them.
"""

from __future__ import annotations

from time import monotonic

import trio
from msgspec import structs

from tunnel.agent.joining import broken, join
from tunnel.agent.served import FOREVER, LocalRequest, ServedStream
from tunnel.errors import BY_CODE, OUTCOMES, Failure
from tunnel.http.chunks import Chunks
from tunnel.http.client import Service
from tunnel.http.forwarded import local_head
from tunnel.http.heads import check_trailers, is_among, upgrade_of
from tunnel.http.response import EVENT_STREAM, MAX_HEAD, Answer, find_head, parse_answer
from tunnel.link.stream import RawStream, Stream
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.net import Socket
from tunnel.wire import frames
from tunnel.wire.frames import UNKNOWN, Open, Response

log = get_logger("tunnel.agent")

#: methods that may be sent again when a kept connection turns out to be dead (RFC 9110, 9.2.2)
IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})
_ALERT = b"\x15\x03"  # how TLS says that it did not understand (RFC 8446, 5.1 and 6)


class LocalExchanger:
    """request_timeout: seconds to the head of an answer."""

    def __init__(self, request_timeout: float) -> None:
        self._request_timeout = request_timeout

    async def exchange(self, local: LocalRequest) -> None:
        """The innermost handler of a local request. Raises Failure."""
        visit = local.visit
        visit.deadline = visit.started + self._limit(visit.opened)
        try:
            try:
                await self._any(local)
            except Failure as exc:
                if exc.outcome != "local_broken" or local.status or not await visit.service.is_tls_unawares():
                    raise
                raise Failure("local_broken", _tls_text(visit.service)) from exc
            local.outcome = "ok"
            if local.status == 400 and await visit.service.is_tls_unawares():
                # nginx and Go answer plain HTTP on their port for TLS, and visitors have read what they say.
                log.warning("local service answers 400", local=local.address, reason=_tls_text(visit.service))
        except Failure as exc:
            local.outcome = exc.outcome
            local.error = exc.text if OUTCOMES[exc.outcome].failed else ""  # a visitor who leaves is no fault of it
            raise
        except trio.Cancelled:
            self.name_cancellation(local)
            raise
        finally:
            if local.socket is not None:
                local.socket.close()

    async def _any(self, local: LocalRequest) -> None:
        """An exchange of any kind. Raises Failure."""
        stream, opened = local.visit.stream, local.visit.opened
        # Before an upgrade there is no body; what comes on the stream then is for `_upgraded` alone.
        if opened.protocol == frames.UPGRADE:
            await self._relay(local, await self._ask(local, local_head(local.head, local.headers, opened.length)))
        elif local.request or is_whole(stream, opened):
            answer = await self._ask(local, local.request or self.compose(local))
            if not self._pass_small(local, answer):
                await self._relay(local, answer)
        else:
            await self._streamed(local, local_head(local.head, local.headers, opened.length))

    def name_cancellation(self, local: LocalRequest) -> None:
        """Say whose doing it is that nobody waits for the service any longer."""
        if local.visit.timed_out:
            local.outcome, local.error = "timeout", self.explain_timeout(local.visit)
        else:
            failure = local.visit.stream.failure
            local.outcome = BY_CODE[failure[0]].name if failure and failure[0] in BY_CODE else "link_lost"

    def compose(self, local: LocalRequest) -> bytes:
        """A request that is all here (`is_whole`), as it is sent. Raises Failure."""
        opened = local.visit.opened
        body = _whole_body(local.visit.stream)
        local.bytes_in = len(body)
        return local_head(local.head, local.headers, opened.length) + body

    # Without waiting ------------------------------------------------------------------------------------------

    def begin(self, local: LocalRequest, socket: Socket) -> bool:
        """Send a whole request on a kept connection; False if a task has to go on with that. Raises Failure."""
        visit = local.visit
        visit.deadline = visit.started + self._limit(visit.opened)
        local.socket = socket
        request = local.request = self.compose(local)
        try:
            local.sent = socket.send_nowait(request)
        except trio.BrokenResourceError:
            return False
        return local.sent == len(request)

    def finish(self, local: LocalRequest) -> bool | None:
        """Pass on what has come, if that is the whole of a small answer; None: nothing has come yet. False if a task
        has to go on with it."""
        socket = local.socket
        assert socket is not None
        try:
            local.part = part = socket.recv_here()
            if part is None:
                return None
            answer = self._whole_head(local, part)
        except (Failure, trio.BrokenResourceError) as exc:
            local.problem = exc
            return False
        if answer is None or not self._pass_small(local, answer):
            return False
        local.outcome = "ok"
        if local.socket is not None:
            local.socket.close()
        return True

    def explain_timeout(self, visit: ServedStream) -> str:
        """Whose time-out it was, for the shorter one counts."""
        mine, limit = self._request_timeout, self._limit(visit.opened)
        theirs = visit.opened.deadline_ms / 1000
        whose = "the core's" if limit < mine else "the core's and the agent's" if limit == theirs else "the agent's"
        return f"{visit.service.address} did not answer within {limit:g} s ({whose} -request-timeout)"

    # Asking ---------------------------------------------------------------------------------------------------

    def _limit(self, opened: Open) -> float:
        """Seconds to the answer's head."""
        return min(self._request_timeout, opened.deadline_ms / 1000 or self._request_timeout)

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
                raise Failure("local_broken", _tls_text(local.visit.service))
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

    def _respond(self, local: LocalRequest, answer: Answer, body: bytes, end: bool) -> None:
        visit = local.visit
        now = monotonic()
        head, redirects = answer.head, visit.service.redirects
        if redirects is not None and (answer.status // 100 == 3 or answer.status == 201):
            head = redirects.rewrite(head, local.head.fields)
        response = Response(
            answer.status,
            answer.length,
            int((now - visit.started) * 1e6),
            int((now - local.started) * 1e6),
            head,
        )
        if end:
            local.marks["last_byte"] = visit.marks["last_byte"] = now
        if answer.status != 400:
            visit.service.has_answered = True
        if visit.stream.failure is None:
            visit.stream.link.session.respond(visit.stream, response, body, end)

    def _keep(self, local: LocalRequest) -> None:
        """The connection is good for another request."""
        assert local.socket is not None
        local.visit.service.keep(local.socket)
        local.socket = None

    def _pass_small(self, local: LocalRequest, answer: Answer) -> bool:
        """Pass the answer on if all of it is here and fits one frame."""
        rest = answer.rest
        if answer.chunked or answer.length == UNKNOWN or answer.length > len(rest) or answer.status == 101:
            return False
        visit = local.visit
        # A HEAD's length is no body.
        size = 0 if _is_bodiless(local, answer) else answer.length
        if not visit.stream.link.session.can_carry(visit.stream, size):
            return False
        visit.deadline = FOREVER
        local.bytes_out = size
        self._respond(local, answer, rest[:size], True)
        if answer.keep_alive and len(rest) == size:
            self._keep(local)
        return True

    async def _relay(self, local: LocalRequest, answer: Answer) -> None:
        """Pass any answer on, head and body; the connection is kept if it may be."""
        visit, socket = local.visit, local.socket
        assert socket is not None
        visit.deadline = visit.waits_since = FOREVER
        if answer.status == 101:
            await self._upgraded(local, socket, answer)
            return
        if _is_bodiless(local, answer):
            self._respond(local, answer, b"", True)
            if answer.keep_alive and not answer.rest:
                self._keep(local)
            return
        self._respond(local, answer, b"", False)
        if EVENT_STREAM.search(answer.head):
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
            self._keep(local)

    async def _relay_counted(self, local: LocalRequest, socket: Socket, answer: Answer) -> bool:
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

    async def _relay_chunks(self, local: LocalRequest, socket: Socket, answer: Answer) -> bool:
        stream = local.visit.stream
        chunks = Chunks()
        data = answer.rest
        while True:
            if part := await chunks.read(data):
                local.bytes_out += len(part)
                await stream.send(part)
            if chunks.ended:
                stream.finish(chunks.trailers)
                return not chunks.rest
            data = await self._receive(local, socket)
            if not data:
                raise Failure("local_broken", f"{local.address} broke off in the middle of a chunked answer")

    async def _relay_to_end(self, local: LocalRequest, socket: Socket, answer: Answer) -> bool:
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

    async def _receive(self, local: LocalRequest, socket: Socket) -> bytes:
        is_stream = "event" in local.marks  # nothing is wrong when it says nothing
        local.visit.waits_since = FOREVER if is_stream else monotonic()
        try:
            part = await socket.recv()
        except trio.BrokenResourceError as exc:
            raise Failure("local_broken", f"{local.address} broke off within the answer ({exc})") from exc
        if part:
            local.visit.waits_since = FOREVER  # else it has ended, and was waited for until then
        return part

    async def _upgraded(self, local: LocalRequest, socket: Socket, answer: Answer) -> None:
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
            raise broken(visit.stream, visit.service) from exc

    # Requests whose body is not here yet ----------------------------------------------------------------------

    async def _streamed(self, local: LocalRequest, head: bytes) -> None:
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
                answer = await self._read_head(local, socket, await socket.recv_later())
            except trio.BrokenResourceError as exc:
                raise Failure("local_broken", f"{service.address} broke the connection off ({exc})") from exc
            if not complete:
                answer = structs.replace(answer, keep_alive=False)
            if not self._pass_small(local, answer):
                await self._relay(local, answer)
            nursery.cancel_scope.cancel()

    async def _upload(self, local: LocalRequest, socket: Socket) -> None:
        visit = local.visit
        stream = visit.stream
        chunked = visit.opened.length == UNKNOWN
        while True:
            visit.deadline = FOREVER  # the visitor is waited for, and the core watches that
            if not local.status:
                visit.waits_since = FOREVER
            part = await stream.receive()
            if not local.status:
                visit.waits_since = now = monotonic()
                visit.deadline = now + self._limit(visit.opened)
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


def is_whole(stream: Stream, opened: Open) -> bool:
    """Whether the request's body is all here, or there is none."""
    return stream.ended and not stream.trailers and opened.length >= frames.NO_BODY


def _nothing(service: Service) -> str:
    return f"{service.address} closed the connection without an answer"


def _tls_text(service: Service) -> str:
    return f"{service.address} speaks TLS; give it as https://{service.address}"


def _is_bodiless(local: LocalRequest, answer: Answer) -> bool:
    return local.method == "HEAD" or answer.status in (204, 304) or answer.length == frames.NO_BODY


def _whole_body(stream: Stream) -> bytes:
    session = stream.link.session
    body = session.next_part(stream)
    while part := session.next_part(stream):
        body += part
    return body
