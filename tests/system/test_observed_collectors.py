"""Collectors that are dead, never answer, or speak gRPC: the data path does not notice, and nothing is hidden."""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from running import RunningAgent, RunningCore, poll
from service import Service
from visiting import Connection
from watching import ask, free_port, get

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]


@contextmanager
def black_hole() -> Iterator[str]:
    """A collector that accepts, reads and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []

    def serve(sock: socket.socket) -> None:
        try:
            while sock.recv(65536):
                pass
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            taken.append(sock)
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for sock in [listener, *taken]:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()


def medians(*cores: RunningCore) -> list[float]:
    """The median of 200 requests each, seconds, asked in turn so that a busy moment hits all alike."""
    took: list[list[float]] = [[] for _ in cores]
    with ExitStack() as stack:
        visitors = [stack.enter_context(Connection(core.public, "app.localhost")) for core in cores]
        for _ in range(220):
            for number, visitor in enumerate(visitors):
                began = time.perf_counter()
                assert visitor.ask("GET /echo").status == 200
                took[number].append(time.perf_counter() - began)
    return [statistics.median(one[20:]) for one in took]


def tracing_details(program: RunningCore | RunningAgent) -> dict[str, Any]:
    return dict(json.loads(get(program.metrics, "/health/detailed")[1])["details"]["tracing"])


@pytest.mark.parametrize("kind", ["dead", "slow"])
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_bad_collector_costs_the_data_path_nothing(
    start_core: Start, start_agent: StartAgent, start_service: StartService, ending: ExitStack, kind: str, protocol: str
) -> None:
    endpoint = ending.enter_context(black_hole()) if kind == "slow" else f"http://127.0.0.1:{free_port()}"
    flags = (f"-tracing-endpoint={endpoint}", f"-tracing-protocol={protocol}")
    environment = {
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_BSP_MAX_QUEUE_SIZE": "100",
        "OTEL_BSP_EXPORT_TIMEOUT": "2000",
    }
    service = start_service()
    plain, traced = start_core(), start_core(*flags, environment=environment)
    start_agent(plain, service.url, "-subdomain=app")
    agent = start_agent(traced, service.url, "-subdomain=app", *flags, environment=environment)
    usual, now = medians(plain, traced)
    assert now < 1.5 * usual + 0.002
    for program in (traced, agent):
        details = tracing_details(program)
        assert details["exporting"] and details["exported"] == 0
        # some wait in the queue, one batch is on its way, and up to 32 are not spans yet
        assert details["dropped"] + details["failed"] >= 440 - 2 * 100 - 32, details
        assert program.find("traces cannot be exported") == [] or kind == "dead"
    if kind == "dead":
        assert poll(lambda: traced.find("traces cannot be exported"), "a warning", 15, 0.1)
        assert len(traced.find("traces cannot be exported")) == 1
        assert not tracing_details(traced)["collector_up"]
    took = [duration(program) for program in (agent, plain, traced)]
    assert took[0] < 2.7 and took[2] < took[1] + 2.3, took  # 2 s, and what a busy machine takes


def duration(program: RunningCore | RunningAgent) -> float:
    """Seconds from SIGTERM to the end."""
    began = time.monotonic()
    program.terminate()
    assert program.wait() == 0
    return time.monotonic() - began


def test_spans_over_grpc(
    start_core: Start, start_agent: StartAgent, start_service: StartService, tmp_path: Path
) -> None:
    output = tmp_path / "spans"
    with output.open("wb") as out:
        sink = subprocess.Popen([sys.executable, str(Path(__file__).with_name("grpcsink.py"))], stdout=out)
    try:
        port = poll(lambda: (text := output.read_text()).endswith("\n") and text.split()[0], "the collector's port", 20)
        flags = (f"-tracing-endpoint=http://127.0.0.1:{port}", "-tracing-protocol=grpc")
        environment = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
        core, service = start_core(*flags, environment=environment), start_service()
        start_agent(core, service.url, "-subdomain=app", *flags, environment=environment)
        assert ask(core, "GET /echo").status == 200
        trace_id = core.wait_for("request")["trace_id"]

        def spans() -> list[list[str]]:
            return [line.split() for line in output.read_text().splitlines()[1:] if trace_id in line]

        poll(lambda: len(spans()) == 4, "four spans", 15, 0.1)
        parents = {name if parent != "-" else "root": (span, parent) for name, _, span, parent in spans()}
        assert parents["tunnel.stream"][1] == parents["root"][0]
        assert parents["agent.stream"][1] == parents["tunnel.stream"][0]
        assert parents["GET"][1] == parents["agent.stream"][0]
    finally:
        sink.terminate()
        assert sink.wait(10) == 0
