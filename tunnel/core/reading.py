"""The head of a public request: read, judged, and what follows from it for the request."""

from __future__ import annotations

import re
from contextlib import suppress
from time import monotonic

import trio

from tunnel.core.hostnames import normalise_host
from tunnel.core.limits import Counts
from tunnel.core.request import FOREVER, Request, make_request_id
from tunnel.errors import Failure
from tunnel.handler import Fields
from tunnel.http.heads import Head, is_request_id, named_in, parse_request, split_words
from tunnel.http.repeated import KnownHead, know

_METHOD_BYTES = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_FIRST = _METHOD_BYTES | frozenset(b"\r")  # of a connection's next request
_MAX_HOST = 300  # bytes of a Host field that is looked at
_METHOD = re.compile(rb"([A-Za-z-]{1,20}) ")
REFUSED_METHODS = frozenset({b"CONNECT", b"TRACE"})
_USUAL_METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})


class Known:
    """What follows from a head for every request on the connection that repeats it.

    forwarded: the head as it travels to the agent from behind the address to the request id; made by the first that
    is forwarded, b"" before.
    """

    __slots__ = ("accept", "forwarded", "head", "headers", "host", "method")

    def __init__(self, head: KnownHead, request: Request) -> None:
        self.head = head
        self.method = request.method
        self.accept = request.accept
        self.headers = request.request_headers
        self.host = request.host
        self.forwarded = b""


