"""The metrics part of the contract, as data, held against the pages of both programs in both formats."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import trio
from contract import AGENT, CORE, GO, RUNTIME, Row, table
from fakehost import FakeHost
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from observability import metrics
from observability.buckets import Histogram
from observability.exposition import OPENMETRICS, TEXT, Family, choose, label_value, render
from tunnel.handler import ConnectVisit, LinkVisit, LocalVisit, QueryVisit, RequestVisit, StreamVisit, Visit

ASK = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;q=0.5"


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
