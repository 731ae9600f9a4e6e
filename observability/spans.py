"""From a finished visit to the facts of a span: name, kind, attributes, status, events.

What many spans say alike (a tunnel's names, a visitor, a target) is made once and kept, together with its encoding. So
each kind of visit has its attributes in groups, each a function of the few values that it is made of, and beside them
those of its own.

Attribute names are the current HTTP and database semantic conventions, beside them the reference page's `http.method`,
`http.url` and `agent.id`, and our own under `tunnel.`. Names of spans are of low cardinality: a method or a fixed word.
No OpenTelemetry in here: otlp.py makes bytes of the facts, readable.py the SDK's objects for its other exporters.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

from observability.context import SpanContext
from observability.phases import phases
from observability.record import Record
from tunnel.handler import ConnectVisit, LocalVisit, QueryVisit, RequestVisit, StreamVisit, Visit

Attributes = dict[str, Any]  #: str, int and float values only

INTERNAL, SERVER, CLIENT = 1, 2, 3  #: span kinds, numbered as OTLP numbers them

MAX_TEXT = 2048  # characters kept of a path, a query string, a user agent: they are visitors' and may be huge
MAX_METHOD = 100  # characters of a method that nobody knows
MAX_KEPT = 300  # characters of a text whose group is kept: longer ones are rare, and would take much memory
_KNOWN_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
#: outcomes that are nobody's failure on our side (DESIGN.md): the span's status stays unset
_HARMLESS = frozenset(
    {"", "ok", "visitor_aborted", "bad_request", "method_not_allowed", "request_timeout", "body_too_large"}
    | {"uri_too_long", "head_too_large", "no_tunnel", "quota"}
)
_REMEMBERED = 4096  # parents whose end is kept, so that a child that ends a little later can be cut


class Common:
    """Attributes that recur from span to span. encoded: what an encoder made of them, b"" before."""

    __slots__ = ("attributes", "encoded")

    def __init__(self, attributes: Attributes) -> None:
        self.attributes = attributes
        self.encoded = b""


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
    """Takes records in the order in which their visits ended."""

    def __init__(self, role: str, clock: WallClock | None = None) -> None:
        self._is_core = role == "core"
        self._ended: OrderedDict[str, int] = OrderedDict()
        self.clock = clock or WallClock()

    def build(self, record: Record) -> Facts | None:
        """The span of a finished visit, or None for a visit that makes none after all."""
        visit, ended, origin, failure = record
        if visit.kind == "connect" and self._is_core and not _is_authentication(visit):
            return None
        name, kind, common, own = _FACTS[visit.kind](visit, ended, self._is_core)
        start, end, offset = self._times(visit, ended, origin.parent_id)
        events = [(mark, min(max(int(at * 1e9) + offset, start), end), "") for mark, at in visit.marks.items()]
        error_type = description = ""
        if failure or visit.status >= 500 or visit.outcome not in _HARMLESS:
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

    def _times(self, visit: Visit, ended: float, parent_id: str) -> tuple[int, int, int]:
        """(start, end, offset) in nanoseconds, kept inside the parent's where that ended first."""
        root, started = visit, visit.started
        while root.parent is not None:
            root = root.parent
        if visit.parent is not None and visit.parent.span_id == parent_id:
            started = max(started, visit.parent.started)
        offset = self.clock.offset(root.started)
        start = int(started * 1e9) + offset
        if visit.outcome == "ok":  # the agent's answers end with their last byte: the core may be done with them before
            ended = visit.marks.get("last_byte", ended)
        end = max(start, int(ended * 1e9) + offset)
        limit = self._ended.get(parent_id)
        if limit is not None and end > limit:
            end = limit
            start = min(start, end)
        if visit.kind not in ("query", "local"):
            self._ended[visit.span_id] = end
            if len(self._ended) > _REMEMBERED:
                self._ended.popitem(last=False)
        return start, end, offset


# What each kind of visit says ------------------------------------------------------------------------------------

F = TypeVar("F", bound=Callable[..., Common])
Said = tuple[str, int, tuple[Common, ...], Attributes]  #: a span's name and kind, its attributes: common and own
_PHASES = {
    phase: f"tunnel.phase.{phase}_ms" for phase in ("visitor", "queue", "link", "agent", "local", "answer", "body")
}


