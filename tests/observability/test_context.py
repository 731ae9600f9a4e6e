"""Trace context: the W3C's cases, agreement with the SDK's own propagators, B3, and hostile input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.propagators.b3 import B3MultiFormat
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from tracetools import PARENT, SPAN, TRACE

from observability.context import (
    MAX_BAGGAGE,
    NOTHING,
    Propagation,
    SpanContext,
    check_baggage,
    check_tracestate,
    choose_propagators,
    format_traceparent,
    parse_b3,
    parse_b3_multi,
    parse_traceparent,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (PARENT, SpanContext(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-00", SpanContext(TRACE, SPAN, False)),
        (f"00-{TRACE}-{SPAN}-03", SpanContext(TRACE, SPAN, True)),  # level 2: random flag
        (f"00-{TRACE}-{SPAN}-fe", SpanContext(TRACE, SPAN, False)),
        (f"01-{TRACE}-{SPAN}-01", SpanContext(TRACE, SPAN, True)),  # a later version is read as far as we know it
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", SpanContext(TRACE, SPAN, True)),
        (f"cc-{TRACE}-{SPAN}-01-", SpanContext(TRACE, SPAN, True)),
    ],
)
def test_a_good_traceparent_is_read(value: str, expected: SpanContext) -> None:
    assert parse_traceparent(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN.upper()}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}a-{SPAN}-01",
        f"00-{TRACE}-{SPAN}a-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-0g",
        f"00-{TRACE}-{SPAN}-01-extra",
        f"00-{TRACE}-{SPAN}-01-",
        f"00-{TRACE}-{SPAN}-01.",
        f"cc-{TRACE}-{SPAN}-01.what-the-future",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
        f"00-{TRACE}-{SPAN}-01, 00-{TRACE}-{SPAN}-01",
        f"00-{TRACE[:-1]}\u0661-{SPAN}-01",
    ],
)
def test_a_malformed_traceparent_starts_a_new_trace(value: str) -> None:
    assert parse_traceparent(value) is None


@given(st.text(alphabet="0123456789abcdefABCDEF-gz ", max_size=80) | st.text(max_size=60))
def test_parsing_takes_anything(value: str) -> None:
    context = parse_traceparent(value)
    assert context is None or (len(context.trace_id), len(context.span_id)) == (32, 16)
    assert parse_b3(value) is None or len(parse_b3(value).trace_id) == 32  # type: ignore[union-attr]
    assert isinstance(check_tracestate([value]), str)
    assert isinstance(check_baggage([value]), str)


@given(st.data())
def test_it_agrees_with_the_sdk(data: st.DataObject) -> None:
    """One character of a good value changed, dropped or doubled: both read the same."""
    at = data.draw(st.integers(0, len(PARENT) - 1))
    new = data.draw(st.sampled_from(["", "0", "f", "F", "g", "-", PARENT[at] * 2]))
    value = PARENT[:at] + new + PARENT[at + 1 :]
    found = TraceContextTextMapPropagator().extract({"traceparent": value})
    theirs = trace.get_current_span(found).get_span_context()
    ours = parse_traceparent(value)
    assert (ours is not None) == theirs.is_valid
    if ours is not None:
        assert (int(ours.trace_id, 16), int(ours.span_id, 16)) == (theirs.trace_id, theirs.span_id)
        assert ours.sampled == bool(theirs.trace_flags & 1)


@given(st.binary(min_size=16, max_size=16).filter(any), st.binary(min_size=8, max_size=8).filter(any), st.booleans())
def test_there_and_back(trace_id: bytes, span_id: bytes, sampled: bool) -> None:
    context = SpanContext(trace_id.hex(), span_id.hex(), sampled)
    assert parse_traceparent(format_traceparent(*context)) == context


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["foo=1,bar=2"], "foo=1,bar=2"),
        (["foo=1 \t , \t bar=2", "baz=3"], "foo=1,bar=2,baz=3"),
        (["foo=1,,bar=2", ""], "foo=1,bar=2"),
        (["fw529a3039@dt=FfAAAQ", "0aa@s=1"], "fw529a3039@dt=FfAAAQ,0aa@s=1"),
        (["foo=1,foo=2"], ""),
        (["foo"], ""),
        (["Foo=1"], ""),
        (["foo=a=b"], ""),
        (["foo=\x01"], ""),
        (["foo @dt=1"], ""),
        ([",".join(f"k{n}=1" for n in range(32))], ",".join(f"k{n}=1" for n in range(32))),
        ([",".join(f"k{n}=1" for n in range(33))], ""),
        (["a=" + "x" * 257], ""),
        ([], ""),
    ],
)
def test_tracestate_is_kept_whole_or_dropped(values: list[str], expected: str) -> None:
    assert check_tracestate(values) == expected


def test_baggage_is_kept_whole_or_dropped() -> None:
    assert check_baggage(["user=alice;secure, shop = 7", "x=%20"]) == "user=alice;secure, shop = 7,x=%20"
    assert check_baggage(["user"]) == ""
    assert check_baggage(["user=\r\nevil: 1"]) == ""
    assert check_baggage(["a=" + "b" * MAX_BAGGAGE]) == ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f"{TRACE}-{SPAN}-1", SpanContext(TRACE, SPAN, True)),
        (f"{TRACE}-{SPAN}-0", SpanContext(TRACE, SPAN, False)),
        (f"{TRACE}-{SPAN}-d", SpanContext(TRACE, SPAN, True)),
        (f"{TRACE}-{SPAN}", SpanContext(TRACE, SPAN, True)),
        (f"{TRACE}-{SPAN}-1-05e3ac9a4f6e3b90", SpanContext(TRACE, SPAN, True)),
        (f"{TRACE[16:]}-{SPAN}-1", SpanContext("0" * 16 + TRACE[16:], SPAN, True)),
        (f"{TRACE.upper()}-{SPAN.upper()}-1", SpanContext(TRACE, SPAN, True)),
        ("0", None),
        ("d", None),
        ("", None),
        (f"{TRACE}-{SPAN}-2", None),
        (f"{TRACE}-{SPAN}-1-nope", None),
        (f"{TRACE}-{SPAN}-1-05e3ac9a4f6e3b90-x", None),
        (f"{'0' * 32}-{SPAN}-1", None),
        (f"{TRACE}-{'0' * 16}-1", None),
        (f"{TRACE[:20]}-{SPAN}-1", None),
    ],
)
def test_b3_single(value: str, expected: SpanContext | None) -> None:
    assert parse_b3(value) == expected
    if expected is not None:
        found = B3MultiFormat().extract({"b3": value})
        theirs = trace.get_current_span(found).get_span_context()
        assert (theirs.trace_id, theirs.span_id) == (int(expected.trace_id, 16), int(expected.span_id, 16))
        assert bool(theirs.trace_flags & 1) == expected.sampled


@pytest.mark.parametrize(
    ("extra", "sampled"),
    [
        ({"x-b3-sampled": "1"}, True),
        ({"x-b3-sampled": "true"}, True),
        ({"x-b3-sampled": "0"}, False),
        ({"x-b3-sampled": "False"}, False),
        ({"x-b3-flags": "1"}, True),
        ({"x-b3-flags": "1", "x-b3-sampled": "0"}, True),
        ({}, True),
    ],
)
def test_b3_multi(extra: dict[str, str], sampled: bool) -> None:
    assert parse_b3_multi({"x-b3-traceid": TRACE, "x-b3-spanid": SPAN, **extra}) == SpanContext(TRACE, SPAN, sampled)


def test_b3_multi_needs_both_ids_and_a_known_state() -> None:
    assert parse_b3_multi({"x-b3-traceid": TRACE}) is None
    assert parse_b3_multi({"x-b3-spanid": SPAN}) is None
    assert parse_b3_multi({"x-b3-traceid": TRACE, "x-b3-spanid": SPAN, "x-b3-sampled": "maybe"}) is None


def test_fields_are_found_in_any_case_and_joined_in_order() -> None:
    incoming = Propagation(("tracecontext", "baggage")).extract(
        [
            (b"Host", b"a"),
            (b"TraceParent", b" " + PARENT.encode()),
            (b"Tracestate", b"a=1"),
            (b"TRACESTATE", b"b=2"),
            (b"Baggage", b"u=1"),
        ]
    )
    assert incoming == (SpanContext(TRACE, SPAN, True), "a=1,b=2", "u=1", True)


def test_two_traceparents_are_none_and_so_is_their_tracestate() -> None:
    headers = [(b"traceparent", PARENT.encode())] * 2 + [(b"tracestate", b"a=1")]
    assert Propagation(("tracecontext",)).extract(headers) == (None, "", "", True)


def test_what_is_not_enabled_is_not_read() -> None:
    b3 = [(b"b3", f"{TRACE}-{SPAN}-1".encode())]
    assert Propagation(("tracecontext", "baggage")).extract(b3) is NOTHING
    assert Propagation(("b3",)).extract([(b"traceparent", PARENT.encode())]) is NOTHING
    assert Propagation(()).extract([(b"traceparent", PARENT.encode()), *b3]) is NOTHING


@pytest.mark.parametrize("name", ["b3", "b3multi"])
def test_either_b3_reads_both_forms(name: str) -> None:
    single = [(b"B3", f"{TRACE}-{SPAN}-1".encode())]
    multi = [(b"X-B3-TraceId", TRACE.encode()), (b"X-B3-SpanId", SPAN.encode()), (b"X-B3-Sampled", b"1")]
    for headers in (single, multi):
        assert Propagation((name,)).extract(headers).context == SpanContext(TRACE, SPAN, True)


def test_the_last_listed_format_wins() -> None:
    other = "1" * 16
    headers = [(b"traceparent", PARENT.encode()), (b"b3", f"{TRACE}-{other}-0".encode()), (b"tracestate", b"a=1")]
    assert Propagation(("tracecontext", "b3")).extract(headers)[:2] == (SpanContext(TRACE, other, False), "")
    assert Propagation(("b3", "tracecontext")).extract(headers)[:2] == (SpanContext(TRACE, SPAN, True), "a=1")


def test_every_chosen_format_is_written() -> None:
    headers: dict[str, str] = {}
    carried = {"tracestate": "a=1", "baggage": "u=1"}
    Propagation(("tracecontext", "baggage", "b3", "b3multi")).inject(headers, carried, TRACE, SPAN, True)
    assert headers == {
        "traceparent": PARENT,
        "tracestate": "a=1",
        "baggage": "u=1",
        "b3": f"{TRACE}-{SPAN}-1",
        "x-b3-traceid": TRACE,
        "x-b3-spanid": SPAN,
        "x-b3-sampled": "1",
    }
    headers = {}
    Propagation(()).inject(headers, carried, TRACE, SPAN, True)
    assert headers == {}


@pytest.mark.parametrize(
    ("configured", "environment", "expected"),
    [
        (None, {}, ["tracecontext", "baggage"]),
        (("tracecontext", "baggage"), {"OTEL_PROPAGATORS": "b3, b3multi"}, ["b3", "b3multi"]),
        (("b3",), {"OTEL_PROPAGATORS": "tracecontext"}, ["b3"]),
        (None, {"OTEL_PROPAGATORS": "none"}, []),
        ((), {"OTEL_PROPAGATORS": "b3"}, []),
        (None, {"OTEL_PROPAGATORS": "b3,b3"}, ["b3"]),
    ],
)
def test_choice(configured: tuple[str, ...] | None, environment: dict[str, str], expected: list[str]) -> None:
    assert choose_propagators(configured, environment) == (expected, [])


def test_an_unknown_propagator_is_named() -> None:
    assert choose_propagators(None, {"OTEL_PROPAGATORS": "xray,tracecontext"}) == (["tracecontext"], ["xray"])
