"""Who may attach and under which name, on running programs: tokens, JWTs, accounts, names; also on PostgreSQL."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey
from running import RunningAgent, RunningCore, poll
from service import Service
from watching import ask, run_agent, sample

pytestmark = pytest.mark.system

HOLD = 1.0
SECRET = "a-secret-of-thirty-two-bytes-or-more"
StartAgent = Callable[..., RunningAgent]


@pytest.fixture(scope="module")
def private_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory, private_key: rsa.RSAPrivateKey) -> Iterator[RunningCore]:
    directory = tmp_path_factory.mktemp("accounts")
    (directory / "secret").write_text(SECRET + "\n")
    pem = private_key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (directory / "public.pem").write_bytes(pem)
    core = RunningCore(
        directory / "core",
        f"-name-hold={HOLD}s",
        f"-jwt-secret-file={directory / 'secret'}",
        f"-jwt-public-key={directory / 'public.pem'}",
    )
    yield core
    core.close()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


def account_id(core: RunningCore, name: str) -> str:
    made: str = json.loads(core.command("account", "create", name, "-json").stdout)["id"]
    return made


def new_token(core: RunningCore, account: str, *flags: str) -> tuple[str, str]:
    """(token, its id)"""
    core.command("account", "create", account, check=False)
    made = json.loads(core.command("token", "create", account, "-json", *flags).stdout)
    return made["token"], made["id"]


def attempt(core: RunningCore, token: str, *flags: str) -> tuple[int, list[dict[str, Any]]]:
    """An agent that is to give up by itself: its exit code and its ERROR records."""
    code, out, err = run_agent(
        "-log-json", f"-server=127.0.0.1:{core.agents[1]}", f"-server-fingerprint={core.fingerprint}",
        "-local=http://127.0.0.1:9", "-metrics-addr=", *flags, AGENT_TOKEN=token,
    )  # fmt: skip
    assert not err
    return code, [record for line in out.splitlines() if (record := json.loads(line))["level"] == "ERROR"]


def ended_for(agent: RunningAgent, reason: str) -> None:
    """The agent gave up for this reason, with one line about it."""
    agent.expected_code = 1
    assert agent.wait(5) == 1
    errors = [record for record in agent.records if record["level"] == "ERROR"]
    assert [record["msg"] for record in errors] == ["giving up"]
    assert reason in errors[0]["error"], errors


# Credentials -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "reason", "words"),
    [
        ("", "missing_token", "no token was given; give one with -token-file"),
        ("tt_" + "x" * 43, "bad_token", "not known here"),
        ("no-token-at-all", "bad_token", "neither one of this server's nor a JWT"),
    ],
)
def test_bad_credentials_end_the_agent(core: RunningCore, token: str, reason: str, words: str) -> None:
    before, mark = sample(core.metrics, "tunnel_authentication_failures_total", reason=reason), core.mark()
    code, errors = attempt(core, token)
    assert code == 1
    assert len(errors) == 1 and words in errors[0]["error"], errors
    assert core.wait_for("authentication failed", reason=reason, after=mark)["level"] == "WARNING"
    assert sample(core.metrics, "tunnel_authentication_failures_total", reason=reason) == before + 1


def test_revoking_a_token_ends_its_link(core: RunningCore, service: Service, start_agent: StartAgent) -> None:
    token, id = new_token(core, "revoking")
    other, _ = new_token(core, "revoking")
    agent = start_agent(core, service.url, "-subdomain=revoking", token=token)
    stays = start_agent(core, service.url, "-subdomain=staying", token=other, agent_id="stays")
    assert ask(core, "GET /echo", host="revoking.localhost").status == 200
    core.command("token", "revoke", id)
    revoked = time.monotonic()
    ended_for(agent, "revoked")
    assert time.monotonic() - revoked < 3
    assert ask(core, "GET /echo", host="revoking.localhost").status in (404, 503)
    assert stays.is_running and ask(core, "GET /echo", host="staying.localhost").status == 200
    code, errors = attempt(core, token)
    assert code == 1 and "revoked" in errors[0]["error"]
    assert token not in str(core.records) + str(errors)


def test_an_expired_token(core: RunningCore, service: Service, start_agent: StartAgent) -> None:
    token, _ = new_token(core, "expiring", "-expires=3s")
    agent = start_agent(core, service.url, "-subdomain=expiring", token=token)
    ended_for(agent, "expired")
    code, errors = attempt(core, token)
    assert code == 1 and "expired" in errors[0]["error"]


def test_a_disabled_account(core: RunningCore, service: Service, start_agent: StartAgent) -> None:
    token, _ = new_token(core, "disabling")
    agent = start_agent(core, service.url, "-subdomain=disabling", token=token)
    core.command("account", "disable", "disabling")
    disabled = time.monotonic()
    ended_for(agent, "disabled")
    assert time.monotonic() - disabled < 3
    assert attempt(core, token)[0] == 1
    core.command("account", "enable", "disabling")

    def is_let_in() -> bool:
        """The core looks into the store once a second; an agent that comes before gives up."""
        again = start_agent(core, service.url, "-subdomain=disabling", token=token, ready=False)
        poll(lambda: again.find("tunnel ready") or not again.is_running, "it is in, or has given up", 20)
        again.expected_code = 0 if again.is_running else 1
        return again.is_running

    poll(is_let_in, "an enabled account's agent is let in", 20)
    assert ask(core, "GET /echo", host="disabling.localhost").status == 200


# JWTs ------------------------------------------------------------------------------------------------------------


def claims(account: str, seconds: float) -> dict[str, Any]:
    return {"account_id": account, "agent_id": "jwt-agent", "exp": int(time.time() + seconds)}


def test_jwts(core: RunningCore, service: Service, start_agent: StartAgent, private_key: rsa.RSAPrivateKey) -> None:
    account = account_id(core, "jwt")
    pem = private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    hs256 = jwt.encode({"alg": "HS256"}, claims(account, 60), OctKey.import_key(SECRET))
    rs256 = jwt.encode({"alg": "RS256"}, claims(account, 60), RSAKey.import_key(pem))
    for number, token in enumerate((hs256, rs256)):
        start_agent(core, service.url, f"-subdomain=jwt{number}", token=token, agent_id="jwt-agent")
        assert ask(core, "GET /echo", host=f"jwt{number}.localhost").status == 200
    code, errors = attempt(core, hs256, "-agent-id=somebody-else")
    assert code == 1 and "another agent" in errors[0]["error"]
    forged = jwt.encode({"alg": "HS256"}, claims(account, 60), OctKey.import_key("x" * 32))
    assert attempt(core, forged, "-agent-id=jwt-agent")[0] == 1
    stale = jwt.encode({"alg": "HS256"}, claims(account, -5), OctKey.import_key(SECRET))
    code, errors = attempt(core, stale, "-agent-id=jwt-agent")
    assert code == 1 and "expired" in errors[0]["error"]


def test_a_jwt_that_expires_ends_its_link(core: RunningCore, service: Service, start_agent: StartAgent) -> None:
    account = account_id(core, "jwtexp")
    token = jwt.encode({"alg": "HS256"}, claims(account, 3), OctKey.import_key(SECRET))
    agent = start_agent(core, service.url, "-subdomain=jwtexp", token=token, agent_id="jwt-agent")
    ended_for(agent, "expired")


# Names -----------------------------------------------------------------------------------------------------------


def test_reserved_names(core: RunningCore, service: Service, start_agent: StartAgent) -> None:
    owner, _ = new_token(core, "owner")
    other, _ = new_token(core, "other")
    core.command("tunnel", "reserve", "shop", "owner")
    poll(lambda: ask(core, "GET /", host="shop.localhost").outcome == "no_agent", "the name is known", 5, 0.1)
    code, errors = attempt(core, other, "-subdomain=shop", "-max-retries=0")
    assert code == 1 and errors[0]["reason"] == "name_reserved"
    start_agent(core, service.url, "-subdomain=shop", token=owner)
    assert ask(core, "GET /echo", host="shop.localhost").status == 200


def test_a_fresh_account_claims_and_the_name_is_held(
    core: RunningCore, service: Service, start_agent: StartAgent
) -> None:
    first, _ = new_token(core, "claiming")
    other, _ = new_token(core, "waiting")
    agent = start_agent(core, service.url, "-subdomain=claimed", token=first)
    assert ask(core, "GET /echo", host="claimed.localhost").status == 200
    code, errors = attempt(core, other, "-subdomain=claimed", "-max-retries=0")
    assert code == 1 and errors[0]["reason"] == "name_taken"
    agent.kill()
    core.wait_for("agent disconnected", account_id=agent.wait_for("authenticated")["account_id"])
    answer = ask(core, "GET /echo", host="claimed.localhost")
    assert (answer.status, answer.outcome) == (503, "no_agent")
    # The hold, and the time for which the core remembers what the store said.
    poll(lambda: ask(core, "GET /", host="claimed.localhost").outcome == "no_tunnel", "it is free", HOLD + 4, 0.1)
    assert ask(core, "GET /", host="claimed.localhost").status == 404
    start_agent(core, service.url, "-subdomain=claimed", token=other)
    assert ask(core, "GET /echo", host="claimed.localhost").status == 200


@pytest.mark.parametrize("flags", [(), ("-workers=2",)], ids=["one process", "workers"])
def test_names_change_hands_at_once(
    flags: tuple[str, ...],
    service: Service,
    start_core: Callable[..., RunningCore],
    start_agent: StartAgent,
) -> None:
    """By a reservation, and when their account is deleted: no hold, and another core on the store does the same."""
    core = start_core(*flags, "-tcp-ports=0")
    beside = RunningCore(core.data_dir)
    try:
        tokens = {name: core.new_token(name) for name in ("old", "new", "gone")}
        agent = start_agent(core, service.url, "-subdomain=given", token=tokens["old"])
        there = start_agent(beside, service.url, "-subdomain=given", token=tokens["old"], agent_id="there")
        assert "account old, which served it last, loses it" in core.command("tunnel", "reserve", "given", "new").stderr
        for one in (agent, there):
            said = one.wait_for("connection refused", timeout=10)
            assert said["reason"] == "name_reserved" and "reserved for another account" in said["error"]
        start_agent(core, service.url, "-subdomain=given", token=tokens["new"], agent_id="new")
        assert ask(core, "GET /echo", host="given.localhost").status == 200

        agent = start_agent(core, "tcp://" + service.url.removeprefix("http://"), "-subdomain=lost",
                            token=tokens["gone"], agent_id="gone")  # fmt: skip
        held = start_agent(core, service.url, "-subdomain=held", token=tokens["gone"], agent_id="held")
        held.close()
        core.command("account", "delete", "gone")
        ended_for(agent, "no longer there")
        for name in ("lost", "held"):
            start_agent(core, service.url, f"-subdomain={name}", token=tokens["new"], agent_id=name)
            assert ask(core, "GET /echo", host=f"{name}.localhost").status == 200
        assert not core.find("name is free again")
    finally:
        beside.close()


def test_names_are_stable(core: RunningCore, service: Service, start_agent: StartAgent) -> None:
    token, _ = new_token(core, "stable")
    names: list[str] = []
    for _ in range(2):
        agent = start_agent(core, service.url, token=token)
        names += agent.tunnels
        agent.close()
    assert names[0] == names[1]
    assert names[0].replace("-", "").isalnum()


# PostgreSQL ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database_url() -> Iterator[str]:
    path = Path(__file__).parents[1] / "core" / "postgres.py"
    spec = importlib.util.spec_from_file_location("tests_core_postgres", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.PostgreSQL()
    yield server.database()
    server.remove()


def test_a_whole_run_on_postgresql(
    tmp_path: Path, database_url: str, service: Service, start_agent: StartAgent, start_core: Callable[..., RunningCore]
) -> None:
    # The URL holds a password: it goes by the environment, and nothing shows it.
    environment = {"TUNNEL_DATABASE_URL": database_url}
    core = start_core("-heartbeat=500ms", environment=environment)

    def command(*words: str) -> str:
        config = tmp_path / "core.toml"
        config.write_text(f'[database]\nurl = "{database_url}"\n')
        return core.command(f"-config={config}", *words).stdout

    command("account", "create", "acme")
    token, doomed = (command("token", "create", "acme").strip() for _ in range(2))
    agent = start_agent(core, service.url, "-subdomain=pg", token=token)
    victim = start_agent(core, service.url, "-subdomain=pg2", token=doomed, agent_id="victim")
    for _ in range(5):
        assert ask(core, "POST /upload", host="pg.localhost", body=b"x" * 100).status == 200
    command("token", "revoke", doomed[:9])
    ended_for(victim, "revoked")
    command("account", "limit", "acme", "-requests-per-second", "1", "-requests-burst", "1")
    poll(lambda: ask(core, "GET /echo", host="pg.localhost").outcome == "quota", "the limit holds", 5, 0.1)
    core.terminate()
    assert core.wait() == 0
    [usage] = json.loads(command("usage", "acme", "-json"))
    assert usage["requests"] >= 5 and usage["bytes_in"] == 500
    mark = agent.mark()
    again = core.again()
    try:
        agent.wait_for("tunnel ready", after=mark)
        poll(lambda: ask(again, "GET /echo", host="pg.localhost").status == 200, "served again", 5, 0.2)
    finally:
        again.close()
    everything = str(core.records) + core.error_text + str(again.records)
    assert database_url.split(":")[2].split("@")[0] not in everything
