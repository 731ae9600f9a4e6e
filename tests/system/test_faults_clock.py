"""A wall clock that jumps by hours (docs/FAULTS.md), forward and back, under real programs at work.

What lasts for a while (time-outs, rates, waits, heartbeats) goes by the monotonic clock and notices nothing; what is a
date (expiry, months, time stamps) follows the clock, and comes right when the clock does.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from faketime import WallClock
from joserfc import jwt
from joserfc.jwk import OctKey
from observing import Span, spans_of, tracing
from running import RunningAgent, RunningCore, poll
from service import Service
from watching import Asking, SpanTap, ask, get, samples, status_of, wait_served

pytestmark = pytest.mark.system

HOURS = 5
SECRET = "a secret of thirty-two bytes, or more"
HEARTBEAT = ("-heartbeat=200ms", "-heartbeat-timeout=4s")
Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]


@pytest.fixture
def core_clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path / "core-clock")


@pytest.fixture
def agent_clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path / "agent-clock")


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[SpanTap]:
    with SpanTap(tmp_path) as tap:
        yield tap


def seconds_of(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def test_nothing_that_lasts_notices(
    start_core: Start, start_agent: StartAgent, start_service: StartService, tap: SpanTap,
    core_clock: WallClock, agent_clock: WallClock,
) -> None:  # fmt: skip
    """Requests under way, links, heartbeats, rates, health, metrics, spans and logs, while each clock jumps."""
    flags, environment = tracing(tap.endpoint, *HEARTBEAT, "-log-level=debug", "-metrics-report-interval=1s")
    core = start_core(*flags, environment={**environment, **core_clock.environment})
    service = start_service()
    agent = start_agent(
        core, service.url, "-subdomain=app", *flags, environment={**environment, **agent_clock.environment}
    )
    assert status_of(core) == 200, core.tail() + agent.tail()
    jumps = [(clock, sign * HOURS * 3600) for clock in (core_clock, agent_clock) for sign in (1, -1, 0)]
    for number, (clock, offset) in enumerate(jumps, 1):
        asking = [Asking(core, "GET /slow?ms=700") for _ in range(3)]
        poll(lambda due=3 * number: service.begun.count("/slow?ms=700") == due, "the requests are under way")
        clock.set(offset)
        seen = core.mark()
        assert status_of(core) == 200
        assert [one.result().status for one in asking] == [200] * 3
        assert all(0.6 < one.took < 9 for one in asking), [one.took for one in asking]  # no hours, on a busy machine
        # The clocks are compared once a second.
        poll(lambda after=seen: status_of(core) == 200 and any(
                abs(seconds_of(one["time"]) - time.time() - core_clock.offset) < 60
                for one in core.find("request", after=after, path="/echo")),
             "a line with the new time", 10, 0.2)  # fmt: skip
        for program in (core, agent):
            assert get(program.metrics, "/readyz")[0] == 200
            assert json.loads(get(program.metrics, "/health/detailed")[1])["uptime_seconds"] < 120
    assert not agent.find("link ended") and not core.find("agent disconnected")
    check_times(samples(core.metrics), samples(core.metrics, "/metrics/agents"), samples(agent.metrics))
    for record in core.find("request") + agent.find("local request"):
        assert 0 <= duration(record["duration"]) < 30, record
    core.close()
    agent.close()
    check_spans(spans_of(tap))


def check_times(*pages: dict[tuple[str, frozenset[tuple[str, str]]], float]) -> None:
    """No sum of seconds has hours in it, or less than nothing."""
    found = 0
    for page in pages:
        for (name, labels), value in page.items():
            if name.endswith("_seconds_sum"):
                found += 1
                assert 0 <= value < 300, (name, labels, value)
    assert found > 5


def duration(text: str) -> float:
    """Seconds of a log line's duration: 1.5ms, 2s, 1m3s."""
    units = {"µs": 1e-6, "us": 1e-6, "ns": 1e-9, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
    parts = re.findall(r"([\d.]+)(µs|us|ns|ms|h|m|s)", text)
    assert parts and "".join(a + b for a, b in parts) == text, text
    return sum(float(number) * units[unit] for number, unit in parts)


def check_spans(spans: list[Span]) -> None:
    assert len([span for span in spans if span.name == "GET" and span.kind == "S"]) >= 24
    by_id = {span.id: span for span in spans}
    for span in spans:
        lasts = span.seconds
        assert 0 <= lasts < (200 if "connect" in span.name or "link" in span.name else 10), span
        parent = by_id.get(span.parent)
        if parent is not None and span.name != "agent.stream":  # the agent's clock is another one
            assert parent.start <= span.start <= span.end <= parent.end, (parent, span)


def test_rates_and_waits_go_by_another_clock(
    start_core: Start, start_agent: StartAgent, start_service: StartService, core_clock: WallClock
) -> None:
    core, service = start_core(environment=core_clock.environment), start_service()
    start_agent(core, service.url, "-subdomain=app")
    core.command("account", "limit", "default", "-requests-per-second", "1", "-requests-burst", "2")
    poll(lambda: ask(core, "GET /echo").outcome == "quota", "the limit holds", 5, 0.05)
    for offset in (HOURS * 3600, -HOURS * 3600):
        core_clock.set(offset)
        answers = [ask(core, "GET /echo") for _ in range(10)]
        assert [one.outcome for one in answers].count("quota") >= 6  # no pile of requests that hours would have earned
        assert all(float(one["retry-after"]) <= 2 for one in answers if one.outcome == "quota")
        poll(lambda: status_of(core) == 200, "and no wait for the hours to pass", 5, 0.2)


def test_the_month_is_the_clocks(
    start_core: Start, start_agent: StartAgent, start_service: StartService, core_clock: WallClock
) -> None:
    """From the last hour of a month into the next and back: each month has what was used in it, and its limit."""
    now = datetime.datetime.now(datetime.UTC)
    begins = datetime.datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=datetime.UTC)
    before, after = (int((begins - now).total_seconds()) + offset for offset in (-3600, 3600))
    core_clock.set(before)
    core, service = start_core(environment=core_clock.environment), start_service()
    start_agent(core, service.url, "-subdomain=app")
    core.command("account", "limit", "default", "-requests-per-month", "3")

    def outcomes(count: int) -> list[str]:
        return [ask(core, "GET /echo").outcome or "passed" for _ in range(count)]

    poll(lambda: ask(core, "GET /echo").outcome == "quota", "the limit holds", 5, 0.05)
    core_clock.set(after)
    assert outcomes(2) == ["passed"] * 2
    core_clock.set(before)
    assert outcomes(2) == ["quota"] * 2
    core_clock.set(after)
    assert outcomes(2) == ["passed", "quota"]

    def used(month: datetime.datetime) -> int:
        [row] = json.loads(core.command("usage", "default", "-json", "-month", f"{month:%Y-%m}").stdout)
        return int(row["requests"])

    poll(lambda: used(begins) == 3, "the use of the next month", 15, 0.5)
    assert used(begins - datetime.timedelta(hours=1)) >= 3


