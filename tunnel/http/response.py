"""Reading a local service's answer: its head by one bounded scan, its body by count, by chunks or to the end.

Well-formed heads (nearly all) are taken by one expression. Anything else goes to h11, which is more lenient, and is
written anew from what h11 understood. Chunked bodies: `tunnel.http.chunks`.
"""

from __future__ import annotations

import re
from functools import lru_cache

import h11
import msgspec

from tunnel.errors import Failure
from tunnel.http.heads import MAX_REMEMBERED, TOKEN, split_words
from tunnel.http.misread import meaning_of

NO_BODY, UNKNOWN = -1, -2  # lengths that are no number, as the link has them (tunnel/SPEC.md, "Body lengths")

MAX_HEAD = 64 * 1024

EVENT_STREAM = re.compile(rb"(?i)\ncontent-type: text/event-stream")  #: in a head as the link carries it

_NORMAL = re.compile(
    rb"HTTP/1\.([01]) ([1-9]\d\d)(?: |(?=\r))([\t -~\x80-\xff]*\r\n"
    rb"(?:" + TOKEN + rb": (?:[!-~\x80-\xff]+(?:[\t ]+[!-~\x80-\xff]+)*)?\r\n)*)\r\n"
)
#: fields about this connection or this message's framing, and those that are the core's to set
_OWN = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"te", b"transfer-encoding",
        b"content-length", b"upgrade", b"x-tunnel-outcome", b"x-request-id",
    }
)  # fmt: skip
_BARE_END = re.compile(rb"\n\r?\n")
_KEPT_WORDS = frozenset({b"close", b"keep-alive", b"upgrade"})


class Answer(msgspec.Struct, frozen=True, gc=False):
    """head: reason, CRLF, fields to pass on. length: of the body in the wire's terms (NO_BODY, UNKNOWN, or bytes).

    chunked: the body comes in chunks. keep_alive: the connection may be used again. upgrade: the value of Upgrade.
    rest: what came behind the head.
    """

    status: int
    head: bytes
    length: int
    chunked: bool
    keep_alive: bool
    upgrade: bytes
    rest: bytes


def find_head(data: bytes) -> int:
    """Where the head in `data` ends (its empty line included), 0 when it is not whole yet. Raises Failure."""
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        bare = _BARE_END.search(data)  # h11 and most servers' clients accept bare line feeds
        end = bare.end() if bare is not None else 0
    if (end or len(data)) > MAX_HEAD:
        raise Failure("local_broken", f"the local service's answer has a head of more than {MAX_HEAD} bytes")
    return end


def parse_answer(data: bytes, end: int, method: bytes) -> Answer:
    """Read the head that ends at `end`. Raises Failure(local_broken)."""
    head = data[:end]
    asked = b"HEAD" if method == b"HEAD" else b"GET"  # nothing else of it matters, and it may be long
    parsed = (_parse_again if end <= MAX_REMEMBERED else _parse)(head, asked)
    if parsed is None:
        return _parse_leniently(data, end, method)
    status, kept, length, chunked, keep_alive, upgrade = parsed
    return Answer(status, kept, length, chunked, keep_alive, upgrade, data[end:])


Parsed = tuple[int, bytes, int, bool, bool, bytes]  #: an Answer but for what came behind the head


def _parse(head: bytes, method: bytes) -> Parsed | None:
    """A well-formed head, None for any other."""
    match = _NORMAL.fullmatch(head)
    if match is None:
        return None
    minor, status_text, head = match.groups()
    status = int(status_text)
    length = -3
    chunked = False
    upgrade = b""
    named: frozenset[bytes] = frozenset()
    lines = head.split(b"\r\n")
    kept = [lines[0]]  # the reason
    for line in lines[1:]:
        name, _, value = line.partition(b": ")
        name = name.lower()
        if name not in _OWN:
            kept.append(line)
        elif name == b"content-length":
            if not value.isdigit() or len(value) > 18 or (length >= 0 and int(value) != length):
                raise Failure("local_broken", "the local service's Content-Length is not one number")
            length = int(value)
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked" or chunked:
                raise Failure("local_broken", "the local service uses a Transfer-Encoding other than chunked, once")
            chunked = True
        elif name == b"connection":
            named |= split_words(value.lower())
        elif name == b"upgrade":
            upgrade = upgrade + b", " + value if upgrade else value
    keep_alive = b"close" not in named and (minor == b"1" or b"keep-alive" in named)
    named -= _KEPT_WORDS
    if named:
        kept = [kept[0], *(line for line in kept[1:] if line.partition(b":")[0].lower() not in named)]
    head = b"\r\n".join(kept)
    if upgrade and status in (101, 426):  # what was switched to, or is wanted (RFC 9110, 15.2.2 and 15.5.22)
        head += b"Upgrade: " + upgrade + b"\r\n"
    if chunked:
        if length >= 0 or minor == b"0":
            # RFC 9112, 6.1 and 6.3: Transfer-Encoding wins, and the message is suspicious; never reuse the connection.
            keep_alive = False
        length = UNKNOWN
    if has_no_body(method, status):
        chunked = False
        length = length if length >= 0 else NO_BODY
    elif length == -3:
        length, keep_alive = UNKNOWN, False
    return status, head, length, chunked, keep_alive, upgrade


#: busy services say the same many times a second
_parse_again = lru_cache(256)(_parse)


def has_no_body(method: bytes, status: int) -> bool:
    """RFC 9112, 6.3, rule 1."""
    return method == b"HEAD" or status < 200 or status in (204, 304)


def _parse_leniently(data: bytes, end: int, method: bytes) -> Answer:
    """Through h11, then once more through the strict way as h11 would have written it."""
    parser = _client(method)
    try:
        parser.receive_data(data[:end])
        event = parser.next_event()
    except h11.RemoteProtocolError as exc:
        raise Failure("local_broken", f"the local service's answer is not valid HTTP ({meaning_of(exc)})") from None
    if not isinstance(event, h11.Response | h11.InformationalResponse):
        raise Failure("local_broken", "the local service's answer is not valid HTTP")
    lines = [b"HTTP/%s %d %s" % (event.http_version, event.status_code, event.reason)]
    lines += [name + b": " + b" ".join(value.split()) for name, value in event.headers.raw_items()]
    rewritten = b"\r\n".join(lines) + b"\r\n\r\n"
    if (
        len(rewritten) > MAX_HEAD
    ):  # spaces and line ends come in that were not there; the link's frames have their limit
        raise Failure("local_broken", f"the local service's answer has a head of more than {MAX_HEAD} bytes")
    if _NORMAL.fullmatch(rewritten) is None:
        raise Failure("local_broken", "the local service's answer has a field that can't be passed on")
    answer = parse_answer(rewritten, len(rewritten), method)
    return msgspec.structs.replace(
        answer, rest=parser.trailing_data[0] + data[end:]
    )  # h11 may see the head's end before we do


def _client(method: bytes) -> h11.Connection:
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD + 1024)
    parser.send(h11.Request(method=method, target=b"/", headers=[(b"Host", b"local")]))
    parser.send(h11.EndOfMessage())
    return parser
