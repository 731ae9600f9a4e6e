"""A request's head as it came over the link: judged by the agent, and written for the local service.

Most of a head comes again and again: a visitor's fields are the same for each of its requests but for the request id,
which the core puts last. So the lines between the first and the last are judged once and the judgement is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

import msgspec

from tunnel.errors import Failure
from tunnel.http.heads import LINES, MAX_REMEMBERED, TOKEN, VALUE
from tunnel.http.response import UNKNOWN

_LAST_LINE = re.compile(rb"(?:(" + TOKEN + rb"): " + VALUE + rb"\r\n)?")
_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/1\.1\r\n")


class Forwarded(msgspec.Struct, frozen=True, gc=False):
    """A head that is valid. fields: all behind the request line. names: of all of them but the last, lower case; last:
    the last one's."""

    method: bytes
    target: bytes
    line: bytes
    fields: bytes
    names: frozenset[bytes]
    last: bytes


def read_forwarded(head: bytes) -> Forwarded:
    """The agent's look at a request head that came over the link. Raises Failure."""
    at = head.find(b"\r\n") + 2
    line, fields = head[:at], head[at:]
    end = fields.rfind(b"\r\n", 0, -2)
    size = end + 2 if end >= 0 else 0  # of all lines but the last
    match = _REQUEST_LINE.fullmatch(line)
    names = (_names_again if size <= MAX_REMEMBERED else _names)(fields[:size])
    last = _LAST_LINE.fullmatch(fields, size)
    if match is None or names is None or last is None:
        raise Failure("bad_request", "the request head that came over the link is not valid")
    method, target = match.groups()
    return Forwarded(method, target, line, fields, names, (last[1] or b"").lower())


def _names(lines: bytes) -> frozenset[bytes] | None:
    """The lower-case names in whole field lines, None if they are not valid."""
    if LINES.fullmatch(lines) is None:
        return None
    return frozenset([line.partition(b":")[0].lower() for line in lines.split(b"\r\n")[:-1]])


_names_again = lru_cache(256)(_names)


def local_head(head: Forwarded, extra: Mapping[str, str], length: int) -> bytes:
    """The head as the local service gets it: a layer's fields in place of those of the same name, and our framing.

    extra: names in lower case. length: of the body, in the wire's terms.
    """
    fields = head.fields
    for name, value in extra.items():
        field = name.encode("latin-1", "replace")
        if field in head.names or field == head.last:
            fields = re.sub(rb"(?im)^" + re.escape(field) + rb": [^\r\n]*\r\n", b"", fields)
        shown = b"Host" if field == b"host" else field  # as people write it: there are servers that look
        fields += b"%b: %b\r\n" % (shown, value.encode("latin-1", "replace"))
    if length >= 0:
        return b"%b%bContent-Length: %d\r\n\r\n" % (head.line, fields, length)
    if length == UNKNOWN:
        return b"%b%bTransfer-Encoding: chunked\r\n\r\n" % (head.line, fields)
    return b"%b%b\r\n" % (head.line, fields)
