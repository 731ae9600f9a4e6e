"""What the layers cost on their own: metrics, logs and tracing around a request's visits, made as the programs make
them, in this process. What is done late is contained, and so is the making of spans; sending them is not.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import trio

from observability.accesslog import AccessLog
from observability.agent_metrics import AgentMetrics
from observability.context import DEFAULT_PROPAGATORS, Propagation
from observability.core_metrics import CoreMetrics
from observability.logqueue import QueueHandler
from observability.record import Record
from observability.sampling import Sampler
from observability.spans import SpanBuilder
from observability.tracing import Tracer
from observability.usual import UsualSpans
from tunnel.errors import OUTCOMES, REFUSALS
from tunnel.handler import (
    Fields,
    Guard,
    Handler,
    Host,
    Layer,
    LocalVisit,
    RequestVisit,
    StreamVisit,
    Visit,
    monotonic,
    wrap,
)
from tunnel.log.lines import JsonFormatter
from tunnel.observers import fold

ROUNDS = 5
REQUESTS = 4000  #: of each round
HEAD = Fields([(b"Host", b"app.localhost"), (b"User-Agent", b"Mozilla/5.0 (X11; Linux x86_64)"), (b"Accept", b"*/*")])
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0"  #: but for the last digit


def layers(role: str, ratio: float) -> list[Layer]:
    """All three, as the programs fold them. Lines and spans go nowhere."""
    log = logging.getLogger("benchmarks")
    encode = UsualSpans(SpanBuilder(role), role).encode
    records: list[Record] = []

    def put_all(more: Sequence[Record]) -> None:
        records.extend(more)
        if len(records) >= 32:
            for one in records:
                encode(one)
            records.clear()

    handler: Any = logging.NullHandler()
    handler.writer = SimpleNamespace(put=lambda lines: None)
    handler.setFormatter(JsonFormatter())
    access = AccessLog(logging.INFO, cast(QueueHandler, handler))
    host = cast(Host, SimpleNamespace(outcomes=tuple(OUTCOMES), refusals=REFUSALS))
    all_three = [
        Tracer(role, put_all, Sampler(ratio), Propagation(DEFAULT_PROPAGATORS)).layer,
        (CoreMetrics(host) if role == "core" else AgentMetrics(host)).layer,
        access.layer("request" if role == "core" else "local"),
    ]
    return fold([Guard(str(depth), layer, depth, log) for depth, layer in enumerate(all_three)])


async def _end(visit: Visit) -> None:
    visit.outcome, visit.status, visit.bytes_out = "ok", 200, 1024


def at_core(around: Sequence[Layer]) -> Handler:
    """Makes and handles a request that is answered over a stream."""
    handle_stream = wrap(_end, around)

    async def request(visit: RequestVisit) -> None:
        stream = StreamVisit(visit, "http")
        stream.connection_id, stream.agent_id, stream.account_id, stream.tunnel = "c-1", "agent-1", "acme", "app"
        stream.method, stream.target, stream.request_id, stream.stream_id = "GET", "/k1", visit.request_id, 4711
        marks = visit.marks
        marks["opened"] = monotonic()
        await handle_stream(stream)
        marks["answered"] = monotonic()
        marks["first_byte"] = monotonic()
        await _end(visit)

    handle = wrap(request, around)

    async def one(number: int) -> None:
        visit = RequestVisit("192.0.2.1", "http")
        visit.method, visit.target, visit.host, visit.request_headers = "GET", "/k1", "app.localhost", HEAD
        visit.request_id, visit.tunnel, visit.agent_us, visit.local_us = f"{number:016x}", "app", 200, 100
        visit.agent_id, visit.account_id, visit.connection_id = "agent-1", "acme", "c-1"
        visit.marks["head"] = monotonic()
        await handle(visit)

    return one


def at_agent(around: Sequence[Layer], sampled: bool) -> Handler:
    """Makes and handles a stream with a request to the local service."""
    handle_local = wrap(_end, around)

    async def served(visit: StreamVisit) -> None:
        local = LocalVisit(visit, "127.0.0.1:8080", "http")
        local.headers = dict(visit.headers)
        local.marks["first_byte"] = monotonic()
        local.marks["last_byte"] = visit.marks["last_byte"] = monotonic()
        await handle_local(local)
        await _end(visit)

    handle = wrap(served, around)

    async def one(number: int) -> None:
        visit = StreamVisit(None, "http")
        visit.agent_id, visit.method, visit.target, visit.stream_id = "agent-1", "GET", "/k1", 4711
        visit.request_id, visit.headers = f"{number:016x}", {"traceparent": f"{TRACEPARENT}{sampled:d}"}
        await handle(visit)

    return one


def _run(one: Handler) -> float:
    """µs a request: the median of some rounds."""

    async def go() -> None:
        for number in range(REQUESTS):
            await one(number)

    rounds = []
    for _ in range(ROUNDS):
        gc.collect()
        began = time.perf_counter()
        trio.run(go)
        rounds.append((time.perf_counter() - began) / REQUESTS * 1e6)
    return statistics.median(rounds)


def added(role: str, sampled: bool) -> float:
    """µs that the layers add to a request of the core or the agent."""
    around = layers(role, float(sampled))
    if role == "core":
        return _run(at_core(around)) - _run(at_core([]))
    return _run(at_agent(around, sampled)) - _run(at_agent([], sampled))