def _request(visit: RequestVisit, ended: float, is_core: bool) -> Said:
    scheme, host = visit.scheme, visit.host[:MAX_KEPT]
    agent = ""
    for field, value in visit.request_headers:
        if len(field) == 10 and field.lower() == b"user-agent":
            agent = value[:MAX_TEXT].decode("latin-1")
            break
    common = (
        _route(visit.method[:MAX_METHOD], scheme, host, visit.http_version),
        _answered(visit.status, visit.outcome, visit.tunnel, visit.agent_id, visit.connection_id, visit.account_id),
        _visitor(visit.client, agent),
        _url(scheme, host, visit.target),
    )
    own: Attributes = {"http.request.body.size": visit.bytes_in, "http.response.body.size": visit.bytes_out}
    if visit.request_id:
        own["tunnel.request.id"] = _clean(visit.request_id)
    for phase, spent in phases(visit, ended).items():
        own[_PHASES[phase]] = int(spent * 1e3 + 0.5) / 1e3
    return visit.method if visit.method in _KNOWN_METHODS else "HTTP", SERVER, common, own


def _stream(visit: StreamVisit, ended: float, is_core: bool) -> Said:
    common = (
        _carried(visit.method[:MAX_METHOD], visit.protocol),
        _answered(visit.status, visit.outcome, visit.tunnel, visit.agent_id, visit.connection_id, visit.account_id),
        _path(visit.target),
    )
    own: Attributes = {"tunnel.stream.id": visit.stream_id}
    _sizes(own, visit, visit.protocol == "tcp")
    if visit.request_id:
        own["tunnel.request.id"] = _clean(visit.request_id)
    if not is_core:
        return "agent.stream", SERVER, common, own
    own["tunnel.clock.offset_seconds"] = visit.offset
    return "tunnel.stream", CLIENT, common, own


def _local(visit: LocalVisit, ended: float, is_core: bool) -> Said:
    scheme, address, method = visit.scheme, visit.address, visit.method
    common: tuple[Common, ...] = (_service(address, scheme, method[:MAX_METHOD], visit.status, visit.outcome),)
    own: Attributes = {}
    _sizes(own, visit, not method)
    if visit.request_id:
        own["tunnel.request.id"] = _clean(visit.request_id)
    if not method:
        return "tcp", CLIENT, common, own
    common += (_full(scheme, address, visit.target),)
    return method if method in _KNOWN_METHODS else "HTTP", CLIENT, common, own


def _query(visit: QueryVisit, ended: float, is_core: bool) -> Said:
    own: Attributes = {"db.system.name": visit.system, "db.operation.name": visit.operation}
    _put(own, "tunnel.outcome", visit.outcome)
    return "db.query", INTERNAL, (), own


def _connect(visit: ConnectVisit, ended: float, is_core: bool) -> Said:
    host, _, port = visit.remote.rpartition(":")
    side = "client" if is_core else "server"
    own: Attributes = {f"{side}.address": host.strip("[]") or visit.remote}
    if port.isascii() and port.isdigit():
        own[f"{side}.port"] = int(port)
    _put(own, "agent.id", _clean(visit.agent_id))
    _put(own, "tunnel.connection.id", visit.connection_id)
    _put(own, "tunnel.account.id", visit.account_id)
    _put(own, "tunnel.outcome", visit.outcome)
    _put(own, "tunnel.refusal", visit.reason)
    return ("agent.accept", SERVER, (), own) if is_core else ("agent.connect", CLIENT, (), own)


# Groups of attributes that recur, by what they are made of ----------------------------------------------------------


def _kept(count: int) -> Callable[[F], F]:
    """Keep the newest `count` results of a function, but not those for a long text, which is its last argument."""

    def keep(make: F) -> F:
        cached = lru_cache(count)(make)

        def made(*args: Any) -> Common:
            return cached(*args) if len(args[-1]) <= MAX_KEPT else make(*args)

        return cast(F, made)

    return keep


@lru_cache(1024)
def _route(method: str, scheme: str, host: str, http_version: str) -> Common:
    out = _method(method)
    out["url.scheme"] = scheme
    out["network.protocol.version"] = http_version
    _put(out, "server.address", _clean(host))
    return Common(out)


@lru_cache(4096)
def _answered(status: int, outcome: str, tunnel: str, agent_id: str, connection_id: str, account_id: str) -> Common:
    """How it ended, and whose it was."""
    out: Attributes = {}
    _put(out, "http.response.status_code", status)
    _put(out, "tunnel.outcome", outcome)
    _put(out, "tunnel.name", tunnel)
    _put(out, "agent.id", _clean(agent_id))
    _put(out, "tunnel.connection.id", connection_id)
    _put(out, "tunnel.account.id", account_id)
    return Common(out)


