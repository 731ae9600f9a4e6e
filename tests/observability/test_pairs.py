"""Two spans made at once against the two made one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tracetools import SPAN, TRACE, a_local, a_request, a_stream

from observability.context import SpanContext
from observability.export import Exporter
from observability.exporters import HTTP, Limits, Target
from observability.pairs import Pairs
from observability.record import ROOT, Origin, Record
from observability.spans import SpanBuilder
from observability.usual import UsualSpans
from tunnel.handler import ConnectVisit, Fields, QueryVisit

ROLES = ("core", "agent")
BUILDERS = {role: SpanBuilder(role) for role in ROLES}
USUAL = {role: UsualSpans(builder, role) for role, builder in BUILDERS.items()}
PAIRS = {role: Pairs(builder.clock, role) for role, builder in BUILDERS.items()}

INNER_SPAN = "1" * 16
HEAD = [(b"Host", b"api.localhost"), (b"User-Agent", b"ua/1")]


def at_core() -> list[Any]:
    """Inner visit, its origin, the exception's name it ended with; then those of the outer."""
    request = a_request(Fields(HEAD))
    request.started, request.ended, request.agent_us, request.local_us = 100.0, 100.5, 20_000, 10_000
    request.marks = {"head": 100.1, "opened": 100.15, "answered": 100.35, "first_byte": 100.4}
    stream = a_stream(request, headers={"traceparent": "00-"})
    stream.started, stream.ended, stream.offset = 100.14, 100.45, 0.125
    return [stream, Origin(SPAN, False, None), "", request, ROOT, ""]


def at_agent() -> list[Any]:
    stream = a_stream(None, headers={"traceparent": "00-"})
    stream.started, stream.ended, stream.marks = 100.0, 100.5, {"last_byte": 100.4}
    local = a_local(stream)
    local.headers = {"traceparent": "00-"}
    local.started, local.ended, local.marks = 100.1, 100.45, {"first_byte": 100.3, "last_byte": 100.4}
    return [local, Origin(SPAN, False, None), "", stream, Origin("c" * 16, True, None), ""]


def usual(role: str) -> list[Any]:
    told = at_core() if role == "core" else at_agent()
    for visit, span_id in ((told[0], INNER_SPAN), (told[3], SPAN)):
        visit.trace_id, visit.span_id, visit.sampled = TRACE, span_id, True
        visit.outcome, visit.status, visit.bytes_out = "ok", 200, 1024
    return told


def records(told: Sequence[Any]) -> tuple[Record, Record]:
    inner, origin, failure, outer, outer_origin, outer_failure = told
    return (inner, inner.ended, origin, failure), (outer, outer.ended, outer_origin, outer_failure)


def one_by_one(role: str, told: Sequence[Any]) -> tuple[bytes, bytes]:
    inner, outer = records(told)
    return USUAL[role].encode(inner), USUAL[role].encode(outer)


moments = st.floats(99.5, 101)
origins = st.sampled_from([ROOT, Origin(SPAN, False, None), Origin("c" * 16, True, None), Origin("", True, None),
                           Origin(SPAN, False, SpanContext(TRACE, SPAN, True))])  # fmt: skip
odd_marks = st.dictionaries(
    st.sampled_from(["head", "opened", "answered", "first_byte", "last_byte", "connected", "upgraded"]), moments
)
targets = st.sampled_from(["", "/", "/a?b=c&d", "http://u:p@h/x?y=z", "/" + "x" * 3000, "/\u00e4?\u00df=1"])
texts = st.sampled_from(["", "x", "\u00e4\udc80", "y" * 3000])
numbers = st.sampled_from([-1, 0, 1, 127, 128, 5000, 70_000, 1 << 40])
#: by name of an attribute, what it may be
ODD: dict[str, st.SearchStrategy[Any]] = {
    "started": moments, "ended": st.just(0.0) | moments, "marks": odd_marks, "target": targets, "host": texts,
    "headers": st.sampled_from([{}, {"tracestate": "a=1"}, {"baggage": "a=1"}]), "request_id": texts,
    "method": st.sampled_from(["GET", "POST", "", "BREW"]), "http_version": st.sampled_from(["1.0", "1.1"]),
    "status": st.sampled_from([0, 101, 204, 404, 500, 503]), "agent_us": numbers, "local_us": numbers,
    "outcome": st.sampled_from(["", "visitor_aborted", "local_broken", "quota"]), "agent_id": texts,
    "tunnel": st.sampled_from(["", "x"]),
    "protocol": st.sampled_from(["tcp", "upgrade"]), "span_id": st.just("2" * 16), "trace_id": st.just("3" * 32),
    "bytes_in": numbers.map(abs), "bytes_out": numbers.map(abs), "stream_id": numbers.map(abs),
    "offset": st.floats(-9, 9), "address": st.sampled_from(["[::1]:80", "x", "a:b"]), "parent": st.none(),
    "request_headers": st.sampled_from([HEAD, [], Fields([]), Fields([(b"user-agent", b"u" * 999)])]),
}  # fmt: skip


@settings(max_examples=600)
@given(st.data(), st.sampled_from(ROLES))
def test_the_same_bytes(data: st.DataObject, role: str) -> None:
    told = usual(role)
    for _ in range(data.draw(st.integers(0, 2))):
        visits = data.draw(st.sampled_from([[told[0]], [told[3]], [told[0], told[3]]]))
        name = data.draw(st.sampled_from([name for name in ODD if all(hasattr(visit, name) for visit in visits)]))
        value = data.draw(ODD[name])
        for visit in visits:
            setattr(visit, name, value)
    if data.draw(st.integers(0, 9)) == 0:
        told[data.draw(st.sampled_from([1, 4]))] = data.draw(origins)
    if data.draw(st.integers(0, 9)) == 0:
        told[data.draw(st.sampled_from([2, 5]))] = "Cancelled"
    pair = PAIRS[role].encode(*records(told))
    assert pair is None or pair == one_by_one(role, told)


@pytest.mark.parametrize("role", ROLES)
def test_usual_ones_are_pairs(role: str) -> None:
    told = usual(role)
    assert PAIRS[role].encode(*records(told)) == one_by_one(role, told)
    inner, outer = records(told)
    assert PAIRS[role].encode(outer, inner) is None
    assert PAIRS[role].encode(inner, records(usual(role))[1]) is None
    told[3].parent = ConnectVisit("192.0.2.1:1")  # its times would have to be looked at
    assert PAIRS[role].encode(inner, outer) is None


@pytest.mark.parametrize("role", ROLES)
def test_each_record_makes_its_span_in_its_place(role: str) -> None:
    """In pairs, alone, and beside what makes none or fails."""
    exporter = Exporter(Target(HTTP, "http://127.0.0.1:1"), Limits(), role, "1")
    exporter._make, exporter._make_pair = USUAL[role].encode, PAIRS[role].encode
    query, broken = QueryVisit("token.find", "sqlite"), usual(role)
    query.trace_id, query.span_id = TRACE, SPAN
    broken[3].target = broken[0].target = None
    pairs = [records(usual(role)) for _ in range(4)]
    some = [*pairs[0], pairs[1][0], *pairs[2], (query, query.started, ROOT, ""), pairs[3][1], pairs[3][0]]
    assert exporter._make_all(some) == [USUAL[role].encode(record) for record in some]
    assert exporter._make_all([]) == [] and exporter.failed == 0
    assert len(exporter._make_all([*pairs[0], *records(broken), *pairs[1]])) == 4
    assert exporter.failed == 2
