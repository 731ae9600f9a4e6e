"""Several workers' numbers as one page: sums, exemplars, gauges by their rule, and what ended workers had counted."""

from __future__ import annotations

import pytest
from fakehost import FakeHost
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from observability.agent_metrics import FAMILIES as AGENT
from observability.buckets import REQUEST_SECONDS, Histogram
from observability.core_metrics import FAMILIES as CORE
from observability.core_metrics import CoreMetrics
from observability.exposition import render
from observability.merging import Merger, _state, encode, rule_of
from observability.reports import make_report, parse_report
from observability.runtime import FAMILIES as RUNTIME
from tunnel.handler import Offered, RequestVisit


def offered(key: str, *metrics: Metric, is_last: bool = False) -> Offered:
    return Offered(int(key[0]), key, encode(metrics), is_last)


def values(merger: Merger, *own: Metric) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for metric in merger.families(own)
        for sample in metric.samples
    }


def histogram(*seconds: float, trace_id: str = "") -> Metric:
    counted = Histogram(REQUEST_SECONDS)
    for value in seconds:
        counted.observe(value, trace_id)
    return CORE["tunnel_request_duration_seconds"].metric(((), counted))


def test_counters_add_up_by_their_labels() -> None:
    merger, total = Merger(), CORE["tunnel_requests_total"]
    merger.take(
        [offered("0.1", total.metric((("200",), 3))), offered("1.2", total.metric((("200",), 4), (("404",), 1)))],
        ["0.1", "1.2"],
    )
    assert values(merger) == {("tunnel_requests_total", ("200",)): 7, ("tunnel_requests_total", ("404",)): 1}


def test_histograms_add_up_bucket_by_bucket() -> None:
    merger = Merger()
    one, other = (0.0001, 0.004, 7.0), (0.004, 100.0)
    merger.take([offered("0.1", histogram(*one)), offered("1.2", histogram(*other))], ["0.1", "1.2"])
    [merged], [whole] = list(merger.families()), [histogram(*one, *other)]
    assert [(s.name, s.labels, pytest.approx(s.value)) for s in whole.samples] == [
        (s.name, s.labels, s.value) for s in merged.samples
    ]


def test_of_exemplars_the_newest_stays_in_each_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("observability.buckets.time.time", lambda: now[0])
    old = histogram(0.004, 7.0, trace_id="aa")
    now[0] = 2000.0
    new = histogram(0.0041, trace_id="bb")
    merger = Merger()
    merger.take([offered("1.2", new), offered("0.1", old)], ["0.1", "1.2"])
    [merged] = merger.families()
    seen = {sample.labels["le"]: sample.exemplar for sample in merged.samples if sample.exemplar}
    assert {le: (one.labels["trace_id"], one.value) for le, one in seen.items()} == {
        "0.005": ("bb", 0.0041), "10.0": ("aa", 7.0)
    }  # fmt: skip
    text = render([merged], True).decode()
    assert '# {trace_id="bb"} 0.0041 2000' in text
    [parsed] = parse_openmetrics(text)
    assert parsed.type == "histogram"


def test_gauges_by_their_rule() -> None:
    merger = Merger()
    lag, tasks, limit = (
        RUNTIME["trio_run_loop_lag_seconds"],
        RUNTIME["trio_tasks_living"],
        CORE["tunnel_connections_limit"],
    )
    expiry, build = CORE["tunnel_certificate_expiry_timestamp_seconds"], CORE["tunnel_build_info"]
    start, files = (
        GaugeMetricFamily("process_start_time_seconds", "x", 5),
        GaugeMetricFamily("process_max_fds", "x", 100),
    )
    opened = {key: GaugeMetricFamily("process_open_fds", "x", n) for key, n in (("0.1", 60), ("1.2", 70))}
    for key, n in (("0.1", 1.0), ("1.2", 2.0)):
        merger.take(
            [offered(key, lag.metric(((), n)), tasks.metric(((), n)), limit.metric(((), 1000)),
                     expiry.metric((("agent",), 100 * n)), build.metric((("1", "3"), 1)), start, files, opened[key])],
            ["0.1", "1.2"],
        )  # fmt: skip
    assert values(merger, GaugeMetricFamily("process_start_time_seconds", "x", 3)) == {
        ("trio_run_loop_lag_seconds", ()): 2, ("trio_tasks_living", ()): 3, ("tunnel_connections_limit", ()): 1000,
        ("tunnel_certificate_expiry_timestamp_seconds", ("agent",)): 100, ("tunnel_build_info", ("1", "3")): 1,
        ("process_start_time_seconds", ()): 3, ("process_max_fds", ()): 100, ("process_open_fds", ()): 70,
    }  # fmt: skip


def test_every_limit_and_info_of_ours_has_a_rule_that_is_no_sum() -> None:
    parts = {"tunnel_held_bytes_limit"}  # of which each worker has its own
    for name, family in {**CORE, **AGENT, **RUNTIME}.items():
        if name.endswith(("_limit", "_info", "_timestamp_seconds")) and name not in parts:
            assert rule_of(_state(family.metric())) != "sum", name
        if family.type != "gauge":
            assert family.merge == "sum", name