@_kept(4096)
def _visitor(client: str, user_agent: str) -> Common:
    out: Attributes = {}
    _put(out, "client.address", client)
    _put(out, "user_agent.original", _clean(user_agent))
    return Common(out)


@_kept(2048)
def _url(scheme: str, host: str, target: str) -> Common:
    path, query = split_target(target)
    url = f"{scheme}://{_clean(host)}{path}"
    out: Attributes = {"http.url": f"{url}?{query}" if query else url, "url.path": path}
    _put(out, "url.query", query)
    return Common(out)


@_kept(2048)
def _path(target: str) -> Common:
    if not target:
        return Common({})
    path, query = split_target(target)
    out: Attributes = {"url.path": path}
    _put(out, "url.query", query)
    return Common(out)


@_kept(2048)
def _full(scheme: str, address: str, target: str) -> Common:
    path, query = split_target(target)
    url = f"{scheme}://{address}{path}"
    full = f"{url}?{query}" if query else url
    return Common({"url.full": full, "http.url": full})


@lru_cache(1024)
def _carried(method: str, protocol: str) -> Common:
    out = _method(method) if method else {}
    out["tunnel.stream.protocol"] = protocol
    return Common(out)


@lru_cache(1024)
def _service(address: str, scheme: str, method: str, status: int, outcome: str) -> Common:
    host, _, port = address.rpartition(":")
    out: Attributes = {"server.address": host.strip("[]") or address, "url.scheme": scheme}
    if port.isascii() and port.isdigit():
        out["server.port"] = int(port)
    if method:
        out |= _method(method)
    _put(out, "http.response.status_code", status)
    _put(out, "tunnel.outcome", outcome)
    return Common(out)


_FACTS: dict[str, Callable[[Any, float, bool], Said]] = {
    "request": _request,
    "stream": _stream,
    "local": _local,
    "query": _query,
    "connect": _connect,
}


def _is_authentication(visit: Any) -> bool:
    """Whether a connection to the core got so far as to say who it is: a port scan makes no span."""
    return visit.outcome in ("ok", "refused") or bool(visit.agent_id)


def _sizes(out: Attributes, visit: Visit, is_raw: bool) -> None:
    """Bytes towards the local service and back: bodies, or whatever a TCP tunnel carried."""
    out["tunnel.bytes_in" if is_raw else "http.request.body.size"] = visit.bytes_in
    out["tunnel.bytes_out" if is_raw else "http.response.body.size"] = visit.bytes_out


def _put(out: Attributes, key: str, value: object) -> None:
    if value:
        out[key] = value


def _method(method: str) -> Attributes:
    if method in _KNOWN_METHODS:
        return {"http.request.method": method, "http.method": method}
    original = _clean(method)
    return {"http.request.method": "_OTHER", "http.request.method_original": original, "http.method": original}


def _blame(visit: Visit, failure: str) -> tuple[str, str]:
    """(error.type, description of the error status), or ("", "") where the span's status stays unset."""
    outcome = visit.outcome or ("internal" if failure and failure != "Cancelled" else "")
    if visit.status >= 500 and outcome in ("", "ok"):
        return str(visit.status), _clean(visit.error) or f"HTTP {visit.status}"
    if failure and failure != "Cancelled" and outcome in ("internal", "ok"):
        return failure, _clean(visit.error) or failure
    if outcome in _HARMLESS:
        return "", ""
    reason = visit.reason if isinstance(visit, ConnectVisit) else ""
    return reason or outcome, _clean(visit.error) or reason or outcome


def _clean(text: str) -> str:
    """Bounded, and valid UTF-8: one lone surrogate would make the whole batch unsendable."""
    text = text[:MAX_TEXT]
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def split_target(target: str) -> tuple[str, str]:
    """A request target as (path, query string with the values redacted). An absolute target loses its authority."""
    path, _, query = target.partition("#")[0].partition("?")
    if "://" in path and not path.startswith("/"):
        path = "/" + path.partition("://")[2].partition("/")[2]
    return _clean(path), redact(query) if query else ""


def redact(query: str) -> str:
    """`a=1&b=2` → `a=REDACTED&b=REDACTED`. Names stay, and so does what has no `=`; `;` separates as `&` does."""
    parts = query[:MAX_TEXT].replace(";", "&").split("&")
    return _clean("&".join(f"{part.partition('=')[0]}=REDACTED" if "=" in part else part for part in parts))
