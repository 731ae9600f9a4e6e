"""Trace context as it travels: W3C traceparent, tracestate and baggage, and Zipkin's B3 in both its forms.

Own code instead of the SDK's propagators, because every request passes here and most of them are not sampled: a
traceparent costs 0.4 µs to read this way and 3.4 µs that way. What comes in is a visitor's and hostile: whatever is
not exactly well-formed is as if it were not there, and everything kept is bounded.

Sources: W3C Trace Context (Level 2, sections 3.2 and 3.3), W3C Baggage (section 3.3),
github.com/openzipkin/b3-propagation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

DEFAULT_PROPAGATORS = ("tracecontext", "baggage")
KNOWN_PROPAGATORS = frozenset({"tracecontext", "baggage", "b3", "b3multi", "none"})

MAX_TRACESTATE_MEMBERS = 32  # W3C Trace Context 3.3.1.1
MAX_TRACESTATE = 2048  # characters; the standard asks for 512 at least
MAX_BAGGAGE = 8192  # bytes, W3C Baggage 3.3.2

_NO_TRACE = "0" * 32
_NO_SPAN = "0" * 16
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?").fullmatch
_TRACESTATE_MEMBER = re.compile(
    r"(?:[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
).fullmatch
_BAGGAGE = re.compile(r"[!#-'*+\-.^_`|~0-9A-Za-z]+[ \t]*=[\x20-\x7e\t]*").fullmatch
_TRACE_ID = re.compile(r"(?:[0-9a-f]{16}|[0-9a-f]{32})").fullmatch
_SPAN_ID = re.compile(r"[0-9a-f]{16}").fullmatch
#: no state leaves the decision to the receiver; like the SDK we take it as sampled
_SAMPLED = {"1": True, "true": True, "d": True, "0": False, "false": False, "": True}


class SpanContext(NamedTuple):
    """Where a trace has got to: ids in lower-case hex, and whether whoever sent it recorded the span."""

    trace_id: str
    span_id: str
    sampled: bool


def parse_traceparent(value: str) -> SpanContext | None:
    """A `traceparent` value, or None where the standard says to start a new trace.

    Of a later version than 00 the first four parts are read, and more may follow after a dash; ff is no version.
    """
    match = _TRACEPARENT(value)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (more and version == "00"):
        return None
    if trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return SpanContext(trace_id, span_id, flags[1] in "13579bdf")


def format_traceparent(trace_id: str, span_id: str, sampled: bool) -> str:
    return f"00-{trace_id}-{span_id}-01" if sampled else f"00-{trace_id}-{span_id}-00"


def check_tracestate(values: Sequence[str]) -> str:
    """Several `tracestate` fields as one, in order; "" if any of it is malformed or there is too much."""
    joined = ",".join(values)
    if not joined or len(joined) > MAX_TRACESTATE:
        return ""
    members = [member for part in joined.split(",") if (member := part.strip(" \t"))]
    if len(members) > MAX_TRACESTATE_MEMBERS or not all(map(_TRACESTATE_MEMBER, members)):
        return ""
    keys = {member.partition("=")[0] for member in members}
    return ",".join(members) if len(keys) == len(members) else ""


def check_baggage(values: Sequence[str]) -> str:
    """Several `baggage` fields as one, in order; "" if any of it is malformed or there is too much."""
    joined = ",".join(values)
    if not joined or len(joined) > MAX_BAGGAGE:
        return ""
    return joined if all(_BAGGAGE(part.strip(" \t")) for part in joined.split(",")) else ""


def parse_b3(value: str) -> SpanContext | None:
    """The single `b3` field: trace-span, trace-span-state or trace-span-state-parent. A bare state holds no context."""
    parts = value.split("-")
    if not 2 <= len(parts) <= 4 or (len(parts) == 4 and _SPAN_ID(parts[3].lower()) is None):
        return None
    if len(parts) > 2 and parts[2] not in ("0", "1", "d"):
        return None
    return _b3_context(parts[0], parts[1], parts[2] if len(parts) > 2 else "")


def parse_b3_multi(fields: Mapping[str, str]) -> SpanContext | None:
    """The `x-b3-*` fields, by lower-case name. The debug flag means sampled."""
    state = "1" if fields.get("x-b3-flags") == "1" else fields.get("x-b3-sampled", "")
    return _b3_context(fields.get("x-b3-traceid", ""), fields.get("x-b3-spanid", ""), state)


def _b3_context(trace_id: str, span_id: str, state: str) -> SpanContext | None:
    trace_id, span_id, sampled = trace_id.lower(), span_id.lower(), _SAMPLED.get(state.lower())
    if _TRACE_ID(trace_id) is None or _SPAN_ID(span_id) is None or sampled is None:
        return None
    trace_id = trace_id.rjust(32, "0")
    if trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return SpanContext(trace_id, span_id, sampled)


class Incoming(NamedTuple):
    """What a visitor's head says about traces. `has_tracestate`: there was such a field, used or not."""

    context: SpanContext | None
    tracestate: str
    baggage: str
    has_tracestate: bool


