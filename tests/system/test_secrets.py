"""Secrets never appear: both programs at level debug, good and failing authentication, requests that carry secrets.

Everything that leaves the programs is searched: their logs, every page they serve, the pages that visitors get, and
the spans that a real receiver got.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from acmeserver import AcmeServer, certificate_of
from joserfc import jwt
from joserfc.jwk import OctKey
from running import Address, RunningAgent, RunningCore, poll
from service import Service
from visiting import Connection
from watching import SpanTap, ask, get, run_agent, run_core, sample

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


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_process_titles_show_no_secret(
    tmp_path: Path, start_core: Callable[..., RunningCore], start_agent: Callable[..., RunningAgent]
) -> None:
    """Given as flags, with `=` and without; of workers and of a successor too."""
    jwt_secret, status = JWT_SECRET, "status-hush-0123456789"
    core = start_core("-jwt-secret", jwt_secret, f"-dashboard-token={status}", "-workers=2")
    token = core.token
    agent = start_agent(core, "http://127.0.0.1:9", f"-token={token}", environment={"AGENT_TOKEN": ""})
    for program, names in ((core, ["-jwt-secret", "-dashboard-token"]), (agent, ["-token"])):
        assert program.wait_for("a secret was given as a flag, which others could read for a moment: give it in a file "
                                "or the environment")["names"] == names  # fmt: skip
    pids = [core.pid, agent.pid, *children(core.pid)]
    assert len(pids) == 4
    for pid in pids:
        for secret in (jwt_secret, status, token):
            assert secret not in title(pid)
    assert "-dashboard-token=****" in title(core.pid) and "-workers=2" in title(core.pid)
    mark = core.mark()
    core.signal(signal.SIGUSR2)
    successor = core.wait_for("upgrade: successor started", after=mark)["pid"]
    try:
        poll(lambda: not core.is_running, "the old core has ended", 30)
        assert jwt_secret not in title(successor) and status not in title(successor), "it has them, and hides them"
        assert get(core.dashboard, "/status")[0] == 401
        assert get(core.dashboard, "/status", Authorization=f"Bearer {status}")[0] == 200
    finally:
        os.kill(successor, signal.SIGTERM)
        poll(lambda: len(core.find("stopped")) == 2, "the successor has ended", 20)
    for program in (core, agent):
        for secret in (jwt_secret, status, token):
            assert secret not in str(program.records)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:db-hush@127.0.0.1:1/x",
        "postgresql://127.0.0.1:1/x?user=u&password=db-hush",
        "postgresql://u:db-hush@/x?host=/no/such/place",
        "postgresql://u:db-hush@127.0.0.1:port/x",
        "postgresql://u:db-hush@[::1/x",
        "postgresql+psycopg://u:db%2Dhush@127.0.0.1:1/x",
        "sqlite:////proc/no/such/x.db?password=db-hush",
    ],
)
def test_a_database_that_is_away_shows_no_password(tmp_path: Path, url: str) -> None:
    said = ""
    flags = (f"-data-dir={tmp_path}", "-database-wait=0", "-log-json", "-log-level=debug", "-metrics-addr=",
             "-dashboard-addr=", "-public-addr=127.0.0.1:0", "-agent-addr=127.0.0.1:0")  # fmt: skip
    for words in ((), ("account", "list"), ("migrate",)):
        code, out, err = run_core(*flags, f"-database-url={url}", *words, timeout=60)
        assert code in (1, 2), (code, out, err)
        said += out + err
    code, out, err = run_core(*flags, TUNNEL_DATABASE_URL=url, timeout=60)
    assert code in (1, 2)
    said += out + err
    assert "hush" not in said, said


def test_wrong_dashboard_tokens_are_not_logged(start_core: Callable[..., RunningCore]) -> None:
    core = start_core("-log-level=debug", environment={"TUNNEL_DASHBOARD_TOKEN": "right-hush-0123456789"})
    said = ""
    for field in ("Bearer wrong-hush-1", "Basic d3Jvbmc6d3JvbmctaHVzaC0y", "Digest hush", "hush", "Bearer right-hush"):
        status, text = get(core.dashboard, "/status", Authorization=field)
        assert status == 401
        said += text
    said += get(core.dashboard, "/status?token=right-hush-0123456789")[1]
    assert get(core.dashboard, "/status", Authorization="Bearer right-hush-0123456789")[0] == 200
    said += get(core.dashboard, "/status", Authorization="Bearer right-hush-0123456789")[1]
    core.close()
    assert "hush" not in said + str(core.records) + core.error_text


def test_keys_of_certificates_are_not_logged(tmp_path: Path, start_core: Callable[..., RunningCore]) -> None:
    """Orders that work and orders that fail in several ways, at level debug: account key, keys, signatures, nonces."""
    server = AcmeServer(tmp_path / "authority")
    try:
        names = [f"n{number}.hush.test" for number in range(4)]
        core = start_core(
            "-public-tls", "-http-addr=127.0.0.1:0", "-acme-agree", f"-acme-directory={server.directory}",
            f"-acme-ca-cert={server.web_ca}", "-base-domain=hush.test", f"-acme-names={names[0]}", "-log-level=debug",
        )  # fmt: skip
        server.tell(http_port=core.http[1])
        core.wait_for("certificate issued", timeout=20)
        for name, told in zip(names[1:], ({"wrong_key": True}, {"html": True}, {"bad_nonces": 99}), strict=True):
            core.command("tunnel", "reserve", name.split(".")[0], "default")
            server.tell(wrong_key=False, html=False)
            server.tell(**told)
            certificate_of(core.public, name)
            core.wait_for("certificate not issued", host=name, timeout=20)
        core.close()
        said = str(core.records) + core.error_text
        files = [path for path in core.data_dir.rglob("*") if path.suffix in (".pem", ".key")]
        assert len(files) >= 4
        for path in files:
            for line in path.read_text().splitlines():
                assert line.startswith("-----") or line not in said, path
        assert "PRIVATE KEY" not in said and "eyJ" not in said
    finally:
        server.close()


@pytest.mark.parametrize(("mode", "is_said"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_token_file_that_others_can_read_is_said(
    tmp_path: Path,
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    mode: int,
    is_said: bool,
) -> None:
    core = start_core()
    file = tmp_path / "my token"
    file.write_text(core.token)
    file.chmod(mode)
    agent = start_agent(core, "http://127.0.0.1:9", "-subdomain=app", f"-token-file={file}")
    said = agent.find("token file can be read by others")
    assert len(said) == is_said
    for record in said:
        assert (record["level"], record["advice"]) == ("WARNING", f"chmod 600 '{file}'")


def test_files_are_their_owners_alone(
    tmp_path: Path,
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    """Whatever the umask is, in directories that the core makes itself."""
    server = AcmeServer(tmp_path / "authority")
    before = os.umask(0)
    try:
        data, invite = tmp_path / "new" / "deep" / "data", tmp_path / "invite" / "deep"
        core = start_core(
            f"-data-dir={data}", f"-invite-dir={invite}", "-dashboard-addr=0.0.0.0:0", "-public-tls",
            "-http-addr=127.0.0.1:0", "-acme-agree", f"-acme-directory={server.directory}",
            f"-acme-ca-cert={server.web_ca}", "-base-domain=hush.test", "-acme-names=www.hush.test", data_dir=data,
        )  # fmt: skip
        server.tell(http_port=core.http[1])
        start_agent(core, start_service().url, "-subdomain=app")
        core.new_token("acme")
        core.wait_for("certificate issued", timeout=20)
        rows = [path for top in (tmp_path / "new", tmp_path / "invite") for path in (top, *top.rglob("*"))]
        modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in rows}
        names = {path.name for path in rows}
        assert {"tunnel.db", "default.token", "dashboard.token", "agent-link.key", "account.key", "state.json",
                "www.hush.test.pem", "self-signed.key", "token", "fingerprint"} <= names  # fmt: skip
        wrong = {name: oct(mode) for name, mode in modes.items() if mode & 0o077}
        assert not wrong, wrong
    finally:
        os.umask(before)
        server.close()


def test_a_collectors_credentials_are_not_logged(
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    """In its address and in the fields that are sent to it; one that is dead, and one that refuses."""
    service = start_service()
    for endpoint in ("http://user:otel-hush@127.0.0.1:1", f"http://user:otel-hush@127.0.0.1:{service.port}/status/401"):
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20otel-hush,x-api-key=otel-hush",
        }
        core = start_core("-log-level=debug", environment=environment)
        agent = start_agent(core, service.url, "-subdomain=app", "-log-level=debug", environment=environment)
        for _ in range(5):
            assert ask(core, "GET /echo").status == 200
        poll(lambda core=core: sample(core.metrics, "tunnel_spans_dropped_total"), "spans are dropped", 20, 0.1)  # type: ignore[misc]
        said = pages(core.metrics, CORE_PAGES) + pages(core.dashboard, ("/status",))
        said += pages(agent.metrics, ("/metrics", "/health/detailed"))
        agent.close()
        core.close()
        for program in (core, agent):
            said += str(program.records) + "".join(program.other_lines) + program.error_text
        assert "otel-hush" not in said, said[max(0, said.index("otel-hush") - 400) :][:800]
