"""What the agent counts: the identities hold with every outcome, and long lives don't drown the averages."""

from __future__ import annotations

import itertools

import pytest
import trio
from fakehost import FakeHost

from observability.agent_metrics import FAMILIES, AgentMetrics
from tunnel.errors import OUTCOMES
from tunnel.handler import LocalVisit, StreamVisit, Visit

Numbers = dict[str, float]


def read(metrics: AgentMetrics) -> Numbers:
    return {sample.name: sample.value for metric in metrics.collect() for sample in metric.samples}


def hold_identities(numbers: Numbers) -> None:
    assert (
        numbers["agent_streams_completed"] + numbers["agent_streams_failed"] + numbers["agent_streams_active"]
        == numbers["agent_streams_total"]
    )
    if not numbers["agent_streams_active"]:
        assert numbers["agent_requests_success"] + numbers["agent_requests_failed"] == numbers["agent_requests_total"]
        assert numbers["agent_request_duration_microseconds_count"] == numbers["agent_requests_total"]


async def nothing(visit: Visit) -> None:
    pass


@pytest.fixture
def fake() -> FakeHost:
    return FakeHost("agent")


@pytest.fixture
def metrics(fake: FakeHost) -> AgentMetrics:
    return AgentMetrics(fake)


def ended(visit: StreamVisit | LocalVisit, outcome: str, status: int = 0) -> Visit:
    visit.outcome, visit.status = outcome, status
    return visit


async def test_identities_with_every_end(metrics: AgentMetrics) -> None:
    handle = metrics.layer(nothing)
    ends = list(itertools.product(("", *OUTCOMES), (0, 200, 404, 500, 503), ("http", "upgrade", "tcp", "probe")))
    for outcome, status, protocol in ends:
        await handle(ended(StreamVisit(None, protocol), outcome, status))
        hold_identities(read(metrics))
    numbers = read(metrics)
    per_protocol = len(ends) // 4
    assert numbers["agent_streams_total"] == 3 * per_protocol
    assert numbers["agent_requests_total"] == 2 * per_protocol
    well = 2 * 3  # ok and visitor_aborted, with 0, 200 and 404
    assert numbers["agent_streams_completed"] == 3 * well
    assert numbers["agent_requests_success"] == 2 * well


@pytest.mark.parametrize(
    ("outcome", "status", "failed"),
    [
        ("ok", 200, 0),
        ("ok", 404, 0),
        ("ok", 500, 1),
        ("visitor_aborted", 200, 0),
        ("local_refused", 0, 1),
        ("local_broken", 200, 1),
        ("timeout", 0, 1),
        ("link_lost", 200, 1),
        ("", 0, 1),
    ],
)
async def test_failed_means(outcome: str, status: int, failed: int, metrics: AgentMetrics) -> None:
    handle = metrics.layer(nothing)
    stream = StreamVisit(None, "http")
    await handle(ended(LocalVisit(stream, "localhost:3000", "http"), outcome, status))
    await handle(ended(stream, outcome, status))
    numbers = read(metrics)
    assert numbers["agent_local_requests_total"] == 1
    assert numbers["agent_local_requests_error"] == failed
    assert numbers["agent_requests_failed"] == failed
    assert numbers["agent_streams_failed"] == failed
    assert numbers["agent_requests_success"] == 1 - failed


async def test_in_flight_and_cancelled(metrics: AgentMetrics) -> None:
    seen: list[Numbers] = []

    async def handler(visit: Visit) -> None:
        seen.append(read(metrics))
        scope.cancel()
        await trio.sleep_forever()

    handle = metrics.layer(handler)
    with trio.CancelScope() as scope:
        await handle(StreamVisit(None, "http"))
    hold_identities(seen[0])
    assert seen[0]["agent_streams_active"] == 1
    numbers = read(metrics)
    hold_identities(numbers)
    assert (numbers["agent_streams_active"], numbers["agent_streams_failed"]) == (0, 1)


async def test_a_handlers_exception_passes_and_is_counted(metrics: AgentMetrics) -> None:
    async def handler(visit: Visit) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await metrics.layer(handler)(StreamVisit(None, "http"))
    hold_identities(read(metrics))


async def test_probes_count_nowhere(metrics: AgentMetrics) -> None:
    before = read(metrics)
    handle = metrics.layer(nothing)
    probe = StreamVisit(None, "probe")
    await handle(ended(LocalVisit(probe, "localhost:3000", "http"), "local_refused"))
    await handle(ended(probe, "local_refused"))
    assert read(metrics) == before


