"""Heads of requests and answers: what is refused, what is dropped, what is set.

The public side is hostile: h11 alone accepts both Content-Length and Transfer-Encoding, obs-fold, bare LF, odd
versions and control bytes. So a byte-level expression looks first, h11 parses, and a few checks follow. What goes over
the link has no framing fields and no hop-by-hop fields (RFC 9110, 7.6.1); each side sets its own framing.
"""

from __future__ import annotations

import re
from functools import lru_cache

import h11
import msgspec

from tunnel.errors import Failure
from tunnel.http.misread import meaning_of

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_LINE = rb"(?:" + TOKEN + rb":[\t -~\x80-\xff]*\r\n)*"
VALUE = rb"(?:[!-~\x80-\xff]+(?:[\t ]+[!-~\x80-\xff]+)*)?"  # without space around it
_NORMAL_LINE = rb"(?:" + TOKEN + rb": " + VALUE + rb"\r\n)*"

#: request line and fields, each line ended by CRLF, then the empty line (RFC 9112, 2.1); no obs-fold, no bare LF
_REQUEST = re.compile(rb"(" + TOKEN + rb") ([!-~\x80-\xff]+) HTTP/(\d\.\d)\r\n" + _LINE + rb"\r\n")
_TARGET = re.compile(rb"[!-\"$-~]+")  # visible ASCII, no fragment
_VISIBLE = re.compile(rb"[!-~]+")
_HOST = re.compile(rb"(?im)^host:([^\r\n]*)")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#@]+)(/[^#]*|\?[^#]*)?")
_LENGTH = re.compile(rb"(?i)\ncontent-length:([^\r]*)")
_UPGRADE = re.compile(rb"(?i)\nupgrade: ([^\r]*)")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._~:+/=@\-]{1,128}")

#: answer head as it travels: reason, fields, exactly as h11 would write them
_RELAYED = re.compile(rb"[\t -~\x80-\xff]*\r\n" + _NORMAL_LINE)
LINES = re.compile(_NORMAL_LINE)  #: whole field lines
_NOT_TRAILERS = re.compile(
    rb"(?im)^(?:transfer[-_]encoding|content[-_](?:length|encoding|type|range)|host|connection|trailer"  # RFC 9110,
    rb"|authorization|proxy[-_]authorization|set[-_]cookie|cookie|expect|range|http2[-_]settings"  # 6.5.1
    rb"|keep[-_]alive|proxy[-_]connection|te|upgrade|forwarded|x[-_]forwarded[-_][a-z]+|x[-_]real[-_]ip"  # and ours
    rb"|x[-_]request[-_]id|x[-_]tunnel[-_]outcome):"
)
#: fields that an answer must not carry over the link (or that are the core's own)
_FORBIDDEN = re.compile(
    rb"(?i)\n(?:connection|keep-alive|proxy-connection|proxy-authenticate|te|transfer-encoding|content-length"
    rb"|x-tunnel-outcome|x-request-id):"
)

#: what proxies say of a visitor and frameworks believe; passed on from trusted proxies only
PROXIED = frozenset(
    {
        b"x-forwarded-port", b"x-forwarded-prefix", b"x-forwarded-ssl", b"x-forwarded-scheme", b"x-forwarded-server",
        b"x-forwarded-by", b"x-real-ip",
    }
)  # fmt: skip

#: not passed on: hop by hop, framing, and what we set ourselves
DROPPED = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te",
        b"transfer-encoding", b"upgrade", b"content-length", b"http2-settings",
        b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"forwarded", b"x-request-id",
    }
) | PROXIED  # fmt: skip


MAX_SHOWN = 64  #: bytes of a field's name that are quoted
MAX_NAMED = 2048  #: bytes of a path that is told of a head which was refused
MAX_REMEMBERED = 1024  #: bytes of a head whose judgement is kept for the next time that it comes


class Head(msgspec.Struct, frozen=True):
    """A visitor's request head, checked. length: of the body; None: none declared; -2: chunked.

    host: the Host field, or the authority of an absolute target. target: origin form, or "*". fields: (lower-case
    name, name as sent, value). connection: lower-case words of Connection.
    """

    method: bytes
    target: bytes
    host: bytes
    version: bytes
    fields: list[tuple[bytes, bytes, bytes]]
    length: int | None
    connection: frozenset[bytes]
    upgrade: bytes
    expects_continue: bool

    def at(self, target: bytes) -> Head:
        """The same head with another address."""
        return Head(
            self.method,
            target,
            self.host,
            self.version,
            self.fields,
            self.length,
            self.connection,
            self.upgrade,
            self.expects_continue,
        )


