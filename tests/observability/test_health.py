"""The health pages: 200 or 503, and a reason for every check."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import trio
from fakehost import FakeHost
from trio.testing import MockClock, wait_all_tasks_blocked

from observability import health
from observability.health import MAX_LAG, Health
from observability.runtime import LAG_PERIOD
from tunnel.handler import Observer, PageRequest

LIVE = ("/healthz", "/health/live")
READY = ("/readyz", "/health/ready")
BOTH = ("/health", "/health/detailed")


@pytest.fixture(params=["core", "agent"])
def fake(request: pytest.FixtureRequest) -> FakeHost:
    return FakeHost(request.param)


async def ask(of: Health, path: str) -> tuple[int, Any]:
    answer = await of.pages()[path](PageRequest(path, "", {}))
    assert answer.content_type == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    content = json.loads(answer.body)
    assert content["status"] == ("ok" if answer.status == 200 else "unavailable")
    for check in content["checks"].values():
        assert set(check) == {"ok", "reason"}
        assert check["reason"]
    return answer.status, content


async def test_all_is_well(fake: FakeHost) -> None:
    fake.checks["store"] = lambda: (True, "reachable")
    of = Health(fake)
    for path in (*LIVE, *READY, *BOTH):
        status, content = await ask(of, path)
        assert status == 200
        assert ("store" in content["checks"]) == (path not in LIVE)
        assert ("run_loop" in content["checks"]) == (path not in READY)


async def test_not_ready_is_alive(fake: FakeHost) -> None:
    draining = False
    fake.checks["drain"] = lambda: (not draining, "draining" if draining else "taking traffic")
    of = Health(fake)
    assert (await ask(of, "/readyz"))[0] == 200
    draining = True  # the very next answer says so
    for path in (*READY, *BOTH):
        status, content = await ask(of, path)
        assert status == 503
        assert content["checks"]["drain"] == {"ok": False, "reason": "draining"}
    for path in LIVE:
        assert (await ask(of, path))[0] == 200


async def test_a_check_that_raises_does_not_hold(fake: FakeHost) -> None:
    def broken() -> tuple[bool, str]:
        raise OSError("x" * 10_000)

    fake.checks = {"broken": broken, "fine": lambda: (True, "fine")}
    status, content = await ask(Health(fake), "/readyz")
    assert status == 503
    assert content["checks"]["fine"]["ok"]
    assert content["checks"]["broken"]["reason"].startswith("the check broke: OSError: x")
    assert len(content["checks"]["broken"]["reason"]) <= 200


async def test_a_loop_that_is_late(fake: FakeHost, mock_clock: MockClock, nursery: trio.Nursery) -> None:
    of = Health(fake)
    nursery.start_soon(of.lag.run)
    await wait_all_tasks_blocked()
    assert (await ask(of, "/healthz"))[0] == 200
    mock_clock.jump(LAG_PERIOD + MAX_LAG + 1)
    for path in (*LIVE, *BOTH):
        status, content = await ask(of, path)
        assert status == 503
        assert content["checks"]["run_loop"] == {"ok": False, "reason": "the run loop is 6.0 s late"}
    assert (await ask(of, "/readyz"))[0] == 200
    await wait_all_tasks_blocked()
    mock_clock.jump(LAG_PERIOD)
    await wait_all_tasks_blocked()
    assert (await ask(of, "/healthz"))[0] == 200
    nursery.cancel_scope.cancel()


async def test_detailed(fake: FakeHost) -> None:
    fake.set_details("tracing", lambda: {"dropped": 3})
    fake.core.connections_limit = math.inf
    fake.add_link("c1")
    _, content = await ask(Health(fake), "/health/detailed")
    assert content["role"] == fake.role
    assert content["version"] == "1.2.3"
    assert content["uptime_seconds"] >= 0
    assert content["runtime"]["tasks_living"] >= 1
    assert content["details"] == {"tracing": {"dropped": 3}}
    if fake.role == "core":
        assert content["statistics"]["connections_limit"] is None  # none in JSON, which has no infinity
        assert content["statistics"]["links"][0]["connection_id"] == "c1"
    else:
        assert content["statistics"]["agent_id"] == "agent-1"


async def test_details_that_break_spare_the_page(fake: FakeHost) -> None:
    def broken() -> dict[str, Any]:
        raise KeyError("gone")

    fake.set_details("broken", broken)
    status, content = await ask(Health(fake), "/health/detailed")
    assert status == 200
    assert content["details"] == {"unavailable": "KeyError: 'gone'"}


async def test_the_plugin_adds_pages_and_costs_nothing() -> None:
    async with trio.open_nursery() as nursery:  # ends only if the plug-in's task does
        host = FakeHost(nursery=nursery)
        async with health.plugin(host) as layer:
            assert set(host.pages) == {*LIVE, *READY, *BOTH}
            assert isinstance(layer, Observer)
            assert not (layer.begins or layer.ends or layer.late or layer.enters)
            assert (await host.get("/healthz")).status == 200
