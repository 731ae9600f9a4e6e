"""Counting many visits in a row against counting them one by one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from fakehost import FakeHost
from hypothesis import given
from hypothesis import strategies as st

from observability.agent_metrics import AgentMetrics
from observability.buckets import MOST_GATHERED, Histogram
from observability.core_metrics import CoreMetrics
from tunnel.errors import OUTCOMES
from tunnel.handler import Ended, LocalVisit, QueryVisit, RequestVisit, StreamVisit, Visit

MARKS = ("head", "opened", "answered", "first_byte", "upgraded", "event", "connected", "last_byte")
TRACES = ("a" * 32, "b" * 32, "c" * 32)
ANSWERED = dict.fromkeys(MARKS[:4], 100.25)

outcomes = st.just("ok") | st.sampled_from(["", "unheard_of", *OUTCOMES])
statuses = st.sampled_from([200, 200, 101, 404, 500, 503, 0, 99, 600])
moments = st.floats(100, 103)
marks = st.just({}) | st.just(ANSWERED) | st.dictionaries(st.sampled_from(MARKS), moments)
sizes = st.sampled_from([0, 1, 256, 257, 1 << 31])
protocols = st.sampled_from(["http", "http", "http", "upgrade", "tcp", "probe"])


@st.composite
def ended(draw: st.DrawFn, visit: Visit) -> Visit:
    visit.started, visit.ended = 100.0, draw(moments)
    visit.outcome, visit.status, visit.marks = draw(outcomes), draw(statuses), dict(draw(marks))
    visit.bytes_in, visit.bytes_out = draw(sizes), draw(sizes)
    visit.sampled, visit.trace_id = draw(st.booleans()), draw(st.sampled_from(TRACES))
    return visit


@st.composite
def at_core(draw: st.DrawFn) -> Visit:
    request = RequestVisit("192.0.2.1", "http")
    request.method, request.event_stream = (
        draw(st.sampled_from(["GET", ""])),
        draw(st.sampled_from([False, False, True])),
    )
    stream = StreamVisit(request, draw(protocols))
    query = QueryVisit(draw(st.sampled_from(["token.find", "usage.add"])), "sqlite")
    return draw(ended(draw(st.sampled_from([request, request, stream, query]))))


@st.composite
def at_agent(draw: st.DrawFn) -> list[Visit]:
    stream = StreamVisit(None, draw(protocols))
    local = LocalVisit(stream, "127.0.0.1:80", "http")
    return [draw(ended(visit)) for visit in draw(st.sampled_from([[local, stream], [local], [stream]]))]


def numbers(metrics: CoreMetrics | AgentMetrics) -> dict[tuple[str, ...], object]:
    """Samples with their exemplars, by name and labels."""
    return {
        (sample.name, *sample.labels.values()): (
            pytest.approx(sample.value) if sample.name.endswith("_sum") else sample.value,
            sample.exemplar and (sample.exemplar.labels, sample.exemplar.value),
        )
        for metric in metrics.collect()
        for sample in metric.samples
    }


def count(metrics: CoreMetrics | AgentMetrics, visits: Sequence[Visit], at_once: bool) -> dict[tuple[str, ...], object]:
    layer = metrics.layer
    over: list[Ended] = [(visit, None) for visit in visits]
    for visit in visits:
        if begin := layer.begins.get(visit.kind):
            begin(visit)
    if at_once:
        layer.batch(over)
    else:
        for visit, raised in over:
            layer.late[visit.kind](visit, raised)
    return numbers(metrics)


@given(st.lists(at_core(), max_size=12))
def test_the_core_counts_the_same(visits: list[Visit]) -> None:
    assert count(CoreMetrics(FakeHost()), visits, True) == count(CoreMetrics(FakeHost()), visits, False)


@given(st.lists(at_agent(), max_size=8))
def test_the_agent_counts_the_same(pairs: list[list[Visit]]) -> None:
    visits = [visit for pair in pairs for visit in pair]
    host = FakeHost("agent")
    assert count(AgentMetrics(host), visits, True) == count(AgentMetrics(host), visits, False)


@given(st.lists(st.tuples(st.floats(-1, 9), st.just("") | st.sampled_from(TRACES))))
def test_a_histogram_counts_the_same(observed: list[tuple[float, str]]) -> None:
    single, many, untraced = (Histogram((0.0, 1.0, 5.0)) for _ in range(3))
    for value, trace_id in observed:
        single.observe(value, trace_id)
    values = [value for value, _ in observed]
    many.observe_all(values, [trace_id for _, trace_id in observed])
    untraced.observe_all(values)
    assert single.counts == many.counts == untraced.counts
    assert single.sum == pytest.approx(many.sum) and many.sum == untraced.sum
    assert [one and one[:2] for one in single.exemplars] == [one and one[:2] for one in many.exemplars]
    assert not any(untraced.exemplars)


def test_what_a_histogram_gathers_is_bounded() -> None:
    single, many = Histogram((0.0, 1.0, 5.0)), Histogram((0.0, 1.0, 5.0))
    values = [number % 13 / 2 for number in range(3 * MOST_GATHERED)]
    for value in values:
        single.observe(value)
    for at in range(0, len(values), 50):
        many.observe_all(values[at : at + 50])
        assert len(many._gathered) < MOST_GATHERED
    assert many.counts == single.counts and many.count == len(values)
    assert many.sum == pytest.approx(single.sum)


def test_what_began_counts_at_once_and_is_not_kept() -> None:
    core, agent = CoreMetrics(FakeHost()), AgentMetrics(FakeHost("agent"))
    stream = StreamVisit(None, "http")
    core.layer.begins["stream"](stream)
    agent.layer.begins["stream"](stream)
    agent.layer.begins["local"](LocalVisit(stream, "127.0.0.1:80", "http"))
    for _ in range(2):
        at_core, at_agent = numbers(core), numbers(agent)
        assert at_core["tunnel_streams_total",] == at_core["tunnel_streams_active",] == (1, None)
        assert at_agent["agent_streams_total",] == at_agent["agent_streams_active",] == (1, None)
        assert at_agent["agent_local_requests_total",] == (1, None)
    assert core._begun == agent._begun == agent._local_begun == []