NOTHING = Incoming(None, "", "", False)

_W3C_FIELDS = {b"traceparent", b"tracestate"}
_B3_FIELDS = {b"b3", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-sampled", b"x-b3-flags"}


class Propagation:
    """Which headers are read from visitors and written for local services, chosen once.

    On the link it is always traceparent, tracestate and baggage: both ends are ours.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(name for name in names if name in KNOWN_PROPAGATORS and name != "none")
        self.w3c = "tracecontext" in self.names
        self.baggage = "baggage" in self.names
        self.b3 = "b3" in self.names
        self.b3_multi = "b3multi" in self.names
        wanted: set[bytes] = set()
        for is_on, fields in (
            (self.w3c, _W3C_FIELDS),
            (self.baggage, {b"baggage"}),
            (self.b3 or self.b3_multi, _B3_FIELDS),
        ):
            wanted |= fields if is_on else set()
        #: traceparent alone says it all
        self.is_plain = self.w3c and not (self.b3 or self.b3_multi)
        self._wanted = frozenset(wanted)
        self._lengths = frozenset(map(len, wanted))  # most fields are told apart by their length alone

    def extract(self, headers: Sequence[tuple[bytes, bytes]]) -> Incoming:
        """Read a visitor's head: (name, value) pairs in any case, as sent.

        Where several formats hold a context the one listed last wins, as with the SDK's composite propagator.
        """
        lengths = self._lengths
        found: dict[str, list[str]] | None = None
        for name, value in headers:
            if len(name) in lengths and (lower := name.lower()) in self._wanted:
                if found is None:
                    found = {}
                found.setdefault(lower.decode(), []).append(value.decode("latin-1").strip(" \t"))
        if found is None:
            return NOTHING
        if self.is_plain and len(found) == 1 and (values := found.get("traceparent")) and len(values) == 1:
            return Incoming(parse_traceparent(values[0]), "", "", False)  # nearly always
        return self._read(found)

    def _read(self, found: dict[str, list[str]]) -> Incoming:
        context, tracestate = None, ""
        single = {name: values[0] for name, values in found.items() if len(values) == 1}  # doubled means malformed
        for name in self.names:
            seen = None
            if name == "tracecontext":
                seen = parse_traceparent(single.get("traceparent", ""))
            elif name in ("b3", "b3multi"):  # either reads both forms, the single one first; they differ in writing
                seen = parse_b3(single.get("b3", "")) or parse_b3_multi(single)
            if seen is not None:
                context = seen
                tracestate = check_tracestate(found.get("tracestate", ())) if name == "tracecontext" else ""
        return Incoming(context, tracestate, check_baggage(found.get("baggage", ())), "tracestate" in found)

    def inject(
        self, headers: dict[str, str], carried: Mapping[str, str], trace_id: str, span_id: str, sampled: bool
    ) -> None:
        """Write context into a local request's headers. `carried`: tracestate and baggage as they crossed the link.

        An empty tracestate is written on purpose: it replaces a visitor's that belongs to a trace we did not join.
        """
        if not self.w3c:  # what crossed the link was for us
            headers.pop("traceparent", None)
            headers.pop("tracestate", None)
        else:
            headers["traceparent"] = f"00-{trace_id}-{span_id}-01" if sampled else f"00-{trace_id}-{span_id}-00"
            if (tracestate := carried.get("tracestate")) is not None:
                headers["tracestate"] = tracestate
        if not self.baggage:
            headers.pop("baggage", None)
        elif baggage := carried.get("baggage"):
            headers["baggage"] = baggage
        if self.b3:
            headers["b3"] = f"{trace_id}-{span_id}-{'1' if sampled else '0'}"
        if self.b3_multi:
            headers["x-b3-traceid"] = trace_id
            headers["x-b3-spanid"] = span_id
            headers["x-b3-sampled"] = "1" if sampled else "0"


def choose_propagators(configured: Sequence[str] | None, environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(names, unknown names): the configuration where it differs from the default, else OTEL_PROPAGATORS, else that."""
    names = list(configured) if configured is not None else list(DEFAULT_PROPAGATORS)
    if tuple(names) == DEFAULT_PROPAGATORS and (value := environ.get("OTEL_PROPAGATORS", "").strip()):
        names = [name.strip().lower() for name in value.split(",") if name.strip()]
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in KNOWN_PROPAGATORS]
    if "none" in names:
        return [], unknown
    return [name for name in names if name in KNOWN_PROPAGATORS], unknown
