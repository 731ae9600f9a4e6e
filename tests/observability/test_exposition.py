"""The metrics part of the contract, as data, held against the pages of both programs in both formats."""

from __future__ import annotations

import shutil
import subprocess
from typing import NamedTuple

import pytest
import trio
from fakehost import FakeHost
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from observability import metrics
from observability.buckets import Histogram
from observability.exposition import OPENMETRICS, TEXT, Family, choose, label_value, render
from tunnel.handler import ConnectVisit, LinkVisit, LocalVisit, QueryVisit, RequestVisit, StreamVisit, Visit

ASK = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;q=0.5"

SECONDS = "0.0003 0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1.0 2.0 5.0 10.0 30.0 +Inf"
MICROSECONDS = (
    "300.0 500.0 1000.0 2000.0 5000.0 10000.0 20000.0 50000.0 100000.0 200000.0 500000.0 "
    "1e+06 2e+06 5e+06 1e+07 3e+07 +Inf"
)
STREAM = "0.001 0.005 0.01 0.05 0.1 0.5 1.0 2.0 5.0 10.0 30.0 60.0 300.0 1800.0 7200.0 43200.0 +Inf"
ROUND_TRIP = "0.0001 0.0002 0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1.0 2.0 5.0 +Inf"
QUERY = "0.0001 0.0002 0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1.0 5.0 +Inf"
BYTES = (
    "0.0 256.0 1024.0 4096.0 16384.0 65536.0 262144.0 1.048576e+06 4.194304e+06 1.6777216e+07 "
    "6.7108864e+07 2.68435456e+08 1.073741824e+09 +Inf"
)
PAUSE = "0.0001 0.0002 0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.5 +Inf"

# name | type | labels | buckets
CORE = f"""
tunnel_connections_total | counter
tunnel_connections_active | gauge
tunnel_connections_by_account | gauge | account_id
tunnel_connection_state | gauge | connection_id state
tunnel_connection_rtt_seconds | histogram | | {ROUND_TRIP}
tunnel_authentication_failures_total | counter | reason
tunnel_streams_total | counter
tunnel_streams_active | gauge
tunnel_stream_duration_seconds | histogram | | {STREAM}
tunnel_requests_total | counter | code
tunnel_request_duration_seconds | histogram | | {SECONDS}
tunnel_time_to_first_byte_seconds | histogram | | {SECONDS}
tunnel_request_size_bytes | histogram | | {BYTES}
tunnel_response_size_bytes | histogram | | {BYTES}
tunnel_quota_exceeded_total | counter | type
tunnel_quota_usage | gauge | account_id type
tunnel_quota_limit | gauge | account_id type
tunnel_bytes_total | counter | direction
tunnel_request_outcomes_total | counter | outcome
tunnel_upstream_errors_total | counter | reason
tunnel_connections_limit | gauge
tunnel_db_query_duration_seconds | histogram | operation | {QUERY}
tunnel_link_queued_bytes | gauge
tunnel_streams_stalled | gauge | side
tunnel_spans_exported_total | counter
tunnel_spans_dropped_total | counter
tunnel_logs_dropped_total | counter
tunnel_certificate_expiry_timestamp_seconds | gauge | listener
tunnel_build_info | gauge | python version
"""
AGENT = f"""
agent_connection_active | gauge | agent_id
agent_reconnections_total | counter
agent_reconnection_errors_total | counter
agent_consecutive_errors | gauge
agent_streams_total | counter
agent_streams_active | gauge
agent_streams_completed | bare
agent_streams_failed | bare
agent_requests_total | counter
agent_requests_success | bare
agent_requests_failed | bare
agent_request_duration_microseconds | histogram | | {MICROSECONDS}
agent_frames_received | bare
agent_frames_sent | bare
agent_frames_error | bare
agent_heartbeats_sent | bare
agent_heartbeats_failed | bare
agent_heartbeat_rtt_seconds | histogram | | {ROUND_TRIP}
agent_local_requests_total | counter
agent_local_requests_error | bare
agent_local_request_duration_microseconds | histogram | | {MICROSECONDS}
agent_spans_exported_total | counter
agent_spans_dropped_total | counter
agent_logs_dropped_total | counter
"""
RUNTIME = f"""
process_virtual_memory_bytes | gauge
process_resident_memory_bytes | gauge
process_start_time_seconds | gauge
process_cpu_seconds_total | counter
process_open_fds | gauge
process_max_fds | gauge
python_allocated_blocks | gauge
trio_tasks_living | gauge
trio_tasks_runnable | gauge
trio_run_loop_lag_seconds | gauge
python_gc_pause_seconds | histogram | generation | {PAUSE}
"""
GO = """
go_memstats_alloc_bytes | gauge
go_memstats_heap_inuse_bytes | gauge
go_goroutines | gauge
go_gc_duration_seconds | summary
"""