CHUNKED = -2
_NO_WORDS: frozenset[bytes] = frozenset()
_KEEP_ALIVE = frozenset({b"keep-alive"})


def parse_request(raw: bytes, max_target: int, max_fields: int = 0) -> Head:
    """Check and parse a whole request head, the empty line included. max_fields: 0 for any number.

    Raises Failure: bad_request, uri_too_long, head_too_large.
    """
    if 0 < max_fields < (count := raw.count(b"\n") - 2):  # first: thousands of tiny ones take long to parse
        text = f"the head has {count} fields; {max_fields} are accepted"
        raise Failure("head_too_large", text, limit="header_count")
    match = _REQUEST.fullmatch(raw)
    if match is None:
        raise Failure("bad_request", _explain(raw))
    method, target, version = match.groups()
    if version not in (b"1.1", b"1.0"):
        raise Failure("bad_request", "the HTTP version is not 1.1 or 1.0", status=505)
    if len(target) > max_target:
        raise Failure("uri_too_long", f"the address is longer than {max_target} bytes")
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=len(raw))
    try:
        parser.receive_data(raw)
        event = parser.next_event()
    except h11.RemoteProtocolError as exc:
        raise Failure("bad_request", meaning_of(exc)) from None
    if type(event) is not h11.Request:
        raise Failure("bad_request", "the request head is not complete")
    head = _check(event, method, target, version)
    if b"_" in raw:
        _refuse_collisions(head.fields)
    if head.length is not None and head.length >= 0:
        lengths = _LENGTH.findall(raw)  # h11 makes one of several equal ones
        if len(lengths) != 1 or b"," in lengths[0]:
            raise Failure("bad_request", "Content-Length is given twice")
    return head


def _check(event: h11.Request, method: bytes, target: bytes, version: bytes) -> Head:
    fields = [(raw.lower(), raw, value) for raw, value in event.headers.raw_items()]
    length: int | None = None
    host = upgrade = b""
    hosts = 0
    chunked = expects = False
    words = _NO_WORDS
    for name, _, value in fields:
        if name == b"host":
            hosts += 1
            host = value
        elif name == b"connection":
            lower = value.lower()
            words = _KEEP_ALIVE if lower == b"keep-alive" and not words else words | split_words(lower)
        elif name == b"content-length":
            if length is not None:
                raise Failure("bad_request", "Content-Length is given twice")
            if len(value) > 18:
                raise Failure("body_too_large", "the body is said to be longer than any could be")
            length = int(value)
        elif name == b"transfer-encoding":
            if chunked or value.lower() != b"chunked":
                raise Failure("bad_request", "only Transfer-Encoding: chunked is understood, once")
            chunked = True
        elif name == b"upgrade":
            upgrade = upgrade + b", " + value if upgrade else value
        elif name == b"expect":
            if value.lower() != b"100-continue" or expects:
                raise Failure("bad_request", "only Expect: 100-continue is understood, once", status=417)
            expects = version == b"1.1"
    if hosts > 1 or (hosts == 0 and version == b"1.1"):
        raise Failure("bad_request", "there must be exactly one Host field")
    if chunked and (length is not None or version == b"1.0"):
        raise Failure("bad_request", "Transfer-Encoding does not go with Content-Length or HTTP/1.0")
    if not target.startswith(b"/"):
        target, host = _other_target(method, target, host if hosts else None)
    if _TARGET.fullmatch(target) is None:
        raise Failure("bad_request", "the address has characters that must be percent-encoded")
    return Head(method, target, host, version, fields, CHUNKED if chunked else length, words, upgrade, expects)


def _refuse_collisions(fields: list[tuple[bytes, bytes, bytes]]) -> None:
    """CGI, WSGI and others read "_" in a name as "-": such a name must not stand for a field that we set or judge."""
    names = {name for name, _, _ in fields}
    for name, raw_name, _ in fields:
        if b"_" in name:
            other = name.replace(b"_", b"-")
            if other in DROPPED or other in names or other.startswith((b"x-forwarded-", b"x-b3-", b"x-tunnel-")):
                shown = raw_name[:MAX_SHOWN].decode() + ("…" if len(raw_name) > MAX_SHOWN else "")
                raise Failure("bad_request", f"the field {shown} has an underscore and would be taken for another one")


