"""A real Prometheus scrapes both programs during a load with faults, answers the contract's queries, and its exemplars
lead to traces that were exported and took as long as the exemplar's bucket says."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from observing import Prometheus, Span, spans_of, tracing
from running import RunningAgent, RunningCore, poll
from service import Service
from visiting import Broken, Connection
from watching import SpanTap

from observability import buckets

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]

PATHS = ("/echo", "/slow?ms=15", "/status/500", "/status/404", "/download?size=70000", "/garbage", "/slow?ms=120")

#: queries of the contract and of the reference page, put right; each must have data while the load runs
QUERIES = (
    "sum(rate(tunnel_requests_total[5s])) > 0",
    'sum(rate(tunnel_requests_total{code=~"5.."}[5s])) / sum(rate(tunnel_requests_total[5s])) > 0',
    "histogram_quantile(0.95, sum by (le) (rate(tunnel_request_duration_seconds_bucket[5s]))) > 0.015",
    "histogram_quantile(0.5, sum by (le) (rate(tunnel_time_to_first_byte_seconds_bucket[5s]))) > 0",
    "histogram_quantile(0.95, sum by (le) (rate(tunnel_stream_duration_seconds_bucket[5s]))) > 0",
    "histogram_quantile(0.95, sum by (le) (rate(tunnel_response_size_bytes_bucket[5s]))) > 10000",
    "sum by (outcome) (rate(tunnel_request_outcomes_total[5s])) > 0",
    "sum by (reason) (rate(tunnel_upstream_errors_total[5s])) > 0",
    "rate(tunnel_bytes_total{direction=\"out\"}[5s]) > 0",
    "sum(rate(tunnel_streams_total[5s])) > 0",
    "tunnel_connections_active == 2",
    "sum by (account_id) (tunnel_connections_by_account) == 2",
    'sum by (state) (tunnel_connection_state{state="connected"}) == 2',
    "tunnel_connections_active / tunnel_connections_limit < 0.9",
    "histogram_quantile(0.9, sum by (le) (rate(tunnel_connection_rtt_seconds_bucket[5s]))) > 0",
    "increase(tunnel_authentication_failures_total[5s]) == 0",
    "tunnel_quota_limit - tunnel_quota_usage > 0",
    'histogram_quantile(0.9, sum by (le, operation) (tunnel_db_query_duration_seconds_bucket)) > 0',
    'tunnel_build_info{job="core"} == 1',
    'sum(rate(agent_requests_success{job="agent"}[5s])) / sum(rate(agent_requests_total{job="agent"}[5s])) > 0.2',
    'sum by (agent_id) (agent_connection_active{job="agents"}) == 1',
    'sum by (agent_id) (agent_requests_total{job="agents"}) > 0',
    'histogram_quantile(0.95, sum by (le) (rate(agent_request_duration_microseconds_bucket{job="agent"}[5s]))) > 15000',
    'rate(agent_frames_sent{job="agent"}[5s]) > 0',
    'rate(agent_local_requests_error{job="agent"}[5s]) > 0',
    'agent_consecutive_errors{job="agent"} == 0',
    "process_resident_memory_bytes > 1e7",
    "trio_tasks_living > 3",
    "trio_run_loop_lag_seconds >= 0",
    "sum by (job) (rate(process_cpu_seconds_total[5s])) > 0",
    "sum by (generation) (python_gc_pause_seconds_count) >= 0",
)  # fmt: skip


class Load:
    """A visitor that goes on until told to stop."""

    def __init__(self, core: RunningCore) -> None:
        self._core = core
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            for host, path in [*(("app", path) for path in PATHS), ("closed", "/"), ("nobody", "/")]:
                with Connection(self._core.public, f"{host}.localhost") as visitor, suppress(Broken):
                    visitor.ask(f"GET {path}")
                self._ended.wait(0.005)

    def end(self) -> None:
        self._ended.set()
        self._thread.join(10)


def test_a_real_prometheus(
    start_core: Start, start_agent: StartAgent, start_service: StartService, tmp_path: Path, ending: ExitStack
) -> None:
    tap = ending.enter_context(SpanTap(tmp_path))
    flags, environment = tracing(tap.endpoint)
    core, service = start_core("-heartbeat=200ms", *flags, environment=environment), start_service()
    nobody = ending.enter_context(socket.socket())
    nobody.bind(("127.0.0.1", 0))
    reporting = ("-metrics-report-interval=1s", *flags)
    agent = start_agent(core, service.url, "-subdomain=app", *reporting, environment=environment)
    closed = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    start_agent(core, closed, "-subdomain=closed", *reporting, agent_id="closed", environment=environment)
    targets = {
        "core": (core.metrics, "/metrics"),
        "agent": (agent.metrics, "/metrics"),
        "agents": (core.metrics, "/metrics/agents"),
    }
    load = Load(core)
    ending.callback(load.end)
    prometheus = ending.enter_context(Prometheus(tmp_path, targets))
    prometheus.wait_up()
    for text in QUERIES:
        poll(lambda text=text: prometheus.query(text), f"{text} has data", 15, 0.1)
    assert {labels["job"]: value for labels, value in prometheus.query("up")} == dict.fromkeys(targets, 1)
    assert {labels["agent_id"] for labels, _ in prometheus.query("agent_connection_active")} == {"agent", "closed"}
    load.end()
    check_exemplars(prometheus, tap)


def check_exemplars(prometheus: Prometheus, tap: SpanTap) -> None:
    """Each histogram's exemplars: the trace was exported, and its span took as long as the bucket says."""
    for name, service, unit, bounds in (
        ("tunnel_request_duration_seconds", "S", 1.0, buckets.REQUEST_SECONDS),
        ("agent_request_duration_microseconds", "agent.stream", 1e-6, buckets.REQUEST_MICROSECONDS),
        ("agent_local_request_duration_microseconds", "C", 1e-6, buckets.REQUEST_MICROSECONDS),
        ("tunnel_time_to_first_byte_seconds", "", 1.0, buckets.REQUEST_SECONDS),
    ):
        found = prometheus.get("query_exemplars", query=f"{name}_bucket", start="0", end="99999999999")
        assert len(found) >= 3, (name, found)  # buckets with one
        for series in found:
            upper = float(series["seriesLabels"]["le"])
            lower = max((bound for bound in bounds if bound < upper), default=-math.inf)
            for exemplar in series["exemplars"]:
                value = float(exemplar["value"])
                assert lower < value <= upper, (name, series)
                trace_id = exemplar["labels"]["trace_id"]
                spans: list[Span] = poll(lambda trace_id=trace_id: spans_of(tap, trace_id), trace_id, 10, 0.1)
                [span] = [one for one in spans if is_measured(one, service)]
                close = pytest.approx(span.seconds, rel=0.05, abs=0.002)
                assert value * unit == close if service else value * unit <= span.seconds + 0.002, (name, span)


def is_measured(span: Span, what: str) -> bool:
    if what == "agent.stream":
        return span.name == what
    if what == "C":
        return span.kind == "C" and span.name != "tunnel.stream"
    return span.kind == "S" and span.name != "agent.stream"


def test_an_agent_that_is_gone_can_be_alerted_on(
    start_core: Start, start_agent: StartAgent, start_service: StartService, tmp_path: Path, ending: ExitStack
) -> None:
    core = start_core()
    agent: Any = start_agent(core, start_service().url, "-subdomain=app")
    prometheus = ending.enter_context(Prometheus(tmp_path, {"agents": (core.metrics, "/metrics/agents")}))
    prometheus.wait_up()
    active = 'agent_connection_active{agent_id="agent"}'
    poll(lambda: prometheus.value(active) == 1, "the agent is there", 10, 0.1)
    agent.kill()
    poll(lambda: prometheus.value(active) == 0, "the agent is seen to be gone", 10, 0.1)
    poll(lambda: prometheus.query('agent_requests_total{agent_id="agent"}') == [], "its other series end", 15, 0.1)
