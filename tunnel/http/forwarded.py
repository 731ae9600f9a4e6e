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
from tunnel.http.heads import LINES, MAX_REMEMBERED, TOKEN
from tunnel.http.response import UNKNOWN

_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/1\.1\r\n")


class Forwarded(msgspec.Struct, frozen=True, gc=False):
    """A head that is valid. fields: all behind the request line; names: of these, lower case."""

    method: bytes
    target: bytes
    line: bytes
    fields: bytes
    names: tuple[frozenset[bytes], frozenset[bytes]]  # of all lines but the last, and of the last


def read_forwarded(head: bytes) -> Forwarded:
    """The agent's look at a request head that came over the link. Raises Failure."""
    at = head.find(b"\r\n") + 2
    line, fields = head[:at], head[at:]
    match = _REQUEST_LINE.fullmatch(line)
    last = fields.rfind(b"\r\n", 0, -2) + 2 if len(fields) > 2 else 0
    if last < 2:
        last = 0
    before = fields[:last]
    names = (_names_again if last <= MAX_REMEMBERED else _names)(before)
    last_name = _names(fields[last:])
    if match is None or names is None or last_name is None:
        raise Failure("bad_request", "the request head that came over the link is not valid")
    return Forwarded(match[1], match[2], line, fields, (names, last_name))


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
    before, last = head.names
    for name, value in extra.items():
        field = name.encode("latin-1", "replace")
        if field in before or field in last:
            fields = re.sub(rb"(?im)^" + re.escape(field) + rb": [^\r\n]*\r\n", b"", fields)
        fields += b"%b: %b\r\n" % (field, value.encode("latin-1", "replace"))
    if length >= 0:
        return b"%b%bContent-Length: %d\r\n\r\n" % (head.line, fields, length)
    if length == UNKNOWN:
        return b"%b%bTransfer-Encoding: chunked\r\n\r\n" % (head.line, fields)
    return b"%b%b\r\n" % (head.line, fields)
