"""Secrets never appear: both programs at level debug, good and failing authentication, requests that carry secrets.

Everything that leaves the programs is searched: their logs, every page they serve, the pages that visitors get, and
the spans that a real receiver got.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import OctKey
from running import Address, RunningAgent, RunningCore, poll
from service import Service
from visiting import Connection
from watching import SpanTap, ask, get, run_agent, run_core

pytestmark = pytest.mark.system

JWT_SECRET = "jwt-hush-hush-0123456789-0123456789"
BAD_TOKEN = "tt_" + "WrongHushHushWrongHushHushWrongHushHush0000"
ODD_TOKEN = "neither-hush-nor-a-jwt"
BEARER, COOKIE, QUERY, PASSWORD = "bearer-hush-1", "cookie-hush-2", "query-hush-3", "userinfo-hush-4"

CORE_PAGES = ("/metrics", "/metrics/agents", "/healthz", "/readyz", "/health", "/health/detailed")


def pages(where: Address, paths: tuple[str, ...]) -> str:
    found = [get(where, path) for path in paths]
    assert all(status == 200 for status, _ in found), [status for status, _ in found]
    return "".join(text for _, text in found)


def refused(core: RunningCore, token: str, *flags: str) -> str:
    """All that an agent with a bad token says, and that it was told so."""
    code, out, err = run_agent(
        "-log-json", "-log-level=debug", f"-server=127.0.0.1:{core.agents[1]}", "-metrics-addr=",
        f"-server-fingerprint={core.fingerprint}", *flags, AGENT_TOKEN=token,
    )  # fmt: skip
    assert code == 1 and "giving up" in out
    return out + err


def test_no_secret_leaves(
    tmp_path: Path,
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    with SpanTap(tmp_path) as tap:
        debug = ("-log-level=debug", f"-tracing-endpoint={tap.endpoint}", "-metrics-report-interval=1s")
        environment = {"OTEL_BSP_SCHEDULE_DELAY": "100", "TUNNEL_JWT_SECRET": JWT_SECRET}
        core = start_core(*debug[:2], environment=environment)
        service = start_service()
        agent = start_agent(core, f"app={service.url},down=http://127.0.0.1:9", *debug, environment=environment)
        claims: dict[str, Any] = {"account_id": "nobody", "agent_id": "x", "exp": int(time.time()) + 60}
        good_jwt = jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(JWT_SECRET))
        said = refused(core, BAD_TOKEN) + refused(core, ODD_TOKEN) + refused(core, good_jwt)
        said += refused(core, "", f"-token={BAD_TOKEN}")
        pages_seen = visit(core)
        core.wait_for("request", outcome="local_refused")
        poll(lambda: "agent_requests_total" in get(core.metrics, "/metrics/agents")[1], "the agent's report", 10, 0.1)
        said += pages_seen + pages(core.metrics, CORE_PAGES) + pages(core.dashboard, ("/", "/status"))
        said += pages(agent.metrics, ("/metrics", "/healthz", "/readyz", "/health/detailed"))
        token = core.token
        poll(lambda: len(tap.spans) > 8, "spans", 10, 0.05)
        agent.close()
        core.close()
        said += str(tap.spans)
    for program in (core, agent):
        said += str(program.records) + "".join(program.other_lines) + program.error_text
    assert len(core.find("authentication failed")) == 4
    assert agent.find("local request", level="DEBUG")
    # The service got them, so they were really there to be shown.
    assert BEARER in str(service.requests) and COOKIE in str(service.requests) and QUERY in str(service.requests)
    for secret in (token, BAD_TOKEN, ODD_TOKEN, JWT_SECRET, good_jwt, BEARER, COOKIE, QUERY, PASSWORD):
        assert secret not in said, f"{secret} in {said[max(0, said.index(secret) - 300) :][:600]}"


def visit(core: RunningCore) -> str:
    """Requests with secrets in every place, answered, failing and malformed: the pages that came back."""
    fields = (f"Authorization: Bearer {BEARER}", f"Cookie: session={COOKIE}", f"Proxy-Authorization: Basic {BEARER}")
    target = f"/status/500?token={QUERY}&x=1"
    ask(core, f"GET {target}", *fields)
    ask(core, f"POST /echo?token={QUERY}", *fields, body=COOKIE.encode())
    ask(core, f"GET http://user:{PASSWORD}@app.localhost{target}", *fields)
    shown = b""
    for form in ("text/html", "application/json", "text/plain"):
        accept = f"Accept: {form}"
        for host in ("down.localhost", "nobody.localhost"):
            shown += ask(core, f"GET /x?token={QUERY}", accept, *fields, host=host).body
        shown += ask(core, f"TRACE /x?token={QUERY}", accept, *fields).body
        shown += ask(core, f"GET /x?token={QUERY}", accept, "Content-Length: 1", "Content-Length: 2", *fields).body
    with Connection(core.public, "app.localhost") as visitor:
        visitor.send(f"GET /x?token={QUERY} HTTP/1.1\r\nAuthorization {BEARER}\r\n\r\n".encode())
        shown += visitor.read().body
    return shown.decode()


def test_starts_that_fail_show_no_secret(tmp_path: Path) -> None:
    data = f"-data-dir={tmp_path / 'data'}"
    failed = [
        run_core(data, "-jwt-secret=hush"),
        run_core(data, "-nosuch", TUNNEL_JWT_SECRET="hush"),
        run_core(data, "-database-url=mysql://u:hush@h/x"),
        run_agent("-token=hush\tmore"),
        run_agent("-token", "hush", "stray"),
    ]
    for code, out, err in failed:
        assert code == 2 and "hush" not in out + err, (out, err)
    for code, out, err in (run_core("-help", TUNNEL_JWT_SECRET="hush"), run_agent("-help", AGENT_TOKEN="hush")):
        assert code == 0 and "hush" not in out + err
