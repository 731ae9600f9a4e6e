"""Whose trace it is: a visitor's context joined, linked or ignored; sampling; B3; baggage; an agent's wrong clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from observing import check_nesting, shape, spans_of, tracing, wait_trace
from running import RunningAgent, RunningCore, poll
from service import Received, Service
from watching import SpanTap, ask, sample

pytestmark = pytest.mark.system

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"traceparent: 00-{TRACE}-{SPAN}-01"
STATE = "tracestate: vendor=abc,other=1"
BAGGAGE = "baggage: user=alice,plan=free"

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]


class World:
    """A core and an agent that export to one receiver, set up alike; `core_flags` are the core's alone."""

    def __init__(self, core: RunningCore, agent: RunningAgent, service: Service, tap: SpanTap) -> None:
        self.core, self.agent, self.service, self.tap = core, agent, service, tap

    def ask(self, *fields: str, path: str = "/echo") -> tuple[Received, str]:
        """One request: what the local service got, and the trace id in the core's log."""
        request_id = f"request-{len(self.service.requests)}"
        assert ask(self.core, f"GET {path}", f"X-Request-Id: {request_id}", *fields).status == 200
        record = self.core.wait_for("request", request_id=request_id)
        return self.service.requests[-1], record.get("trace_id", "")


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[SpanTap]:
    with SpanTap(tmp_path) as tap:
        yield tap


@pytest.fixture
def world(
    tap: SpanTap, start_core: Start, start_agent: StartAgent, start_service: Callable[[], Service]
) -> Callable[..., World]:
    def make(*flags: str, agent_environment: dict[str, str] | None = None, **variables: str) -> World:
        all_flags, environment = tracing(tap.endpoint, *flags, **variables)
        core, service = start_core(*all_flags, "-heartbeat=200ms", environment=environment), start_service()
        both = [one for one in all_flags if not one.startswith(("-tracing-visitor", "-tracing-ratio"))]
        environment = {**environment, **(agent_environment or {})}
        agent = start_agent(core, service.url, "-subdomain=app", *both, environment=environment)
        return World(core, agent, service, tap)

    return make


def test_a_visitors_trace_is_joined(world: Callable[..., World]) -> None:
    it = world()
    seen, trace_id = it.ask(PARENT, STATE, BAGGAGE)
    assert trace_id == TRACE
    spans = wait_trace(it.tap, TRACE, 4)
    assert shape(spans) == "GET S(tunnel.stream C(agent.stream S(GET C)))"
    [root] = [span for span in spans if span.name == "GET" and span.kind == "S"]
    assert root.parent == SPAN and root.links == []
    [local] = [span for span in spans if span.name == "GET" and span.kind == "C"]
    assert seen.get("traceparent") == f"00-{TRACE}-{local.id}-01"
    assert seen.get("tracestate") == "vendor=abc,other=1"
    assert seen.get("baggage") == "user=alice,plan=free"
    # what is no context is as if it were not there
    seen, trace_id = it.ask("traceparent: 00-zz-01", BAGGAGE)
    assert trace_id not in ("", TRACE)
    assert seen.get("traceparent").split("-")[1] == trace_id
    # B3 is not enabled: passed on as any field, and no context
    seen, other = it.ask(f"b3: {TRACE}-{SPAN}-1")
    assert other not in (TRACE, trace_id)


@pytest.mark.parametrize("mode", ["link", "ignore"])
def test_a_visitors_trace_is_kept_apart(world: Callable[..., World], mode: str) -> None:
    it = world(f"-tracing-visitor-context={mode}")
    seen, trace_id = it.ask(PARENT, STATE)
    assert trace_id not in ("", TRACE)
    spans = wait_trace(it.tap, trace_id, 4)
    [root] = [span for span in spans if not span.parent]
    assert root.links == ([TRACE] if mode == "link" else [])
    assert seen.get("traceparent").startswith(f"00-{trace_id}-")
    assert seen.get("tracestate") == ""  # theirs belongs to their trace
    assert spans_of(it.tap, TRACE) == []


