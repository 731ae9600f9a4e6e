"""Blame: every outcome of the table made to happen, and the same word in all five places.

The metric tunnel_request_outcomes_total (up by one, and no other), the attribute tunnel.outcome of the request's span
as a real OTLP receiver got it, the access record, the answer's page, and X-Tunnel-Outcome. A visitor who has left gets
no answer, and what a local service answered is relayed: there the last two are absent.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from running import RunningAgent, RunningCore, poll
from service import Service
from visiting import Answer, Connection
from watching import SpanTap, ask, sample, samples

from tunnel.errors import OUTCOMES, UPSTREAM

pytestmark = pytest.mark.system

JSON = "Accept: application/json"
OUTCOME, UPSTREAM_ERROR = "tunnel_request_outcomes_total", "tunnel_upstream_errors_total"


class Bench:
    """A core with close limits, an agent for `app` (its service) and `refused` (nobody listens), a span receiver."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.tap = stack.enter_context(SpanTap(directory))
        self.service = Service()
        stack.callback(self.service.close)
        self.core = RunningCore(
            directory / "core",
            "-layers=tracing,metrics,logs,health,faulty:plugin",
            f"-tracing-endpoint={self.tap.endpoint}",
            "-max-body=1000",
            "-max-streams=1",
            "-head-timeout=700ms",
            "-request-timeout=700ms",
            "-body-idle-timeout=700ms",
            "-drain-timeout=300ms",
            environment={"PYTHONPATH": str(Path(__file__).parent), "OTEL_BSP_SCHEDULE_DELAY": "100"},
        )
        stack.callback(self.core.close)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            nobody = free.getsockname()[1]
        local = f"app={self.service.url},refused=http://127.0.0.1:{nobody}"
        self.agent = RunningAgent(self.core, local)
        stack.callback(self.agent.close)
        self.lingering: Connection | None = None  # a visitor whose request goes on until `settle`
        self._stack = stack

    def counts(self) -> dict[tuple[str, str], float]:
        """The two counters of outcomes: (name, outcome or reason) → count."""
        wanted = (OUTCOME, UPSTREAM_ERROR)
        return {(name, dict(labels).popitem()[1]): n for (name, labels), n in samples(self.core.metrics).items()
                if name in wanted}  # fmt: skip

    def other_agent(self, account: str, *limits: str) -> RunningAgent:
        """An agent of another account, serving the name of the account."""
        token = self.core.new_token(account)
        if limits:
            self.core.command("account", "limit", account, *limits)
        agent = RunningAgent(self.core, self.service.url, f"-subdomain={account}", token=token, agent_id=account)
        self._stack.callback(agent.close)
        return agent

    def wait_at_service(self, target: str) -> None:
        poll(lambda: any(one.target == target for one in self.service.requests), f"{target} is at the service")

    def settle(self) -> None:
        """Until nothing is under way any more."""
        if self.lingering is not None:
            self.lingering.reset()
            self.lingering = None
        poll(lambda: not sample(self.core.metrics, "tunnel_streams_active"), "no stream is open")

    def visit(self, host: str = "app.localhost") -> Connection:
        return self._stack.enter_context(Connection(self.core.public, host))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path_factory.mktemp("blame"), stack)


# Ways to each outcome. Each gives the Answer, or None for a visitor that left: its request id is then ABORTED_ID.

Case = Callable[[Bench], Answer | None]
ABORTED_ID = "the-one-who-left"


def ok(bench: Bench) -> Answer:
    return ask(bench.core, "GET /echo", JSON)


def ok_with_500(bench: Bench) -> Answer:
    return ask(bench.core, "GET /status/500", JSON)  # the service's own words, also when they are bad ones


def visitor_aborted(bench: Bench) -> None:
    visitor = bench.visit()
    visitor.send(visitor.request("GET /hang?abort", f"X-Request-Id: {ABORTED_ID}"))
    bench.wait_at_service("/hang?abort")
    visitor.reset()


def visitor_aborted_within_the_answer(bench: Bench) -> None:
    visitor = bench.visit()
    visitor.send(visitor.request("GET /sse?n=600", f"X-Request-Id: {ABORTED_ID}-later"))
    assert visitor.read_head().status == 200
    visitor.close()


def bad_request(bench: Bench) -> Answer:
    return ask(bench.core, "GET /", JSON, "Host: app.localhost", "Host: app.localhost")


def method_not_allowed(bench: Bench) -> Answer:
    return ask(bench.core, "TRACE /", JSON)


def request_timeout(bench: Bench) -> Answer:
    visitor = bench.visit()
    visitor.send(visitor.request("POST /upload", JSON, "Content-Length: 100") + b"only this")
    return visitor.read()


def request_timeout_in_the_head(bench: Bench) -> Answer:
    visitor = bench.visit()
    visitor.send(b"GET /never HTTP/1.1\r\nHost: app.loc")
    return visitor.read()


def body_too_large(bench: Bench) -> Answer:
    return ask(bench.core, "POST /upload", JSON, body=b"x" * 1001)


def uri_too_long(bench: Bench) -> Answer:
    return ask(bench.core, "GET /" + "x" * 17000, JSON)


def head_too_large(bench: Bench) -> Answer:
    return ask(bench.core, "GET /", JSON, "X-Big: " + "x" * 70000)


def no_tunnel(bench: Bench) -> Answer:
    return ask(bench.core, "GET /", JSON, host="nobody.localhost")