@pytest.mark.parametrize(
    ("protocol", "status", "marks", "stream_us", "local_us"),
    [
        ("upgrade", 101, {"sent": 0.1, "first_byte": 0.2}, 200_000, 200_000),
        ("http", 200, {"first_byte": 0.2, "event": 0.3}, 300_000, 300_000),
        ("tcp", 0, {"connected": 0.1}, 0, 100_000),
    ],
)
async def test_long_lives_end_where_the_answer_begins(
    protocol: str,
    status: int,
    marks: dict[str, float],
    stream_us: float,
    local_us: float,
    metrics: AgentMetrics,
) -> None:
    async def handler(visit: Visit) -> None:
        visit.outcome, visit.status = "ok", status
        if isinstance(visit, StreamVisit):
            visit.started -= 3600
            local = LocalVisit(visit, "localhost:3000", "http")
            local.started = visit.started
            local.marks = {name: local.started + at for name, at in marks.items()}
            await handle(local)

    handle = metrics.layer(handler)
    await handle(StreamVisit(None, protocol))
    numbers = read(metrics)
    assert numbers["agent_request_duration_microseconds_sum"] == pytest.approx(stream_us, abs=1)
    assert numbers["agent_local_request_duration_microseconds_sum"] == pytest.approx(local_us, abs=1)
    assert not metrics._answered


async def test_a_refused_upgrade_is_an_ordinary_answer(metrics: AgentMetrics) -> None:
    handle = metrics.layer(nothing)
    stream = StreamVisit(None, "upgrade")
    stream.started -= 10
    local = LocalVisit(stream, "localhost:3000", "http")
    local.started, local.marks = stream.started, {"first_byte": stream.started + 1}
    await handle(ended(local, "ok", 403))
    await handle(ended(stream, "ok", 403))
    numbers = read(metrics)
    assert numbers["agent_request_duration_microseconds_sum"] > 9.9e6
    assert numbers["agent_local_request_duration_microseconds_sum"] > 9.9e6


async def test_durations_are_microseconds_with_exemplars(metrics: AgentMetrics) -> None:
    handle = metrics.layer(nothing)
    stream = StreamVisit(None, "http")
    local = LocalVisit(stream, "localhost:3000", "http")
    for visit in (local, stream):
        visit.started -= 0.0015
        visit.trace_id, visit.sampled = "cd" * 16, True
        await handle(ended(visit, "ok", 200))
    found = {
        sample.name: sample.exemplar
        for metric in metrics.collect()
        for sample in metric.samples
        if sample.exemplar is not None
    }
    assert set(found) == {
        "agent_request_duration_microseconds_bucket",
        "agent_local_request_duration_microseconds_bucket",
    }
    for exemplar in found.values():
        assert exemplar.labels == {"trace_id": "cd" * 16}
        assert 1500 <= exemplar.value < 1e6


def test_statistics_are_read_at_the_scrape(metrics: AgentMetrics, fake: FakeHost) -> None:
    counted = {
        "reconnections": "agent_reconnections_total",
        "reconnection_errors": "agent_reconnection_errors_total",
        "consecutive_errors": "agent_consecutive_errors",
        "frames_received": "agent_frames_received",
        "frames_sent": "agent_frames_sent",
        "frames_error": "agent_frames_error",
        "heartbeats_sent": "agent_heartbeats_sent",
        "heartbeats_failed": "agent_heartbeats_failed",
        "logs_dropped": "agent_logs_dropped_total",
    }
    for number, field in enumerate(counted, 1):
        setattr(fake.agent, field, number)
    fake.round_trips = [0.001]
    numbers = read(metrics)
    assert [numbers[name] for name in counted.values()] == list(range(1, len(counted) + 1))
    assert numbers["agent_heartbeat_rtt_seconds_count"] == 1
    assert numbers["agent_connection_active"] == 1
    fake.agent.connected = False
    assert read(metrics)["agent_connection_active"] == 0


def test_every_family_is_exposed(metrics: AgentMetrics) -> None:
    names = {sample.name for metric in metrics.collect() for sample in metric.samples}
    assert {name if row.type != "histogram" else f"{name}_count" for name, row in FAMILIES.items()} <= names
