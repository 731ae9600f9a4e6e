"""Quotas that hold, on running programs: connections, requests, bandwidth; and usage that survives."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from running import RunningAgent, RunningCore, poll
from service import Service
from watching import ask, run_agent, sample, samples

pytestmark = pytest.mark.system

FLUSH = 5.0  #: seconds that a killed core may lose
StartAgent = Callable[..., RunningAgent]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCore]:
    core = RunningCore(tmp_path_factory.mktemp("quotas") / "core")
    yield core
    core.close()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


def limited(core: RunningCore, account: str, *limits: str) -> tuple[str, str]:
    """A new account with these limits: (its token, its id)."""
    id = json.loads(core.command("account", "create", account, "-json").stdout)["id"]
    if limits:
        core.command("account", "limit", account, *limits)
    return core.new_token(account), id


def usage(core: RunningCore, account: str) -> dict[str, Any]:
    [found] = json.loads(core.command("usage", account, "-json").stdout)
    return dict(found)


def exceeded(core: RunningCore, type: str) -> float:
    return sample(core.metrics, "tunnel_quota_exceeded_total", type=type)


def refused_agent(core: RunningCore, token: str, *flags: str, local: str = "http://127.0.0.1:9") -> dict[str, Any]:
    """The refusal of an agent that tries once; it must give up with exit code 1."""
    code, out, _ = run_agent(
        "-log-json", f"-server=127.0.0.1:{core.agents[1]}", f"-server-fingerprint={core.fingerprint}",
        f"-local={local}", "-metrics-addr=", "-max-retries=0", *flags, AGENT_TOKEN=token,
    )  # fmt: skip
    assert code == 1
    [refusal] = [record for line in out.splitlines() if (record := json.loads(line))["msg"] == "connection refused"]
    return dict(refusal)


# Connections -----------------------------------------------------------------------------------------------------


def test_connections_of_an_account(core: RunningCore, service: Service, start_agent: StartAgent) -> None:
    token, id = limited(core, "links", "-connections", "1")
    before = exceeded(core, "connection")
    agent = start_agent(core, service.url, "-subdomain=links", token=token)
    assert sample(core.metrics, "tunnel_quota_limit", account_id=id, type="connection") == 1
    assert sample(core.metrics, "tunnel_quota_usage", account_id=id, type="connection") == 1
    assert sample(core.metrics, "tunnel_connections_by_account", account_id=id) == 1
    refusal = refused_agent(core, token, "-agent-id=second")
    assert refusal["reason"] == "connection_quota" and "limit" in refusal["error"]
    assert exceeded(core, "connection") == before + 1
    agent.close()
    core.wait_for("agent disconnected", account_id=id)
    assert ("tunnel_connections_by_account", frozenset({("account_id", id)})) not in samples(core.metrics)
    start_agent(core, service.url, "-subdomain=links", token=token)


def test_max_connections(start_core: Callable[..., RunningCore], service: Service, start_agent: StartAgent) -> None:
    core = start_core("-max-connections=2", "-max-connections-per-account=1")
    assert sample(core.metrics, "tunnel_connections_limit") == 2
    start_agent(core, service.url, "-subdomain=one")
    assert refused_agent(core, core.token)["reason"] == "connection_quota"
    start_agent(core, service.url, "-subdomain=two", token=core.new_token("two"))
    refusal = refused_agent(core, core.new_token("three"))
    assert refusal["reason"] == "too_many_connections" and "2 links" in refusal["error"]
    assert sample(core.metrics, "tunnel_connections_active") == 2


# Names and ports -------------------------------------------------------------------------------------------------


def test_names_of_an_account(core: RunningCore, service: Service, start_agent: StartAgent) -> None:
    token, id = limited(core, "names", "-names", "2")
    failures = sample(core.metrics, "tunnel_authentication_failures_total", reason="name_quota")
    before = exceeded(core, "names")
    agent = start_agent(core, f"names-a={service.url},names-b={service.url}", token=token)
    assert sample(core.metrics, "tunnel_quota_limit", account_id=id, type="names") == 2
    assert sample(core.metrics, "tunnel_quota_usage", account_id=id, type="names") == 2
    refusal = refused_agent(core, token, "-agent-id=second", "-subdomain=names-c")
    assert refusal["reason"] == "name_quota" and f"account limit {id} -names N" in refusal["error"]
    agent.close()
    core.wait_for("agent disconnected", account_id=id)
    assert refused_agent(core, token, "-subdomain=names-c")["reason"] == "name_quota"  # the others are held
    assert exceeded(core, "names") == before + 2
    assert sample(core.metrics, "tunnel_authentication_failures_total", reason="name_quota") == failures + 2
    core.command("tunnel", "reserve", "names-c", "names")  # which counts for no limit
    start_agent(core, service.url, "-subdomain=names-c", agent_id="third", token=token)
    assert sample(core.metrics, "tunnel_quota_usage", account_id=id, type="names") == 2


def test_ports_of_an_account(start_core: Callable[..., RunningCore], service: Service, start_agent: StartAgent) -> None:
    core = start_core("-tcp-ports=0", "-max-ports-per-account=2", "-max-names-per-account=4")
    agent = start_agent(core, "db=tcp://127.0.0.1:1,ssh=tcp://127.0.0.1:1")
    id = str(core.wait_for("agent connected")["account_id"])
    assert sample(core.metrics, "tunnel_quota_limit", account_id=id, type="ports") == 2
    assert sample(core.metrics, "tunnel_quota_usage", account_id=id, type="ports") == 2
    refusal = refused_agent(core, core.token, "-agent-id=second", local="more=tcp://127.0.0.1:1")
    assert refusal["reason"] == "port_quota" and f"account limit {id} -ports N" in refusal["error"]
    assert exceeded(core, "ports") == 1
    start_agent(core, service.url, "-subdomain=web", agent_id="third")  # which needs no port
    agent.close()
    core.wait_for("agent disconnected", agent_id="agent")
    start_agent(core, "more=tcp://127.0.0.1:1", agent_id="fourth")
    assert sample(core.metrics, "tunnel_quota_usage", account_id=id, type="ports") == 1


# Requests --------------------------------------------------------------------------------------------------------


def test_requests_per_second(core: RunningCore, service: Service, start_agent: StartAgent) -> None:
    token, _ = limited(core, "rate", "-requests-per-second", "2", "-requests-burst", "4")
    start_agent(core, service.url, "-subdomain=rate", token=token)
    before = exceeded(core, "requests")
    answers = [ask(core, "GET /echo", host="rate.localhost") for _ in range(6)]
    refused = [answer for answer in answers if answer.status == 429]
    assert [answer.status for answer in answers[:4]] == [200] * 4
    assert refused and {answer.outcome for answer in refused} == {"quota"}
    assert exceeded(core, "requests") == before + len(refused)
    wait = int(refused[-1]["retry-after"])
    assert 1 <= wait <= 2
    refused_at = time.monotonic()
    poll(lambda: ask(core, "GET /echo", host="rate.localhost").status == 200, "a request passes", wait + 1, 0.1)
    assert time.monotonic() - refused_at < wait + 0.5


def test_requests_and_bytes_of_a_month(core: RunningCore, service: Service, start_agent: StartAgent) -> None:
    token, id = limited(core, "month", "-requests-per-month", "3")
    start_agent(core, service.url, "-subdomain=month", token=token)
    statuses = [ask(core, "GET /echo", host="month.localhost").status for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    answer = ask(core, "GET /echo", host="month.localhost")
    assert b"3 requests a month" in answer.body and 1 <= int(answer["retry-after"]) <= 31 * 86400
    # Raised while all runs; the other limit of a month is met instead.
    core.command("account", "limit", "month", "-requests-per-month", "none", "-bandwidth-per-month", "100KiB")
    poll(lambda: ask(core, "GET /echo", host="month.localhost").status == 200, "the new limit holds", 5, 0.1)
    before = exceeded(core, "bandwidth")
    assert len(ask(core, "GET /download?size=150000", host="month.localhost").body) == 150_000
    answer = ask(core, "GET /echo", host="month.localhost")
    assert (answer.status, answer.outcome) == (429, "quota") and b"bytes a month" in answer.body
    assert exceeded(core, "bandwidth") == before + 1
    assert sample(core.metrics, "tunnel_quota_limit", account_id=id, type="bandwidth") == 100 * 1024
    assert sample(core.metrics, "tunnel_quota_usage", account_id=id, type="bandwidth") == 150_000
    assert sample(core.metrics, "tunnel_quota_limit", account_id=id, type="requests") == math.inf


# Bandwidth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["down", "up"])
def test_bandwidth_is_shaped(core: RunningCore, service: Service, start_agent: StartAgent, direction: str) -> None:
    rate, size = 2_000_000, 5_000_000
    token, id = limited(core, f"shaped-{direction}", "-bandwidth", str(rate))
    host = f"shaped-{direction}"
    start_agent(core, service.url, f"-subdomain={host}", token=token)
    began = time.monotonic()
    if direction == "down":
        answer = ask(core, f"GET /download?size={size}", host=f"{host}.localhost")
        assert len(answer.body) == size
    else:
        answer = ask(core, "POST /upload", host=f"{host}.localhost", body=bytes(size))
        assert answer.body.startswith(str(size).encode())
    measured = size / (time.monotonic() - began)
    assert abs(measured / rate - 1) < 0.15, f"{measured:.0f} bytes/s"
    assert size <= sample(core.metrics, "tunnel_quota_usage", account_id=id, type="bandwidth") < size + 1000


# Usage -----------------------------------------------------------------------------------------------------------


def test_usage_survives(
    start_core: Callable[..., RunningCore], service: Service, start_agent: StartAgent, ending: ExitStack
) -> None:
    core = start_core()
    start_agent(core, service.url, "-subdomain=app")
    # (1) A drain writes all.
    for _ in range(10):
        assert ask(core, "POST /echo", body=b"x" * 1000).status == 200
    core.terminate()
    assert core.wait() == 0
    assert usage(core, "default") | {"account_id": ""} == {
        "account": "default", "account_id": "", "month": time.strftime("%Y-%m", time.gmtime()),
        "requests": 10, "bytes_in": 10_000, "bytes_out": 10_000,
    }  # fmt: skip
    # (2) It goes on from there, and a kill loses at most what came in the last 5 seconds.
    core = core.again()
    ending.callback(core.close)
    poll(lambda: ask(core, "POST /echo", body=b"x" * 1000).status == 200, "served again", 5, 0.1)
    known = 10 + int(sample(core.metrics, "tunnel_requests_total", code="200"))
    core.wait_for("request", status=200)
    asked = time.monotonic()
    poll(lambda: usage(core, "default")["requests"] == known, "written while it runs", FLUSH + 4, 0.1)
    assert time.monotonic() - asked < FLUSH + 3
    for _ in range(5):
        assert ask(core, "POST /echo", body=b"x" * 1000).status == 200
    core.kill()
    after = usage(core, "default")["requests"]
    assert known <= after <= known + 5
    core = core.again()
    ending.callback(core.close)
    poll(lambda: ask(core, "GET /echo").status == 200, "served again", 5, 0.1)
    [account] = {dict(labels)["account_id"] for name, labels in samples(core.metrics) if name == "tunnel_quota_usage"}
    assert sample(core.metrics, "tunnel_quota_usage", account_id=account, type="requests") == after + 1
