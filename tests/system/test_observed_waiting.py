"""Who was slow when no answer came, or half of one: phases on the span and Server-Timing name the local service, also
when the core's clock runs out or the visitor leaves, and nobody where nobody can know."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from observing import Span, tracing, wait_trace
from running import Record, RunningAgent, RunningCore, poll
from service import Service
from test_observed_timing import timing
from visiting import Connection
from watching import SpanTap, ask, sample

pytestmark = pytest.mark.system
NEAR = 100.0  #: milliseconds that link, agent and core may take on a busy machine


class Mute:
    """A service that takes connections and requests; after `beginning` it says nothing, and breaks off when told."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.beginning = b""
        self.asked = 0
        self._held: list[socket.socket] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
                self._held.append(sock)
                if sock.recv(65536):
                    self.asked += 1
                    sock.sendall(self.beginning)
            except OSError:
                return

    def die(self) -> None:
        """Reset all connections."""
        while self._held:
            sock = self._held.pop()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()

    def close(self) -> None:
        self._listener.close()
        self.die()


class Bench:
    """start: a core and an agent with these flags of each, for `app`."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory, self._stack = directory, stack
        self.tap = stack.enter_context(SpanTap(directory))
        self.service = Mute()
        stack.callback(self.service.close)

    def start(self, core: str = "", agent: str = "", local: str = "") -> None:
        flags, environment = tracing(self.tap.endpoint, "-tracing-server-timing")
        self.core = RunningCore(self._directory / "core", *flags, *core.split(), environment=environment)
        self._stack.callback(self.core.close)
        self.agent = RunningAgent(
            self.core, local or self.service.url, "-subdomain=app", flags[0], *agent.split(), environment=environment
        )
        self._stack.callback(self.agent.close)

    def visit(self, *fields: str, line: str = "GET /") -> Connection:
        """A visitor whose request is at the service."""
        visitor = self._stack.enter_context(Connection(self.core.public, "app.localhost"))
        visitor.send(visitor.request(line, *fields))
        poll(lambda: self.service.asked, "the request is at the service")
        return visitor

    def root(self, outcome: str) -> tuple[Span, Record]:
        record = self.core.wait_for("request", outcome=outcome)
        spans = wait_trace(self.tap, record["trace_id"], 4)
        [root] = [span for span in spans if not span.parent]
        return root, record


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack)


def phases(root: Span) -> dict[str, float]:
    found = {
        name[len("tunnel.phase.") : -len("_ms")]: float(value)
        for name, value in root.attributes.items()
        if name.startswith("tunnel.phase.")
    }
    assert sum(found.values()) == pytest.approx(root.seconds * 1e3, abs=1)
    return found


def check_local(root: Span, least: float) -> dict[str, float]:
    """All of the time but a little is the local service's, and that is at least so many milliseconds."""
    found = phases(root)
    assert found["local"] >= least, found
    assert sum(found.values()) - found["local"] < NEAR, found
    return found


@pytest.mark.parametrize("timer", ["agent's", "core's"])
def test_a_service_that_never_answers(bench: Bench, timer: str) -> None:
    """The shorter time-out counts. At the core's both ends look four times a second: either may be the first."""
    bench.start(*(("", "-request-timeout=600ms") if timer == "agent's" else ("-request-timeout=600ms", "")))
    answer = ask(bench.core, "GET /")
    assert (answer.status, answer.outcome) == (504, "timeout")
    root, _ = bench.root("timeout")
    found = check_local(root, 500)
    parts = timing(answer["server-timing"])
    assert list(parts) == ["core", "link", "agent", "local"]
    assert parts["local"] == pytest.approx(found["local"], abs=20)
    assert sample(bench.core.metrics, "tunnel_limit_refusals_total", limit="first_byte_time") == 1


def test_a_visitor_who_leaves(bench: Bench) -> None:
    bench.start()
    visitor = bench.visit()
    time.sleep(0.8)  # what is told of has lasted
    visitor.reset()
    root, _ = bench.root("visitor_aborted")
    check_local(root, 700)


@pytest.mark.parametrize("how", ["dies", "hangs", "is left"])
def test_a_service_that_stops_within_the_body(bench: Bench, how: str) -> None:
    bench.start("-body-idle-timeout=1600ms" if how == "hangs" else "")
    bench.service.beginning = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf of it"
    visitor = bench.visit()
    assert visitor.read_head().status == 200
    if how != "hangs":
        time.sleep(1.4)
        (bench.service.die if how == "dies" else visitor.reset)()
    outcome = {"dies": "local_broken", "hangs": "timeout", "is left": "visitor_aborted"}[how]
    root, _ = bench.root(outcome)
    check_local(root, 1300)


def test_a_service_that_breaks_off_before_its_answer(bench: Bench) -> None:
    bench.start()
    visitor = bench.visit()
    time.sleep(0.5)
    bench.service.die()
    answer = visitor.read_head()
    assert answer.status == 502
    assert timing(answer["server-timing"])["local"] >= 400
    root, _ = bench.root("local_broken")
    check_local(root, 400)


def test_what_is_over_before_the_agent_has_said_anything_is_nobodys(bench: Bench) -> None:
    bench.start("-request-timeout=10s")
    bench.agent.stop()
    try:
        with Connection(bench.core.public, "app.localhost") as visitor:
            visitor.send(visitor.request("GET /"))
            time.sleep(0.4)
            visitor.reset()
            record = bench.core.wait_for("request", outcome="visitor_aborted")
    finally:
        bench.agent.cont()
    [root] = [span for span in wait_trace(bench.tap, record["trace_id"], 2) if not span.parent]
    found = phases(root)
    assert found["remote"] >= 350
    assert not {"link", "agent", "local"} & set(found)


def test_a_visitor_who_is_slow_with_its_body(bench: Bench) -> None:
    bench.start("-request-timeout=700ms -body-idle-timeout=700ms")
    visitor = bench.visit("Content-Length: 100", line="POST /")
    answer = visitor.read_head()
    assert (answer.status, answer.outcome) == (408, "request_timeout")
    assert timing(answer["server-timing"])["upload"] >= 600
    root, _ = bench.root("request_timeout")
    found = phases(root)
    assert found["upload"] >= 600
    assert found.get("local", 0) == 0


def test_a_body_that_comes_slowly_is_not_the_services_time(bench: Bench) -> None:
    service = Service()
    try:
        bench.start(local=service.url)
        with Connection(bench.core.public, "app.localhost") as visitor:
            visitor.send(visitor.request("POST /upload", "Content-Length: 2") + b"a")
            time.sleep(0.7)
            visitor.send(b"b")
            answer = visitor.read_head()
        assert answer.status == 200
        root, _ = bench.root("ok")
    finally:
        service.close()
    for found in (phases(root), timing(answer["server-timing"])):
        assert found["upload"] >= 650
        assert found["link"] + found["agent"] + found["local"] < NEAR
