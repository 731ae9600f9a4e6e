"""Quotas over two workers, with real processes: what holds for one core holds for both together."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from crewing import Visitors, pids, wait_links
from running import RunningAgent, RunningCore, poll
from service import Service
from visiting import Broken, Connection
from watching import sample

pytestmark = pytest.mark.system

StartAgent = Callable[..., RunningAgent]
FLUSH = 5.0  #: seconds that a killed worker may lose


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCore]:
    core = RunningCore(
        tmp_path_factory.mktemp("quotas") / "core", "-workers=2", "-max-visitors-per-address=40", "-tcp-ports=0"
    )
    yield core
    core.close()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


def serve(core: RunningCore, start_agent: StartAgent, service: Service, account: str, *limits: str) -> RunningAgent:
    """An agent of a new account with these limits, and its links."""
    core.command("account", "create", account)
    if limits:
        core.command("account", "limit", account, *limits)
    seen = core.mark()
    agent = start_agent(core, service.url, f"-subdomain={account}", agent_id=account, token=core.new_token(account))
    wait_links(core, 2, after=seen)
    return agent


def usage(core: RunningCore, account: str) -> dict[str, Any]:
    [found] = json.loads(core.command("usage", account, "-json").stdout)
    return dict(found)


def served_by(core: RunningCore, account: str, after: int) -> set[int]:
    host = f"{account}.localhost"
    return {record["worker"] for record in core.find("request", after=after, host=host, outcome="ok")}


def test_a_request_rate(core: RunningCore, start_agent: StartAgent, service: Service) -> None:
    serve(core, start_agent, service, "rated", "-requests-per-second=50", "-requests-burst=20")
    seen = core.mark()
    began = time.monotonic()
    with Visitors(core, 10, host="rated.localhost", kept=5, pause=0.002) as load:
        poll(lambda: time.monotonic() - began > 2, "2 s", 5)
    took = time.monotonic() - began
    statuses = Counter(load.answered.values())
    assert not load.failed and statuses.keys() == {200, 429}
    # Over both workers together: the burst, and 50 a second. Not a request more; and none is lost between the two.
    assert statuses[200] <= 20 + 50 * took + 1
    assert statuses[200] >= 20 + 50 * 2 * 0.9
    poll(lambda: served_by(core, "rated", seen) == {0, 1}, "both have served")


def test_a_months_requests(core: RunningCore, start_agent: StartAgent, service: Service) -> None:
    serve(core, start_agent, service, "monthly", "-requests-per-month=101")
    with Visitors(core, 8, host="monthly.localhost", kept=3, pause=0) as load:
        load.wait(400)
    statuses = Counter(load.answered.values())
    assert statuses[200] == 101  # exactly
    assert statuses.keys() == {200, 429}
    poll(lambda: usage(core, "monthly")["requests"] == 101, "the store has it", 2 * FLUSH, 0.2)


def test_a_bandwidth(core: RunningCore, start_agent: StartAgent, service: Service) -> None:
    """Eight downloads over both workers share 4 MB/s."""
    serve(core, start_agent, service, "shaped", "-bandwidth=4000000")
    seen = core.mark()
    size, count = 1_000_000, 8
    done: list[int] = []

    def download() -> None:
        with Connection(core.public, "shaped.localhost", 60) as visitor:
            done.append(len(visitor.ask(f"GET /download?size={size}").body))

    threads = [threading.Thread(target=download) for _ in range(count)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    took = time.monotonic() - began
    assert done == [size] * count
    # BURST is a quarter of a second, and each of the eight may have a chunk or two unpaid at its end.
    assert took > (size * count - 1_000_000 - count * 2 * 65536) / 4e6
    assert took < size * count / 4e6 * 1.5
    poll(lambda: served_by(core, "shaped", seen) == {0, 1}, "both have served")


def test_an_accounts_connections(core: RunningCore, start_agent: StartAgent, service: Service) -> None:
    first = serve(core, start_agent, service, "small", "-connections=1")
    token = core.new_token("small")
    second = start_agent(core, service.url, "-subdomain=small", agent_id="second", token=token, ready=False)
    assert second.wait_for("connection refused")["reason"] == "connection_quota"
    assert sample(core.metrics, "tunnel_quota_exceeded_total", type="connection") >= 1
    first.close()
    second.wait_for("tunnel ready", timeout=60)


def test_an_accounts_names_and_ports(core: RunningCore, start_agent: StartAgent, service: Service) -> None:
    first = serve(core, start_agent, service, "named", "-names=2", "-ports=1")
    id = str(core.wait_for("agent connected", agent_id="named")["account_id"])
    token, tcp = core.new_token("named"), "named-tcp=tcp://127.0.0.1:1"
    seen = core.mark()
    second = start_agent(core, tcp, agent_id="named-2", token=token)
    wait_links(core, 2, after=seen)
    usage = {type: sample(core.metrics, "tunnel_quota_usage", account_id=id, type=type) for type in ("names", "ports")}
    assert usage == {"names": 2, "ports": 1}  # whatever the number of links
    for local, reason in ((f"other={service.url}", "name_quota"), ("named=tcp://127.0.0.1:1", "port_quota")):
        if reason == "port_quota":
            first.close()
            core.wait_for("agent disconnected", agent_id="named")
            poll(lambda: len(core.find("agent disconnected", agent_id="named")) == 2, "both links are gone")
        third = start_agent(core, local, "-max-retries=0", agent_id=reason, token=token, ready=False)
        third.expected_code = 1
        assert third.wait_for("connection refused")["reason"] == reason
        assert third.wait() == 1
        assert sample(core.metrics, "tunnel_quota_exceeded_total", type=reason.replace("_quota", "s")) >= 1
    second.close()


def test_connections_of_one_address(core: RunningCore) -> None:
    held: list[Connection] = []
    try:
        for _ in range(80):
            held.append(Connection(core.public, "nobody.localhost"))
        answers = []
        for visitor in held:
            try:
                answers.append(visitor.ask("GET /").outcome)
            except (Broken, OSError):
                answers.append("closed")
    finally:
        for visitor in held:
            visitor.close()
    found = Counter(answers)
    assert found["no_tunnel"] == 40, found
    assert found["overloaded"] + found["closed"] == 40, found
    poll(lambda: sample(core.metrics, "tunnel_limit_refusals_total", limit="connections_per_address") == 40, "counted")


def test_what_both_workers_count_comes_to_the_store_once(
    core: RunningCore, start_agent: StartAgent, service: Service
) -> None:
    serve(core, start_agent, service, "counted")
    with Visitors(core, 8, "GET /download?size=1000", host="counted.localhost", kept=4, pause=0) as load:
        load.wait(500)
    count = len(load.answered)
    assert not load.failed and set(load.answered.values()) == {200}

    def stored() -> bool:
        found = usage(core, "counted")
        assert found["requests"] <= count and found["bytes_out"] <= count * 1000
        return bool(found["requests"] == count and found["bytes_out"] == count * 1000)

    poll(stored, "the store has all of it", 3 * FLUSH, 0.2)


def test_a_killed_worker_loses_no_more_than_it_may(
    core: RunningCore, start_agent: StartAgent, service: Service
) -> None:
    """And its part of a month's budget is not given out again."""
    serve(core, start_agent, service, "killed", "-requests-per-month=300")
    with Visitors(core, 6, host="killed.localhost", kept=3) as load:
        load.wait(150)
        os.kill(pids(core)[1], signal.SIGKILL)
        load.wait(400)
    passed = Counter(load.answered.values())[200]
    assert passed + len(load.failed) >= 300 - 6 and passed <= 300
    # What it had counted since its last write is not in the store; the other's is.
    poll(lambda: usage(core, "killed")["requests"] > 0, "the store has the other's", 2 * FLUSH, 0.2)
    assert usage(core, "killed")["requests"] <= passed + len(load.failed)