def named_in(raw: bytes) -> tuple[bytes, bytes, bytes]:
    """(path, Host, version) of a head that was refused, or of its beginning, as far as they can be read; else b"".

    For the log, so without the query, and without the authority of an absolute target: secrets may be there.
    """
    line, ended, fields = raw.partition(b"\n")
    words = line.removesuffix(b"\r").split(b" ")
    hosts = _HOST.findall(fields)
    host = hosts[0].strip(b" \t") if len(hosts) == 1 else b""
    version = words[-1].removeprefix(b"HTTP/")
    if not ended or len(words) != 3 or version not in (b"1.1", b"1.0") or _VISIBLE.fullmatch(words[1]) is None:
        return b"", host, b""
    path = words[1].partition(b"?")[0].partition(b"#")[0]
    if not path.startswith(b"/"):
        authority = path.partition(b"://")[2]
        path = b"/" + authority.partition(b"/")[2] if authority else b""
    return path[:MAX_NAMED], host, version


def _other_target(method: bytes, target: bytes, host: bytes | None) -> tuple[bytes, bytes]:
    """Absolute form to origin form (it and Host must agree: RFC 9112, 3.2.2); "*" for OPTIONS; nothing else."""
    if target == b"*" and method == b"OPTIONS":
        return target, host or b""
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        if method == b"CONNECT":
            raise Failure("method_not_allowed", "CONNECT is not passed through the tunnel")
        raise Failure("bad_request", "the address is neither a path nor an http URL")
    if host is not None and host.lower() != match[1].lower():
        raise Failure("bad_request", "the address and the Host field name different hosts")
    path = match[2] or b"/"
    return (path if path.startswith(b"/") else b"/" + path), match[1]


def split_words(value: bytes) -> frozenset[bytes]:
    """The words of a comma-separated field value."""
    return frozenset(word.strip() for word in value.split(b",") if word.strip())


def upgrade_of(head: bytes) -> bytes:
    """The protocols that a head as it travels names in Upgrade."""
    return b",".join(_UPGRADE.findall(head))


def is_among(answered: bytes, asked: bytes) -> bool:
    """Whether a 101 names protocols, and only such as were asked for (RFC 9110, 7.8)."""
    words = split_words(answered.lower())
    return bool(words) and words <= split_words(asked.lower())


def _explain(raw: bytes) -> str:
    first = raw.partition(b"\r\n")[0]
    if re.fullmatch(TOKEN + rb" [!-~\x80-\xff]+ HTTP/\d\.\d", first) is None:
        return "the request line is malformed"
    if re.search(rb"(?<!\r)\n|\r(?!\n)", raw):
        return "a line does not end with CRLF"
    if re.search(rb"\n[ \t]", raw):
        return "a field is folded over several lines"
    return "a field name or value has characters that are not allowed"


def is_request_id(value: bytes) -> bool:
    return _REQUEST_ID.fullmatch(value) is not None


def forwarded_head(head: Head, own_fields: bytes, *, upgrade: bool) -> bytes:
    """The request head as it travels to the agent: request line, the visitor's fields in their order, our own."""
    dropped = DROPPED
    words = head.connection
    if words is not _NO_WORDS and words is not _KEEP_ALIVE:
        dropped = dropped | words
        dropped -= {b"host"}
    lines = [head.method + b" " + head.target + b" HTTP/1.1"]
    has_host = False
    for name, raw_name, value in head.fields:
        if name in dropped:
            continue
        if name == b"host":
            has_host = True
            value = head.host
        lines.append(raw_name + b": " + value)
    if not has_host:
        lines.append(b"Host: " + head.host)
    if upgrade:
        lines.append(b"Connection: Upgrade\r\nUpgrade: " + head.upgrade)
    lines.append(own_fields)
    return b"\r\n".join(lines)


def check_relayed(head: bytes) -> None:
    """The core's look at an answer's head that came over the link. Raises Failure(local_broken)."""
    if not (_is_relayed_again if len(head) <= MAX_REMEMBERED else _is_relayed)(head):
        raise Failure("local_broken", "the answer's head that came over the link is not valid")


def _is_relayed(head: bytes) -> bool:
    return _RELAYED.fullmatch(head) is not None and _FORBIDDEN.search(head) is None


#: busy services say the same many times a second
_is_relayed_again = lru_cache(256)(_is_relayed)


def check_trailers(fields: bytes) -> bool:
    """Whether trailer fields that came over the link are fields, and none that must not be there."""
    return LINES.fullmatch(fields) is not None and _NOT_TRAILERS.search(fields) is None
