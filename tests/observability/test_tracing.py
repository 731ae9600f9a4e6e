"""The layer and the plug-in: ids, parents, headers, what is recorded, and what a real OTLP receiver gets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from fakehost import FakeHost
from opentelemetry import trace
from tracetools import (
    PARENT,
    SPAN,
    TRACE,
    a_local,
    a_request,
    a_stream,
    all_records,
    ends_well,
    make_tracer,
    run_chain,
    until,
)

from observability.exporters import Limits
from observability.readable import enter
from observability.tracing import plugin, statistics
from tunnel.handler import ConnectVisit, Fields, LinkVisit, Observer, QueryVisit, Visit


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


# The layer -------------------------------------------------------------------------------------------------------


async def test_a_request_makes_one_tree_across_the_link() -> None:
    core, core_queue = make_tracer("core")
    agent, agent_queue = make_tracer("agent")
    seen = await run_chain(core.layer, agent.layer)
    records = {id(visit): origin for visit, _, origin, _ in [*all_records(agent_queue), *all_records(core_queue)]}
    assert len(records) == 4
    assert {visit.trace_id for visit in seen.values()} == {seen["request"].trace_id}
    assert all(visit.sampled for visit in seen.values())
    assert len({visit.span_id for visit in seen.values()}) == 4
    parents = [
        (None, "request"),
        ("request", "tunnel.stream"),
        ("tunnel.stream", "agent.stream"),
        ("agent.stream", "local"),
    ]
    for parent, child in parents:
        origin = records[id(seen[child])]
        assert origin.parent_id == (seen[parent].span_id if parent else "")
        assert origin.is_remote == (child == "agent.stream")
    assert seen["local"].headers["traceparent"] == f"00-{seen['local'].trace_id}-{seen['local'].span_id}-01"


async def test_an_unsampled_trace_is_passed_on_with_flag_00_and_recorded_nowhere() -> None:
    core, core_queue = make_tracer("core", ratio=0.0)
    agent, agent_queue = make_tracer("agent", ratio=1.0)  # the core's decision, not the agent's ratio
    seen = await run_chain(core.layer, agent.layer)
    assert not len(core_queue)
    assert not len(agent_queue)
    assert not any(visit.sampled for visit in seen.values())
    assert len({visit.trace_id for visit in seen.values()}) == 1
    assert seen["local"].headers["traceparent"] == f"00-{seen['request'].trace_id}-{seen['request'].span_id}-00"


async def test_ids_are_there_before_the_handler_runs() -> None:
    for ratio in (0.0, 1.0):
        tracer, _ = make_tracer(ratio=ratio)

        async def handler(visit: Visit, ratio: float = ratio) -> None:
            assert len(visit.trace_id) == 32
            assert len(visit.span_id) == 16
            assert visit.sampled == (ratio == 1.0)

        for visit in (a_request(), a_stream(None, "tcp"), ConnectVisit("192.0.2.1:4711")):
            await tracer.layer(handler)(visit)


async def test_a_visitors_context_is_joined() -> None:
    tracer, queue = make_tracer()
    visit = a_request([(b"Traceparent", PARENT.encode()), (b"tracestate", b"a=1"), (b"baggage", b"u=1")])
    await tracer.layer(ends_well)(visit)
    ((_, _, origin, _),) = all_records(queue)
    assert (visit.trace_id, origin.parent_id, origin.is_remote, origin.link) == (TRACE, SPAN, True, None)
    stream = a_stream(visit)
    await tracer.layer(ends_well)(stream)
    assert stream.headers == {
        "traceparent": f"00-{TRACE}-{stream.span_id}-01",
        "tracestate": "a=1",
        "baggage": "u=1",
    }


async def test_a_visitors_context_is_linked() -> None:
    tracer, queue = make_tracer(visitor_context="link")
    visit = a_request([(b"traceparent", PARENT.encode()), (b"tracestate", b"a=1"), (b"baggage", b"u=1")])
    await tracer.layer(ends_well)(visit)
    ((_, _, origin, _),) = all_records(queue)
    assert visit.trace_id != TRACE
    assert origin.parent_id == ""
    assert origin.link == (TRACE, SPAN, True)
    assert (visit.headers["tracestate"], visit.headers["baggage"]) == ("", "u=1")


async def test_a_visitors_context_is_ignored() -> None:
    tracer, queue = make_tracer(visitor_context="ignore")
    visit = a_request([(b"traceparent", PARENT.encode()), (b"tracestate", b"a=1"), (b"baggage", b"u=1")])
    await tracer.layer(ends_well)(visit)
    ((_, _, origin, _),) = all_records(queue)
    assert visit.trace_id != TRACE
    assert (origin.parent_id, origin.link) == ("", None)
    assert visit.headers == {"tracestate": ""}


async def test_a_malformed_context_starts_a_new_trace_without_its_tracestate() -> None:
    tracer, _ = make_tracer()
    visit = a_request([(b"traceparent", b"00-abc-def-01"), (b"tracestate", b"a=1")])
    await tracer.layer(ends_well)(visit)
    assert visit.trace_id != TRACE
    assert visit.headers["tracestate"] == ""


async def test_a_visitors_sampled_flag_buys_nothing() -> None:
    asks = [(b"traceparent", b"00-" + b"f" * 32 + b"-" + SPAN.encode() + b"-01")]
    for trusts_parent in (False, True):
        tracer, queue = make_tracer(ratio=0.5, trusts_parent=trusts_parent)
        visit = a_request(asks)
        await tracer.layer(ends_well)(visit)
        assert visit.trace_id == "f" * 32
        assert visit.sampled == trusts_parent
        assert len(queue) == trusts_parent


@pytest.mark.parametrize("value", [b"", PARENT.encode()])
def test_a_head_that_several_requests_share_is_read_once_and_kept_for_none_of_them(value: bytes) -> None:
    """What was found goes with the head: a tracer that kept heads would hold as many bytes as visitors like."""
    tracer, _ = make_tracer("core")
    fields = Fields([(b"Host", b"api.localhost"), *([(b"traceparent", value)] if value else [])])
    before = sys.getrefcount(fields)
    visits = [a_request(fields) for _ in range(3)]
    for visit in visits:
        tracer.start_request(visit)
    assert fields.found is not None
    assert len({visit.span_id for visit in visits}) == 3
    assert len({visit.trace_id for visit in visits}) == (1 if value else 3)
    other = a_request(Fields(fields))
    tracer.start_request(other)
    assert bool(value) == (other.trace_id == visits[0].trace_id)
    del visits, visit
    assert sys.getrefcount(fields) == before


async def test_a_zipkin_visitor_is_joined_and_the_local_service_hears_b3() -> None:
    core, _ = make_tracer("core", propagators=("b3", "b3multi"))
    agent, _ = make_tracer("agent", propagators=("b3", "b3multi"))
    request = a_request([(b"b3", f"{TRACE}-{SPAN}-1".encode())])
    await core.layer(ends_well)(request)
    stream = a_stream(request)
    await core.layer(ends_well)(stream)
    assert request.trace_id == TRACE
    far = a_stream(None, headers=stream.headers)
    await agent.layer(ends_well)(far)
    local = a_local(far)
    await agent.layer(ends_well)(local)
    assert local.headers == {
        "b3": f"{TRACE}-{local.span_id}-1",
        "x-b3-traceid": TRACE,
        "x-b3-spanid": local.span_id,
        "x-b3-sampled": "1",
    }


async def test_a_tcp_tunnel_is_a_root() -> None:
    tracer, queue = make_tracer()
    visit = a_stream(None, "tcp")
    await tracer.layer(ends_well)(visit)
    ((_, _, origin, _),) = all_records(queue)
    assert origin.parent_id == ""
    assert visit.headers["traceparent"] == f"00-{visit.trace_id}-{visit.span_id}-01"


@pytest.mark.parametrize("role", ["core", "agent"])
async def test_links_probes_and_unasked_queries_make_no_spans(role: str) -> None:
    tracer, queue = make_tracer(role)
    for visit in (LinkVisit(ConnectVisit("a:1")), a_stream(None, "probe"), QueryVisit("usage.add", "sqlite")):
        await tracer.layer(ends_well)(visit)
        assert visit.outcome == "ok"
        assert visit.trace_id == ""
    assert not len(queue)


async def test_an_agent_without_a_tracing_core_makes_its_own_trace() -> None:
    agent, queue = make_tracer("agent")
    stream = a_stream(None)
    await agent.layer(ends_well)(stream)
    local = a_local(stream)
    await agent.layer(ends_well)(local)
    assert len(queue) == 2
    assert local.headers["traceparent"] == f"00-{stream.trace_id}-{local.span_id}-01"


async def test_a_context_over_the_link_that_is_none_goes_no_further() -> None:
    agent, _ = make_tracer("agent", ratio=0.0)
    stream = a_stream(None, headers={"traceparent": "00-nonsense-00"})
    await agent.layer(ends_well)(stream)
    local = a_local(stream)
    local.headers = dict(stream.headers)
    await agent.layer(ends_well)(local)
    assert local.headers["traceparent"] == f"00-{stream.trace_id}-{local.span_id}-00"


async def test_a_query_hangs_under_the_visit_that_asked() -> None:
    for ratio, spans in ((1.0, 2), (0.0, 0)):
        tracer, queue = make_tracer(ratio=ratio)
        request = a_request()
        query = QueryVisit("token.find", "sqlite", parent=request)

        async def handler(visit: Visit, layer: Any = tracer.layer, query: QueryVisit = query) -> None:
            await layer(ends_well)(query)

        await tracer.layer(handler)(request)
        assert query.trace_id == request.trace_id
        assert len(queue) == spans
        if spans:
            assert all_records(queue)[0][2].parent_id == request.span_id


async def test_what_the_handler_raises_passes_and_ends_the_span() -> None:
    tracer, queue = make_tracer()

    async def breaks(visit: Visit) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await tracer.layer(breaks)(a_request())
    assert [failure for *_, failure in all_records(queue)] == ["KeyError"]


async def test_cancellation_passes_and_ends_every_span(autojump_clock: trio.testing.MockClock) -> None:
    tracer, queue = make_tracer()

    async def stream(visit: Visit) -> None:
        await trio.sleep_forever()

    async def request(visit: Visit) -> None:
        try:
            await tracer.layer(stream)(a_stream(visit))
        finally:
            visit.outcome = "visitor_aborted"

    with trio.move_on_after(1) as scope:
        await tracer.layer(request)(a_request())
    assert scope.cancelled_caught
    assert [(visit.kind, failure) for visit, _, _, failure in all_records(queue)] == [
        ("stream", "Cancelled"),
        ("request", "Cancelled"),
    ]


async def test_a_full_queue_drops_and_counts() -> None:
    tracer, queue = make_tracer(limits=Limits(queue=3, batch=2))
    for _ in range(10):
        await tracer.layer(ends_well)(a_request())
    assert (len(queue), queue.dropped) == (3, 7)
    assert queue.wake.is_set()
    queue.drop_all()
    assert (len(queue), queue.dropped) == (0, 10)


async def test_the_current_span_is_set_around_local_requests_and_queries_only() -> None:
    tracer, _ = make_tracer("agent")
    tracer.set_enter(enter)
    stream = a_stream(None)
    seen: dict[str, str] = {}

    async def look(visit: Visit) -> None:
        seen[visit.kind] = f"{trace.get_current_span().get_span_context().span_id:016x}"

    await tracer.layer(look)(stream)
    local = a_local(stream)
    await tracer.layer(look)(local)
    query = QueryVisit("a", "sqlite", parent=stream)
    await tracer.layer(look)(query)
    assert seen == {"stream": "0" * 16, "local": local.span_id, "query": query.span_id}
    assert not trace.get_current_span().get_span_context().is_valid


# The plug-in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": "otlp"},
    ],
)
async def test_with_nothing_configured_it_does_nothing(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    host = FakeHost("core", {"tracing": {"endpoint": "", "protocol": "http/protobuf", "ratio": 1.0}})
    async with plugin(host) as layer:
        assert isinstance(layer, Observer)  # what needs a coroutine would cost every request its quick way
        assert not (layer.begins or layer.ends or layer.late or layer.enters)
        assert statistics("core") is None
    assert host.details()["tracing"] == {"exporting": False}


def test_opentelemetry_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, trio, observability.tracing as t\n"
        "class Host:\n"
        "    role, version, options = 'core', '1', {}\n"
        "    def set_details(self, *_): pass\n"
        "async def main():\n"
        "    async with t.plugin(Host()): pass\n"
        "trio.run(main)\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('opentelemetry', 'google', 'requests', 'grpc')])\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"protocol": "carrier pigeon"}, "tracing.protocol"),
        ({"visitor_context": "maybe"}, "tracing.visitor_context"),
        ({"ratio": 2}, "between 0 and 1"),
    ],
)
async def test_an_option_that_makes_no_sense_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        async with plugin(FakeHost("core", {"tracing": {"endpoint": "http://127.0.0.1:9", **options}})):
            pass


async def test_bad_environment_is_logged_and_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "astrology")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    monkeypatch.setenv("OTEL_PROPAGATORS", "tracecontext,pigeon")
    async with plugin(FakeHost("core", {"tracing": {"endpoint": "http://127.0.0.1:9"}})):
        pass
    reasons = [r.fields["reason"] for r in caplog.records if r.message == "tracing setting ignored"]  # type: ignore[attr-defined]
    assert len(reasons) == 3
    assert all(word in " ".join(reasons) for word in ("astrology", "OTEL_BSP_MAX_QUEUE_SIZE", "pigeon"))


@contextmanager
def oteltap(output: Path) -> Iterator[tuple[int, Callable[[], list[dict[str, Any]]]]]:
    """A real OTLP/HTTP receiver process; the second value gives the spans it has printed into `output`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with output.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-u", "-m", "oteltap", "--port", str(port)], stdout=out)

    def spans() -> list[dict[str, Any]]:
        text = output.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.startswith("{")]

    try:
        yield port, spans
    finally:
        process.terminate()
        process.wait(10)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.5).close()
    except OSError:
        return False
    return True


