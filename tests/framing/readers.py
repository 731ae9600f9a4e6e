"""The same bytes read by us, by h11 and by llhttp (httptools): every request up to the first that is refused."""

from __future__ import annotations

import h11
import httptools

from tunnel.core.hostnames import normalise_host
from tunnel.core.reading import _USUAL_METHODS, check_method, may_upgrade
from tunnel.errors import Failure
from tunnel.http.chunks import Chunks
from tunnel.http.heads import CHUNKED, Head, forwarded_head, parse_request

MAX_TARGET = 16384
MAX_HEAD = 65536
OWN = b"X-Forwarded-For: 192.0.2.1\r\nX-Request-Id: r-1\r\n"


class Reading:
    """One request. fields: as sent, in order, values without surrounding space. head: ours only."""

    def __init__(
        self, method: bytes, target: bytes, fields: list[tuple[bytes, bytes]], head: Head | None = None
    ) -> None:
        self.method = method
        self.target = target
        self.fields = fields
        self.head = head
        self.body = b""
        self.trailers = b""
        self.whole = False

    def facts(self) -> tuple[bytes, bytes, list[tuple[bytes, bytes]], bytes, bool]:
        fields = [
            (name, value.lower() if name.lower() == b"transfer-encoding" else value) for name, value in self.fields
        ]
        return self.method, self.target, fields, self.body, self.whole  # h11 writes that value in small letters

    def canonical(self) -> bytes:
        """What a local service would get."""
        assert self.head is not None
        made = forwarded_head(self.head, OWN, upgrade=False)
        if self.head.length is None:
            return made + b"\r\n"
        if self.head.length == CHUNKED:
            chunk = b"%x\r\n%b\r\n" % (len(self.body), self.body) if self.body else b""
            return made + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n" + self.trailers + b"\r\n"
        return made + b"Content-Length: %d\r\n\r\n" % self.head.length + self.body


def ours(raw: bytes) -> tuple[list[Reading], str]:
    """(requests, why the next one was refused: "" for nothing, or its text)."""
    found: list[Reading] = []
    data = raw
    try:
        while data:
            data = data.removeprefix(b"\r\n")
            end = data.find(b"\r\n\r\n") + 4
            if end < 4 or end > MAX_HEAD:
                return found, "the head is not whole" if data else ""
            head = parse_request(data[:end], MAX_TARGET)
            normalise_host(head.host)  # an empty one names no tunnel, whatever the version
            if head.method not in _USUAL_METHODS:
                check_method(head.method)
            target = data[:end].split(b" ", 2)[1]
            one = Reading(head.method, target, [(raw_name, value) for _, raw_name, value in head.fields], head)
            data = data[end:]
            found.append(one)
            asks = b"upgrade" in head.connection
            if asks and head.upgrade and not head.length and may_upgrade(head):
                one.whole = True
                return found, "what follows an upgrade is the new protocol's"
            if head.length == CHUNKED:
                chunks = Chunks("bad_request")
                one.body = b"".join(chunks.feed(data))
                assert not chunks.is_behind
                one.whole, one.trailers, data = chunks.ended, chunks.trailers, chunks.rest
            else:
                length = head.length or 0
                one.body, one.whole, data = data[:length], len(data) >= length, data[length:]
            keep_alive = b"close" not in head.connection and (
                head.version == b"1.1" or b"keep-alive" in head.connection
            )
            if not keep_alive or asks or not one.whole:
                return found, "the connection ends"
    except Failure as exc:
        return found, exc.text or exc.outcome
    except ValueError as exc:
        return found, str(exc)
    return found, ""


def h11_reads(raw: bytes) -> tuple[list[Reading], str]:
    found: list[Reading] = []
    data = raw
    try:
        while data:
            parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
            parser.receive_data(data)
            event = parser.next_event()
            if not isinstance(event, h11.Request):
                return found, "not whole"
            one = Reading(event.method, event.target, list(event.headers.raw_items()))
            found.append(one)
            while isinstance(event := parser.next_event(), h11.Data):
                one.body += event.data
            one.whole = isinstance(event, h11.EndOfMessage)
            if not one.whole or parser.their_state not in (h11.DONE, h11.MUST_CLOSE, h11.MIGHT_SWITCH_PROTOCOL):
                return found, "the connection ends"
            data = parser.trailing_data[0]
    except h11.RemoteProtocolError as exc:
        return found, str(exc)
    return found, ""


class _Listener:
    def __init__(self) -> None:
        self.found: list[Reading] = []
        self.parser = httptools.HttpRequestParser(self)
        self._in_head = False

    def on_message_begin(self) -> None:
        self.found.append(Reading(b"", b"", []))
        self._in_head = True

    def on_url(self, part: bytes) -> None:
        self.found[-1].target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            self.found[-1].fields.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self.found[-1].method = self.parser.get_method()

    def on_body(self, part: bytes) -> None:
        self.found[-1].body += part

    def on_message_complete(self) -> None:
        self.found[-1].whole = True


def llhttp_reads(raw: bytes) -> tuple[list[Reading], str]:
    listener = _Listener()
    why = ""
    try:
        listener.parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        why = "upgrade"
    except httptools.HttpParserError as exc:
        why = str(exc)
    return [one for one in listener.found if one.method], why