def test_tokens_expire_by_the_clock_and_are_good_again_when_it_is_right(
    start_core: Start, start_agent: StartAgent, start_service: StartService, core_clock: WallClock
) -> None:
    core = start_core(environment={"TUNNEL_JWT_SECRET": SECRET, **core_clock.environment})
    service = start_service()
    token = core.command("token", "create", "default", "-expires", "2h").stdout.strip()
    account = json.loads(core.command("account", "show", "default", "-json").stdout)["id"]
    claims: dict[str, Any] = {"account_id": account, "agent_id": "jwt", "exp": int(time.time()) + 7200}
    signed = jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(SECRET))
    start_agent(core, service.url, "-subdomain=app", agent_id="lasting")

    def start_those_with_an_expiry() -> list[RunningAgent]:
        return [
            start_agent(core, service.url, "-subdomain=tt", token=token, agent_id="tt"),
            start_agent(core, service.url, "-subdomain=jwt", token=signed, agent_id="jwt"),
        ]

    core_clock.set(-HOURS * 3600)  # long before they were made
    agents = start_those_with_an_expiry()
    core_clock.set(HOURS * 3600)
    for agent in agents:
        agent.expected_code = 1
        assert agent.wait(10) == 1
        assert "has expired" in agent.tail()
    assert status_of(core) == 200
    core_clock.set(0)
    for agent, name in zip(start_those_with_an_expiry(), ("tt", "jwt"), strict=True):
        assert status_of(core, f"{name}.localhost") == 200
        assert agent.is_running


def test_a_name_that_a_wrong_clock_released_is_held_for_minutes_not_hours(
    start_core: Start, start_agent: StartAgent, start_service: StartService, core_clock: WallClock
) -> None:
    core, service = start_core("-name-hold=3s", environment=core_clock.environment), start_service()
    other = core.new_token("other")
    start_agent(core, service.url, "-subdomain=app")
    first = start_agent(core, service.url, "-subdomain=mine", agent_id="first")
    core_clock.set(HOURS * 3600)
    first.close()
    core.wait_for("agent disconnected", agent_id="first")
    core_clock.set(0)
    second = start_agent(core, service.url, "-subdomain=mine", token=other, agent_id="second", ready=False)
    second.wait_ready(timeout=25)  # the hold, 3 s, and until it tries again
    assert status_of(core) == 200  # the name that was in use all the time


def test_certificates_are_judged_by_the_agents_clock(
    start_core: Start, start_agent: StartAgent, start_service: StartService, agent_clock: WallClock, tmp_path: Path
) -> None:
    """A link that is up stays; a new one is refused while the clock is beyond the certificate, and tried again."""
    authority = trustme.CA()
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=2)
    issued = authority.issue_cert("localhost", not_after=ends)
    chain, key, root = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "root.pem"
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    authority.cert_pem.write_to_path(str(root))
    core = start_core(f"-agent-cert={chain}", f"-agent-key={key}")
    service = start_service()
    agent = start_agent(
        core, service.url, "-subdomain=app", "-server-fingerprint=", f"-ca-cert={root}",
        f"-server=localhost:{core.agents[1]}", environment=agent_clock.environment,
    )  # fmt: skip
    agent_clock.set(HOURS * 3600)
    assert [status_of(core) for _ in range(5)] == [200] * 5
    seen = agent.mark()
    core.kill()
    again = core.again()
    try:
        agent.wait_for("reconnecting", after=seen)
        failed = agent.wait_for("connection failed", after=seen, timeout=10)
        poll(lambda: any("not trusted" in one["error"] for one in agent.find("connection failed", after=seen)), failed)
        assert "expired" in str(agent.find("connection failed", after=seen))
        agent_clock.set(0)
        wait_served(again, 10)
    finally:
        again.close()
