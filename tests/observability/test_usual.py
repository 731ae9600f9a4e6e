"""The short way to a span's bytes against the one by its facts."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tracetools import SPAN, TRACE, a_local, a_request, a_stream

from observability.context import SpanContext
from observability.otlp import encode_span
from observability.record import ROOT, Origin
from observability.spans import SpanBuilder
from observability.usual import UsualSpans
from tunnel.errors import OUTCOMES
from tunnel.handler import Fields, LocalVisit, QueryVisit, RequestVisit, StreamVisit, Visit

BUILDERS = {role: SpanBuilder(role) for role in ("core", "agent")}
USUAL = {role: UsualSpans(builder, role) for role, builder in BUILDERS.items()}
MARKS = ("head", "opened", "answered", "first_byte")

texts = st.text(max_size=20) | st.just("x" * 400)
targets = st.sampled_from(["", "/", "/a?b=c&d", "http://u:p@h/x?y=z", "/" + "x" * 3000, "/ä?ß=1"]) | texts
methods = st.sampled_from(["GET", "POST", "", "BREW", "M" * 300])
sizes = st.sampled_from([0, 1, 127, 128, 5000, 70_000, 1 << 40]) | st.integers(0, 1 << 62)
moments = st.floats(99, 103)
any_marks = st.dictionaries(st.sampled_from([*MARKS, "upgraded", "event", "last_byte", "sent"]), moments)
steps = st.lists(st.floats(0, 0.5), min_size=4, max_size=4)
ordered_marks = steps.map(lambda gaps: dict(zip(MARKS, accumulate(gaps, initial=100.0), strict=False)))
origins = st.builds(
    Origin, st.just("") | st.just(SPAN), st.booleans(), st.sampled_from([None] * 7 + [SpanContext(TRACE, SPAN, True)])
)


@st.composite
def visits(draw: st.DrawFn) -> Visit:
    request = a_request(target=draw(targets))
    fields = [
        (b"Host", b"x"),
        *draw(st.sampled_from([[], [(b"USER-Agent", b"ua/\xe4")], [(b"user-agent", b"u" * 999)]])),
    ]
    request.request_headers = draw(st.sampled_from([fields, Fields(fields)]))
    request.host, request.method, request.http_version = (
        draw(texts),
        draw(methods),
        draw(st.sampled_from(["1.0", "1.1"])),
    )
    request.agent_us, request.local_us = draw(st.integers(-1, 9_000_000)), draw(st.integers(-1, 9_000_000))
    stream = a_stream(draw(st.sampled_from([None, request])), draw(st.sampled_from(["http", "upgrade", "tcp"])))
    stream.stream_id, stream.offset, stream.method = draw(sizes), draw(st.floats(-9, 9)), draw(methods)
    local = a_local(stream)
    for visit in (request, stream, local):
        visit.trace_id, visit.span_id = TRACE, draw(st.sampled_from([SPAN, "1" * 16]))
        visit.started, visit.ended = draw(moments), draw(st.just(0.0) | moments)
        visit.status = draw(st.sampled_from([0, 101, 200, 204, 304, 404, 500]))
        visit.outcome = draw(st.sampled_from(["", *["ok"] * len(OUTCOMES), *OUTCOMES]))
        visit.bytes_in, visit.bytes_out = draw(sizes), draw(sizes)
        visit.headers = draw(st.sampled_from([{}, {"tracestate": "a=1"}]))
        visit.marks = draw(any_marks | ordered_marks)
        if isinstance(visit, RequestVisit | StreamVisit | LocalVisit):
            visit.request_id = draw(st.sampled_from(["", "0123456789abcdef", "ä\udc80", "r" * 3000]))
    return draw(st.sampled_from([request, stream, local]))


@settings(max_examples=400)
@given(visits(), origins, st.sampled_from([""] * 8 + ["Cancelled", "ValueError"]), st.sampled_from(["core", "agent"]))
def test_the_same_bytes(visit: Visit, origin: Origin, failure: str, role: str) -> None:
    record = visit, visit.ended or 103.5, origin, failure
    facts = BUILDERS[role].build(record)
    assert facts is not None
    assert USUAL[role].encode(record) == encode_span(facts)


@given(ordered_marks, st.integers(0, 9_000_000), st.integers(-1, 9_000_000))
def test_the_same_phases_of_an_answered_request(marks: dict[str, float], agent: int, local: int) -> None:
    visit = a_request()
    visit.trace_id, visit.span_id, visit.started, visit.outcome = TRACE, SPAN, 100.0, "ok"
    visit.marks, visit.agent_us, visit.local_us = marks, agent, local
    facts = BUILDERS["core"].build((visit, 102.5, ROOT, ""))
    assert facts is not None and len(facts.events) == 4
    assert USUAL["core"].encode((visit, 102.5, ROOT, "")) == encode_span(facts)


@pytest.mark.parametrize("make", [a_request, lambda: a_stream(a_request()), lambda: a_local(a_stream(None))])
def test_what_went_well_takes_the_short_way(monkeypatch: pytest.MonkeyPatch, make: type[Visit]) -> None:
    visit = make()
    visit.trace_id, visit.span_id, visit.outcome, visit.status = TRACE, SPAN, "ok", 200
    with monkeypatch.context() as patch:
        patch.delattr(SpanBuilder, "build")
        assert USUAL["core"].encode((visit, visit.started + 1, ROOT, ""))
        visit.status = 500
        with pytest.raises(AttributeError):
            USUAL["core"].encode((visit, visit.started + 1, ROOT, ""))


def test_other_kinds_take_the_long_way() -> None:
    visit = QueryVisit("token.find", "sqlite")
    visit.trace_id, visit.span_id = TRACE, SPAN
    facts = BUILDERS["core"].build((visit, visit.started + 1, ROOT, ""))
    assert facts is not None
    assert USUAL["core"].encode((visit, visit.started + 1, ROOT, "")) == encode_span(facts)
