"""Tracing as a layer: decides whether a trace is recorded, gives visits their ids, and passes context on.

The hot half. It does only what must be done while the visit runs: ids, and the context in `visit.headers`. Spans are
made a little after its end (export.py, spans.py). A visit that is not sampled costs an id or two short strings and no
span; its context travels on all the same, with the flag 00.

Shape: request → tunnel.stream (core) → agent.stream → local request; queries hang under the visit that asked. A
request's `headers` hold the tracestate and baggage that travel on; its stream's, with the traceparent, cross the link
in the open frame and are the agent's to join. Links make no span (they live for days), and neither do probes.

OpenTelemetry itself is imported on the export thread, and only if something is configured.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
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
from observability.export import Exporter
from observability.exporters import choose_target, missing_extra, read_limits
from observability.record import ROOT, Enter, Origin, Record, make_origin
from observability.sampling import Sampler, choose_sampler
from tunnel.handler import Begin, Ended, Fields, Host, Layer, Leave, Observer, RequestVisit, StreamVisit, Visit

log = logging.getLogger("observability")

VISITOR_CONTEXTS = ("join", "link", "ignore")

#: a context as the core writes it; ids of nothing but zeros are none
_USUAL = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-0[01]").fullmatch
_MADE = 64  # traces that are begun, and ids of spans that are made beforehand

#: of a trace that is begun beforehand: trace id, span id, the visit's `origin`, whether it is sampled
Begun = tuple[str, str, Origin | str, bool]

_running: dict[str, Exporter] = {}


def statistics(role: str) -> dict[str, Any] | None:
    """Exported, failed and dropped spans of the program of this role in this process; None while it exports nothing."""
    exporter = _running.get(role)
    return exporter.statistics() if exporter is not None else None


class Tracer:
    """Starts and records visits. The `start_*` methods set trace_id, span_id and sampled, and `origin`: where the span
    hangs; if there will be none, the traceparent that goes on as it is, or None where that has to be written anew.

    Begins run once a visit, on a processor that has done other things meanwhile, where each step costs three times as
    much as in a row. So what can be is made for many traces at once: their ids, and what a request says to its stream.
    """

    def __init__(
        self,
        role: str,
        put_all: Callable[[Sequence[Record]], None],
        sampler: Sampler,
        propagation: Propagation,
        visitor_context: str = "join",
    ) -> None:
        self._put_all = put_all
        self._sampler = sampler
        self._propagation = propagation
        self._visitor_context = visitor_context
        self._begun: list[Begun] = []
        self._span_ids: list[str] = []
        self._enter: Enter | None = None
        begins: dict[str, Begin] = {
            "request": self.start_request,
            "stream": self.start_core_stream if role == "core" else self.start_agent_stream,
            "local": self.start_local,
            "query": self.start_query,
            "connect": self.start_root,
        }
        enters = {"local": self._make_current, "query": self._make_current}
        self.layer = Observer(begins, {}, dict.fromkeys(begins, self._ended), self._all_ended, enters)

    def set_enter(self, enter: Enter) -> None:
        """Called by the export thread once OpenTelemetry is imported: from now on its current span is set around local
        requests and queries, where code of others may look for it."""
        self._enter = enter

    def _ended(self, visit: Visit, raised: BaseException | None) -> None:
        self._all_ended(((visit, raised),))

    def _all_ended(self, visits: Sequence[Ended]) -> None:
        records = [
            (visit, visit.ended, visit.origin, type(raised).__name__ if raised is not None else "")
            for visit, raised in visits
            if visit.sampled and visit.origin is not None
        ]
        if records:
            self._put_all(records)

    def start_root(self, visit: Visit) -> None:
        """A trace of our own."""
        begun = self._begun
        if not begun:
            self._begin_traces()
        visit.trace_id, visit.span_id, visit.origin, visit.sampled = begun.pop()

    def _begin_traces(self) -> None:
        decide = self._sampler.decide
        ids = getrandbits(192 * _MADE).to_bytes(24 * _MADE).hex()
        for at in range(0, len(ids), 48):
            trace_id, span_id = ids[at : at + 32], ids[at + 32 : at + 48]
            if decide(trace_id):
                self._begun.append((trace_id, span_id, ROOT, True))
            else:
                self._begun.append((trace_id, span_id, f"00-{trace_id}-{span_id}-00", False))

    def start_request(self, visit: RequestVisit) -> None:
        """A visitor's request: joins, links or ignores the context it brought."""
        headers = visit.request_headers
        incoming = headers.found if type(headers) is Fields else None
        if incoming is NOTHING and (begun := self._begun):  # nearly always
            visit.trace_id, visit.span_id, visit.origin, visit.sampled = begun.pop()
            return
        if incoming is None:
            incoming = self._propagation.extract(headers)
            if type(headers) is Fields:
                headers.found = incoming
        if incoming is NOTHING:
            self.start_root(visit)
        else:
            self._start_with(visit, incoming)

    def _start_with(self, visit: RequestVisit, incoming: Incoming) -> None:
        mode, context = self._visitor_context, incoming.context
        if incoming.baggage and mode != "ignore":
            visit.headers["baggage"] = incoming.baggage
        if context is not None and mode == "join":
            if incoming.has_tracestate:
                visit.headers["tracestate"] = incoming.tracestate
            visit.trace_id = context.trace_id
            visit.span_id = self._take_span_id()
            visit.sampled = self._sampler.decide_joined(context.trace_id, context.sampled)
            if visit.sampled:
                visit.origin = Origin(context.span_id, True, None)
            return
        if incoming.has_tracestate:
            visit.headers["tracestate"] = ""  # theirs belongs to a trace that we did not join: see Propagation.inject
        self.start_root(visit)
        if visit.sampled and mode == "link":
            visit.origin = Origin("", False, context)

    def start_core_stream(self, visit: StreamVisit) -> None:
        """The core's end: under the request, or a root for a TCP tunnel. Its headers take the context to the agent."""
        parent, headers = visit.parent, visit.headers
        if parent is None or not parent.trace_id:
            if visit.protocol != "probe":
                self.start_root(visit)
                headers["traceparent"] = format_traceparent(visit.trace_id, visit.span_id, visit.sampled)
            return
        # the most important first, the longest last: the room for context in an open frame is bounded
        if parent.sampled:
            self._start_child(visit, parent)
            headers["traceparent"] = f"00-{visit.trace_id}-{visit.span_id}-01"
        else:
            visit.trace_id, visit.span_id = parent.trace_id, parent.span_id
            headers["traceparent"] = parent.origin or f"00-{visit.trace_id}-{visit.span_id}-00"
        if carried := parent.headers:
            if "tracestate" in carried:
                headers["tracestate"] = carried["tracestate"]
            if "baggage" in carried:
                headers["baggage"] = carried["baggage"]

    def start_agent_stream(self, visit: StreamVisit) -> None:
        """The agent's end: the core has decided. A trace of its own only where the core sent no context."""
        headers = visit.headers
        value = headers.get("traceparent")
        if visit.protocol == "probe":
            return
        if value is None or _USUAL(value) is None:
            self._start_unusual(visit, value)
            return
        visit.trace_id = value[3:35]
        if value[54] == "1":
            visit.sampled = True
            visit.span_id = self._take_span_id()
            visit.origin = make_origin((value[36:52], True, None))
        else:
            visit.span_id = value[36:52]
            if len(headers) == 1 and self._propagation.is_plain:
                visit.origin = value

    def _start_unusual(self, visit: StreamVisit, value: str | None) -> None:
        context = parse_traceparent(value) if value else None
        if context is None:
            visit.headers.pop("traceparent", None)  # what is none goes no further
            self.start_root(visit)
            if not visit.sampled:
                visit.origin = None
            return
        visit.trace_id = context.trace_id
        if context.sampled:
            visit.sampled = True
            visit.span_id = self._take_span_id()
            visit.origin = Origin(context.span_id, True, None)
        else:
            visit.span_id = context.span_id

    def start_local(self, visit: Visit) -> None:
        """The request to the local service, which is handed the context in the formats that were chosen."""
        parent = visit.parent
        if parent is None or not parent.trace_id:
            return
        if not parent.sampled and (passed := parent.origin) is not None:
            visit.trace_id, visit.span_id = parent.trace_id, parent.span_id
            visit.headers["traceparent"] = passed  # what crossed the link goes on as it is
            return
        self._start_child(visit, parent)
        self._propagation.inject(visit.headers, parent.headers, visit.trace_id, visit.span_id, visit.sampled)

    def start_query(self, visit: Visit) -> None:
        """A query hangs under the visit that asked; one of the program's own makes no span."""
        parent = visit.parent
        if parent is not None and parent.trace_id:
            self._start_child(visit, parent)

    def _take_span_id(self) -> str:
        ids = self._span_ids
        if not ids:
            digits = getrandbits(64 * _MADE).to_bytes(8 * _MADE).hex()
            ids.extend(digits[at : at + 16] for at in range(0, len(digits), 16))
        return ids.pop()

    def _make_current(self, visit: Visit) -> Leave | None:
        return self._enter(visit) if visit.sampled and self._enter is not None else None

    def _start_child(self, visit: Visit, parent: Visit) -> None:
        visit.trace_id = parent.trace_id
        if parent.sampled:
            visit.sampled = True
            visit.span_id = self._take_span_id()
            visit.origin = make_origin((parent.span_id, False, None))
        else:
            visit.span_id = parent.span_id


@asynccontextmanager
async def plugin(host: Host) -> AsyncIterator[Layer]:
    """The plug-in `tracing`. With nothing configured its layer does nothing.

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
        yield Observer({}, {})  # visits are nothing to it
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
    tracer = Tracer(host.role, exporter.put_all, sampler, Propagation(names), visitor_context)
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
