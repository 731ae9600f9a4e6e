"""Visits: one thing being handled each, with its facts. Who handles it makes it and fills them in."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from msgspec import Struct, field

monotonic = time.monotonic  #: the clock of `Visit.started` and of all marks (seconds)


class Visit(Struct, kw_only=True, eq=False):
    """One thing being handled.

    kind: "connect", "link", "stream", "request", "local" or "query".
    parent: the visit that caused this one (request → stream → local request), or None.
    started, ended: monotonic seconds; `ended` is 0 while it runs, and known to what an observer does `late`.
    marks: named times on the way, monotonic seconds, in the order they happened.
    headers: what travels on with it (a stream's over the link, a local request's to the local service); a layer may
        add trace context here. Names are lower case.
    outcome: how it ended, a word of `tunnel.errors.OUTCOMES`; "" while it runs.
    status: HTTP status as the visitor (or local caller) saw it; 0 where there is none.
    error: one line about a failure, for the log and the span; "" otherwise.
    bytes_in, bytes_out: body bytes, towards the local service and back.
    trace_id, span_id, sampled: set by a tracing layer (lower-case hex); sampled says that the trace is exported.

    A msgspec struct, because every request makes two at each end: filled with dozens of beginnings in C, it takes a
    third of the time that the constructors of three Python classes take.
    """

    kind: ClassVar[str] = ""

    parent: Visit | None = None
    started: float = field(default_factory=monotonic)
    ended: float = 0.0
    marks: dict[str, float] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    outcome: str = ""
    status: int = 0
    error: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    trace_id: str = ""
    span_id: str = ""
    sampled: bool = False
    origin: Any = None  # a tracing layer's own: where its span hangs, or what of its context goes on
    extra: Any = None  # another layer's own state for this visit; keep a dict if several need it
    reached: int = 0  # the guard's: how many layers in the call has come
    raised: BaseException | None = None  # the guard's: what the handler itself raised

    @property
    def trace_fields(self) -> dict[str, str]:
        """What a log line about it says of its span; nothing where there is none to be found."""
        return {"trace_id": self.trace_id, "span_id": self.span_id} if self.sampled else {}


class ConnectVisit(Visit):
    """Getting a link up: on the core from accept to welcome, on the agent from dial to welcome.

    Marks on the agent: "dialed", "tls" (where used), "websocket", "authenticated". Outcome "ok", or "refused" with
    `reason` from `tunnel.errors.REFUSALS`, or "link_lost".
    """

    kind: ClassVar[str] = "connect"

    remote: str  # the other end's address, host:port
    connection_id: str = ""
    agent_id: str = ""
    account_id: str = ""
    reason: str = ""


class LinkVisit(Visit):
    """An attached link, welcome to end. Its parent is the ConnectVisit that brought it up, and says whose it is."""

    kind: ClassVar[str] = "link"

    parent: ConnectVisit
    remote: str = ""
    connection_id: str = ""
    agent_id: str = ""
    account_id: str = ""
    state: str = "connected"  # or "draining"

    def __post_init__(self) -> None:
        connect = self.parent
        self.remote, self.connection_id = connect.remote, connect.connection_id
        self.agent_id, self.account_id = connect.agent_id, connect.account_id


class Fields(list[tuple[bytes, bytes]]):
    """The fields of a head, (name, value) as sent, in order. Requests whose heads repeat one another share one.

    found, agent: a tracing layer's own, what it has read there of traces and of the visitor's program, None before.
    They go when the head goes.
    """

    __slots__ = ("agent", "found")

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(pairs)
        self.found: Any = None
        self.agent: str | None = None


def path_of(target: str) -> str:
    """The path of a request's target: no query, no fragment, and nothing of an authority, which may hold a password."""
    path = target.partition("?")[0].partition("#")[0]
    if not path.startswith("/") and "://" in path:
        path = "/" + path.partition("://")[2].partition("/")[2]
    return path


class RequestVisit(Visit):
    """A visitor's HTTP request at the core, first byte of its head to last byte of the answer.

    Marks: "head" (request head read), "opened" (stream opened), "uploaded" (the last of a body that came in parts is on
    its way, or the service took no more of it), "answered" (answer's head came from the agent), "first_byte" (answer's
    head written), "upgraded" (101 written), "event" (first body byte of an event stream).
    `request_headers` are (name, value) byte pairs as the visitor sent them, in order.
    `cause` says in one line why it was turned away, where that is no failure (those have `error`); "" otherwise.
    `limit` is the word of `tunnel.errors.LIMITS` that had been reached, where that is why.
    `agent_us` and `local_us` are the agent's and the local service's share up to the answer's head, or to the end of a
    request that got none, microseconds, -1 where unknown. `stalled_us` is how long an answer that broke off had waited
    for the local service then.
    """

    kind: ClassVar[str] = "request"

    client: str  # the visitor's IP address
    scheme: str
    method: str = ""
    target: str = ""  # path and query; log the path only, redact the query's values on spans
    host: str = ""  # normalised: lower case, no port
    http_version: str = "1.1"
    request_headers: Sequence[tuple[bytes, bytes]] = ()
    request_id: str = ""
    tunnel: str = ""
    agent_id: str = ""
    account_id: str = ""
    connection_id: str = ""
    cause: str = ""
    limit: str = ""
    event_stream: bool = False
    agent_us: int = -1
    local_us: int = -1
    stalled_us: int = 0


class StreamVisit(Visit):
    """One stream on a link, seen from either end. `headers` cross the link in the open frame.

    protocol: "http", "upgrade", "tcp" or "probe" (probes count in no stream metric).
    offset: the link's measured clock difference, agent minus core, seconds.
    On the core the parent is the RequestVisit (None for a TCP tunnel); on the agent there is none.
    `method` and `target` name the request that it carries, if any.
    """

    kind: ClassVar[str] = "stream"

    parent: Visit | None
    protocol: str
    stream_id: int = 0
    connection_id: str = ""
    agent_id: str = ""
    account_id: str = ""
    tunnel: str = ""
    method: str = ""
    target: str = ""
    request_id: str = ""
    offset: float = 0.0


class LocalVisit(Visit):
    """The agent's request to a local service; its parent is the StreamVisit, whose request it is.

    Marks: "connected" (a new connection was made), "sent", "first_byte". A layer's `headers` are added to the request
    and replace fields of the same name.
    """

    kind: ClassVar[str] = "local"

    parent: StreamVisit
    address: str  # host:port of the local service
    scheme: str
    method: str = ""
    target: str = ""
    request_id: str = ""

    def __post_init__(self) -> None:
        stream = self.parent
        self.method, self.target, self.request_id = stream.method, stream.target, stream.request_id


class QueryVisit(Visit):
    """A query that really goes to the store. operation: a closed set of names ("token.find", "usage.add", …)."""

    kind: ClassVar[str] = "query"

    operation: str
    system: str  # "sqlite" or "postgresql"
