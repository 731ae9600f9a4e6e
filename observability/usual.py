"""The usual spans straight into OTLP's bytes: requests, streams and local requests that went well.

A span is made of facts (spans.py), and these are encoded (otlp.py): so every kind of span can be made, and so it is
defined how it looks. Nearly all of them have a way of their own here, at half the cost: what is the same in all of
them is made beforehand, and the rest goes into it without a stop. A test holds the bytes against those of the facts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import Any

from observability import groups
from observability.groups import KNOWN_METHODS, clean
from observability.otlp import (
    ATTRIBUTE,
    EMPTY_STATUS,
    FLAGS,
    before_double,
    before_text,
    before_time,
    before_value,
    encode_attributes,
    encode_common,
    encode_span,
    field,
    name_and_kind,
    pack_double,
    pack_fixed64,
    varint,
)
from observability.phases import phases
from observability.record import Origin, Record
from observability.spans import CLIENT, HARMLESS, PHASES, SERVER, SpanBuilder
from tunnel.handler import LocalVisit, RequestVisit, StreamVisit, Visit

_unhex = bytes.fromhex
pack_times = Struct(f"<BQBQ{len(FLAGS[True])}s").pack
_SPAN = tuple(b"\x12" + varint(size) for size in range(4096))  #: a span's tag and length
STREAM_ID = tuple(before_value(ATTRIBUTE, "tunnel.stream.id", b"\x18", size) for size in range(11))
_REQUEST_ID = tuple(before_text(ATTRIBUTE, "tunnel.request.id", size) for size in range(65))
OFFSET = before_double(ATTRIBUTE, "tunnel.clock.offset_seconds")
NAMES = {method: name_and_kind(method, SERVER) for method in KNOWN_METHODS}
LOCAL_NAMES = {method: name_and_kind(method, CLIENT) for method in KNOWN_METHODS}
CORE_STREAM, AGENT_STREAM = name_and_kind("tunnel.stream", CLIENT), name_and_kind("agent.stream", SERVER)

# An answered request has these phases and marks, and they are written in one go.
_MARKS = ["head", "opened", "answered", "first_byte"]
_PHASES = [before_double(ATTRIBUTE, name) for name in list(PHASES.values())[:7]]
_EVENTS = [before_time(mark) for mark in _MARKS]
_VISITOR, _QUEUE, _LINK, _AGENT, _LOCAL, _ANSWER, _BODY = _PHASES
_HEAD, _OPENED, _ANSWERED, _FIRST_BYTE = _EVENTS
_pack_answered = Struct(
    "<" + "".join(f"{len(head)}sd" for head in _PHASES) + "".join(f"{len(head)}sQ" for head in _EVENTS)
).pack


#: added and taken away again, it leaves of a number what `round` makes of it: a double has no room for the rest
WHOLE = 1.5 * 2.0**52


class UsualSpans:
    """Encodes records: the usual ones on the short way, all others by their facts."""

    def __init__(self, builder: SpanBuilder, role: str) -> None:
        self._builder = builder
        self._is_core = role == "core"
        self._stream_name = CORE_STREAM if self._is_core else AGENT_STREAM
        self._ways: dict[str, Callable[[Any, float, Origin], bytes]] = {
            "request": self._request,
            "stream": self._stream,
            "local": self._local,
        }
        self._request_id = ""  # of the span before: two in a row have the same
        self._request_id_field = b""

    def encode(self, record: Record) -> bytes:
        """The span of a finished visit as a field of ScopeSpans; b"" for a visit that makes none after all."""
        visit, ended, origin, failure = record
        way = self._ways.get(visit.kind)
        if way is None or failure or visit.status >= 500 or visit.outcome not in HARMLESS or origin.link is not None:
            facts = self._builder.build(record)
            return encode_span(facts) if facts is not None else b""
        return as_field(way(visit, ended, origin))

    def _request(self, visit: RequestVisit, ended: float, origin: Origin) -> bytes:
        start, end, offset = self._builder.times(visit, ended, origin.parent_id)
        route, answered, visitor, url = groups.of_request(visit)
        return b"".join(
            (
                _begin(visit, NAMES.get(visit.method) or _HTTP, start, end, origin),
                route.encoded or encode_common(route),
                answered.encoded or encode_common(answered),
                visitor.encoded or encode_common(visitor),
                url.encoded or encode_common(url),
                encode_sizes(visit.bytes_in, visit.bytes_out, False),
                self._said_request_id(visit.request_id),
                answered_tail(visit, ended, offset) or _request_tail(visit, ended, start, end, offset),
                EMPTY_STATUS,
            )
        )

    def _stream(self, visit: StreamVisit, ended: float, origin: Origin) -> bytes:
        start, end, offset = self._builder.times(visit, ended, origin.parent_id)
        carried, answered, path = groups.of_stream(visit)
        number = varint(visit.stream_id)
        return b"".join(
            (
                _begin(visit, self._stream_name, start, end, origin),
                carried.encoded or encode_common(carried),
                answered.encoded or encode_common(answered),
                path.encoded or encode_common(path),
                STREAM_ID[len(number)],
                number,
                encode_sizes(visit.bytes_in, visit.bytes_out, visit.protocol == "tcp"),
                self._said_request_id(visit.request_id),
                OFFSET + pack_double(visit.offset) if self._is_core else b"",
                _events(visit, start, end, offset) if visit.marks else b"",
                EMPTY_STATUS,
            )
        )

    def _local(self, visit: LocalVisit, ended: float, origin: Origin) -> bytes:
        start, end, offset = self._builder.times(visit, ended, origin.parent_id)
        method = visit.method
        service, *rest = groups.of_local(visit)
        name = LOCAL_NAMES.get(method) or (_LOCAL_HTTP if method else _LOCAL_TCP)
        return b"".join(
            (
                _begin(visit, name, start, end, origin),
                service.encoded or encode_common(service),
                rest[0].encoded or encode_common(rest[0]) if rest else b"",
                encode_sizes(visit.bytes_in, visit.bytes_out, not method),
                self._said_request_id(visit.request_id),
                _events(visit, start, end, offset) if visit.marks else b"",
                EMPTY_STATUS,
            )
        )

    def _said_request_id(self, request_id: str) -> bytes:
        if request_id is not self._request_id:
            self._request_id = request_id
            self._request_id_field = encode_request_id(request_id)
        return self._request_id_field


def as_field(span: bytes) -> bytes:
    """Of ScopeSpans."""
    size = len(span)
    return _SPAN[size] + span if size < 4096 else field(b"\x12", span)


def encode_request_id(request_id: str) -> bytes:
    size = len(request_id)
    if 0 < size < len(_REQUEST_ID) and request_id.isascii():
        return _REQUEST_ID[size] + request_id.encode()
    text = clean(request_id).encode()
    return before_text(ATTRIBUTE, "tunnel.request.id", len(text)) + text if text else b""


_HTTP = name_and_kind("HTTP", SERVER)
_LOCAL_HTTP = name_and_kind("HTTP", CLIENT)
_LOCAL_TCP = name_and_kind("tcp", CLIENT)


def _begin(visit: Visit, name: bytes, start: int, end: int, origin: Origin) -> bytes:
    """All before the attributes."""
    parent_id = origin.parent_id
    begun = (
        _unhex(f"0a10{visit.trace_id}1208{visit.span_id}")
        + name
        + pack_times(0x39, start, 0x41, end, FLAGS[origin.is_remote])
    )
    if tracestate := visit.headers.get("tracestate"):
        begun += field(b"\x1a", tracestate.encode())
    return begun + _unhex("2208" + parent_id) if parent_id else begun


@lru_cache(4096)
def encode_sizes(bytes_in: int, bytes_out: int, is_raw: bool) -> bytes:
    if is_raw:
        return encode_attributes({"tunnel.bytes_in": bytes_in, "tunnel.bytes_out": bytes_out})
    return encode_attributes({"http.request.body.size": bytes_in, "http.response.body.size": bytes_out})


def answered_tail(visit: RequestVisit, ended: float, offset: int) -> bytes:
    """Phases and events of a request whose marks are all there and in order; otherwise b""."""
    marks = visit.marks
    if list(marks) != _MARKS or visit.agent_us < 0 or visit.stalled_us:
        return b""
    started = visit.started
    head, opened, answered, first_byte = marks.values()
    if not started <= head <= opened <= answered <= first_byte <= ended:
        return b""
    link = (answered - opened) * 1e3
    agent, local = visit.agent_us / 1e3, visit.local_us / 1e3
    if agent > link:
        agent = link
    if local < 0:
        local = 0.0
    elif local > agent:
        local = agent
    whole = WHOLE  # rounded to microseconds
    return _pack_answered(
        _VISITOR,
        ((head - started) * 1e3 * 1e3 + whole - whole) / 1e3,
        _QUEUE,
        ((opened - head) * 1e3 * 1e3 + whole - whole) / 1e3,
        _LINK,
        ((link - agent) * 1e3 + whole - whole) / 1e3,
        _AGENT,
        ((agent - local) * 1e3 + whole - whole) / 1e3,
        _LOCAL,
        (local * 1e3 + whole - whole) / 1e3,
        _ANSWER,
        ((first_byte - answered) * 1e3 * 1e3 + whole - whole) / 1e3,
        _BODY,
        ((ended - first_byte) * 1e3 * 1e3 + whole - whole) / 1e3,
        _HEAD,
        int(head * 1e9) + offset,
        _OPENED,
        int(opened * 1e9) + offset,
        _ANSWERED,
        int(answered * 1e9) + offset,
        _FIRST_BYTE,
        int(first_byte * 1e9) + offset,
    )


def _request_tail(visit: RequestVisit, ended: float, start: int, end: int, offset: int) -> bytes:
    spent = {PHASES[phase]: round(spent * 1e3) / 1e3 for phase, spent in phases(visit, ended).items()}
    return encode_attributes(spent) + _events(visit, start, end, offset)


def _events(visit: Visit, start: int, end: int, offset: int) -> bytes:
    out = b""
    for mark, at in visit.marks.items():
        moment = int(at * 1e9) + offset
        out += before_time(mark) + pack_fixed64(start if moment < start else end if moment > end else moment)
    return out
