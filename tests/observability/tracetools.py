"""What the tracing tests share: visits that look like real ones, a collector in a thread, a bounded wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import trio

from observability.context import Propagation
from observability.export import SpanQueue
from observability.exporters import Limits
from observability.record import Record
from observability.sampling import Sampler
from observability.tracing import Tracer
from tunnel.handler import Layer, LocalVisit, RequestVisit, StreamVisit, Visit, monotonic

W3C = ("tracecontext", "baggage")
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


def make_tracer(
    role: str = "core",
    ratio: float = 1.0,
    propagators: tuple[str, ...] = W3C,
    visitor_context: str = "join",
    trusts_parent: bool = False,
    limits: Limits | None = None,
) -> tuple[Tracer, SpanQueue]:
    queue = SpanQueue(limits or Limits())
    return Tracer(role, queue.put_all, Sampler(ratio, trusts_parent), Propagation(propagators), visitor_context), queue


def all_records(queue: SpanQueue) -> list[Record]:
    return queue.take()


def a_request(headers: list[tuple[bytes, bytes]] | None = None, target: str = "/hello?q=secret") -> RequestVisit:
    visit = RequestVisit("192.0.2.7", "http")
    visit.method, visit.target, visit.host = "GET", target, "api.localhost"
    visit.request_headers = headers if headers is not None else [(b"Host", b"api.localhost"), (b"User-Agent", b"ua/1")]
    visit.agent_id, visit.account_id, visit.connection_id = "agent-1", "acme", "conn-1"
    visit.request_id, visit.tunnel = "req-1", "api"
    return visit


def a_stream(parent: Visit | None, protocol: str = "http", headers: dict[str, str] | None = None) -> StreamVisit:
    visit = StreamVisit(parent, protocol)
    visit.stream_id, visit.connection_id, visit.agent_id, visit.account_id = 7, "conn-1", "agent-1", "acme"
    if protocol != "tcp":
        visit.method, visit.target, visit.request_id = "GET", "/hello?q=secret", "req-1"
    visit.headers = dict(headers or {})
    return visit


def a_local(parent: StreamVisit) -> LocalVisit:
    return LocalVisit(parent, "localhost:3000", "http")


def mark(visit: Visit, *names: str) -> None:
    for name in names:
        visit.marks[name] = monotonic()


async def ends_well(visit: Visit) -> None:
    visit.outcome, visit.status = "ok", 200


async def run_chain(core_layer: Layer, agent_layer: Layer) -> dict[str, Visit]:
    """A request through both programs, by hand: the visits by name."""
    seen: dict[str, Visit] = {}

    async def local(visit: Visit) -> None:
        seen["local"] = visit
        mark(visit, "connected", "sent", "first_byte")
        await ends_well(visit)

    async def agent_stream(visit: StreamVisit) -> None:
        seen["agent.stream"] = visit
        await agent_layer(local)(a_local(visit))
        await ends_well(visit)

    async def core_stream(visit: StreamVisit) -> None:
        seen["tunnel.stream"] = visit
        visit.offset = 1.5
        await agent_layer(agent_stream)(a_stream(None, headers=visit.headers))  # as if it had crossed the link
        await ends_well(visit)

    async def request(visit: RequestVisit) -> None:
        seen["request"] = visit
        mark(visit, "head")
        await core_layer(core_stream)(a_stream(visit))
        mark(visit, "opened", "answered", "first_byte")
        visit.agent_us, visit.local_us = 20, 10
        await ends_well(visit)

    await core_layer(request)(a_request())
    return seen


class Collector:
    """An HTTP collector: keeps the bodies of POSTs, answers with `status`. Port from the kernel."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, dict[str, str], bytes]] = []
        self.status = 200
        self.hold = threading.Event()  # unset while requests are to hang
        self.hold.set()
        collector = self

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.hold.wait(30)
                collector.bodies.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(collector.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.hold.set()
        collector.server.shutdown()
        collector.server.server_close()
        thread.join(5)


async def until(condition: Callable[[], Any], seconds: float = 15) -> Any:
    """Poll, with a bound, for what another thread or process does."""
    with trio.fail_after(seconds):
        while not (value := condition()):  # noqa: ASYNC110 - it happens outside of Trio
            await trio.sleep(0.02)
    return value
