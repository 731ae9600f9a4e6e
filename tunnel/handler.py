"""The seam: what is handled (visits), what handles it (handlers), and what is wrapped around it (layers).

A *visit* is one thing being handled. The room that handles it makes the visit and fills in the facts; layers around
the handler (metrics, tracing, logs, third parties) see it begin, run and end. Parents are explicit, so no context
variable has to cross a task or the link. With no layer a handler is the bare function and nothing is paid.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import trio
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
    its way), "answered" (answer's head came from the agent),
    "first_byte" (answer's head written), "upgraded" (101 written), "event" (first body byte of an event stream).
    `request_headers` are (name, value) byte pairs as the visitor sent them, in order.
    `cause` says in one line why it was turned away, where that is no failure (those have `error`); "" otherwise.
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


Handler = Callable[[Any], Awaitable[None]]
Layer = Callable[[Handler], Handler]


def wrap(handler: Handler, layers: Sequence[Layer]) -> Handler:
    """Put layers around a handler: the first is outermost. `wrap(handler, [])` is the handler itself."""
    for layer in reversed(layers):
        handler = layer(handler)
    return handler


Begin = Callable[[Any], None]
End = Callable[[Any, BaseException | None], None]
Ended = tuple[Any, BaseException | None]  #: a visit, and what its handler raised


Leave = Callable[[], None]
Enter = Callable[[Any], Leave | None]


class Observer:
    """A layer that only looks.

    `begins` and `ends` hold, by kind of visit, what is called before the handler, and what is called after it with the
    exception that it raised, or None. Neither waits. `late` is called as `ends` is, but some milliseconds later and for
    many visits in a row, in the order in which they ended; `visit.ended` says when that was. What only counts or
    writes belongs there: it runs in one go on a warm processor, and visitors don't wait for it. Where `batch` is given
    it is called instead, with all visits in a row: those of the kinds in `late`, and others, which it is to skip.
    `enters` hold what belongs to the handler's task (a context variable): called in it right before the handler, and
    what that returns right after. A visit that is handled without a task is not entered.

    It is a layer like any other, but a program runs neighbouring observers in one coroutine and gathers what is for
    `late` (tunnel/observers.py). By itself it calls `late` at once.
    """

    def __init__(
        self,
        begins: Mapping[str, Begin],
        ends: Mapping[str, End],
        late: Mapping[str, End] | None = None,
        batch: Callable[[Sequence[Ended]], None] | None = None,
        enters: Mapping[str, Enter] | None = None,
    ) -> None:
        self.begins = begins
        self.ends = ends
        self.enters = enters or {}
        self.late = late or {}
        self.batch = batch or self._one_by_one

    def _one_by_one(self, visits: Sequence[Ended]) -> None:
        late = self.late
        for visit, raised in visits:
            if end := late.get(visit.kind):
                end(visit, raised)

    def __call__(self, handler: Handler) -> Handler:
        async def observed(visit: Visit) -> None:
            kind = visit.kind
            if begin := self.begins.get(kind):
                begin(visit)
            raised: BaseException | None = None
            enter = self.enters.get(kind)
            leave = enter(visit) if enter is not None else None
            try:
                await handler(visit)
            except BaseException as exc:
                raised = exc
                raise
            finally:
                if leave is not None:
                    leave()
                visit.ended = monotonic()
                if end := self.ends.get(kind):
                    end(visit, raised)
                if kind in self.late:
                    self.batch(((visit, raised),))

        return observed


class Guard:
    """Makes a layer harmless: what it raises is reported once, then the layer is out of the way for good.

    The guard knows per visit whether the inner handler has run (`visit.reached`) and what it raised itself
    (`visit.raised`), so it never runs it twice, never swallows its exceptions, and lets `Cancelled` pass.
    `depth` is the layer's place counted from outside, starting at 0.
    """

    def __init__(self, name: str, layer: Layer, depth: int, log: logging.Logger) -> None:
        self.name = name
        self.is_off = False
        self.layer = layer
        self._depth = depth
        self._log = log

    def __call__(self, handler: Handler) -> Handler:
        depth = self._depth

        async def inner(visit: Visit) -> None:
            if visit.reached > depth:
                raise RuntimeError(f"layer {self.name} ran the handler twice")
            visit.reached = depth + 1
            try:
                await handler(visit)
            except BaseException as exc:
                visit.raised = exc
                raise

        try:
            layered = self.layer(inner)
        except Exception as exc:
            self.switch_off(exc)
            return handler
        if layered is inner:
            return handler  # it has no interest in visits: nothing is paid

        async def guarded(visit: Visit) -> None:
            if self.is_off:
                await handler(visit)
                return
            try:
                await layered(visit)
            except BaseException as exc:
                if exc is visit.raised or not isinstance(exc, Exception):
                    raise
                self.switch_off(exc)
            else:
                if visit.reached > depth and visit.raised is None:
                    return
                self.switch_off(RuntimeError("it swallowed the handler's call or its exception"))
            if visit.reached <= depth:
                await handler(visit)
            elif isinstance(visit.raised, trio.Cancelled):
                # Raised anew if it is from outside; the layer's own must not get out of its scope.
                await trio.lowlevel.checkpoint_if_cancelled()
                raise RuntimeError(f"layer {self.name} cancelled the handler")
            elif visit.raised is not None:
                raise visit.raised

        return guarded

    def switch_off(self, exc: BaseException) -> None:
        """The layer raised this: report it, once, and pass the layer by from now on."""
        if not self.is_off:
            self.is_off = True
            self._log.error(
                "layer switched off",
                extra={"fields": {"layer": self.name, "error": f"{type(exc).__name__}: {exc}"}},
            )


# What a program offers its plug-ins ------------------------------------------------------------------------------


@dataclass(slots=True)
class PageRequest:
    """A GET on one of the program's own pages; header names lower case."""

    path: str
    query: str
    headers: dict[str, str]