class Row(NamedTuple):
    type: str
    labels: frozenset[str]
    buckets: tuple[str, ...]


def table(*texts: str) -> dict[str, Row]:
    rows = {}
    for line in "".join(texts).strip().splitlines():
        if line:
            name, type, labels, buckets, *_ = (*(part.strip() for part in line.split("|")), "", "", "")
            rows[name] = Row(type, frozenset(labels.split()), tuple(buckets.split()))
    return rows


def found(parsed: list[Metric]) -> dict[str, Row]:
    """The same table, made from what a parser of prometheus_client understood."""
    rows = {}
    for metric in parsed:
        name, type = metric.name, metric.type
        if type == "counter":
            name += "_total"
        elif type == "unknown":
            type = "bare"
        suffixes = {"histogram": ("_bucket", "_count", "_sum"), "summary": ("", "_count", "_sum")}.get(type, ("",))
        assert {sample.name for sample in metric.samples} == {name + suffix for suffix in suffixes}
        labels = frozenset(label for sample in metric.samples for label in sample.labels) - {"le", "quantile"}
        buckets = tuple(dict.fromkeys(sample.labels["le"] for sample in metric.samples if "le" in sample.labels))
        rows[name] = Row(type, labels, buckets)
    return rows


async def exercise(host: FakeHost, layer: object) -> None:
    """One visit of each kind, so that every family has a sample."""

    async def handler(visit: Visit) -> None:
        visit.outcome, visit.status = "ok", 200
        visit.sampled, visit.trace_id = True, "0af7651916cd43dd8448eb211c80319c"
        visit.marks = {"head": visit.started, "first_byte": visit.started}

    handle = layer(handler)  # type: ignore[operator]
    host.round_trips = [0.001]
    connect = ConnectVisit("192.0.2.1:1", "c1")
    await handle(connect)
    await handle(LinkVisit(connect))
    await handle(StreamVisit(None, "http"))
    if host.role == "core":
        host.core.certificate_expiry = {"agent": 2e9, "public": 1.9e9}
        host.add_link("c1")
        host.add_quota("acme", "requests", 1)
        await handle(RequestVisit("192.0.2.1", "http"))
        await handle(QueryVisit("token.find", "sqlite"))
    else:
        await handle(LocalVisit(StreamVisit(None, "http"), "localhost:3000", "http"))


