"""From a finished visit to the facts of a span: name, kind, attributes, status, events.

What many spans say alike is in groups that are kept (groups.py); beside them each has attributes of its own.

Attribute names are the current HTTP and database semantic conventions, beside them the reference page's `http.method`,
`http.url` and `agent.id`, and our own under `tunnel.`. Names of spans are of low cardinality: a method or a fixed word.
No OpenTelemetry in here: otlp.py makes bytes of the facts, readable.py the SDK's objects for its other exporters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from observability import groups
from observability.context import SpanContext
from observability.groups import KNOWN_METHODS, Attributes, Common, clean
from observability.phases import NAMES, phases
from observability.record import Record
from tunnel.handler import ConnectVisit, LocalVisit, QueryVisit, RequestVisit, StreamVisit, Visit

INTERNAL, SERVER, CLIENT = 1, 2, 3  #: span kinds, numbered as OTLP numbers them

#: outcomes that are nobody's failure on our side (DESIGN.md): the span's status stays unset
HARMLESS = frozenset(
    {"", "ok", "visitor_aborted", "bad_request", "method_not_allowed", "request_timeout", "body_too_large"}
    | {"uri_too_long", "head_too_large", "no_tunnel", "quota"}
)


class Facts(NamedTuple):
    """All that is said about one span. Times are nanoseconds since the epoch, ids lower-case hex.

    parent_id: "" for a root; is_remote: the parent is in another process. common and own: its attributes. events:
    (name, time, exception type or ""). failed: the status is an error, described by `description`; otherwise unset.
    """

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    is_remote: bool
    tracestate: str
    start: int
    end: int
    common: tuple[Common, ...]
    own: Attributes
    events: list[tuple[str, int, str]]
    link: SpanContext | None
    failed: bool
    description: str

    @property
    def attributes(self) -> Attributes:
        """All of them."""
        out: Attributes = {}
        for common in self.common:
            out |= common.attributes
        return out | self.own


class WallClock:
    """Monotonic seconds → nanoseconds since the epoch.

    All visits of a trace are converted with the offset that held when the trace began, so that a step of the system's
    clock cannot make a child start before its parent.
    """

    def __init__(self) -> None:
        self._history = [(float("-inf"), measure_offset())]
        self._checked = time.monotonic()

    def refresh(self, every: float = 60.0) -> None:
        """Measure the offset again if `every` seconds have passed. Steps under 1 ms are let be."""
        now = time.monotonic()
        if now - self._checked < every:
            return
        self._checked = now
        offset = measure_offset()
        if abs(offset - self._history[-1][1]) > 1_000_000:
            self._history.append((now, offset))
            del self._history[1:-256]

    def offset(self, began: float) -> int:
        """Nanoseconds to add for what belongs to a trace that began at this monotonic second."""
        since, offset = self._history[-1]
        if began >= since:
            return offset
        for since, offset in reversed(self._history):
            if began >= since:
                return offset
        return self._history[0][1]


def measure_offset() -> int:
    """Wall clock minus monotonic clock, nanoseconds. The least disturbed of some tries: a thread may lose the
    processor between the two readings, and two programs on one machine should agree to microseconds."""
    best, offset = 1 << 62, 0
    for _ in range(5):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        if after - before < best:
            best, offset = after - before, wall - (before + after) // 2
    return offset


class SpanBuilder:
    """Makes facts of records, in any order."""

    def __init__(self, role: str, clock: WallClock | None = None) -> None:
        self._is_core = role == "core"
        self.clock = clock or WallClock()

    def build(self, record: Record) -> Facts | None:
        """The span of a finished visit, or None for a visit that makes none after all."""
        visit, ended, origin, failure = record
        if visit.kind == "connect" and self._is_core and not _is_authentication(visit):
            return None
        name, kind, common, own = _FACTS[visit.kind](visit, ended, self._is_core)
        start, end, offset = self.times(visit, ended, origin.parent_id)
        events = [(mark, min(max(int(at * 1e9) + offset, start), end), "") for mark, at in visit.marks.items()]
        error_type = description = ""
        if failure or visit.status >= 500 or visit.outcome not in HARMLESS:
            if failure == "Cancelled":
                events.append(("cancelled", end, ""))
            elif failure:
                events.append(("exception", end, failure))
            error_type, description = _blame(visit, failure)
            if error_type:
                own["error.type"] = error_type
        return Facts(
            name,
            kind,
            visit.trace_id,
            visit.span_id,
            origin.parent_id,
            origin.is_remote,
            visit.headers.get("tracestate", ""),
            start,
            end,
            common,
            own,
            events,
            origin.link,
            bool(error_type),
            description,
        )

    def times(self, visit: Visit, ended: float, parent_id: str) -> tuple[int, int, int]:
        """(start, end, offset) in nanoseconds, kept inside those of its parents in this process."""
        root, started, is_cut = visit, visit.started, False
        if visit.outcome == "ok":  # the agent's answers end with their last byte: the core may be done with them before
            ended = visit.marks.get("last_byte", ended)
        above = visit.parent
        is_inside = above is not None and above.span_id == parent_id
        if is_inside and above.started > started:  # type: ignore[union-attr]
            started = above.started  # type: ignore[union-attr]
        while above is not None:
            if is_inside and (limit := above.ended):
                if above.outcome == "ok":
                    limit = above.marks.get("last_byte", limit)
                if ended > limit:
                    ended, is_cut = limit, True
            root = above
            above = root.parent
        offset = self.clock.offset(root.started)
        start, end = int(started * 1e9) + offset, int(ended * 1e9) + offset
        if end < start:
            if is_cut:
                start = end
            else:
                end = start
        return start, end, offset


# What each kind of visit says ------------------------------------------------------------------------------------

Said = tuple[str, int, tuple[Common, ...], Attributes]  #: a span's name and kind, its attributes: common and own
PHASES = {phase: f"tunnel.phase.{phase}_ms" for phase in NAMES}


def _request(visit: RequestVisit, ended: float, is_core: bool) -> Said:
    own: Attributes = {"http.request.body.size": visit.bytes_in, "http.response.body.size": visit.bytes_out}
    if visit.request_id:
        own["tunnel.request.id"] = clean(visit.request_id)
    for phase, spent in phases(visit, ended).items():
        own[PHASES[phase]] = round(spent * 1e3) / 1e3
    return visit.method if visit.method in KNOWN_METHODS else "HTTP", SERVER, groups.of_request(visit), own


def _stream(visit: StreamVisit, ended: float, is_core: bool) -> Said:
    common = groups.of_stream(visit)
    own: Attributes = {"tunnel.stream.id": visit.stream_id}
    _sizes(own, visit, visit.protocol == "tcp")
    if visit.request_id:
        own["tunnel.request.id"] = clean(visit.request_id)
    if not is_core:
        return "agent.stream", SERVER, common, own
    own["tunnel.clock.offset_seconds"] = visit.offset
    return "tunnel.stream", CLIENT, common, own


def _local(visit: LocalVisit, ended: float, is_core: bool) -> Said:
    method = visit.method
    own: Attributes = {}
    _sizes(own, visit, not method)
    if visit.request_id:
        own["tunnel.request.id"] = clean(visit.request_id)
    name = "tcp" if not method else method if method in KNOWN_METHODS else "HTTP"
    return name, CLIENT, groups.of_local(visit), own


def _query(visit: QueryVisit, ended: float, is_core: bool) -> Said:
    own: Attributes = {"db.system.name": visit.system, "db.operation.name": visit.operation}
    if visit.outcome:
        own["tunnel.outcome"] = visit.outcome
    return "db.query", INTERNAL, (), own


def _connect(visit: ConnectVisit, ended: float, is_core: bool) -> Said:
    host, _, port = visit.remote.rpartition(":")
    side = "client" if is_core else "server"
    own: Attributes = {f"{side}.address": host.strip("[]") or visit.remote}
    if port.isascii() and port.isdigit():
        own[f"{side}.port"] = int(port)
    said = {
        "agent.id": clean(visit.agent_id),
        "tunnel.connection.id": visit.connection_id,
        "tunnel.account.id": visit.account_id,
        "tunnel.outcome": visit.outcome,
        "tunnel.refusal": visit.reason,
    }
    own |= {key: value for key, value in said.items() if value}
    return ("agent.accept", SERVER, (), own) if is_core else ("agent.connect", CLIENT, (), own)


_FACTS: dict[str, Callable[[Any, float, bool], Said]] = {
    "request": _request,
    "stream": _stream,
    "local": _local,
    "query": _query,
    "connect": _connect,
}


def _is_authentication(visit: Any) -> bool:
    """Whether a connection to the core got so far as to say who it is: no span of a port scan, of silence, of noise."""
    if visit.agent_id or visit.outcome == "ok":
        return True
    return visit.outcome == "refused" and visit.reason not in ("timeout", "protocol")


def _sizes(out: Attributes, visit: Visit, is_raw: bool) -> None:
    """Bytes towards the local service and back: bodies, or whatever a TCP tunnel carried."""
    out["tunnel.bytes_in" if is_raw else "http.request.body.size"] = visit.bytes_in
    out["tunnel.bytes_out" if is_raw else "http.response.body.size"] = visit.bytes_out


def _blame(visit: Visit, failure: str) -> tuple[str, str]:
    """(error.type, description of the error status), or ("", "") where the span's status stays unset."""
    outcome = visit.outcome or ("internal" if failure and failure != "Cancelled" else "")
    if visit.status >= 500 and outcome in ("", "ok"):
        return str(visit.status), clean(visit.error) or f"HTTP {visit.status}"
    if failure and failure != "Cancelled" and outcome in ("internal", "ok"):
        return failure, clean(visit.error) or failure
    if outcome in HARMLESS:
        return "", ""
    reason = visit.reason if isinstance(visit, ConnectVisit) else ""
    return reason or outcome, clean(visit.error) or reason or outcome