@dataclass(slots=True)
class PageAnswer:
    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


Page = Callable[[PageRequest], Awaitable[PageAnswer]]


def no_such_page(pages: Mapping[str, Page]) -> PageAnswer:
    """The answer to a path that is none of these."""
    return PageAnswer(404, f"there is no such page; there are: {', '.join(sorted(pages))}\n".encode())


Check = Callable[[], tuple[bool, str]]  #: (holds, reason)


@dataclass(slots=True)
class QuotaStatistics:
    account_id: str
    type: str  # "connection", "bandwidth" or "requests"
    usage: float
    limit: float  # math.inf: none
    pending: float = 0.0  # what of the usage is known here only, as yet


@dataclass(slots=True)
class LinkStatistics:
    """What a link's owner counts in plain integers."""

    connection_id: str
    agent_id: str
    account_id: str
    state: str
    streams: int
    frames_in: int
    frames_out: int
    frames_bad: int
    queue_bytes: int
    rtt: float  # seconds, the newest; 0 before the first
    offset: float  # seconds, the other end's clock minus ours
    stalled_visitor: int = 0  # streams whose visitor does not take what has come: their window is used up
    stalled_agent: int = 0  # streams whose agent does not take what is to be sent
    instance: str = ""  # the same for all links of one agent; "" where it does not say
    worker: int = 0  # that has the link
    remote: str = ""  # the agent's address, host:port
    since: float = 0.0  # when it was welcomed, seconds since 1970


@dataclass(slots=True)
class CoreStatistics:
    connections_limit: float
    bytes_in: int
    bytes_out: int
    links: list[LinkStatistics]
    quotas: list[QuotaStatistics]
    quota_exceeded: dict[str, int]  # by type, since start
    logs_dropped: int = 0
    certificate_expiry: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # by listener: the first one's, since 1970
    limit_refusals: dict[str, int] = dataclasses.field(default_factory=dict)  # by limit, since start
    protocol_errors: int = 0  # links and would-be links that broke the protocol
    held_bytes: int = 0  # unread bodies and what waits to be sent, on all links
    held_bytes_limit: float = math.inf  # how many there may be
    acme_orders: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # for certificates, by result, since start; empty: none
    acme_failing: int = 0  # names that should have a certificate, or a newer one, and whose orders fail