@pytest.fixture(params=["core", "agent"])
def role(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("go_names", [False, True])
async def test_the_contract(role: str, go_names: bool, nursery: trio.Nursery) -> None:
    host = FakeHost(role, {"metrics": {"go_names": go_names}}, nursery)
    async with metrics.plugin(host) as layer:
        await exercise(host, layer)
        text = await host.get("/metrics")
        openmetrics = await host.get("/metrics", ASK)
    expected = table(CORE if role == "core" else AGENT, RUNTIME, GO if go_names else "")
    assert (text.status, text.content_type) == (200, TEXT)
    assert (openmetrics.status, openmetrics.content_type) == (200, OPENMETRICS)
    assert found(list(parse_text(text.body.decode()))) == expected
    assert found(list(parse_openmetrics(openmetrics.body.decode()))) == expected  # type: ignore[no-untyped-call]


async def test_exemplars_in_openmetrics_on_histograms_only(role: str, nursery: trio.Nursery) -> None:
    host = FakeHost(role, nursery=nursery)
    async with metrics.plugin(host) as layer:
        await exercise(host, layer)
        text = await host.get("/metrics")
        openmetrics = await host.get("/metrics", ASK)
    assert b"trace_id" not in text.body
    carriers = {
        metric.name: metric.type
        for metric in parse_openmetrics(openmetrics.body.decode())  # type: ignore[no-untyped-call]
        for sample in metric.samples
        if sample.exemplar is not None
    }
    names = {
        "core": ("tunnel_request_duration_seconds", "tunnel_time_to_first_byte_seconds"),
        "agent": ("agent_request_duration_microseconds", "agent_local_request_duration_microseconds"),
    }
    assert carriers == dict.fromkeys(names[role], "histogram")


async def test_no_created_samples_and_an_end(role: str, nursery: trio.Nursery) -> None:
    host = FakeHost(role, {"metrics": {"go_names": True}}, nursery)
    async with metrics.plugin(host):
        for accept in ("", ASK):
            body = (await host.get("/metrics", accept)).body
            assert b"_created" not in body
            assert body.count(b"# EOF") == (1 if accept else 0)
            assert body.endswith(b"# EOF\n") == bool(accept)


async def test_the_page_written_in_pieces_is_the_page(nursery: trio.Nursery) -> None:
    host = FakeHost("agent", nursery=nursery)
    async with metrics.plugin(host):
        assert host.report is not None
        pieces = (await host.get("/metrics")).body
        assert pieces.startswith(host.report())


@pytest.mark.parametrize("go_names", [False, True])
async def test_promtool_accepts(role: str, go_names: bool, nursery: trio.Nursery) -> None:
    """Exit code 3 is a lint: only the reference page's own microseconds may cause one."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.fail("promtool is missing: install the package prometheus")
    host = FakeHost(role, {"metrics": {"go_names": go_names}}, nursery)
    async with metrics.plugin(host) as layer:
        await exercise(host, layer)
        pages = [(await host.get(path)).body for path in host.pages]
    for page in pages:
        done = await trio.run_process(
            [promtool, "check", "metrics"],
            stdin=page,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
        lints = [line for line in done.stdout.decode().splitlines() if line]
        allowed = [line for line in lints if "duration_microseconds use base unit" in line]
        assert lints == allowed
        assert done.returncode == (3 if allowed else 0)


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/html, text/plain;q=0.9", False),
        (ASK, True),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; Version=1.0.0 ; charset=utf-8", True),
        ("application/openmetrics-text;version=0.0.1", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=0.3,text/plain;version=0.0.4;q=0.5", False),
        ("application/openmetrics-text;q=nonsense", False),
        (";;,,=;", False),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
            "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            True,
        ),
    ],
)
def test_negotiation(accept: str, is_openmetrics: bool) -> None:
    assert choose(accept) is is_openmetrics


def test_bounds_belong_to_their_bucket() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert (histogram.sum, histogram.count) == (6.6, 5)
    samples = Family("a_seconds", "histogram", "A.").metric(((), histogram)).samples
    assert [sample.value for sample in samples] == [2, 4, 5, 5, 6.6]


@pytest.mark.parametrize("text", ['quo"te', "back\\slash", "new\nline", "\x00\x1b\u2028", "\ud800", "x" * 1000, "ä€😀"])
def test_no_id_spoils_the_page(text: str) -> None:
    value = label_value(text)
    assert len(value) <= 128
    body = render([Family("a", "gauge", "A.", ("id",)).metric(((value,), 1))]).decode()
    (metric,) = parse_text(body)
    assert [sample.labels for sample in metric.samples] == [{"id": value}]
    assert len(body.splitlines()) == 3


def test_plain_ids_stay_as_they_are() -> None:
    for text in ("acme", "agent-1", "Ärger", "a b"):
        assert label_value(text) == text
