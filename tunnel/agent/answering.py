"""A local service's answer on its way to the core: small ones in one frame, all else part by part.

What it brings is counted and timed here, and here it is decided whether the connection may be kept.
"""

from __future__ import annotations

from time import monotonic

import trio

from tunnel.agent.joining import broken, join
from tunnel.agent.served import FOREVER, LocalRequest
from tunnel.errors import Failure
from tunnel.http.chunks import Chunks
from tunnel.http.heads import is_among, upgrade_of
from tunnel.http.response import EVENT_STREAM, Answer
from tunnel.link.stream import RawStream
from tunnel.net import Socket
from tunnel.wire import frames
from tunnel.wire.frames import UNKNOWN, Response


class Answering:
    """Of one exchange or any other: nothing is kept here."""

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


def _is_bodiless(local: LocalRequest, answer: Answer) -> bool:
    return local.method == "HEAD" or answer.status in (204, 304) or answer.length == frames.NO_BODY
