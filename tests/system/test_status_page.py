"""The status page of real cores, of one process and of several: failed requests are found by the ids on error pages."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from crewing import pids, wait_links
from running import RunningAgent, RunningCore, poll
from service import Service
from visiting import Connection
from watching import get

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[..., Service]

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
NOBODY = "http://127.0.0.1:9"  # discard: nobody listens there


def page(core: RunningCore, path: str = "/") -> str:
    code, text = get(core.dashboard, path, Accept=BROWSER)
    assert code == 200 and text.startswith("<!doctype html>")
    return text


def status(core: RunningCore) -> dict[str, Any]:
    code, text = get(core.dashboard, "/status")
    assert code == 200
    found: dict[str, Any] = json.loads(text)
    return found


def ask(core: RunningCore, host: str, line: str, *fields: str) -> tuple[int, str]:
    """Status and request id of an answer to a connection of its own."""
    with Connection(core.public, host) as visitor:
        answer = visitor.ask(line, *fields)
    return answer.status, answer["x-request-id"]


def entry_of(text: str, request_id: str) -> str:
    found = re.findall(rf'<li [^>]*id="{request_id}".*?</li>', text, re.DOTALL)
    assert len(found) == 1, text
    return str(found[0])


@pytest.mark.parametrize("workers", [(), ("-workers=2",)])
def test_a_failed_request_is_found_by_the_id_on_its_error_page(
    start_core: Start, start_agent: StartAgent, start_service: StartService, workers: tuple[str, ...]
) -> None:
    core = start_core(*workers)
    empty = page(core)
    assert "No agent is connected" in empty and "None since this core has started" in empty
    agent = start_agent(core, f"app={start_service().url},down={NOBODY}")
    if workers:
        wait_links(core, 2)
    with Connection(core.public, "down.localhost") as visitor:
        answer = visitor.ask("GET /buy?card=4242", f"Accept: {BROWSER}")
    shown = re.search(r"Request id</dt><dd><code>(\w+)</code>", answer.body.decode())
    assert answer.status == 502 and shown is not None
    entry = entry_of(page(core, "/status"), shown[1])
    for said in (
        "502 local_refused",
        "GET down.localhost/buy",
        "whose side: local service",
        "Connection refused",
        agent.id,
    ):
        assert said in entry, (said, entry)
    assert "4242" not in page(core)
    ids = [ask(core, f"nobody{at}.localhost", "GET /") for at in range(12)]  # some came to each worker
    ids += [ask(core, "app.localhost", "GET /status/500") for _ in range(12)]
    assert ask(core, "app.localhost", "GET /echo")[0] == 200
    now = status(core)
    # In the order in which they ended, which may be another one than that of their answers.
    noted = {(one["status"], one["request_id"]) for one in now["failures"]}
    assert noted == {(502, shown[1]), *ids} and len(now["failures"]) == 25
    assert now["requests"] == {
        "total": 26, "failed": 13, "outcomes": {"ok": 13, "no_tunnel": 12, "local_refused": 1}
    }  # fmt: skip
    assert {one["worker"] for one in now["failures"]} == ({0, 1} if workers else {0})
    assert len(now["links"]) == (2 if workers else 1)
    for link in now["links"]:
        assert link["remote"].startswith("127.0.0.1:") and 0 <= time.time() - link["since"] < 60
        assert link["connection_id"] in page(core) and link["remote"] in page(core)


def test_what_a_worker_knew_outlives_it(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core = start_core("-workers=2")
    start_agent(core, start_service().url, "-subdomain=app")
    wait_links(core, 2)
    ids = [ask(core, "nobody.localhost", "GET /")[1] for _ in range(12)]
    assert {one["worker"] for one in status(core)["failures"]} == {0, 1}
    mark = core.mark()
    for number, pid in pids(core).items():
        os.kill(pid, signal.SIGTERM)  # it drains, and another one takes its place
        poll(lambda n=number, old=pid: pids(core).get(n, old) != old, "there is another worker", 20)
    wait_links(core, 2, after=mark)
    poll(lambda: len(status(core)["failures"]) == 12, "the last words were heard", 10)
    now = status(core)
    assert sorted(one["request_id"] for one in now["failures"]) == sorted(ids)
    assert now["requests"]["outcomes"] == {"no_tunnel": 12}


@pytest.mark.parametrize("workers", [(), ("-workers=2",)])
def test_a_core_that_drains_says_so(
    start_core: Start, start_agent: StartAgent, start_service: StartService, workers: tuple[str, ...]
) -> None:
    core = start_core("-drain-delay=0s", *workers)
    service = start_service()
    start_agent(core, service.url, "-subdomain=app")
    assert "✓ ready" in page(core)
    with Connection(core.public, "app.localhost") as visitor:
        visitor.send(visitor.request("GET /hang"))
        service.wait_request("/hang")
        core.terminate()
        core.wait_for("draining")
        poll(lambda: "✗ not ready" in page(core), "the page says so", 5)
        assert "shutting down" in page(core)
    assert core.wait() == 0


def test_hostile_requests_leave_text(start_core: Start) -> None:
    core = start_core()
    ask(core, "app.localhost", "GET /<script>alert(1)</script>", 'X-Request-Id: "><img/src=x>')
    ask(core, "app.localhost", f"GET /{'y' * 3000}", "X-Request-Id: tunnels")
    with socket.create_connection(core.public, 5) as raw:
        raw.sendall(b"\x16\x03\x01 <b>hello</b>\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    text = page(core)
    assert "<script>" not in text and "<img" not in text and "<b>hello" not in text and "y" * 400 not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and text.count('id="tunnels"') == 1


def test_no_other_name_and_no_other_site(start_core: Start) -> None:
    core = start_core()
    port = core.dashboard[1]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", f"192.0.2.1:{port}"):
        assert get(core.dashboard, "/", Accept=BROWSER, Host=host)[0] == 403, host
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"):
        assert get(core.dashboard, "/", Accept=BROWSER, Host=host)[0] == 200, host
    assert get(core.dashboard, "/status", Origin="http://evil.example")[0] == 403


def test_a_tcp_connection_that_failed_is_there_too(start_core: Start, start_agent: StartAgent) -> None:
    core = start_core("-tcp-ports=0")
    agent = start_agent(core, "db=tcp://127.0.0.1:9")
    port = int(agent.tunnels["db"].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 5) as visitor, suppress(ConnectionResetError):
        assert visitor.recv(100) == b""
    poll(lambda: status(core)["failures"], "it is noted", 5)
    (one,) = status(core)["failures"]
    assert (one["method"], one["path"], one["tunnel"], one["outcome"]) == ("TCP", f"port {port}", "db", "local_refused")
    assert (one["failed"], one["agent_id"], status(core)["requests"]["total"]) == (True, agent.id, 0)


def test_other_paths_say_which_there_are(start_core: Start, start_agent: StartAgent) -> None:
    core = start_core()
    agent = start_agent(core, NOBODY)
    for where, some in ((core.metrics, "/metrics/agents"), (agent.metrics, "/metrics"), (core.dashboard, "/status")):
        code, text = get(where, "/nothing")
        assert code == 404 and some in text and "/readyz" in text
