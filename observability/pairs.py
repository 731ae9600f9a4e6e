"""The usual spans two at a time: a request at the core with its stream, a stream at the agent with its local request.

Nearly all spans there are come in such pairs, the inner right before the outer. What both say (the trace, the request's
id, the target) is looked up once, and both are put together with few calls between: on a busy processor it is those
that cost. Whatever is not exactly usual is no pair, and each span goes its own way (usual.py); a test holds the bytes
of pairs against those.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import Any

from observability import groups
from observability.groups import KNOWN_METHODS, MAX_KEPT, Common
from observability.otlp import EMPTY_STATUS, FLAGS, before_time, encode_common, pack_double, varint
from observability.record import ROOT, Record
from observability.spans import WallClock
from observability.usual import (
    AGENT_STREAM,
    CORE_STREAM,
    LOCAL_NAMES,
    NAMES,
    OFFSET,
    STREAM_ID,
    answered_tail,
    as_field,
    encode_request_id,
    encode_sizes,
    pack_times,
)

Pair = tuple[bytes, bytes]

_unhex = bytes.fromhex
_PARENT = b"\x22\x08"
_OURS, _REMOTE = FLAGS[False], FLAGS[True]
_FIRST_BYTE, _LAST_BYTE = before_time("first_byte"), before_time("last_byte")
_LOCAL_MARKS, _STREAM_MARKS = ["first_byte", "last_byte"], ["last_byte"]
_pack_local_marks = Struct(f"<{len(_FIRST_BYTE)}sQ{len(_LAST_BYTE)}sQ").pack
_pack_stream_marks = Struct(f"<{len(_LAST_BYTE)}sQ").pack


class Pairs:
    """encode: the spans of two records in a row, in their order; None if these are no usual pair."""

    def __init__(self, clock: WallClock, role: str) -> None:
        self._clock = clock
        self.encode = self._at_core if role == "core" else self._at_agent

    def _at_core(self, inner: Record, outer: Record) -> Pair | None:
        if inner[0].parent is not outer[0] or not _is_usual_at_core(inner, outer):
            return None
        stream: Any = inner[0]
        request: Any = outer[0]
        offset = self._clock.offset(request.started)
        tail, agent = answered_tail(request, outer[1], offset), groups.user_agent(request)
        if not tail or len(agent) > MAX_KEPT:
            return None
        of_request = _unhex(f"0a10{request.trace_id}1208{request.span_id}")
        of_stream = of_request[:20] + _unhex(stream.span_id)
        request_id, number = encode_request_id(request.request_id), varint(stream.stream_id)
        method, scheme, host, target = request.method, request.scheme, request.host, request.target
        url, path = _url_and_path(scheme, host, target)
        whose = stream.tunnel, stream.agent_id, stream.connection_id, stream.account_id
        stream_span = b"".join(
            (
                of_stream,
                CORE_STREAM,
                pack_times(0x39, int(stream.started * 1e9) + offset, 0x41, int(inner[1] * 1e9) + offset, _OURS),
                _PARENT,
                of_request[20:],
                _carried(method, stream.status, *whose),
                path,
                STREAM_ID[len(number)],
                number,
                encode_sizes(stream.bytes_in, stream.bytes_out, False),
                request_id,
                OFFSET,
                pack_double(stream.offset),
                EMPTY_STATUS,
            )
        )
        whose = request.tunnel, request.agent_id, request.connection_id, request.account_id
        request_span = b"".join(
            (
                of_request,
                NAMES[method],
                pack_times(0x39, int(request.started * 1e9) + offset, 0x41, int(outer[1] * 1e9) + offset, _OURS),
                _route(method, scheme, host, request.http_version, request.status, *whose),
                _visitor(request.client, agent),
                url,
                encode_sizes(request.bytes_in, request.bytes_out, False),
                request_id,
                tail,
                EMPTY_STATUS,
            )
        )
        return as_field(stream_span), as_field(request_span)

    def _at_agent(self, inner: Record, outer: Record) -> Pair | None:
        if inner[0].parent is not outer[0] or not _is_usual_at_agent(inner, outer):
            return None
        local: Any = inner[0]
        stream: Any = outer[0]
        offset = self._clock.offset(stream.started)
        of_stream = _unhex(f"0a10{stream.trace_id}1208{stream.span_id}")
        of_local = of_stream[:20] + _unhex(local.span_id)
        request_id, number = encode_request_id(stream.request_id), varint(stream.stream_id)
        method, target = stream.method, stream.target
        first_byte, last_byte = local.marks.values()
        ended = int(last_byte * 1e9) + offset
        local_span = b"".join(
            (
                of_local,
                LOCAL_NAMES[method],
                pack_times(0x39, int(local.started * 1e9) + offset, 0x41, ended, _OURS),
                _PARENT,
                of_stream[20:],
                _service(local.address, local.scheme, method, local.status),
                _full(local.scheme, local.address, target),
                encode_sizes(local.bytes_in, local.bytes_out, False),
                request_id,
                _pack_local_marks(_FIRST_BYTE, int(first_byte * 1e9) + offset, _LAST_BYTE, ended),
                EMPTY_STATUS,
            )
        )
        ended = int(stream.marks["last_byte"] * 1e9) + offset
        whose = stream.tunnel, stream.agent_id, stream.connection_id, stream.account_id
        stream_span = b"".join(
            (
                of_stream,
                AGENT_STREAM,
                pack_times(0x39, int(stream.started * 1e9) + offset, 0x41, ended, _REMOTE),
                _PARENT,
                _unhex(outer[2].parent_id),
                _carried(method, stream.status, *whose),
                _path(target),
                STREAM_ID[len(number)],
                number,
                encode_sizes(stream.bytes_in, stream.bytes_out, False),
                request_id,
                _pack_stream_marks(_LAST_BYTE, ended),
                EMPTY_STATUS,
            )
        )
        return as_field(local_span), as_field(stream_span)


def _is_usual_at_core(inner: Record, outer: Record) -> bool:
    """What is written for a pair holds for this one. That the marks are in order, `answered_tail` sees."""
    stream: Any = inner[0]
    request: Any = outer[0]
    return (
        _are_one_exchange(inner, outer)
        and outer[2] is ROOT
        and not (request.headers or stream.marks or "tracestate" in stream.headers)
        and request.started <= stream.started <= inner[1] <= outer[1]
        and len(request.host) <= MAX_KEPT
    )


def _is_usual_at_agent(inner: Record, outer: Record) -> bool:
    local: Any = inner[0]
    stream: Any = outer[0]
    marks, origin = local.marks, outer[2]
    return (
        _are_one_exchange(inner, outer)
        and origin.is_remote
        and origin.link is None
        and origin.parent_id != ""
        and list(marks) == _LOCAL_MARKS
        and list(stream.marks) == _STREAM_MARKS
        and not ("tracestate" in local.headers or "tracestate" in stream.headers)
        and stream.started <= local.started <= marks["first_byte"] <= marks["last_byte"] <= stream.marks["last_byte"]
    )


def _are_one_exchange(inner: Record, outer: Record) -> bool:
    """A request that went well, seen at two places of this process."""
    inside: Any = inner[0]
    outside: Any = outer[0]
    stream = inside if inside.kind == "stream" else outside
    return (
        not (inner[3] or outer[3])
        and inside.outcome == outside.outcome == "ok"
        and inside.status < 500
        and outside.status < 500
        and outside.parent is None
        and inner[2] == (outside.span_id, False, None)
        and inside.trace_id == outside.trace_id
        and stream.protocol == "http"
        and inside.method == outside.method
        and outside.method in KNOWN_METHODS
        and inside.request_id == outside.request_id
        and inside.target == outside.target
        and len(outside.target) <= MAX_KEPT
    )


# What recurs from pair to pair, as bytes --------------------------------------------------------------------------


def _encoded(*commons: Common) -> bytes:
    return b"".join([common.encoded or encode_common(common) for common in commons])


@lru_cache(1024)
def _route(method: str, scheme: str, host: str, http_version: str, status: int, *whose: str) -> bytes:
    return _encoded(groups.route_group(method, scheme, host, http_version), groups.ended_group(status, "ok", *whose))


@lru_cache(1024)
def _carried(method: str, status: int, *whose: str) -> bytes:
    return _encoded(groups.carried_group(method, "http"), groups.ended_group(status, "ok", *whose))


@lru_cache(4096)
def _visitor(client: str, agent: str) -> bytes:
    return _encoded(groups.visitor_group(client, agent))


@lru_cache(2048)
def _url_and_path(scheme: str, host: str, target: str) -> Pair:
    return _encoded(groups.url_group(scheme, host, target)), _encoded(groups.path_group(target))


@lru_cache(2048)
def _path(target: str) -> bytes:
    return _encoded(groups.path_group(target))


@lru_cache(1024)
def _service(address: str, scheme: str, method: str, status: int) -> bytes:
    return _encoded(groups.service_group(address, scheme, method, status, "ok"))


@lru_cache(2048)
def _full(scheme: str, address: str, target: str) -> bytes:
    return _encoded(groups.full_group(scheme, address, target))