class HeadReader:
    """max_…: limits, 0 for none of fields and requests. refusals: counts of limits that were reached."""

    def __init__(self, *, max_head: int, max_target: int, max_fields: int, max_requests: int, refusals: Counts) -> None:
        self._max_head = max_head
        self._max_target = max_target
        self._max_fields = max_fields
        self._max_requests = max_requests
        self._refusals = refusals

    async def read(self, request: Request) -> None:
        """Raises Failure for what is no request or beyond a limit; trio.BrokenResourceError, ClosedResourceError."""
        visitor = request.visitor
        while not self.read_nowait(request):
            try:
                part = await visitor.socket.recv()
            except trio.ClosedResourceError:
                if not request.expired:
                    raise
                self._name(request, visitor.buffer)  # the deadline only woke us: there is somebody to tell
                raise Failure("request_timeout", "the request's head did not arrive in time") from None
            if not part:
                if visitor.buffer:
                    self._name(request, visitor.buffer)
                    request.aborted = "the visitor closed the connection within the request's head"
                raise trio.BrokenResourceError
            visitor.buffer += part

    def read_nowait(self, request: Request) -> bool:
        """Take a head that is all here, False if more of it has to come. Raises Failure."""
        return self._recognise(request) or self._parse(request)

    def _recognise(self, request: Request) -> bool:
        """Take a whole head that repeats the last one on this connection; False for any other, which `_parse` takes."""
        visitor = request.visitor
        known = visitor.known
        if known is None:
            return False
        data = visitor.buffer
        end = data.find(b"\r\n\r\n") + 4
        if end < 4 or end > self._max_head:
            return False
        raw, rest = (data, b"") if end == len(data) else (data[:end], data[end:])
        target = known.head.recognise(raw, self._max_target)
        if not target:
            return False
        visitor.buffer = rest
        visitor.deadline = FOREVER
        request.known = known
        request.marks["head"] = monotonic()
        head = known.head.head
        request.head = head.at(target)
        request.method = known.method
        request.target = target.decode("ascii")
        request.request_id = make_request_id()
        request.accept = known.accept
        request.request_headers = known.headers
        request.host = known.host
        request.body_over = not head.length
        request.keep_alive = self._may_stay(request)  # else it had not been kept
        return True

    def _parse(self, request: Request) -> bool:
        visitor = request.visitor
        data = visitor.buffer
        first = _METHOD_BYTES if request.skipped else _FIRST
        if first is _FIRST and data.startswith(b"\r\n"):
            # RFC 9112, 2.2: an empty line before the request is skipped, one
            request.skipped, first = True, _METHOD_BYTES
            data = visitor.buffer = data[2:]
        if data and data[0] not in first:
            self._name(request, b"")
            what = "it is TLS, and this port speaks plain HTTP" if data[0] == 0x16 else "it begins with no method"
            raise Failure("bad_request", what)
        end = data.find(b"\r\n\r\n") + 4
        if end < 4 or end > self._max_head:
            self._check_unfinished(request, data, end >= 4)
            return False
        visitor.buffer = data[end:]
        visitor.deadline = FOREVER
        raw = data[:end]
        try:
            head = parse_request(raw, self._max_target, self._max_fields)
        except Failure:
            self._name(request, raw)
            raise
        self._take(request, head)
        if request.keep_alive and not any(name == b"x-request-id" for name, _, _ in head.fields):
            known = know(raw, head)
            request.known = visitor.known = Known(known, request) if known is not None else None
        return True

    def _check_unfinished(self, request: Request, data: bytes, is_too_large: bool) -> None:
        """Raises Failure if this can't become a head that is taken."""
        if is_too_large or len(data) > self._max_head:
            self._name(request, data)
            line = data.find(b"\r\n")
            if line < 0 or line > self._max_target + 64:
                raise Failure("uri_too_long", f"the address is longer than {self._max_target} bytes")
            raise Failure("head_too_large", f"the head is larger than {self._max_head} bytes")
        if b"\n\n" in data or b"\n\r\n" in data:  # CRLF CRLF is not in it
            self._name(request, data)
            raise Failure("bad_request", "a line does not end with CRLF")

    def _name(self, request: Request, data: bytes) -> None:
        """Facts for the log and the answer of a request whose head was not understood, so that it can be found."""
        match = _METHOD.match(data)
        request.method = match[1].decode().upper() if match else "-"
        request.request_id = make_request_id()
        path, host, version = named_in(data)
        request.target = path.decode("ascii")
        request.http_version = version.decode("ascii") or request.http_version
        if 0 < len(host) <= _MAX_HOST:
            with suppress(ValueError):
                request.host = normalise_host(host)

    def _take(self, request: Request, head: Head) -> None:
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
        request.request_headers = Fields([(name, value) for _, name, value in head.fields])
        request.body_over = not head.length
        words = head.connection
        request.keep_alive = b"close" not in words and (head.version == b"1.1" or b"keep-alive" in words)
        if b"upgrade" in words:
            # Granted or not: who is in front of us may take what follows, a body too, for the new protocol's.
            request.keep_alive = False
        if request.keep_alive:
            request.keep_alive = self._may_stay(request)
        try:
            # HTTP/1.0 needs no Host (RFC 9112, 3.2); then no tunnel is named.
            request.host = normalise_host(head.host) if head.host or head.version == b"1.1" else ""
        except ValueError as exc:
            raise Failure("bad_request", str(exc)) from exc
        if head.method not in _USUAL_METHODS:
            check_method(head.method)

    def _may_stay(self, request: Request) -> bool:
        """Whether the connection may have more requests than this one."""
        if 0 < self._max_requests <= request.visitor.served:
            self._refusals["connection_requests"] += 1
            return False
        return True


def check_method(method: bytes) -> None:
    """In any case: to some services "connect" is CONNECT, and an answer to "head" would end where nobody knows."""
    upper = method.upper()
    if upper in REFUSED_METHODS:
        raise Failure("method_not_allowed", f"{upper.decode()} is not passed through the tunnel")
    if upper == b"HEAD":
        raise Failure("bad_request", "the method HEAD is written in capitals")


def may_upgrade(head: Head) -> bool:
    """Not from HTTP/1.0 (RFC 9110, 7.8), and not to h2c, which would pass requests by that nobody has checked."""
    return head.version == b"1.1" and not any(
        word.startswith((b"h2", b"http", b"tls")) for word in split_words(head.upgrade.lower())
    )