def no_agent(bench: Bench) -> Answer:
    bench.core.command("tunnel", "reserve", "reserved", "default")
    return ask(bench.core, "GET /", JSON, host="reserved.localhost")


def link_lost(bench: Bench) -> Answer:
    agent = bench.other_agent("doomed")
    visitor = bench.visit("doomed.localhost")
    visitor.send(visitor.request("GET /hang?doomed", JSON))
    bench.wait_at_service("/hang?doomed")
    agent.kill()
    return visitor.read()


def local_refused(bench: Bench) -> Answer:
    return ask(bench.core, "GET /", JSON, host="refused.localhost")


def local_broken(bench: Bench) -> Answer:
    return ask(bench.core, "POST /nothing", JSON, body=b"")


def local_broken_by_garbage(bench: Bench) -> Answer:
    return ask(bench.core, "GET /garbage", JSON)


def timeout(bench: Bench) -> Answer:
    return ask(bench.core, "GET /hang", JSON)


def quota(bench: Bench) -> Answer:
    bench.other_agent("poor", "-requests-per-month", "0")
    return ask(bench.core, "GET /", JSON, host="poor.localhost")


def overloaded(bench: Bench) -> Answer:
    visitor = bench.visit()
    visitor.send(visitor.request("GET /sse?n=600"))  # no time-out ends it
    assert visitor.read_head().status == 200
    bench.lingering = visitor
    return ask(bench.core, "GET /", JSON)


def internal(bench: Bench) -> Answer:
    return ask(bench.core, "GET /", JSON, host="internal.localhost")


CASES: list[Case] = [
    ok, ok_with_500, visitor_aborted, visitor_aborted_within_the_answer, bad_request, method_not_allowed,
    request_timeout, request_timeout_in_the_head, body_too_large, uri_too_long, head_too_large, no_tunnel, no_agent,
    link_lost, local_refused, local_broken, local_broken_by_garbage, timeout, quota, overloaded, internal,
]  # fmt: skip


def outcome_of(case: Case) -> str:
    """The longest outcome that the case's name begins with."""
    return max((one for one in OUTCOMES if case.__name__.startswith(one)), key=len)


def test_there_is_a_way_to_every_outcome() -> None:
    assert {outcome_of(case) for case in CASES} | {"draining"} == set(OUTCOMES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_all_five_say_the_same(bench: Bench, case: Case) -> None:
    outcome = outcome_of(case)
    before, mark = bench.counts(), bench.core.mark()
    answer = case(bench)
    check(bench, outcome, answer, before, mark)
    bench.settle()


def test_draining(tmp_path: Path) -> None:
    with ExitStack() as stack:
        bench = Bench(tmp_path, stack)
        before, mark = bench.counts(), bench.core.mark()
        visitor = bench.visit()
        visitor.send(visitor.request("GET /hang?drain", JSON))
        bench.wait_at_service("/hang?drain")
        bench.agent.stop()  # the core waits a moment for the end of its link: time to read the metric
        try:
            bench.core.terminate()
            check(bench, "draining", visitor.read(), before, mark)
        finally:
            bench.agent.cont()
        assert bench.core.wait() == 0


# The five places -------------------------------------------------------------------------------------------------


def check(bench: Bench, outcome: str, answer: Answer | None, before: dict[tuple[str, str], float], mark: int) -> None:
    row = OUTCOMES[outcome]
    # (1) the metric: this one, and no other
    key = (OUTCOME, outcome)
    what = f"{outcome} is counted; answered: {answer.head[:200] if answer is not None else b''!r}"
    after: dict[tuple[str, str], float] = poll(
        lambda: (now := bench.counts())[key] > before[key] and now, what, 5, 0.02
    )
    assert set(before) >= {(OUTCOME, name) for name in OUTCOMES}, "all outcomes exist from the start"
    expected = {key: 1.0} | ({(UPSTREAM_ERROR, outcome): 1.0} if outcome in UPSTREAM else {})
    assert {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)} == expected
    # (2) the access record
    id = answer["x-request-id"] if answer is not None else ""
    records: list[dict[str, Any]] = poll(
        lambda: [one for one in bench.core.find("request", after=mark, outcome=outcome)
                 if one["request_id"] == id or (not id and one["request_id"].startswith(ABORTED_ID))],
        f"the record of {outcome}", 5,
    )  # fmt: skip
    [record] = records
    status = answer.status if answer is not None else record["status"]
    assert record["status"] == status
    assert (record["level"] == "ERROR") == ("error" in record) == (row.failed or status >= 500)
    # (3) the span
    attributes = bench.tap.wait(record["span_id"])
    assert attributes["tunnel.outcome"] == outcome
    assert int(attributes["http.response.status_code"]) == status
    # (4) the page and (5) the header
    if answer is None:
        assert status == row.status == 499
    elif outcome == "ok":
        assert answer.all("x-tunnel-outcome") == []
    else:
        assert status == row.status
        assert answer.outcome == page_code(answer) == outcome
        assert id.encode() in answer.body


def page_code(answer: Answer) -> str:
    """The outcome as the page has it: JSON if the request got so far as to ask for it, else text."""
    if answer["content-type"] == "application/json":
        return str(json.loads(answer.body)["outcome"])
    status, code = answer.body.decode().split(":")[0].split(" ")
    assert int(status) == answer.status
    return code
