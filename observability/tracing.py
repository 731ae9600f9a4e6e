"""Tracing as a layer: decides whether a trace is recorded, gives visits their ids, and passes context on.

The hot half. It does only what must be done while the visit runs: ids, the context in `visit.headers`, and at the end
one tuple into a queue. Spans are made of these tuples on a thread (export.py, spans.py). A visit that is not sampled
costs an id or two short strings and no span; its context travels on all the same, with the flag 00.

Shape: request → tunnel.stream (core) → agent.stream → local request; queries hang under the visit that asked. A
request's `headers` hold the tracestate and baggage that travel on; its stream's, with the traceparent, cross the link
in the open frame and are the agent's to join. Links make no span (they live for days), and neither do probes.

OpenTelemetry itself is imported on the export thread, and only if something is configured.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import getrandbits
from typing import Any

import trio

from observability.context import (
    NOTHING,
    Incoming,
    Propagation,
    choose_propagators,
    format_traceparent,
    parse_traceparent,
)
from observability.export import Exporter, SpanQueue
from observability.exporters import choose_target, missing_extra, read_limits
from observability.record import ROOT, Enter, Origin
from observability.sampling import Sampler, choose_sampler
from tunnel.handler import Handler, Host, Layer, RequestVisit, StreamVisit, Visit, monotonic

log = logging.getLogger("observability")

VISITOR_CONTEXTS = ("join", "link", "ignore")

_running: dict[str, Exporter] = {}


def statistics(role: str) -> dict[str, Any] | None:
    """Exported, failed and dropped spans of the program of this role in this process; None while it exports nothing."""
    exporter = _running.get(role)
    return exporter.statistics() if exporter is not None else None


class Tracer:
    """Starts and records visits. The `start_*` methods set trace_id, span_id and sampled, and return where the span
    hangs, or None if there will be none."""

    def __init__(
        self, role: str, queue: SpanQueue, sampler: Sampler, propagation: Propagation, visitor_context: str = "join"
    ) -> None:
        self.queue = queue
        self._sampler = sampler
        self._propagation = propagation
        self._visitor_context = visitor_context
        self._enter: Enter | None = None
        self._starts: dict[str, Callable[[Any], Origin | None]] = {
            "request": self.start_request,
            "stream": self.start_core_stream if role == "core" else self.start_agent_stream,
            "local": self.start_local,
            "query": self.start_query,
            "connect": self.start_root,
        }

    def set_enter(self, enter: Enter) -> None:
        """Called by the export thread once OpenTelemetry is imported: from now on its current span is set around local
        requests and queries, where code of others may look for it."""
        self._enter = enter

    def layer(self, handler: Handler) -> Handler:
        starts = self._starts
        put = self.queue.put

        async def traced(visit: Visit) -> None:
            start = starts.get(visit.kind)
            origin = start(visit) if start is not None else None
            if origin is None:
                await handler(visit)
                return
            leave = None
            if self._enter is not None and visit.kind in ("local", "query"):
                leave = self._enter(visit)
            failure = ""
            try:
                await handler(visit)
            except BaseException as exc:
                failure = type(exc).__name__
                raise
            finally:
                if leave is not None:
                    leave()
                put((visit, monotonic(), origin, failure))

        return traced

    def start_root(self, visit: Visit) -> Origin | None:
        """A trace of our own."""
        ids = getrandbits(192).to_bytes(24).hex()  # half the cost of formatting it
        visit.trace_id = trace_id = ids[:32]
        visit.span_id = ids[32:]
        if trace_id[16:] < self._sampler.bound:
            visit.sampled = True
            return ROOT
        return None

    def start_request(self, visit: RequestVisit) -> Origin | None:
        """A visitor's request: joins, links or ignores the context it brought."""
        incoming = self._propagation.extract(visit.request_headers)
        return self.start_root(visit) if incoming is NOTHING else self._start_with(visit, incoming)

    def _start_with(self, visit: RequestVisit, incoming: Incoming) -> Origin | None:
        mode, context = self._visitor_context, incoming.context
        if incoming.baggage and mode != "ignore":
            visit.headers["baggage"] = incoming.baggage
        if context is not None and mode == "join":
            if incoming.has_tracestate:
                visit.headers["tracestate"] = incoming.tracestate
            visit.trace_id = context.trace_id
            visit.span_id = getrandbits(64).to_bytes(8).hex()
            visit.sampled = self._sampler.decide_joined(context.trace_id, context.sampled)
            return Origin(context.span_id, True, None) if visit.sampled else None
        if incoming.has_tracestate:
            visit.headers["tracestate"] = ""  # theirs belongs to a trace that we did not join: see Propagation.inject
        origin = self.start_root(visit)
        return Origin("", False, context) if origin is not None and mode == "link" else origin

    def start_core_stream(self, visit: StreamVisit) -> Origin | None:
        """The core's end: under the request, or a root for a TCP tunnel. Its headers take the context to the agent."""
        if visit.protocol == "probe":
            return None
        parent, headers = visit.parent, visit.headers
        if parent is None or not parent.trace_id:
            origin = self.start_root(visit)
            headers["traceparent"] = format_traceparent(visit.trace_id, visit.span_id, visit.sampled)
            return origin
        carried, origin = parent.headers, self._start_child(visit, parent)
        # the most important first, the longest last: the room for context in an open frame is bounded
        headers["traceparent"] = format_traceparent(visit.trace_id, visit.span_id, visit.sampled)
        if "tracestate" in carried:
            headers["tracestate"] = carried["tracestate"]
        if "baggage" in carried:
            headers["baggage"] = carried["baggage"]
        return origin

    def start_agent_stream(self, visit: StreamVisit) -> Origin | None:
        """The agent's end: the core has decided. A trace of its own only where the core sent no context."""
        if visit.protocol == "probe":
            return None
        value = visit.headers.get("traceparent")
        context = parse_traceparent(value) if value else None
        if context is None:
            return self.start_root(visit)
        visit.trace_id = context.trace_id
        if context.sampled:
            visit.sampled = True
            visit.span_id = getrandbits(64).to_bytes(8).hex()
            return Origin(context.span_id, True, None)
        visit.span_id = context.span_id
        return None

    def start_local(self, visit: Visit) -> Origin | None:
        """The request to the local service, which is handed the context in the formats that were chosen."""
        parent = visit.parent
        if parent is None or not parent.trace_id:
            return None
        origin = self._start_child(visit, parent)
        self._propagation.inject(visit.headers, parent.headers, visit.trace_id, visit.span_id, visit.sampled)
        return origin

    def start_query(self, visit: Visit) -> Origin | None:
        """A query hangs under the visit that asked; one of the program's own makes no span."""
        parent = visit.parent
        return self._start_child(visit, parent) if parent is not None and parent.trace_id else None

    def _start_child(self, visit: Visit, parent: Visit) -> Origin | None:
        visit.trace_id = parent.trace_id
        if parent.sampled:
            visit.sampled = True
            visit.span_id = getrandbits(64).to_bytes(8).hex()
            return Origin(parent.span_id, False, None)
        visit.span_id = parent.span_id
        return None


