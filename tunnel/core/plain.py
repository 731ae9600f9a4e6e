"""Plain HTTP beside TLS (-http-addr): the answers to an authority's challenges, and for all else the way to https.

Tunnels are not served here, so a challenge never stands in the way of one of their paths: over https its path is like
any other. Each connection gets one answer. These requests are no visits: they count in no metric of requests.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from email.utils import formatdate

import h11
import trio

from tunnel.core.forwarding import Forwarding
from tunnel.core.hostnames import normalise_host
from tunnel.core.issuing.challenges import PREFIX
from tunnel.core.limits import Counts
from tunnel.core.request import make_request_id
from tunnel.core.visitor import HEAD, Visitor
from tunnel.errors import Failure
from tunnel.http.answers import answer as make_answer
from tunnel.http.heads import parse_request
from tunnel.log import get_logger

log = get_logger("tunnel.core")

READ_METHODS = frozenset({b"GET", b"HEAD"})


class PlainSide:
    """What a door has its connections served by. find: the answer to a challenge, by host and token.

    outside_port: of the https that visitors type.
    """

    def __init__(
        self,
        forwarding: Forwarding,
        refusals: Counts,
        *,
        outside_port: Callable[[], int],
        find: Callable[[str, str], Awaitable[bytes | None]] | None,
        max_head: int,
        max_target: int,
        max_fields: int,
        head_timeout: float,
    ) -> None:
        self.forwarding = forwarding
        self.refusals = refusals
        self._outside_port = outside_port
        self._find = find
        self._max_head = max_head
        self._max_target = max_target
        self._max_fields = max_fields
        self._head_timeout = head_timeout

    async def serve(self, visitor: Visitor) -> bool:
        """One request; never says that the connection may go on."""
        visitor.begin(HEAD, self._head_timeout)
        try:
            answer = await self._answer(visitor)
        except Failure as exc:
            if exc.limit:
                self.refusals[exc.limit] += 1
            request_id = make_request_id()
            _, head, body = make_answer(
                exc.outcome, request_id=request_id, detail=exc.text, status=exc.status, close=True
            )
            answer = head + body
        await visitor.socket.send(answer)
        return False

    async def _answer(self, visitor: Visitor) -> bytes:
        raw = await self._read_head(visitor)
        head = parse_request(raw, self._max_target, self._max_fields)
        try:
            host = normalise_host(head.host)
        except ValueError as exc:
            raise Failure("bad_request", str(exc)) from None
        target = head.target.decode("latin-1")
        is_head = head.method == b"HEAD"
        if self._find is not None and target.startswith(PREFIX) and head.method in READ_METHODS:
            text = await self._find(host, target.removeprefix(PREFIX))
            if text is not None:
                log.info("challenge answered", host=host, remote=visitor.address)
                return _answer(200, text, is_head, ("Content-Type", "application/octet-stream"))
        if target == "*":
            target = "/"
        port = self._outside_port()
        where = f"https://{host}{'' if port == 443 else f':{port}'}{target}"
        return _answer(308, b"", is_head, ("Location", where))

    async def _read_head(self, visitor: Visitor) -> bytes:
        data = visitor.buffer
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > self._max_head:
                raise Failure("head_too_large", f"the head is larger than {self._max_head} bytes")
            if data[:1] == b"\x16":
                raise Failure("bad_request", "it is TLS, and this port speaks plain HTTP")
            part = await visitor.socket.recv()
            if not part:
                raise trio.BrokenResourceError
            data += part
        return data[: end + 4]


def _answer(status: int, body: bytes, is_head: bool, *fields: tuple[str, str]) -> bytes:
    headers = [
        ("Date", formatdate(usegmt=True)),
        *fields,
        ("Content-Length", str(len(body))),
        ("X-Content-Type-Options", "nosniff"),
        ("Connection", "close"),
    ]
    head = h11.Connection(h11.SERVER).send(h11.Response(status_code=status, headers=headers, reason=_REASONS[status]))
    assert head is not None
    return head if is_head else head + body


_REASONS = {200: b"OK", 308: b"Permanent Redirect"}
