"""How facts of spans reach a collector: encoded by us for OTLP/HTTP, as the SDK's objects for everything else.

Imports OpenTelemetry, so it is imported on the export thread. The SDK has no public way to be handed encoded spans:
where its HTTP exporter looks different inside than we know it, the sink falls back to the SDK's own encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from observability.otlp import Encoder, encode_span
from observability.readable import to_readable
from observability.spans import Facts


class Sink(Protocol):
    """`add` makes of one span what `send` takes many of. `send` blocks; it says whether the collector took them.

    takes_bytes: that is OTLP's bytes, so spans that are encoded already can be sent as well.
    """

    takes_bytes: bool

    def add(self, facts: Facts) -> Any: ...

    def send(self, spans: Sequence[Any]) -> bool: ...

    def close(self) -> None: ...


class ReadableSink:
    """For any exporter of the SDK."""

    takes_bytes = False

    def __init__(self, exporter: SpanExporter, resource: Resource, scope: InstrumentationScope) -> None:
        self._exporter = exporter
        self._resource = resource
        self._scope = scope

    def add(self, facts: Facts) -> ReadableSpan:
        return to_readable(facts, self._resource, self._scope)

    def send(self, spans: Sequence[ReadableSpan]) -> bool:
        return self._exporter.export(spans) is SpanExportResult.SUCCESS

    def close(self) -> None:
        self._exporter.shutdown()


class EncodedSink:
    """For the SDK's OTLP/HTTP exporter, past its encoder. `client`: what it sends with."""

    takes_bytes = True

    def __init__(self, exporter: SpanExporter, client: Any, resource: Resource, scope: InstrumentationScope) -> None:
        self._exporter = exporter
        self._client = client
        self._encoder = make_encoder(resource, scope)

    def add(self, facts: Facts) -> bytes:
        return encode_span(facts)

    def send(self, spans: Sequence[bytes]) -> bool:
        return bool(self._client.export(self._encoder.request(spans)).success)

    def close(self) -> None:
        self._exporter.shutdown()


def make_encoder(resource: Resource, scope: InstrumentationScope) -> Encoder:
    """The encoder with what is the same in every request: taken from the SDK's encoding of one span."""
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.trace import SpanContext

    context = SpanContext(1, 1, False)
    span = ReadableSpan("", context, resource=resource, start_time=0, end_time=0, instrumentation_scope=scope)
    request: ExportTraceServiceRequest = encode_spans([span])
    resource_spans = request.resource_spans[0]
    scope_spans = resource_spans.scope_spans[0]
    del scope_spans.spans[:]
    scope_head = scope_spans.SerializeToString()
    del resource_spans.scope_spans[:]
    return Encoder(resource_spans.SerializeToString(), scope_head)


def make_sink(exporter: SpanExporter, is_http: bool, resource: Resource, scope: InstrumentationScope) -> Sink:
    client = getattr(exporter, "_client", None)
    if is_http and callable(getattr(client, "export", None)):
        return EncodedSink(exporter, client, resource, scope)
    return ReadableSink(exporter, resource, scope)
