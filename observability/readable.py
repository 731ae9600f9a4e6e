"""Facts of spans as the SDK's objects, for its gRPC, Zipkin and console exporters; and its idea of a current span.

Imported on the export thread: this file needs OpenTelemetry.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from opentelemetry.context import attach, detach
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from observability.spans import CLIENT, INTERNAL, SERVER, Facts
from tunnel.handler import Visit

LINK_ATTRIBUTES = {"tunnel.link": "visitor"}

_KINDS = {INTERNAL: SpanKind.INTERNAL, SERVER: SpanKind.SERVER, CLIENT: SpanKind.CLIENT}
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status(StatusCode.UNSET)


class _Current(NonRecordingSpan):
    """A visit's span for whoever looks for the current one. Hardly anybody does, so its context is made when asked."""

    def __init__(self, visit: Visit) -> None:
        self._ids = visit.trace_id, visit.span_id

    @property
    def _context(self) -> SpanContext:  # type: ignore[override]  # an attribute there
        trace_id, span_id = self._ids
        return SpanContext(int(trace_id, 16), int(span_id, 16), False, _SAMPLED)


def enter(visit: Visit) -> Callable[[], None]:
    """Make the visit's span OpenTelemetry's current one, in this task; call the result in the same task to end that."""
    return partial(detach, attach(set_span_in_context(_Current(visit))))


def to_readable(facts: Facts, resource: Resource, scope: InstrumentationScope) -> ReadableSpan:
    """One span for an exporter of the SDK."""
    trace_id = int(facts.trace_id, 16)
    state = TraceState.from_header([facts.tracestate]) if facts.tracestate else None
    parent = None
    if facts.parent_id:
        parent = SpanContext(trace_id, int(facts.parent_id, 16), facts.is_remote, _SAMPLED, state)
    links: tuple[Link, ...] = ()
    if facts.link is not None:
        flags = _SAMPLED if facts.link.sampled else TraceFlags(0)
        linked = SpanContext(int(facts.link.trace_id, 16), int(facts.link.span_id, 16), True, flags)
        links = (Link(linked, LINK_ATTRIBUTES),)
    return ReadableSpan(
        facts.name,
        SpanContext(trace_id, int(facts.span_id, 16), False, _SAMPLED, state),
        parent,
        resource,
        facts.attributes,
        [Event(name, {"exception.type": what} if what else {}, timestamp=at) for name, at, what in facts.events],
        links,
        _KINDS[facts.kind],
        status=Status(StatusCode.ERROR, facts.description) if facts.failed else _UNSET,
        start_time=facts.start,
        end_time=facts.end,
        instrumentation_scope=scope,
    )