def test_what_an_ended_worker_had_counted_stays() -> None:
    merger, total, active = Merger(), CORE["tunnel_streams_total"], CORE["tunnel_streams_active"]

    def state(key: str, n: float, is_last: bool = False) -> Offered:
        return offered(key, total.metric(((), n)), active.metric(((), 2)), histogram(*[0.01] * int(n)), is_last=is_last)

    merger.take([state("0.1", 5), state("1.2", 7)], ["0.1", "1.2"])
    assert values(merger)["tunnel_streams_total", ()] == 12
    # killed: what it said last; its gauges are gone
    merger.take([state("1.2", 8)], ["1.2"])
    found = values(merger)
    assert (found["tunnel_streams_total", ()], found["tunnel_streams_active", ()]) == (13, 2)
    # replaced: the new one begins at nothing
    merger.take([state("1.2", 8), state("0.3", 1)], ["1.2", "0.3"])
    assert values(merger)["tunnel_streams_total", ()] == 14
    # ended with a last word, which is newer than what was known, and is told once
    merger.take([state("1.2", 10, is_last=True), state("0.3", 1)], ["0.3"])
    merger.take([state("0.3", 1)], ["0.3"])
    found = values(merger)
    assert found["tunnel_streams_total", ()] == 16
    assert found["tunnel_request_duration_seconds_count", ()] == 16
    # one that has never said anything but its last word
    merger.take([state("1.9", 100, is_last=True)], ["0.3"])
    assert values(merger)["tunnel_streams_total", ()] == 116


def test_late_answers_of_one_that_has_ended_count_no_more() -> None:
    merger, total = Merger(), CORE["tunnel_streams_total"]
    merger.take([offered("0.1", total.metric(((), 5))), offered("1.2", total.metric(((), 7)))], ["0.1", "1.2"])
    merger.take([offered("1.2", total.metric(((), 8)), is_last=True)], ["0.1"])
    for _ in range(3):  # looks that had begun before it ended, and end after that
        merger.take([offered("1.2", total.metric(((), 8)))], ["0.1"])
        merger.take([offered("1.2", total.metric(((), 8)), is_last=True)], ["0.1"])
    assert values(merger) == {("tunnel_streams_total", ()): 13}


def test_what_was_under_way_at_an_ended_worker_has_failed() -> None:
    def state(key: str, total: int, well: int, failed: int) -> Offered:
        rows = {"total": total, "completed": well, "success": well, "failed": failed, "active": total - well - failed}
        names = ("streams_total", "streams_completed", "streams_failed", "streams_active", "requests_total",
                 "requests_success", "requests_failed")  # fmt: skip
        return offered(key, *(AGENT[f"agent_{name}"].metric(((), rows[name.split("_")[1]])) for name in names))

    merger = Merger()
    merger.take([state("0.1", 10, 5, 1), state("1.2", 7, 7, 0)], ["0.1", "1.2"])
    merger.take([], ["1.2"])
    assert {name: value for (name, _), value in values(merger).items()} == {
        "agent_streams_total": 17, "agent_streams_completed": 12, "agent_streams_failed": 5, "agent_streams_active": 0,
        "agent_requests_total": 17, "agent_requests_success": 12, "agent_requests_failed": 5,
    }  # fmt: skip


def test_one_that_does_not_answer_in_time_is_as_it_was() -> None:
    merger, total = Merger(), CORE["tunnel_streams_total"]
    merger.take([offered("0.1", total.metric(((), 5)))], ["0.1"])
    merger.take([], ["0.1"])
    assert values(merger) == {("tunnel_streams_total", ()): 5}


def test_a_merged_page_is_a_page_like_any_other() -> None:
    """All families of a core, twice, in both formats: the same families, types and labels as one core's."""
    host = FakeHost()
    host.add_link("c1")
    metrics = CoreMetrics(host)
    visit = RequestVisit("192.0.2.1", "http")
    visit.method, visit.outcome, visit.status, visit.ended = "GET", "ok", 200, visit.started + 1
    metrics.layer.late["request"](visit, None)  # type: ignore[attr-defined]  # an Observer
    families = list(metrics.collect())
    merger = Merger()
    merger.take([offered("0.1", *families), offered("1.2", *families)], ["0.1", "1.2"])
    merged = list(merger.families())
    for is_openmetrics, parse in ((False, parse_text), (True, parse_openmetrics)):
        one, two = (list(parse(render(page, is_openmetrics).decode())) for page in (families, merged))
        assert [(m.name, m.type, m.documentation) for m in one] == [(m.name, m.type, m.documentation) for m in two]
        assert [[(s.name, s.labels) for s in m.samples] for m in one] == [
            [(s.name, s.labels) for s in m.samples] for m in two
        ]
    assert values(merger)["tunnel_requests_total", ("200",)] == 2


def test_an_agents_report_of_a_merged_page_is_believed() -> None:
    merger = Merger()
    rows = [AGENT["agent_requests_success"].metric(((), 4)), AGENT["agent_consecutive_errors"].metric(((), 1))]
    merger.take([offered("0.1", *rows), offered("1.2", *rows)], ["0.1", "1.2"])
    parsed = parse_report(make_report(merger.families()))
    assert parsed == {"agent_requests_success": [("", "", 8.0)], "agent_consecutive_errors": [("", "", 1.0)]}
