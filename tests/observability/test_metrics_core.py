"""What the core counts, when, and that nothing it counts can grow or leak."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Iterable

import pytest
import trio
from fakehost import FakeHost
from prometheus_client.core import Metric

from observability.core_metrics import LIMITS, MAX_CONNECTING, MAX_OPERATIONS, ORDERS, UPSTREAM, CoreMetrics
from tunnel.core.issuing.authority import RESULTS
from tunnel.core.quotas import TYPES
from tunnel.errors import LIMITS as TABLE_LIMITS
from tunnel.errors import OUTCOMES, REFUSALS
from tunnel.errors import UPSTREAM as TABLE_UPSTREAM
from tunnel.handler import ConnectVisit, LinkVisit, QueryVisit, RequestVisit, StreamVisit, Visit

Numbers = dict[tuple[str, ...], float]


def read(metrics: CoreMetrics) -> Numbers:
    """Samples by (name, label values…)."""
    return samples(metrics.collect())


def samples(metrics: Iterable[Metric]) -> Numbers:
    return {(s.name, *s.labels.values()): s.value for metric in metrics for s in metric.samples}


async def nothing(visit: Visit) -> None:
    pass


def request(outcome: str = "ok", status: int = 200, method: str = "GET", started: float | None = None) -> RequestVisit:
    visit = RequestVisit("192.0.2.1", "http")
    visit.method, visit.outcome, visit.status = method, outcome, status
    if started is not None:
        visit.started = started
    return visit


@pytest.fixture
def fake() -> FakeHost:
    return FakeHost()


@pytest.fixture
def metrics(fake: FakeHost) -> CoreMetrics:
    return CoreMetrics(fake)


@pytest.fixture
def handle(metrics: CoreMetrics) -> Callable[[Visit], Awaitable[None]]:
    return metrics.layer(nothing)


def test_upstream_is_the_outcome_tables() -> None:
    assert UPSTREAM == TABLE_UPSTREAM
    assert LIMITS == TABLE_LIMITS
    assert ORDERS == RESULTS


def test_closed_label_sets_exist_at_zero(metrics: CoreMetrics) -> None:
    numbers = read(metrics)
    for code in (200, 404, 429, 499, 500, 502, 503, 504):
        assert numbers["tunnel_requests_total", str(code)] == 0
    for outcome in OUTCOMES:
        assert numbers["tunnel_request_outcomes_total", outcome] == 0
    for reason in REFUSALS:
        assert numbers["tunnel_authentication_failures_total", reason] == 0
    for reason in TABLE_UPSTREAM:
        assert numbers["tunnel_upstream_errors_total", reason] == 0
    for type in TYPES:
        assert numbers["tunnel_quota_exceeded_total", type] == 0
    for limit in TABLE_LIMITS:
        assert numbers["tunnel_limit_refusals_total", limit] == 0
    for result in RESULTS:
        assert numbers["tunnel_acme_orders_total", result] == 0
    for direction in ("in", "out"):
        assert numbers["tunnel_bytes_total", direction] == 0


async def test_request_counts_once_everywhere(metrics: CoreMetrics, handle: Callable[[Visit], Awaitable[None]]) -> None:
    visit = request(status=201)
    visit.bytes_in, visit.bytes_out = 10, 5000
    visit.marks = {"head": visit.started + 0.001, "first_byte": visit.started + 0.004}
    await handle(visit)
    numbers = read(metrics)
    assert numbers["tunnel_requests_total", "201"] == 1
    assert numbers["tunnel_request_outcomes_total", "ok"] == 1
    for name in (
        "tunnel_request_duration_seconds",
        "tunnel_time_to_first_byte_seconds",
        "tunnel_request_size_bytes",
        "tunnel_response_size_bytes",
    ):
        assert numbers[f"{name}_count",] == 1
    assert numbers["tunnel_time_to_first_byte_seconds_sum",] == pytest.approx(0.003)
    assert numbers["tunnel_request_size_bytes_sum",] == 10
    assert numbers["tunnel_response_size_bytes_bucket", "4096.0"] == 0
    assert numbers["tunnel_response_size_bytes_bucket", "16384.0"] == 1


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_every_outcome(outcome: str, metrics: CoreMetrics, handle: Callable[[Visit], Awaitable[None]]) -> None:
    await handle(request(outcome, OUTCOMES[outcome].status))
    numbers = read(metrics)
    assert numbers["tunnel_request_outcomes_total", outcome] == 1
    assert numbers["tunnel_requests_total", str(OUTCOMES[outcome].status)] == 1
    upstream = {reason: numbers["tunnel_upstream_errors_total", reason] for reason in TABLE_UPSTREAM}
    assert upstream == {reason: int(reason == outcome) for reason in TABLE_UPSTREAM}


async def test_aborted_after_the_answer_began_is_499(
    metrics: CoreMetrics, handle: Callable[[Visit], Awaitable[None]]
) -> None:
    await handle(request("visitor_aborted", 200))
    numbers = read(metrics)
    assert (numbers["tunnel_requests_total", "499"], numbers["tunnel_requests_total", "200"]) == (1, 0)


async def test_nothing_sent_counts_nothing(metrics: CoreMetrics, handle: Callable[[Visit], Awaitable[None]]) -> None:
    before = read(metrics)
    await handle(request("", 0, ""))
    assert read(metrics) == before


async def test_unparsable_request_counts(metrics: CoreMetrics, handle: Callable[[Visit], Awaitable[None]]) -> None:
    await handle(request("bad_request", 400, ""))
    assert read(metrics)["tunnel_requests_total", "400"] == 1


@pytest.mark.parametrize(("status", "code"), [(0, "500"), (99, "other"), (600, "other"), (999, "other"), (418, "418")])
async def test_codes_are_bounded(
    status: int, code: str, metrics: CoreMetrics, handle: Callable[[Visit], Awaitable[None]]
) -> None:
    await handle(request("ok", status))
    assert read(metrics)["tunnel_requests_total", code] == 1


async def test_unforeseen_ends_are_internal(metrics: CoreMetrics, handle: Callable[[Visit], Awaitable[None]]) -> None:
    await handle(request("", 0))
    await handle(request("a word of a third party", 200))
    assert read(metrics)["tunnel_request_outcomes_total", "internal"] == 2


@pytest.mark.parametrize(
    ("marks", "event_stream", "seconds"),
    [
        ({"upgraded": 0.2}, False, 0.2),
        ({"first_byte": 0.1, "event": 0.3}, True, 0.3),
        ({"first_byte": 0.1}, True, 0.1),
    ],
)
async def test_long_lives_end_at_their_mark(
    marks: dict[str, float],
    event_stream: bool,
    seconds: float,
    metrics: CoreMetrics,
    handle: Callable[[Visit], Awaitable[None]],
) -> None:
    visit = request("ok", 200)
    visit.started -= 3600
    visit.event_stream = event_stream
    visit.marks = {name: visit.started + at for name, at in marks.items()}
    await handle(visit)
    assert read(metrics)["tunnel_request_duration_seconds_sum",] == pytest.approx(seconds)


async def test_exemplars_only_of_exported_traces(
    metrics: CoreMetrics, handle: Callable[[Visit], Awaitable[None]]
) -> None:
    for sampled in (False, True):
        visit = request()
        visit.trace_id, visit.sampled = "ab" * 16, sampled
        visit.marks = {"head": visit.started, "first_byte": visit.started}
        await handle(visit)
        found = {
            s.name: s.exemplar.labels for metric in metrics.collect() for s in metric.samples if s.exemplar is not None
        }
        names = {"tunnel_request_duration_seconds_bucket", "tunnel_time_to_first_byte_seconds_bucket"}
        assert found == ({name: {"trace_id": "ab" * 16} for name in names} if sampled else {})


async def test_streams_open_and_close(metrics: CoreMetrics) -> None:
    seen: list[float] = []

    async def look(visit: Visit) -> None:
        seen.append(read(metrics)["tunnel_streams_active",])

    handle = metrics.layer(look)
    await handle(StreamVisit(None, "tcp"))
    await handle(StreamVisit(None, "probe"))
    numbers = read(metrics)
    assert seen == [1, 0]
    assert (numbers["tunnel_streams_total",], numbers["tunnel_streams_active",]) == (1, 0)
    assert numbers["tunnel_stream_duration_seconds_count",] == 1


@pytest.mark.parametrize("failure", [ValueError("broken"), None])
async def test_no_gauge_leaks(failure: Exception | None, metrics: CoreMetrics, fake: FakeHost) -> None:
    """Handlers that raise or are cancelled leave nothing in flight, and what they did is counted."""

    async def handler(visit: Visit) -> None:
        if failure:
            raise failure
        await trio.sleep_forever()

    handle = metrics.layer(handler)
    connect = ConnectVisit("192.0.2.1:1", "c1")
    for visit in (connect, LinkVisit(connect), StreamVisit(None, "http"), request("", 0), QueryVisit("a.b", "sqlite")):
        if failure:
            with pytest.raises(ValueError, match="broken"):
                await handle(visit)
        else:
            with trio.CancelScope() as scope:
                scope.cancel()
                await handle(visit)
    numbers = read(metrics)
    assert numbers["tunnel_streams_active",] == 0
    assert numbers["tunnel_request_outcomes_total", "internal"] == 1
    assert numbers["tunnel_db_query_duration_seconds_count", "a.b"] == 1
    assert not [key for key in numbers if key[0] == "tunnel_connection_state"]


async def test_connects(metrics: CoreMetrics, handle: Callable[[Visit], Awaitable[None]]) -> None:
    for outcome, reason in (("ok", ""), ("refused", "bad_token"), ("refused", "no such reason"), ("link_lost", "")):
        visit = ConnectVisit("192.0.2.1:1", "c1")
        visit.outcome, visit.reason = outcome, reason
        await handle(visit)
    numbers = read(metrics)
    assert numbers["tunnel_connections_total",] == 1
    assert numbers["tunnel_authentication_failures_total", "bad_token"] == 1
    assert numbers["tunnel_authentication_failures_total", "protocol"] == 1
    assert sum(n for key, n in numbers.items() if key[0] == "tunnel_authentication_failures_total") == 2


async def test_connection_states(metrics: CoreMetrics, fake: FakeHost) -> None:
    """A link that is attached while its connect visit still ends has one series; so many strangers have few."""
    fake.add_link("c0")
    fake.add_link("c-draining", state="draining")
    states: list[Numbers] = []

    async def look(visit: Visit) -> None:
        number = int(visit.connection_id[1:])  # type: ignore[attr-defined]
        if number < MAX_CONNECTING + 20:
            await handle(ConnectVisit("192.0.2.1:1", f"c{number + 1}"))
        else:
            states.append({key: n for key, n in read(metrics).items() if key[0] == "tunnel_connection_state"})

    handle = metrics.layer(look)
    await handle(ConnectVisit("192.0.2.1:1", "c0"))
    found = {key[1]: key[2] for key in states[0]}
    assert len(found) == len(states[0])
    assert found["c0"] == "connected"
    assert found["c1"] == "connecting"
    assert found["c-draining"] == "draining"
    assert list(found.values()).count("connecting") == MAX_CONNECTING


def test_links_accounts_and_quotas_vanish(metrics: CoreMetrics, fake: FakeHost) -> None:
    def series() -> set[str]:
        return {key[0] for key in read(metrics) if {"acme", "c1"} & set(key)}

    fake.add_link("c1", "acme")
    fake.add_link("c2", "acme")
    fake.add_quota("acme", "requests", 5, 100)
    fake.add_quota("acme", "bandwidth", 7)
    fake.add_quota("without a link", "bandwidth", 7)
    numbers = read(metrics)
    assert numbers["tunnel_connections_active",] == 2
    assert numbers["tunnel_connections_by_account", "acme"] == 2
    assert numbers["tunnel_quota_usage", "acme", "requests"] == 5
    assert numbers["tunnel_quota_limit", "acme", "requests"] == 100
    assert numbers["tunnel_quota_limit", "acme", "bandwidth"] == math.inf
    assert ("tunnel_quota_usage", "without a link", "bandwidth") not in numbers
    assert series() == {
        "tunnel_connections_by_account",
        "tunnel_connection_state",
        "tunnel_quota_usage",
        "tunnel_quota_limit",
    }
    fake.core.links.clear()
    assert series() == set()
    assert read(metrics)["tunnel_connections_active",] == 0


def test_statistics_are_read_at_the_scrape(metrics: CoreMetrics, fake: FakeHost) -> None:
    fake.core.bytes_in, fake.core.bytes_out = 3, 4
    fake.core.quota_exceeded["bandwidth"] = 2
    fake.core.logs_dropped = 9
    fake.core.limit_refusals = {"head_time": 5}
    fake.core.protocol_errors, fake.core.held_bytes, fake.core.held_bytes_limit = 6, 7, 8
    fake.core.acme_orders, fake.core.acme_failing = {"ok": 8, "invalid": 1}, 2
    fake.round_trips = [0.001, 0.002]
    read(metrics)
    numbers = read(metrics)
    assert numbers["tunnel_bytes_total", "in"] == 3
    assert numbers["tunnel_bytes_total", "out"] == 4
    assert numbers["tunnel_quota_exceeded_total", "bandwidth"] == 2
    assert numbers["tunnel_connections_limit",] == 1000
    assert numbers["tunnel_logs_dropped_total",] == 9
    assert numbers["tunnel_limit_refusals_total", "head_time"] == 5
    assert numbers["tunnel_protocol_errors_total",] == 6
    assert numbers["tunnel_held_bytes",] == 7
    assert numbers["tunnel_held_bytes_limit",] == 8
    assert numbers["tunnel_acme_orders_total", "ok"] == 8 and numbers["tunnel_acme_orders_total", "timeout"] == 0
    assert numbers["tunnel_acme_names_failing",] == 2
    assert numbers["tunnel_connection_rtt_seconds_count",] == 2


def test_checks_of_readiness_are_a_closed_set(metrics: CoreMetrics, fake: FakeHost) -> None:
    """Those that a core has, from the start: what is not there yet, or breaks, does not hold."""

    def breaks() -> tuple[bool, str]:
        raise RuntimeError("it broke")

    def shown() -> dict[str, float]:
        return {key[1]: value for key, value in read(metrics).items() if key[0] == "tunnel_readiness_check"}

    assert shown() == {"listeners": 0, "store": 0, "draining": 0}
    is_there = True
    fake.checks.update(
        listeners=lambda: (True, "listening"), store=lambda: (is_there, "away"), draining=breaks, mine=breaks
    )
    assert shown() == {"listeners": 1, "store": 1, "draining": 0}
    is_there = False
    assert shown() == {"listeners": 1, "store": 0, "draining": 0}


async def test_query_operations_are_bounded(metrics: CoreMetrics, handle: Callable[[Visit], Awaitable[None]]) -> None:
    for number in range(MAX_OPERATIONS + 10):
        await handle(QueryVisit(f"op.{number}", "sqlite"))
    await handle(QueryVisit("op.0", "sqlite"))
    counts = {key[1]: n for key, n in read(metrics).items() if key[0] == "tunnel_db_query_duration_seconds_count"}
    assert len(counts) == MAX_OPERATIONS + 1
    assert (counts["other"], counts["op.0"]) == (10, 2)


async def test_a_hundred_thousand_random_requests_add_no_series(
    metrics: CoreMetrics, handle: Callable[[Visit], Awaitable[None]]
) -> None:
    """Hosts, paths, headers, methods and ids are nowhere; the codes are those that exist from start-up."""
    before = set(read(metrics))
    rng = random.Random(4)
    codes = (200, 404, 429, 499, 500, 502, 503, 504)
    words = list(OUTCOMES)
    total = 100_000
    for number in range(total):
        visit = request(words[number % len(words)], codes[number % len(codes)], f"M{number}")
        visit.host = f"{rng.getrandbits(64):x}.example"
        visit.target = f"/{rng.getrandbits(64):x}"
        visit.request_headers = ((b"x-%x" % number, b"1"),)
        visit.request_id = visit.tunnel = visit.agent_id = visit.client = str(number)
        await handle(visit)
    numbers = read(metrics)
    assert set(numbers) == before
    assert sum(n for key, n in numbers.items() if key[0] == "tunnel_requests_total") == total
    assert sum(n for key, n in numbers.items() if key[0] == "tunnel_request_outcomes_total") == total
