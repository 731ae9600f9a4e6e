"""The numbers are true: after a load with faults the pages say what an independent client counted.

And the identities of the contract hold, series of closed label sets are there from the start, and what belongs to a
link or an account goes with it.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from running import Address, RunningAgent, RunningCore, poll
from service import Service
from visiting import Broken, Connection
from watching import get, sample, samples

from tunnel.core.quotas import TYPES
from tunnel.errors import OUTCOMES, REFUSALS, UPSTREAM

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]

#: what each client asks for, over and over: (host, path)
MIX = (
    ("app", "/echo"), ("app", "/download?size=100000"), ("nobody", "/"), ("app", "/status/500"), ("app", "/status/404"),
    ("closed", "/"), ("app", "/garbage"), ("app", "/echo"), ("app", "/break-length"), ("app", "/sse?n=2&ms=1"),
)  # fmt: skip
ROUNDS, CLIENTS = 4, 4


class Client(threading.Thread):
    """Asks for the mix and counts what it gets: statuses ("broken" for answers that broke off), and the outcomes."""

    def __init__(self, core: RunningCore) -> None:
        super().__init__(daemon=True)
        self._core = core
        self.codes: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.start()

    def run(self) -> None:
        for _ in range(ROUNDS):
            for host, path in MIX:
                self._ask(host, path)
            self._go_away()

    def _ask(self, host: str, path: str) -> None:
        with Connection(self._core.public, f"{host}.localhost") as visitor:
            visitor.send(visitor.request(f"GET {path}", "Connection: close"))
            answer = visitor.read_head()
            self.codes[str(answer.status)] += 1
            try:
                while visitor.receive():
                    pass
            except Broken as exc:
                is_broken = str(exc) == "reset"
            self.outcomes["local_broken" if is_broken else answer.outcome or "ok"] += 1

    def _go_away(self) -> None:
        with Connection(self._core.public, "app.localhost") as visitor:
            visitor.send(visitor.request("GET /slow?ms=2000"))
            # Only once it is under way, so that it counts at the agent too.
            poll(lambda: sample(self._core.metrics, "tunnel_streams_active") > 0, "a stream")
            visitor.reset()
        self.codes["499"] += 1
        self.outcomes["visitor_aborted"] += 1


def counters(where: Address, name: str, label: str) -> dict[str, int]:
    """{label's value: count} of those that are not 0."""
    found = samples(where)
    return {dict(labels)[label]: int(value) for (one, labels), value in found.items() if one == name and value}


def total(where: Address, *names: str) -> list[int]:
    found = samples(where)
    return [int(found[name, frozenset()]) for name in names]


def test_the_pages_say_what_a_client_counted(
    start_core: Start, start_agent: StartAgent, start_service: StartService, ending: ExitStack
) -> None:
    core, service = start_core(), start_service()
    nobody = ending.enter_context(socket.socket())
    nobody.bind(("127.0.0.1", 0))
    local = f"app={service.url},closed=http://127.0.0.1:{nobody.getsockname()[1]}"
    agent = start_agent(core, local)
    clients = [Client(core) for _ in range(CLIENTS)]
    for client in clients:
        client.join(60)
        assert not client.is_alive()
    codes = sum((client.codes for client in clients), Counter[str]())
    outcomes = sum((client.outcomes for client in clients), Counter[str]())
    requests = codes.total()
    assert requests == CLIENTS * ROUNDS * (len(MIX) + 1)
    poll(lambda: total(core.metrics, "tunnel_streams_active") == [0], "no stream at the core")
    poll(lambda: total(agent.metrics, "agent_streams_active") == [0], "no stream at the agent")

    assert counters(core.metrics, "tunnel_requests_total", "code") == codes
    assert counters(core.metrics, "tunnel_request_outcomes_total", "outcome") == outcomes
    upstream = {name: n for name, n in outcomes.items() if name in UPSTREAM}
    assert counters(core.metrics, "tunnel_upstream_errors_total", "reason") == upstream
    for name in ("request_duration_seconds", "request_size_bytes", "response_size_bytes"):
        assert total(core.metrics, f"tunnel_{name}_count") == [requests]
    assert Counter(one["outcome"] for one in core.find("request")) == outcomes
    streams = requests - codes["404"] + CLIENTS * ROUNDS  # the service's own 404 went through
    assert total(core.metrics, "tunnel_streams_total", "tunnel_stream_duration_seconds_count") == [streams, streams]

    done, failed, active, all_streams = total(
        agent.metrics, "agent_streams_completed", "agent_streams_failed", "agent_streams_active", "agent_streams_total"
    )
    assert done + failed + active == all_streams == streams
    success, failure, all_requests = total(
        agent.metrics, "agent_requests_success", "agent_requests_failed", "agent_requests_total"
    )
    bad = codes["500"] + outcomes["local_refused"] + outcomes["local_broken"]
    assert (success, failure, all_requests) == (streams - bad, bad, streams)
    assert total(agent.metrics, "agent_local_requests_total", "agent_local_requests_error") == [streams, bad]
    kill_and_count(core, agent, service, codes, outcomes)


def kill_and_count(
    core: RunningCore, agent: RunningAgent, service: Service, codes: Counter[str], outcomes: Counter[str]
) -> None:
    """The agent dies within requests; afterwards others find nobody. What was the link's is gone from the page."""
    labels = [dict(one) for _, one in samples(core.metrics)]
    connection = agent.find("authenticated")[0]["connection_id"]
    account = agent.find("authenticated")[0]["account_id"]
    assert any(one.get("connection_id") == connection for one in labels)
    assert any(one.get("account_id") == account for one in labels)
    visitors = [Connection(core.public, "app.localhost") for _ in range(3)]
    for visitor in visitors:
        visitor.send(visitor.request("GET /hold"))
    service.wait_request("/hold", 3)
    agent.kill()
    for visitor in visitors:
        assert visitor.read().outcome == "link_lost"
        visitor.close()
    with Connection(core.public, "app.localhost") as visitor:
        assert visitor.ask("GET /echo").outcome == "no_agent"
    codes += Counter({"502": 3, "503": 1})
    outcomes += Counter({"link_lost": 3, "no_agent": 1})
    assert counters(core.metrics, "tunnel_requests_total", "code") == codes
    assert counters(core.metrics, "tunnel_request_outcomes_total", "outcome") == outcomes
    found = samples(core.metrics)
    assert found["tunnel_streams_active", frozenset()] == found["tunnel_connections_active", frozenset()] == 0
    assert not [key for key in found if {"connection_id", "account_id"} & dict(key[1]).keys()]


def test_series_are_there_from_the_start(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core = start_core()
    found = samples(core.metrics)

    def values(name: str, label: str) -> dict[str, float]:
        return {dict(labels)[label]: value for (one, labels), value in found.items() if one == name}

    assert values("tunnel_request_outcomes_total", "outcome") == dict.fromkeys(OUTCOMES, 0)
    assert values("tunnel_authentication_failures_total", "reason") == dict.fromkeys(REFUSALS, 0)
    assert values("tunnel_upstream_errors_total", "reason") == dict.fromkeys(UPSTREAM, 0)
    assert values("tunnel_quota_exceeded_total", "type") == dict.fromkeys(TYPES, 0)
    assert values("tunnel_bytes_total", "direction") == {"in": 0, "out": 0}
    codes = values("tunnel_requests_total", "code")
    assert codes == dict.fromkeys(("200", "404", "429", "499", "500", "502", "503", "504"), 0)
    before = len(found)
    agent = start_agent(core, start_service().url, "-subdomain=app")
    # Whatever strangers ask for, there is no series of theirs.
    for number in range(200):
        host = f"host{number}" if number % 2 else "app"
        with Connection(core.public, f"{host}.localhost") as visitor:
            visitor.ask(f"GET /echo/{number}?x={number}", f"X-Thing-{number}: {number}", f"User-Agent: {number}")
    now = samples(core.metrics)
    link = [key for key in now if {"connection_id", "account_id"} & dict(key[1]).keys()]
    queries = [key for key in now if key[0].startswith("tunnel_db_query") and key not in found]
    assert len(now) - len(link) - len(queries) == before
    assert len(link) == 2 + 2 * len(TYPES)  # its account, its state, what its account has and may have
    assert sample(agent.metrics, "agent_requests_total") == 100


def test_promtool_has_nothing_to_say(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    """Save about the reference page's own names, which are the contract."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.fail("promtool is missing: install the package prometheus (scripts/packages)")
    core = start_core("-go-metric-names")
    agent = start_agent(core, start_service().url, "-subdomain=app", "-go-metric-names")
    with Connection(core.public, "app.localhost") as visitor:
        assert visitor.ask("GET /echo").status == 200
    poll(lambda: "agent_requests_total{" in get(core.metrics, "/metrics/agents")[1], "a report", 10, 0.1)
    for where, path in ((core.metrics, "/metrics"), (agent.metrics, "/metrics"), (core.metrics, "/metrics/agents")):
        text = get(where, path)[1]
        done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=20)
        complaints = [line for line in (done.stdout + done.stderr).splitlines() if line]
        assert done.returncode in (0, 3), complaints
        assert all(is_the_pages_own(line) for line in complaints), complaints


def is_the_pages_own(complaint: str) -> bool:
    name = complaint.split()[0]
    bare = "counter metrics should have" in complaint and name.startswith("agent_")
    micro = "use base unit" in complaint and "microseconds" in name
    total = "non-counter metrics should not have" in complaint and name.startswith("agent_")
    go = name.startswith("go_")
    return bare or micro or total or go