def _untouched(handler: Handler) -> Handler:
    return handler


@asynccontextmanager
async def plugin(host: Host) -> AsyncIterator[Layer]:
    """The plug-in `tracing`. With nothing configured its layer returns the handler itself.

    Raises ValueError, one line, for an option that makes no sense or a missing extra. Bad OTEL_* values are logged and
    ignored, as OpenTelemetry asks. Ends within two seconds, whatever the collector does.
    """
    options = host.options.get("tracing", {})
    target = choose_target(options, os.environ)
    visitor_context = str(options.get("visitor_context") or "join")
    if visitor_context not in VISITOR_CONTEXTS:
        raise ValueError(f"tracing.visitor_context is {visitor_context!r}: it must be join, link or ignore")
    if target is None:
        host.set_details("tracing", lambda: {"exporting": False})
        yield _untouched
        return
    if lacking := missing_extra(target):
        raise ValueError(lacking)
    sampler, complaint = choose_sampler(float(options.get("ratio", 1.0)), os.environ)
    limits, complaints = read_limits(os.environ)
    names, unknown = choose_propagators(options.get("propagators"), os.environ)
    complaints += [complaint] if complaint else []
    complaints += [f"propagator {name} is not supported" for name in unknown]
    for line in complaints:
        log.warning("tracing setting ignored", extra={"fields": {"reason": line}})
    exporter = Exporter(target, limits, host.role, host.version)
    tracer = Tracer(host.role, exporter.queue, sampler, Propagation(names), visitor_context)
    exporter.on_ready = tracer.set_enter
    exporter.start()
    _running[host.role] = exporter
    host.set_details("tracing", exporter.statistics)
    try:
        yield tracer.layer
    finally:
        _running.pop(host.role, None)
        with trio.CancelScope(shield=True):  # its deadline is `stop`'s own, in real seconds
            await trio.to_thread.run_sync(exporter.stop)
