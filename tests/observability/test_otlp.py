"""Our OTLP bytes against the SDK's own encoding of the same spans."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from observability.context import SpanContext
from observability.groups import Common
from observability.otlp import encode_span
from observability.readable import to_readable
from observability.sinks import make_encoder
from observability.spans import Facts

RESOURCE = Resource({"service.name": "tunnel-core", "n": 1}, "https://opentelemetry.io/schemas/1.30.0")
SCOPE = InstrumentationScope("trio-tunnel", "1.2.3")
ENCODER = make_encoder(RESOURCE, SCOPE)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ids = st.binary(min_size=16, max_size=16).filter(any).map(bytes.hex)
short_ids = st.binary(min_size=8, max_size=8).filter(any).map(bytes.hex)
times = st.integers(0, 2**63)
values = texts | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.just("x" * 5000)
keys = texts | st.sampled_from(["http.method", "agent.id", "http.response.status_code", "client.address"])
all_facts = st.builds(
    Facts,
    name=texts,
    kind=st.sampled_from([1, 2, 3]),
    trace_id=ids,
    span_id=short_ids,
    parent_id=st.just("") | short_ids,
    is_remote=st.booleans(),
    tracestate=st.sampled_from(["", "a=1", "a=1,b=2"]),
    start=times,
    end=times,
    common=st.just(()) | st.tuples(st.builds(Common, st.dictionaries(texts.map("a.".__add__), values, max_size=4))),
    own=st.dictionaries(keys, values, max_size=8),
    events=st.lists(st.tuples(texts, times, st.just("") | texts), max_size=4),
    link=st.none() | st.builds(SpanContext, ids, short_ids, st.booleans()),
    failed=st.booleans(),
    description=texts,
).map(lambda f: f._replace(is_remote=f.is_remote and bool(f.parent_id), description=f.description if f.failed else ""))


@given(st.lists(all_facts, min_size=1, max_size=3))
def test_the_same_spans_as_the_sdk_would_send(many: list[Facts]) -> None:
    ours = ExportTraceServiceRequest.FromString(ENCODER.request([encode_span(facts) for facts in many]))
    theirs = encode_spans([to_readable(facts, RESOURCE, SCOPE) for facts in many])
    assert ours == theirs