@dataclass(slots=True)
class AgentStatistics:
    agent_id: str
    connected: bool
    reconnections: int  # attempts to get a lost link back
    reconnection_errors: int
    consecutive_errors: int
    frames_received: int
    frames_sent: int
    frames_error: int
    heartbeats_sent: int
    heartbeats_failed: int
    logs_dropped: int = 0


@dataclass(slots=True)
class AgentReport:
    """Metrics that an agent sent over its link: Prometheus text, and when it came (monotonic seconds)."""

    agent_id: str
    account_id: str
    text: bytes
    at: float
    connected: bool
    instance: str = ""  # tells agents of one name apart


@dataclass(slots=True)
class Offered:
    """What a worker said. key: tells the process from those before it in the same place; is_last: it has ended."""

    worker: int
    key: str
    data: bytes
    is_last: bool = False


class Workers(Protocol):
    """The worker processes of a program, as its supervisor's plug-ins see them."""

    @property
    def count(self) -> int:
        """How many there should be."""

    @property
    def restarts(self) -> int:
        """How many have ended and been replaced."""

    @property
    def keys(self) -> Sequence[str]:
        """Of those that are ready now."""

    async def ask(self, name: str) -> list[Offered]:
        """What is offered under this name by those that are ready, and the last word of each that has ended since the
        last call. Of one that does not answer within a second it is what it said before. Does what `refresh` does, too.
        """

    async def refresh(self) -> None:
        """Bring the supervisor's `statistics`, `reports`, `details` and `checks` up to date."""


class Tasks(Protocol):
    """A plug-in's own tasks. One that raises is reported and switches the plug-in off; the program goes on."""

    def start_soon(self, async_fn: Callable[..., Awaitable[Any]], /, *args: Any, name: object = None) -> None: ...

    async def start(self, async_fn: Callable[..., Awaitable[Any]], /, *args: Any, name: object = None) -> Any: ...


class Host(Protocol):
    """What a plug-in is given: the program it is plugged into."""

    @property
    def role(self) -> str:
        """ "core" or "agent"."""

    @property
    def version(self) -> str: ...

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """The configuration by section ("metrics", "tracing", "log", …), as plain values."""

    @property
    def outcomes(self) -> Sequence[str]:
        """All outcome words."""

    @property
    def refusals(self) -> Sequence[str]:
        """All reasons for which a link is refused."""

    @property
    def checks(self) -> dict[str, Check]:
        """Readiness checks by name; all hold when the program may take traffic."""

    def statistics(self) -> CoreStatistics | AgentStatistics: ...

    def settle(self) -> None:
        """Let observers do now what they do `late`: what has ended is counted when this returns."""

    def take_round_trips(self) -> list[float]:
        """Heartbeat round trips (seconds) since the last call; bounded, oldest dropped."""

    def reports(self) -> list[AgentReport]:
        """Core: what agents reported over their links. Empty on an agent."""

    def set_report(self, make: Callable[[], bytes]) -> None:
        """Agent: what to send over the link every few seconds as this agent's metrics."""

    def add_page(self, path: str, page: Page) -> None:
        """Serve a page on the metrics address."""

    def offer(self, name: str, make: Callable[[], bytes]) -> None:
        """Where this program is one of several workers: what its part of a plug-in has to say to the supervisor's part
        when that asks, and once more at the end. The name is the plug-in's own, the bytes too."""

    @property
    def workers(self) -> Workers | None:
        """In a supervisor: its workers; None in a program that works itself."""

    def set_details(self, name: str, details: Callable[[], dict[str, Any]]) -> None:
        """Add a section to /health/detailed. With several workers those of one name are put together: numbers add up
        (tunnel/workers/details.py)."""

    def details(self) -> dict[str, dict[str, Any]]: ...

    @property
    def nursery(self) -> Tasks:
        """For a plug-in's own background tasks; cancelled when the program ends."""


PlugIn = Callable[[Host], AbstractAsyncContextManager[Layer]]