@pytest.mark.system
async def test_a_real_receiver_gets_the_tree(tmp_path: Path) -> None:
    with oteltap(tmp_path / "spans") as (port, spans):
        await until(lambda: answers(port))
        options = {"tracing": {"endpoint": f"http://127.0.0.1:{port}", "protocol": "http/protobuf", "ratio": 1.0}}
        core, agent = FakeHost("core", options), FakeHost("agent", options)
        async with plugin(core) as core_layer, plugin(agent) as agent_layer:
            seen = await run_chain(core_layer, agent_layer)
        got = {span["spanId"]: span for span in await until(lambda: len(spans()) >= 4 and spans())}
    assert {span["traceId"] for span in got.values()} == {seen["request"].trace_id}
    shape = {
        (span["name"], span["kind"], got[span["parentSpanId"]]["name"] if span["parentSpanId"] else "")
        for span in got.values()
    }
    assert shape == {
        ("GET", 2, ""),
        ("tunnel.stream", 3, "GET"),
        ("agent.stream", 2, "tunnel.stream"),
        ("GET", 3, "agent.stream"),
    }
    for span in got.values():
        if parent := got.get(span["parentSpanId"]):
            assert int(parent["startTimeUnixNano"]) <= int(span["startTimeUnixNano"])
            assert int(span["endTimeUnixNano"]) <= int(parent["endTimeUnixNano"])
    request = got[seen["request"].span_id]
    attributes = {a["key"]: next(iter(a["value"].values())) for a in request["attributes"]}
    assert attributes["http.url"] == "http://api.localhost/hello?q=REDACTED"
    assert attributes["agent.id"] == "agent-1"
    assert attributes["tunnel.outcome"] == "ok"
    assert [event["name"] for event in request["events"]] == ["head", "opened", "answered", "first_byte"]
    assert core.details()["tracing"]["exported"] == 2
    assert agent.details()["tracing"]["exported"] == 2