def test_a_visitors_flag_buys_nothing(world: Callable[..., World]) -> None:
    it = world("-tracing-ratio=0")
    for _ in range(5):
        seen, trace_id = it.ask(PARENT)
        assert trace_id == TRACE
        assert re.fullmatch(rf"00-{TRACE}-[0-9a-f]{{16}}-00", seen.get("traceparent"))
    it.core.close()
    it.agent.close()
    assert [span for span in spans_of(it.tap) if span.name != "agent.connect"] == []


def test_a_parent_is_trusted_where_the_operator_says_so(world: Callable[..., World]) -> None:
    it = world(OTEL_TRACES_SAMPLER="parentbased_always_off")
    seen, trace_id = it.ask(PARENT)
    assert trace_id == TRACE and seen.get("traceparent").endswith("-01")
    seen, own = it.ask()
    assert seen.get("traceparent") == f"00-{own}-{seen.get('traceparent').split('-')[2]}-00"
    seen, _ = it.ask(PARENT.replace("-01", "-00").replace("4bf9", "5bf9"))
    assert seen.get("traceparent").endswith("-00")
    wait_trace(it.tap, TRACE, 4)
    it.core.close()
    it.agent.close()
    assert {span.trace for span in spans_of(it.tap)} == {TRACE}


@pytest.mark.parametrize("form", ["b3", "b3multi"])
def test_b3(world: Callable[..., World], form: str) -> None:
    it = world(f"-tracing-propagators={form}")
    multi = (f"X-B3-TraceId: {TRACE}", f"X-B3-SpanId: {SPAN}", "X-B3-Sampled: 1")
    seen, trace_id = it.ask(*((f"b3: {TRACE}-{SPAN}-1",) if form == "b3" else multi))
    assert trace_id == TRACE
    spans = wait_trace(it.tap, TRACE, 4)
    [local] = [span for span in spans if span.name == "GET" and span.kind == "C"]
    if form == "b3":
        assert seen.get("b3") == f"{TRACE}-{local.id}-1"
    else:
        assert seen.get("x-b3-traceid") == TRACE
        assert (seen.get("x-b3-spanid"), seen.get("x-b3-sampled")) == (local.id, "1")
    assert seen.get("traceparent") == ""


@pytest.mark.parametrize("skew", [5, -5])
def test_an_agents_wrong_clock_is_measured(world: Callable[..., World], skew: int) -> None:
    it = world(agent_environment=skewed(skew))
    poll(lambda: sample(it.core.metrics, "tunnel_connection_rtt_seconds_count") >= 2, "a heartbeat's answer")
    _, trace_id = it.ask(path="/slow?ms=50")
    spans = {(span.name, span.kind): span for span in wait_trace(it.tap, trace_id, 4)}
    core, agent = spans["tunnel.stream", "C"], spans["agent.stream", "S"]
    offset = core.attributes["tunnel.clock.offset_seconds"]
    assert offset == pytest.approx(skew, abs=0.05)
    # as they came, the agent's spans lie seconds off; put right by the offset, they nest to a heartbeat's precision
    assert agent.start - core.start == pytest.approx(skew * 1e9, abs=0.1e9)
    slack = 0.05e9
    assert core.start - slack <= agent.start - offset * 1e9 <= agent.end - offset * 1e9 <= core.end + slack
    check_nesting([core, spans["GET", "S"]])
    check_nesting([agent, spans["GET", "C"]])
    assert agent.seconds == pytest.approx(0.05, abs=0.04)


def skewed(seconds: int) -> dict[str, str]:
    """The environment of a program whose wall clock is off; its other clocks are right."""
    return {"PYTHONPATH": str(Path(__file__).with_name("skewed")), "CLOCK_SKEW": str(seconds)}
