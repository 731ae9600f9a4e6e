"""A core of two workers, with real processes: one core to everybody, whatever becomes of one of its workers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trustme
from crewing import OldAgent, Visitors, pids, wait_links
from running import RunningAgent, RunningCore, address, clean_environment, poll
from service import Service
from visiting import Answer, Broken, Connection
from watching import get, run_agent, run_core, sample, samples

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]
TWO = "-workers=2"


def workers_of(core: RunningCore, host: str = "app.localhost") -> Counter[int]:
    return Counter(record["worker"] for record in core.find("request", host=host))


def total(core: RunningCore, name: str, **labels: str) -> float:
    return sample(core.metrics, name, **labels)


# A link to each -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", ["true", "false"])
def test_an_agent_has_a_link_to_each_worker(
    start_core: Start, start_agent: StartAgent, start_service: StartService, tls: str
) -> None:
    core, service = start_core("-workers=3", f"-agent-tls={tls}", "-max-connections=1"), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    wait_links(core, 3)
    links = core.find("agent connected")
    assert {record["worker"] for record in links} == {0, 1, 2}
    poll(lambda: {record["server_worker"] for record in agent.find("authenticated")} == {0, 1, 2}, "it knows them")
    assert all(record["remote"].startswith("127.0.0.1:") for record in links)
    assert len(agent.find("tunnel ready")) == 1  # said once
    # It counts once: for the limit, and on the page.
    assert total(core, "tunnel_connections_active") == 1
    assert total(core, "tunnel_connections_total") == 3
    assert total(core, "tunnel_connections_limit") == 1
    assert not agent.find("link given up")
    status, ready = get(agent.metrics, "/readyz")
    assert status == 200 and "3 of 3 links" in ready
    # Another one is one too many, wherever it lands.
    other = start_agent(core, service.url, "-subdomain=other", agent_id="other", ready=False)
    refused = other.wait_for("connection refused")
    assert refused["reason"] == "too_many_connections"


def test_what_is_said_once(
    tmp_path: Path, start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core = start_core(TWO, "-name-hold=1s", f"-invite-dir={tmp_path}")
    assert (tmp_path / "token").read_text().strip() == core.token
    agent = start_agent(core, start_service().url, "-subdomain=app")
    wait_links(core, 2)
    for msg in ("core ready", "first start: connect an agent with this command"):
        assert len(core.find(msg)) == 1, msg
    agent.close()
    core.wait_for("name is free again", timeout=20, tunnel="app")
    core.terminate()
    core.wait()
    assert len(core.find("name is free again")) == len(core.find("draining")) == len(core.find("stopped")) == 1
    assert core.records[-1]["msg"] == "stopped"


def test_a_worker_shows_its_number_and_no_secret(start_core: Start) -> None:
    core = start_core(TWO, "-jwt-secret=eyes-only-0123456789abcdef0123456789")
    shown = {number: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for number, pid in pids(core).items()}
    assert {number: line[-5:-1] for number, line in shown.items()} == {
        number: [b"-m", b"tunnel.core", b"worker", b"%d" % number] for number in range(2)
    }


COMMAND = Path(sys.executable).with_name("tunnel")  # the installed one


@pytest.mark.parametrize("start", [[str(COMMAND)], ["-m", "tunnel"]], ids=["tunnel", "python -m tunnel"])
def test_workers_start_however_the_program_was_started(
    tmp_path: Path, start_core: Start, start_agent: StartAgent, start_service: StartService, start: list[str]
) -> None:
    directory = None
    if start == [str(COMMAND)]:  # then nothing is imported from where it happens to run
        directory = tmp_path
        for name in ("trio.py", "tunnel.py"):
            (tmp_path / name).write_text("raise SystemExit('not this one')")
    core = start_core(TWO, start=[*start, "core"], directory=directory)
    assert sorted(pids(core)) == [0, 1]
    options = {"start": [*start, "agent"], "directory": directory}
    agent = start_agent(core, start_service().url, "-subdomain=app", TWO, **options)
    wait_links(core, 4)
    assert sorted(pids(agent)) == [0, 1]


def test_a_slip_in_the_name_of_the_variable_makes_no_worker() -> None:
    for run, name in ((run_core, "TUNNEL_WORKER"), (run_agent, "AGENT_WORKER")):
        code, _, error = run(**{name: "2"})
        assert code == 2
        assert f"unknown environment variable {name}; did you mean {name}S?" in error and "Traceback" not in error


def test_a_revoked_token_ends_all_its_links(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core = start_core(TWO)
    token = core.new_token("acme")
    agent = start_agent(core, start_service().url, "-subdomain=app", token=token)
    wait_links(core, 2)
    listed = core.command("token", "list", "acme").stdout
    match = re.search(r"^(\w{8,})\s", listed, re.M)
    assert match is not None, listed
    core.command("token", "revoke", match[1])
    agent.expected_code = 1
    assert agent.wait(20) == 1
    assert len(agent.find("giving up")) == 1
    poll(lambda: len(core.find("agent disconnected")) == 2, "both links have ended")


def test_connections_that_come_together_are_shared_out(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(TWO), start_service()
    start_agent(core, service.url, "-subdomain=app")
    wait_links(core, 2)
    with ExitStack() as stack:
        visitors = [stack.enter_context(Connection(core.public, "app.localhost")) for _ in range(60)]
        for visitor in visitors:
            visitor.send(visitor.request("GET /echo"))
        assert {visitor.read().status for visitor in visitors} == {200}
        poll(lambda: len(core.find("request")) == 60, "the log is written")
    counts = workers_of(core)
    assert min(counts[0], counts[1]) >= 15, counts


# One of them is killed ------------------------------------------------------------------------------------------


def test_a_killed_worker_takes_no_request_with_it_but_its_own(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(TWO), start_service()
    start_agent(core, service.url, "-subdomain=app")
    wait_links(core, 2)
    seen = core.mark()
    pages: list[float] = []
    with Visitors(core, 10) as load:
        load.wait(300)
        pages.append(total(core, "tunnel_request_outcomes_total", outcome="ok"))
        os.kill(pids(core)[0], signal.SIGKILL)
        killed = time.monotonic() + 0.05  # by then it is surely gone
        load.wait(300)
        pages.append(total(core, "tunnel_request_outcomes_total", outcome="ok"))
        ended = core.wait_for("worker ended")
        assert (ended["worker"], ended["error"]) == (0, "killed by SIGKILL")
        core.wait_for("agent connected", after=seen, worker=0)
        load.wait(300)
        pages.append(total(core, "tunnel_request_outcomes_total", outcome="ok"))
    assert set(load.answered.values()) == {200}
    # What failed was under way on the killed one: on a connection from before, whose earlier requests it had answered.
    poll(lambda: len(core.find("request", after=seen)) >= len(load.answered) - 200, "the log is written")
    homes = {record["request_id"].rpartition("-")[0]: record["worker"] for record in core.find("request", after=seen)}
    assert len(load.failed) <= 10
    for request_id, opened, what in load.failed:
        assert opened < killed, what
        assert homes.get(request_id.rpartition("-")[0], 0) == 0, (request_id, what)
    # Both serve again, and nothing on the page has gone backwards.
    after = core.records[-200:]
    assert {record["worker"] for record in after if record["msg"] == "request"} == {0, 1}
    assert pages == sorted(pages)
    assert total(core, "tunnel_worker_restarts_total") == 1
    assert get(core.metrics, "/readyz")[0] == 200


def test_a_replaced_worker_serves_before_it_has_a_link(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    """The agent stands still, so nobody dials the new worker; visitors who land there are passed on."""
    core, service = start_core(TWO, "-heartbeat-timeout=60s"), start_service()
    agent = start_agent(core, service.url, "-subdomain=app", "-heartbeat-timeout=60s")
    wait_links(core, 2)
    held = Connection(core.public, "app.localhost")
    assert held.ask("GET /echo").status == 200
    agent.stop()
    os.kill(pids(core)[0], signal.SIGKILL)
    core.wait_for("worker ended")
    poll(lambda: total(core, "tunnel_workers_active") == 2, "it is replaced", 20)
    with ExitStack() as stack:
        waiting = [stack.enter_context(Connection(core.public, "app.localhost")) for _ in range(20)]
        for visitor in waiting:
            visitor.send(visitor.request("GET /echo"))
        agent.cont()
        assert [visitor.read().status for visitor in waiting] == [200] * 20
    held.close()


def test_a_worker_that_hangs_in_a_crash_loop_is_waited_for_longer(start_core: Start) -> None:
    core = start_core(TWO)
    for turn in range(1, 4):
        poll(lambda: total(core, "tunnel_workers_active") == 2, "all are there", 20)
        os.kill(pids(core)[1], signal.SIGKILL)
        poll(lambda turn=turn: len(core.find("worker ended")) == turn, "it is seen")  # type: ignore[misc]
    waits = [float(record["wait"].removesuffix("s")) for record in core.find("worker ended")]
    assert waits[0] == 0 and waits == sorted(waits) and waits[-1] > 0.5
    assert get(core.metrics, "/healthz")[0] == 200


def test_one_worker_is_drained_and_replaced(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(TWO), start_service()
    start_agent(core, service.url, "-subdomain=app")
    wait_links(core, 2)
    seen = core.mark()
    with Visitors(core, 8) as load:
        load.wait(200)
        os.kill(pids(core)[1], signal.SIGTERM)
        core.wait_for("agent connected", after=seen, worker=1, timeout=20)
        load.wait(200)
    assert set(load.answered.values()) == {200}
    # A kept connection may be closed between two requests, which HTTP allows at any time; nothing else fails.
    assert all(not request_id.endswith("-0") for request_id, _, _ in load.failed), load.failed
    assert len(load.failed) <= 8


# Visitors who land where there is no link ------------------------------------------------------------------------


@pytest.fixture
def old(start_core: Start, start_service: StartService, ending: ExitStack) -> tuple[RunningCore, Service]:
    """A core whose only agent has a single link, at one of the two."""
    core, service = start_core(TWO), start_service()
    agent = OldAgent(core, f"app={service.url}")
    ending.callback(agent.close)
    return core, service


def test_an_old_agent_is_served_through_both_workers(old: tuple[RunningCore, Service]) -> None:
    core, service = old
    home = core.wait_for("agent connected")["worker"]
    body = os.urandom(300_000)
    for at in range(30):
        with Connection(core.public, "app.localhost") as visitor:
            assert visitor.ask(f"GET /echo?{at}").status == 200
            assert visitor.ask("POST /echo", body=body).body == body
            assert visitor.ask("GET /chunked?parts=3&size=10").body == visitor.ask("GET /chunked?parts=3&size=10").body
    # Half of the connections came to the other one; each request is told and counted once, where its link is.
    poll(lambda: len(core.find("request")) == 120, "the log is written")
    assert workers_of(core) == {home: 120}
    assert total(core, "tunnel_request_outcomes_total", outcome="ok") == 120
    assert total(core, "tunnel_request_duration_seconds_count") == 120
    assert {received.fields and dict(received.fields)["X-Forwarded-For"] for received in service.requests} == {
        "127.0.0.1"
    }


def test_a_visitor_without_a_tunnel_gets_one_answer(old: tuple[RunningCore, Service]) -> None:
    core, _ = old
    for _ in range(10):
        with Connection(core.public, "nobody.localhost") as visitor:
            assert visitor.ask("GET /").outcome == "no_tunnel"
    assert total(core, "tunnel_request_outcomes_total", outcome="no_tunnel") == 10


def test_pipelined_requests_and_long_answers_go_with_the_connection(old: tuple[RunningCore, Service]) -> None:
    core, _ = old
    for _ in range(10):
        with Connection(core.public, "app.localhost") as visitor:
            visitor.send(visitor.request("GET /echo?1") * 3)
            assert [visitor.read().status for _ in range(3)] == [200] * 3
            visitor.send(visitor.request("GET /upgrade", "Connection: Upgrade", "Upgrade: echo"))
            assert visitor.read_head().status == 101
            visitor.send(b"hello")
            assert visitor.exactly(5) == b"hello"


def test_under_tls_the_bytes_are_passed_on(
    tmp_path: Path, start_core: Start, start_service: StartService, ending: ExitStack
) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("app.localhost")
    (tmp_path / "cert.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    (tmp_path / "key.pem").write_bytes(issued.private_key_pem.bytes())
    core = start_core(
        TWO, "-public-tls", f"-public-cert={tmp_path / 'cert.pem'}", f"-public-key={tmp_path / 'key.pem'}"
    )
    service = start_service()
    ending.callback(OldAgent(core, f"app={service.url}").close)
    home = core.wait_for("agent connected")["worker"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    body = os.urandom(900_000)
    for _ in range(12):
        with Connection(core.public, "app.localhost") as visitor:
            visitor.sock = context.wrap_socket(visitor.sock, server_hostname="app.localhost")
            answers: list[Answer] = [visitor.ask("GET /echo"), visitor.ask("POST /echo", body=body)]
            assert [answer.status for answer in answers] == [200, 200]
            assert answers[1].body == body
    poll(lambda: len(core.find("request")) == 24, "the log is written")
    assert workers_of(core) == {home: 24}
    forwarded = [dict(received.fields)["X-Forwarded-Proto"] for received in service.requests]
    assert set(forwarded) == {"https"}


def test_what_is_odd_about_a_certificate_is_said_once(tmp_path: Path, start_core: Start) -> None:
    pair = tmp_path / "pair.pem"
    trustme.CA().issue_cert("other.example").private_key_and_cert_chain_pem.write_to_path(pair)
    core = start_core(TWO, f"-public-cert={pair}", f"-public-key={pair}")
    assert len(core.find("no certificate is for the tunnels' names")) == 1


def test_an_answer_that_breaks_off_breaks_off_behind_the_other_worker_too(old: tuple[RunningCore, Service]) -> None:
    core, _ = old
    for _ in range(10):
        with Connection(core.public, "app.localhost") as visitor:
            visitor.send(visitor.request("GET /break-length"))
            answer = visitor.read_head()
            assert answer.status == 200
            with pytest.raises(Broken):
                visitor.exactly(int(answer["content-length"]))


def test_a_full_link_is_no_reason_to_refuse_while_another_worker_has_room(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(TWO, "-max-streams=4", "-tcp-ports=0"), start_service()
    host, number = address(service.url)
    agent = start_agent(core, f"app={service.url},raw=tcp://{host}:{number}")
    wait_links(core, 2)
    with ExitStack() as stack:
        held = [stack.enter_context(Connection(core.public, "app.localhost")) for _ in range(8)]
        for at, visitor in enumerate(held):
            visitor.send(visitor.request("GET /hold"))
            poll(lambda at=at: service.begun.count("/hold") == at + 1, "it is served")  # type: ignore[misc]
        with Connection(core.public, "app.localhost") as late:
            assert late.ask("GET /echo").outcome == "overloaded"
        with socket.create_connection(("127.0.0.1", address(agent.tunnels["raw"])[1]), 5) as raw:
            assert not raw_answer(raw)
        service.release.set()
        assert [visitor.read().status for visitor in held] == [200] * 8
        raws = []
        for _ in range(8):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", address(agent.tunnels["raw"])[1]), 5))
            assert raw_answer(raw)
            raws.append(raw)
    assert sample(core.metrics, "tunnel_limit_refusals_total", limit="link_streams") == 2


def raw_answer(raw: socket.socket) -> bool:
    """Whether a TCP tunnel's connection is served; it stays open."""
    try:
        raw.sendall(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
        return raw.recv(65536).startswith(b"HTTP/1.1 200")
    except ConnectionError:
        return False


def is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


# TCP ------------------------------------------------------------------------------------------------------------


def test_a_tcp_port_is_shared_and_survives(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(TWO, "-tcp-ports=0"), start_service()
    host, number = address(service.url)
    agent = start_agent(core, f"raw=tcp://{host}:{number}")
    wait_links(core, 2)
    port = address(agent.tunnels["raw"])[1]
    assert {record["port"] for record in core.find("tcp port opened")} == {port}

    def ask() -> bool:
        with socket.create_connection(("127.0.0.1", port), 5) as raw:
            raw.sendall(b"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return raw.recv(65536).startswith(b"HTTP/1.1 200")

    assert all(ask() for _ in range(10))
    seen = core.mark()
    os.kill(pids(core)[1], signal.SIGKILL)
    core.wait_for("worker ended")
    assert all(ask() for _ in range(10))
    core.wait_for("tcp port opened", after=seen, worker=1, timeout=20)
    assert {record["port"] for record in core.find("tcp port opened")} == {port}
    assert all(ask() for _ in range(10))
    # The last link's end closes it, and the name gets the same port again.
    agent.close()
    poll(lambda: not is_open(port), "the port is closed")
    again = start_agent(core, f"raw=tcp://{host}:{number}")
    assert address(again.tunnels["raw"])[1] == port


# One page -------------------------------------------------------------------------------------------------------


def test_the_page_says_what_an_independent_client_counted(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(TWO), start_service()
    start_agent(core, service.url, "-subdomain=app")
    wait_links(core, 2)
    sent = received = 0
    statuses: Counter[int] = Counter()
    for at in range(60):
        with Connection(core.public, "app.localhost") as visitor:
            body = b"x" * (at * 100)
            answer = visitor.ask("POST /echo", body=body)
            statuses[answer.status] += 1
            sent, received = sent + len(body), received + len(answer.body)
            statuses[visitor.ask(f"GET /status/{503 if at % 3 else 404}").status] += 1
    page = samples(core.metrics)
    for status, count in statuses.items():
        assert page["tunnel_requests_total", frozenset({("code", str(status))})] == count
    assert sum(value for (name, _), value in page.items() if name == "tunnel_requests_total") == 120
    assert page["tunnel_request_size_bytes_sum", frozenset()] == sent
    assert page["tunnel_request_duration_seconds_count", frozenset()] == 120
    assert page["tunnel_request_duration_seconds_bucket", frozenset({("le", "+Inf")})] == 120
    assert page["tunnel_bytes_total", frozenset({("direction", "in")})] == sent
    assert page["tunnel_streams_total", frozenset()] == 120
    assert page["tunnel_streams_active", frozenset()] == 0
    assert page["tunnel_workers_active", frozenset()] == 2
    states = [labels for name, labels in page if name == "tunnel_connection_state"]
    assert len(states) == 2
    poll(lambda: sum(workers_of(core).values()) == 120, "the log is written")
    assert set(workers_of(core)) == {0, 1}  # or this test says nothing
    usage = {dict(labels)["type"]: value for (name, labels), value in page.items() if name == "tunnel_quota_usage"}
    assert (usage["connection"], usage["requests"], usage["bandwidth"]) == (1, 120, sent + received + _bodies(page))


def _bodies(page: dict[tuple[str, frozenset[tuple[str, str]]], float]) -> float:
    """Body bytes of the answers beside the echoes."""
    return page["tunnel_response_size_bytes_sum", frozenset()] - page["tunnel_request_size_bytes_sum", frozenset()]


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
def test_the_page_is_well_formed(
    start_core: Start, start_agent: StartAgent, start_service: StartService, accept: str
) -> None:
    core = start_core(TWO, "-go-metric-names")
    start_agent(core, start_service().url, "-subdomain=app")
    with Connection(core.public, "app.localhost") as visitor:
        assert visitor.ask("GET /echo").status == 200
    status, text = get(core.metrics, "/metrics", accept=accept)
    assert status == 200
    if accept.startswith("text"):
        promtool = shutil.which("promtool")
        assert promtool is not None, "promtool is not installed: apt-get install prometheus"
        done = subprocess.run([promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        from prometheus_client.openmetrics.parser import text_string_to_metric_families

        names = [family.name for family in text_string_to_metric_families(text)]
        assert len(names) == len(set(names)) > 40


def test_agents_pages_and_health_are_of_all_workers(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core = start_core(TWO)
    start_agent(core, start_service().url, "-subdomain=app", "-metrics-report-interval=1s")
    wait_links(core, 2)
    for _ in range(8):
        with Connection(core.public, "app.localhost") as visitor:
            assert visitor.ask("GET /echo").status == 200

    def reported() -> bool:
        return sum(
            value for (name, _), value in samples(core.metrics, "/metrics/agents").items()
            if name == "agent_requests_total"
        ) == 8  # fmt: skip

    poll(reported, "the agent's report has come", 15, 0.2)
    page = samples(core.metrics, "/metrics/agents")
    assert [value for (name, _), value in page.items() if name == "agent_connection_active"] == [1]
    for path in ("/healthz", "/readyz", "/health", "/health/detailed"):
        assert get(core.metrics, path)[0] == 200, path
    assert '"workers":{"ok":true,"reason":"2 of 2 workers serve"}' in get(core.metrics, "/readyz")[1]

    def details() -> dict[str, Any]:
        return dict(json.loads(get(core.metrics, "/health/detailed")[1])["details"])

    poll(lambda: len(details()["tunnels"].get("app", {})) == 2, "both links are probed", 15, 0.2)
    found = details()
    assert set(found) == {"tunnels", "tracing", "logs"}  # those of a core without workers
    assert all(probe["up"] for probe in found["tunnels"]["app"].values())
    assert found["tracing"]["exporting"] is False and found["logs"]["dropped"] == 0
    checks = set(json.loads(get(core.metrics, "/readyz")[1])["checks"]) - {"workers"}  # all that workers have
    page = samples(core.metrics)
    shown = {dict(labels)["check"]: value for (name, labels), value in page.items() if name == "tunnel_readiness_check"}
    assert shown == dict.fromkeys(checks, 1)
    status = get(core.dashboard, "/status")[1]
    assert status.count('"name":"app"') == 1 and '"worker":0' in status and '"worker":1' in status


# One log --------------------------------------------------------------------------------------------------------


def test_lines_do_not_mix_where_the_output_is_slow(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    """The reader of a small pipe stands still for a while: lines wait or are dropped, whole ones."""
    core = start_core(TWO, "-log-level=debug")
    start_agent(core, start_service().url, "-subdomain=app")
    wait_links(core, 2)
    with Visitors(core, 12, f"GET /echo?{'x' * 3000}", pause=0) as load:
        load.wait(2000, 60)
    assert not load.failed
    poll(lambda: len(core.find("request")) >= len(load.answered), "the log is written", 20)
    assert core.other_lines == []
    assert Counter(record["request_id"] for record in core.find("request")).most_common(1)[0][1] == 1
    assert {record["worker"] for record in core.find("request")} == {0, 1}


@pytest.mark.parametrize("is_json", [True, False])
def test_a_reader_that_stops_costs_whole_lines_and_nothing_else(
    tmp_path: Path, start_agent: StartAgent, start_service: StartService, is_json: bool
) -> None:
    """Lines wait, up to 4 MiB of them, then they are dropped and counted; the workers go on."""
    ports = [free_port() for _ in range(4)]
    names = ("public", "agent", "metrics", "dashboard")
    flags = [f"-{name}-addr=127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tunnel.core", TWO, f"-log-json={str(is_json).lower()}", f"-data-dir={tmp_path}",
         "-agent-tls=false", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=clean_environment(),
    )  # fmt: skip
    metrics = ("127.0.0.1", ports[2])
    try:
        poll(lambda: is_open(ports[2]) and get(metrics, "/readyz")[0] == 200, "the core is ready", 30)
        core = cast(RunningCore, SimpleNamespace(agents=("", ports[1]), fingerprint="", public=("127.0.0.1", ports[0]),
                                                 token=(tmp_path / "default.token").read_text().strip()))  # fmt: skip
        start_agent(core, start_service().url, "-subdomain=app")
        with Visitors(core, 12, f"GET /echo/{'x' * 1900}", pause=0) as load:
            load.wait(3500, 120)
        assert not load.failed and set(load.answered.values()) == {200}
        poll(lambda: sample(metrics, "tunnel_logs_dropped_total") > 0, "records are dropped")
        assert sample(metrics, "tunnel_request_outcomes_total", outcome="ok") == len(load.answered)
        # Now somebody reads again.
        assert process.stdout is not None
        lines: list[bytes] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
        reader.start()
        poll(lambda: any(b"log records dropped" in line for line in lines), "it is said how many were lost", 20)
    finally:
        process.terminate()
        process.wait(20)
    reader.join(10)
    process.stdout.close()
    mark = b'"msg":"request"' if is_json else b" request method="
    requests = [line for line in lines if mark in line]
    assert 100 < len(requests) < len(load.answered)
    for line in requests:
        if is_json:
            assert json.loads(line)["worker"] in (0, 1)
        else:
            assert line.count(mark) == 1 and line.endswith((b" worker=0\n", b" worker=1\n"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def test_a_full_disk_costs_records_only(tmp_path: Path, start_agent: StartAgent, start_service: StartService) -> None:
    ports = [free_port() for _ in range(4)]
    names = ("public", "agent", "metrics", "dashboard")
    flags = [f"-{name}-addr=127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)]
    with Path("/dev/full").open("wb") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunnel.core", TWO, "-log-json", f"-data-dir={tmp_path}", "-agent-tls=false",
             *flags], stdout=full, env=clean_environment(),
        )  # fmt: skip
    metrics = ("127.0.0.1", ports[2])
    try:
        poll(lambda: is_open(ports[2]) and get(metrics, "/readyz")[0] == 200, "the core is ready", 30)
        core = cast(RunningCore, SimpleNamespace(agents=("", ports[1]), fingerprint="", public=("127.0.0.1", ports[0]),
                                                 token=(tmp_path / "default.token").read_text().strip()))  # fmt: skip
        start_agent(core, start_service().url, "-subdomain=app")
        with Visitors(core, 4) as load:
            load.wait(100)
        assert not load.failed and set(load.answered.values()) == {200}
        poll(lambda: sample(metrics, "tunnel_logs_dropped_total") >= len(load.answered), "the lost ones are counted")
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_text_lines_tell_their_worker(tmp_path: Path) -> None:
    flags = [f"-{name}-addr=127.0.0.1:0" for name in ("public", "agent", "metrics", "dashboard")]
    process = subprocess.Popen(
        [sys.executable, "-m", "tunnel.core", TWO, "-log-level=debug", f"-data-dir={tmp_path}", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=clean_environment(),
    )  # fmt: skip
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "core ready" in line:
                break
    finally:
        process.terminate()
        out, rest = process.communicate(timeout=20)
    lines += rest.splitlines(keepends=True)
    assert process.returncode == 0 and out == ""
    assert sum(line.endswith(" worker=0\n") for line in lines) and sum(line.endswith(" worker=1\n") for line in lines)


# Ends -----------------------------------------------------------------------------------------------------------


def test_drain_under_load(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(TWO, "-drain-delay=500ms"), start_service()
    start_agent(core, service.url, "-subdomain=app")
    wait_links(core, 2)
    with Visitors(core, 8, "GET /slow?ms=50") as load:
        load.wait(100)
        core.terminate()
        core.wait_for("draining")
        status, text = get(core.metrics, "/readyz")
        assert status == 503 and "shutting down" in text
        assert core.wait(20) == 0
    assert set(load.answered.values()) == {200}
    records = core.find("request")
    assert {record["outcome"] for record in records} == {"ok"}
    # Whatever a worker has begun, the visitor has got.
    assert {record["request_id"] for record in records} <= load.answered.keys()


@pytest.mark.parametrize("after", [0.0, 0.3, 0.6])
def test_a_drain_does_not_wait_for_a_worker_that_is_being_replaced(start_core: Start, after: float) -> None:
    core = start_core(TWO)
    os.kill(pids(core)[0], signal.SIGKILL)
    core.wait_for("worker ended")
    time.sleep(after)  # somewhere within the new one's start
    core.terminate()
    assert core.wait(10) == 0
    assert not [record for record in core.records if record["level"] == "ERROR" and record["msg"] != "worker ended"]


def test_a_second_signal_ends_all_now(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(TWO), start_service()
    start_agent(core, service.url, "-subdomain=app")
    with Connection(core.public, "app.localhost") as visitor:
        visitor.send(visitor.request("GET /hang"))
        service.wait_request("/hang")
        children = list(pids(core).values())
        core.terminate()
        core.wait_for("draining")
        began = time.monotonic()
        core.terminate()
        core.wait(10)
        assert time.monotonic() - began < 5
    poll(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "no worker is left")


def test_workers_end_without_their_supervisor(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(TWO), start_service()
    start_agent(core, service.url, "-subdomain=app")
    children = list(pids(core).values())
    core.kill()
    poll(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "no worker is left", 20)


def test_a_core_that_can_not_start_says_why_once(tmp_path: Path, start_core: Start) -> None:
    core = start_core()
    code, out, _ = run_core(TWO, "-log-json", f"-data-dir={tmp_path / 'b'}", f"-public-addr=127.0.0.1:{core.public[1]}",
                            "-agent-addr=127.0.0.1:0", "-metrics-addr=", "-dashboard-addr=")  # fmt: skip
    assert code == 2
    assert out.count("is in use by another program") == 1


def test_a_signal_to_all_of_them_keeps_the_delay(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    """As systemd sends it with KillMode=control-group: visitors are taken until the delay is over."""
    core, service = start_core(TWO, "-drain-delay=1s"), start_service()
    start_agent(core, service.url, "-subdomain=app")
    wait_links(core, 2)
    began = time.monotonic()
    for pid in [core.pid, *pids(core).values()]:
        os.kill(pid, signal.SIGTERM)
    core.wait_for("draining")
    while time.monotonic() - began < 0.7:
        with Connection(core.public, "app.localhost") as visitor:
            assert visitor.ask("GET /echo").status == 200
    assert core.wait(20) == 0
    assert not core.find("worker ended")


# Upgrade --------------------------------------------------------------------------------------------------------


def test_an_upgrade_loses_nothing(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(TWO, "-drain-timeout=5s"), start_service()
    start_agent(core, service.url, "-subdomain=app")
    wait_links(core, 2)
    seen = core.mark()
    with Visitors(core, 8, kept=20) as load:
        load.wait(200)
        core.signal(signal.SIGUSR2)
        pid = int(core.wait_for("upgrade: successor started", after=seen)["pid"])
        try:
            core.wait_for("core ready", after=seen, timeout=30)
            assert core.process.wait(30) == 0
            load.wait(200)
            load.end()
            assert get(core.metrics, "/readyz")[0] == 200
        finally:
            os.kill(pid, signal.SIGTERM)
            poll(lambda: len(core.find("stopped", after=seen)) == 2, "the successor has ended", 30)
    assert load.failed == []
    assert set(load.answered.values()) == {200}
    assert not core.find("upgrade: not all agents came")
    assert {record["outcome"] for record in core.find("request", after=seen)} == {"ok"}


def test_an_upgrade_may_change_the_number_of_workers(
    tmp_path: Path, start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    config = tmp_path / "core.toml"
    config.write_text("workers = 1\n")
    core, service = start_core(f"-config={config}", "-drain-timeout=3s", "-tcp-ports=0"), start_service()
    host, number = address(service.url)
    agent = start_agent(core, f"app={service.url},raw=tcp://{host}:{number}")
    port = address(agent.tunnels["raw"])[1]
    started = [core.pid]
    try:
        with Visitors(core, 6, kept=20) as load:
            for workers in (3, 2, 1):
                load.wait(60)
                config.write_text(f"workers = {workers}\n")
                seen = core.mark()
                os.kill(started[-1], signal.SIGUSR2)
                started.append(int(core.wait_for("upgrade: successor started", after=seen)["pid"]))
                core.wait_for("core ready", after=seen, timeout=30)
                core.wait_for("stopped", after=seen, timeout=30)
                poll(lambda: not is_running(started[-2]), "the old one has ended", 20)
                wait_links(core, workers, after=seen)
                with socket.create_connection(("127.0.0.1", port), 5) as raw:
                    assert raw_answer(raw)
            load.wait(60)
            load.end()
        assert load.failed == [] and set(load.answered.values()) == {200}
        assert total(core, "tunnel_connections_active") == 1
    finally:
        os.kill(started[-1], signal.SIGTERM)
        poll(lambda: not is_running(started[-1]), "the last one has ended", 20)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
