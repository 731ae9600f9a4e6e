"""Accounts in a running core: authentication, changes noticed, usage that is neither lost nor doubled."""

import logging
import math
import shlex
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import trio
from joserfc import jwt
from joserfc.jwk import OctKey

from tunnel.core import records, tables
from tunnel.core.accounts import Accounts, Grant, ensure_default
from tunnel.core.first import agent_command, leave_invitation
from tunnel.core.quotas import TYPES, Use
from tunnel.core.registry import AgentLink, Registry
from tunnel.core.store import Store, StoreError
from tunnel.errors import ConfigError, Refused
from tunnel.handler import ConnectVisit, Handler, LinkVisit
from tunnel.link.link import Link

SECRET = "a secret of at least thirty-two bytes, surely"
DECEMBER = 1_796_083_200.0


class Admin:
    """What an administrator does, beside the running core."""

    def __init__(self, store: Store, now: Callable[[], float]) -> None:
        self.store = store
        self.now = now

    async def do(self, work: Callable[..., Any], *words: Any) -> Any:
        return await self.store.query("account.default", lambda conn: work(conn, *words), write=True)

    async def account(self, name: str = "acme") -> records.AccountRecord:
        record: records.AccountRecord = await self.do(records.create_account, name, self.now())
        return record

    async def token(self, account_id: str, expires_at: float | None = None) -> tuple[records.TokenRecord, str]:
        made: tuple[records.TokenRecord, str] = await self.do(
            records.create_token, account_id, "", self.now(), expires_at
        )
        return made


@pytest.fixture
def admin(store: Store, wall: Any) -> Admin:
    return Admin(store, wall)


@pytest.fixture
def accounts(store: Store, wall: Any, ticks: Any) -> Accounts:
    return Accounts(store, jwt_secret=SECRET, wall=wall, monotonic=ticks)


async def refusal(accounts: Accounts, token: str, agent_id: str = "agent-1") -> str:
    with pytest.raises(Refused) as caught:
        await accounts.authenticate(token, agent_id)
    assert token == "" or token not in str(caught.value)
    return caught.value.reason


async def stored(store: Store, account_id: str, period: str = "2026-11") -> Use:
    found = await store.query("usage.add", lambda conn: records.read_usage_of(conn, [account_id], [period]))
    return found.get((account_id, period), Use())


# Authentication


async def test_a_good_token(accounts: Accounts, admin: Admin) -> None:
    account = await admin.account()
    record, token = await admin.token(account.id)
    grant = await accounts.authenticate(token, "agent-1")
    assert grant == Grant(account.id, "acme", "agent-1", record.id, None)
    assert accounts.check(grant) is None


async def test_bad_tokens(accounts: Accounts, admin: Admin, wall: Any) -> None:
    account = await admin.account()
    _, expiring = await admin.token(account.id, wall.now + 10)
    revoked_record, revoked = await admin.token(account.id)
    await admin.do(records.revoke_token, revoked_record.id, wall.now)
    wall.now += 10
    assert await refusal(accounts, "") == "missing_token"
    assert await refusal(accounts, "tt_nonsense") == "bad_token"
    assert await refusal(accounts, "nonsense") == "bad_token"
    assert await refusal(accounts, "tt_\ud800") == "bad_token"
    assert await refusal(accounts, "tt_" + "x" * 100_000) == "bad_token"
    assert await refusal(accounts, expiring) == "expired"
    assert await refusal(accounts, revoked) == "revoked"
    _, good = await admin.token(account.id)
    await admin.do(records.change_account, account.id, {"disabled": True})
    assert await refusal(accounts, good) == "account_disabled"


async def test_jwts(accounts: Accounts, store: Store, admin: Admin, wall: Any) -> None:
    account = await admin.account()

    def sign(account_id: str) -> str:
        claims: dict[str, Any] = {"account_id": account_id, "agent_id": "agent-1", "exp": int(wall.now) + 60}
        return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(SECRET))

    token = sign(account.id)
    grant = await accounts.authenticate(token, "agent-1")
    assert grant == Grant(account.id, "acme", "agent-1", "", wall.now + 60)
    assert await refusal(accounts, sign("nobody")) == "bad_token"
    assert await refusal(Accounts(store), token) == "bad_token"  # no key is configured
    await admin.do(records.change_account, account.id, {"disabled": True})
    await accounts.watch(lambda: None)
    assert await refusal(accounts, token) == "account_disabled"
    await admin.do(records.change_account, account.id, {"disabled": False})
    changes: list[int] = []
    await accounts.watch(lambda: changes.append(1))
    wall.now += 60
    await accounts.watch(lambda: changes.append(2))
    assert changes == [1, 2]
    found = accounts.check(grant)
    assert found is not None and found.reason == "expired"


async def test_queries_have_the_connect_as_parent(tmp_path: Path) -> None:
    seen: list[Any] = []

    def layer(handler: Handler) -> Handler:
        async def layered(visit: Any) -> None:
            seen.append(visit)
            await handler(visit)

        return layered

    store = Store("", tmp_path, [layer])
    await store.open()
    admin = Admin(store, lambda: 1.0)
    _, token = await admin.token((await admin.account()).id)
    seen.clear()
    visit = ConnectVisit("192.0.2.1:1")
    accounts = Accounts(store)
    await accounts.authenticate(token, "a", visit)
    assert [(each.operation, each.parent) for each in seen] == [("token.find", visit), ("account.load", visit)]
    seen.clear()
    await accounts.authenticate(token, "b", visit)  # the account is known already
    assert [each.operation for each in seen] == ["token.find"]
    await store.close()


# Changes


async def test_changes_are_noticed(accounts: Accounts, admin: Admin, wall: Any) -> None:
    account = await admin.account()
    record, token = await admin.token(account.id, wall.now + 1000)
    _, other = await admin.token(account.id)
    grants = [await accounts.authenticate(each, "a") for each in (token, other)]
    live = await accounts.load(account.id)
    changes: list[int] = []

    async def reasons() -> list[str | None]:
        before = len(changes)
        await accounts.watch(lambda: changes.append(1))
        assert len(changes) == before + 1
        return [None if found is None else found.reason for found in map(accounts.check, grants)]

    assert await reasons() == [None, None]
    await accounts.watch(lambda: changes.append(1))
    assert len(changes) == 1  # nothing has changed

    await admin.do(records.change_account, account.id, {"max_connections": 1, "requests_per_month": 7})
    assert await reasons() == [None, None]
    assert (live.limits.max_connections, live.limits.requests_per_month) == (1, 7)
    await admin.do(records.revoke_token, record.id, wall.now)
    assert await reasons() == ["revoked", None]
    await admin.do(records.change_account, account.id, {"disabled": True})
    assert await reasons() == ["account_disabled", "account_disabled"]
    await admin.do(records.change_account, account.id, {"disabled": False})
    assert await reasons() == ["revoked", None]
    await admin.do(records.delete_account, account.id)
    assert await reasons() == ["account_disabled", "account_disabled"]
    assert await refusal(accounts, token) == "bad_token"
    with pytest.raises(Refused):
        await accounts.load(account.id)


async def test_a_token_runs_out_while_it_is_used(accounts: Accounts, admin: Admin, wall: Any) -> None:
    account = await admin.account()
    record, token = await admin.token(account.id, wall.now + 5)
    await accounts.watch(lambda: None)
    grant = await accounts.authenticate(token, "a")
    changes: list[int] = []
    wall.now += 4
    await accounts.watch(lambda: changes.append(1))
    assert (changes, accounts.check(grant)) == ([], None)
    wall.now += 1
    await accounts.watch(lambda: changes.append(1))
    found = accounts.check(grant)
    assert changes == [1]
    assert found is not None and found.reason == "expired"
    assert record.id in str(found) and record.prefix not in str(found)  # as `token list` has it; that would be masked


async def test_what_changes_during_a_load_is_not_missed(store: Store, admin: Admin, wall: Any) -> None:
    """A token is revoked, and the revision seen, between reading it and taking it over."""
    account = await admin.account()
    record, token = await admin.token(account.id)
    accounts = Accounts(store, wall=wall)
    await accounts.watch(lambda: None)
    real = store.query
    interfere = True

    async def query(operation: str, work: Any, **more: Any) -> Any:
        nonlocal interfere
        answer = await real(operation, work, **more)
        if operation == "token.find" and interfere:
            interfere = False
            await admin.do(records.revoke_token, record.id, wall.now)
            await accounts.watch(lambda: None)
        return answer

    store.query = query  # type: ignore[method-assign]
    assert await refusal(accounts, token) == "revoked"


async def test_an_account_that_is_forgotten_during_a_load_takes_no_other_ones_token(
    accounts: Accounts, store: Store, admin: Admin, ticks: Any
) -> None:
    _, idle = await admin.token((await admin.account("idle")).id)
    _, token = await admin.token((await admin.account()).id)
    await accounts.watch(lambda: None)
    await accounts.authenticate(idle, "a")
    await accounts.flush()
    ticks.now += 61
    real = store.query

    async def query(operation: str, work: Any, **more: Any) -> Any:
        if operation == "account.load":
            await accounts._flush_quietly()
        return await real(operation, work, **more)

    store.query = query  # type: ignore[method-assign]
    grant = await accounts.authenticate(token, "a")
    assert accounts.check(grant) is None
    assert list(accounts._accounts) == [grant.account_id]


async def test_an_account_that_is_forgotten_during_a_refresh(
    accounts: Accounts, store: Store, admin: Admin, ticks: Any
) -> None:
    account = await accounts.load((await admin.account()).id)
    ticks.now += 61
    real = store.query

    async def query(operation: str, work: Any, **more: Any) -> Any:
        answer = await real(operation, work, **more)
        if operation == "accounts.refresh":
            await accounts._flush_quietly()
            await accounts.load(other.id)
        return answer

    other = await admin.account("other")
    store.query = query  # type: ignore[method-assign]
    await accounts.watch(lambda: None)
    assert account.id not in accounts._accounts
    changes: list[int] = []
    store.query = real  # type: ignore[method-assign]
    await accounts.watch(lambda: changes.append(1))
    assert changes == [1]  # the one loaded meanwhile is looked at once more


async def test_logins_by_turns_keep_each_expiry_once(accounts: Accounts, admin: Admin, wall: Any) -> None:
    account = await admin.account()
    tokens = [(await admin.token(account.id, wall.now + 10 * seconds))[1] for seconds in (1, 2, 3)]
    for _ in range(3):
        for token in tokens:
            await accounts.authenticate(token, "a")
    assert accounts._expiries == [wall.now + 10, wall.now + 20, wall.now + 30]


async def test_one_account_is_one_object(accounts: Accounts, admin: Admin) -> None:
    account = await admin.account()
    found = []

    async def load() -> None:
        found.append(await accounts.load(account.id))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(load)
    assert len({id(each) for each in found}) == 1


# Usage


async def test_usage_survives(accounts: Accounts, store: Store, admin: Admin, wall: Any) -> None:
    account = await accounts.load((await admin.account()).id)
    for _ in range(3):
        account.admit_request()
    account.take_bytes(10, 20)
    await accounts.flush()
    await accounts.flush()
    account.admit_request()
    await accounts.flush()
    assert await stored(store, account.id) == Use(4, 10, 20)
    again = await Accounts(store, wall=wall).load(account.id)
    assert (again.month_requests, again.month_bytes) == (4, 30)


async def test_usage_by_month(accounts: Accounts, store: Store, admin: Admin, wall: Any) -> None:
    account = await accounts.load((await admin.account()).id)
    account.admit_request()
    wall.now = DECEMBER
    await accounts.watch(lambda: None)
    account.admit_request()
    account.admit_request()
    await accounts.flush()
    assert await stored(store, account.id, "2026-11") == Use(1, 0, 0)
    assert await stored(store, account.id, "2026-12") == Use(2, 0, 0)
    assert account.month_requests == 2


async def test_two_cores_add_up(store: Store, admin: Admin, wall: Any) -> None:
    account = await admin.account()
    cores = [Accounts(store, wall=wall), Accounts(store, wall=wall)]
    live = [await core.load(account.id) for core in cores]
    for each in live:
        each.admit_request()
    await cores[0].flush()
    await cores[1].flush()
    assert [each.month_requests for each in live] == [1, 2]
    live[0].admit_request()
    await cores[0].flush()
    assert live[0].month_requests == 3
    assert await stored(store, account.id) == Use(3, 0, 0)


@pytest.mark.parametrize("is_committed", [False, True])
async def test_a_failed_flush_loses_and_doubles_nothing(
    accounts: Accounts, store: Store, admin: Admin, is_committed: bool
) -> None:
    account = await accounts.load((await admin.account()).id)
    real = store.query
    failing = True

    async def query(operation: str, work: Any, **more: Any) -> Any:
        if operation == "usage.add" and failing:
            if is_committed:
                await real(operation, work, **more)
            raise StoreError("the connection broke, perhaps after the commit")
        return await real(operation, work, **more)

    store.query = query  # type: ignore[method-assign]
    for _ in range(3):
        account.admit_request()
        account.take_bytes(1, 0)
        with pytest.raises(StoreError):
            await accounts.flush()
        assert account.month_requests == account.requests
    failing = False
    await accounts.flush()
    await accounts.flush()
    assert await stored(store, account.id) == Use(3, 3, 0)
    assert account.month_requests == 3


async def test_a_cancelled_flush_loses_and_doubles_nothing(accounts: Accounts, store: Store, admin: Admin) -> None:
    account = await accounts.load((await admin.account()).id)
    account.admit_request()
    for _ in range(3):
        with trio.CancelScope() as scope:
            scope.cancel()
            await accounts.flush()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accounts.flush)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        account.admit_request()
    await accounts.flush()
    assert await stored(store, account.id) == Use(4, 0, 0)


async def test_a_deleted_account_does_not_stop_the_others(accounts: Accounts, store: Store, admin: Admin) -> None:
    gone = await accounts.load((await admin.account("gone")).id)
    stays = await accounts.load((await admin.account("stays")).id)
    gone.admit_request()
    stays.admit_request()
    await admin.do(records.delete_account, gone.id)
    await accounts.flush()
    assert await stored(store, stays.id) == Use(1, 0, 0)
    assert await stored(store, gone.id) == Use()


async def test_the_last_use_of_a_token_is_noted(accounts: Accounts, store: Store, admin: Admin, wall: Any) -> None:
    account = await admin.account()
    _, token = await admin.token(account.id)
    await accounts.authenticate(token, "a")
    await accounts.flush()
    [(record, _)] = await store.query("token.find", records.list_tokens)
    assert record.last_used_at == wall.now


async def test_many_accounts_at_once(accounts: Accounts, store: Store, admin: Admin) -> None:
    def create(conn: sa.Connection) -> None:
        conn.execute(
            sa.insert(tables.accounts),
            [{"id": f"a{i}", "name": f"a{i}", "created_at": 0.0, "disabled": False} for i in range(2500)],
        )
        records.bump_revision(conn)

    await admin.do(create)
    live = accounts._accounts
    for i in range(2500):
        live[f"a{i}"] = accounts._make(f"a{i}")
        live[f"a{i}"].admit_request()
    await accounts.watch(lambda: None)
    await accounts.flush()
    assert await stored(store, "a2499") == Use(1, 0, 0)
    assert live["a2499"].name == "a2499"


# In the background


async def test_it_watches_and_flushes_in_the_background(store: Store, admin: Admin) -> None:
    accounts = Accounts(store, watch_interval=0.005, flush_interval=0.01)
    account = await accounts.load((await admin.account()).id)
    changed = trio.Event()
    assert accounts.is_ready() == (False, "the store was not asked yet")
    async with trio.open_nursery() as nursery:
        await nursery.start(accounts.run, lambda: changed.set())
        assert accounts.is_ready() == (True, f"{store.system} answers")
        changed = trio.Event()
        account.admit_request()
        await admin.do(records.change_account, account.id, {"max_connections": 3})
        with trio.fail_after(20):
            await changed.wait()
            while (await stored(store, account.id)).requests == 0:
                await trio.lowlevel.checkpoint()
        assert account.limits.max_connections == 3
        nursery.cancel_scope.cancel()


async def test_idle_accounts_are_forgotten(accounts: Accounts, admin: Admin, ticks: Any) -> None:
    account = await admin.account()
    _, token = await admin.token(account.id)
    await accounts.authenticate(token, "a")
    live = await accounts.load(account.id)
    live.admit_link()
    ticks.now += 1000
    await accounts._flush_quietly()
    assert await accounts.load(account.id) is live
    assert [row.type for row in accounts.quotas()] == list(TYPES)
    live.drop_link()
    assert accounts.quotas() == []
    await accounts._flush_quietly()
    assert await accounts.load(account.id) is live  # it lingers: its agent may be back in a moment
    ticks.now += 61
    await accounts._flush_quietly()
    assert (accounts._accounts, accounts._tokens) == ({}, {})


async def test_an_account_whose_link_drains_is_not_forgotten(
    accounts: Accounts, store: Store, admin: Admin, ticks: Any
) -> None:
    _, token = await admin.token((await admin.account()).id)
    grant = await accounts.authenticate(token, "a")
    account = await accounts.load(grant.account_id)
    account.admit_link()
    registry = Registry("tunnel.example.com", 600, ticks)
    agent = AgentLink(Link(True, 5, 15), LinkVisit(ConnectVisit("192.0.2.1:1", "conn-1")), account, 1)
    registry.attach(agent, "app", "http", 0)
    account.drop_link()
    registry.withdraw(agent)  # it said GOAWAY; a stream goes on
    ticks.now += 1000
    await accounts._flush_quietly()
    assert accounts.check(grant) is None
    account.take_bytes(1, 2)
    await accounts.flush()
    assert await stored(store, account.id) == Use(0, 1, 2)
    registry.detach(agent)
    registry.detach(agent)
    await accounts._flush_quietly()
    assert accounts.check(grant) is None  # use that is counted late is still his
    ticks.now += 61
    await accounts._flush_quietly()
    assert accounts._accounts == {}


async def test_a_store_that_says_nothing(
    sqlite_store: Store, wall: Any, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a look at it nor a write ends: it is not ready, and what runs out runs out."""
    autojump_clock.autojump_threshold = math.inf  # the store still answers, from a thread that takes real time
    admin = Admin(sqlite_store, wall)
    account = await admin.account()
    _, token = await admin.token(account.id, wall.now + 5)
    accounts = Accounts(sqlite_store, wall=wall)
    await accounts.watch(lambda: None)
    grant = await accounts.authenticate(token, "a")
    (await accounts.load(account.id)).admit_request()
    expired: list[float] = []

    def recheck() -> None:
        found = accounts.check(grant)
        assert found is not None and found.reason == "expired"
        expired.append(trio.current_time())

    async def hang(*_: Any, **__: Any) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(accounts.run, recheck)
        sqlite_store.query = hang  # type: ignore[method-assign]
        begun = trio.current_time()
        autojump_clock.autojump_threshold = 0
        await trio.sleep(8)
        assert not accounts.is_ready()[0]
        assert accounts.is_ready()[1].endswith("tunnel.db did not answer within 5 s")
        wall.now += 5
        await trio.sleep(8)
        nursery.cancel_scope.cancel()
    assert len(expired) == 1 and expired[0] - begun < 14
    assert [record.getMessage() for record in caplog.records] == ["store unreachable"]


async def test_an_outage_is_survived_and_logged_once(
    postgresql: Any, tmp_path: Path, wall: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(postgresql.database(), tmp_path)
    await store.open()
    admin = Admin(store, wall)
    accounts = Accounts(store, wall=wall)
    account = await accounts.load((await admin.account()).id)
    caplog.set_level(logging.INFO, "tunnel")
    await accounts.watch(lambda: None)
    await trio.to_thread.run_sync(postgresql.stop)
    try:
        for _ in range(3):
            account.admit_request()
            await accounts.watch(lambda: None)
            await accounts._flush_quietly()
        is_ready, reason = accounts.is_ready()
        assert not is_ready
        assert "pg-secret-word" not in reason and "\n" not in reason
        with pytest.raises(StoreError):
            await accounts.owner_of("api")
    finally:
        await trio.to_thread.run_sync(postgresql.start)
    account.admit_request()
    await accounts.watch(lambda: None)
    await accounts._flush_quietly()
    assert accounts.is_ready()[0]
    assert await stored(store, account.id) == Use(4, 0, 0)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "store unreachable"), ("ERROR", "usage not written"),
        ("INFO", "store answers again"), ("INFO", "usage is written again"),
    ]  # fmt: skip
    assert "pg-secret-word" not in caplog.text
    await store.close()


# The first start


async def test_the_first_start_makes_an_account(store: Store, tmp_path: Path) -> None:
    first = await ensure_default(store, tmp_path / "data")
    assert first is not None
    assert (first.account, first.path) == ("default", tmp_path / "data" / "default.token")
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o600
    assert [path.name for path in first.path.parent.iterdir()] == ["default.token"]
    assert first.is_new
    accounts = Accounts(store)
    grant = await accounts.authenticate(first.path.read_text().strip(), "a")
    assert grant.account_id == first.account_id
    await accounts.flush()
    assert await ensure_default(store, tmp_path / "data") is None


async def test_what_a_first_start_made_is_found_until_an_agent_has_come(store: Store, tmp_path: Path) -> None:
    """The first start may have failed, at a port in use, before it could say so."""
    first = await ensure_default(store, tmp_path)
    for _ in range(2):
        again = await ensure_default(store, tmp_path)
        assert first is not None and again == replace(first, is_new=False)
    admin = Admin(store, lambda: 1.0)
    _, token = await admin.token((await admin.account()).id)
    accounts = Accounts(store)
    await accounts.authenticate(token, "a")  # another account's agent: the core is in use
    await accounts.flush()
    assert await ensure_default(store, tmp_path) is None


@pytest.mark.parametrize("loss", ["the file", "the token", "the account", "used by a JWT", "another file"])
async def test_a_first_token_that_no_agent_could_use_is_not_named_again(
    store: Store, tmp_path: Path, loss: str
) -> None:
    first = await ensure_default(store, tmp_path)
    admin = Admin(store, lambda: 1.0)
    assert first is not None
    if loss == "the file":
        first.path.unlink()
    elif loss == "another file":
        first.path.write_bytes(b"\xff")
    elif loss == "the token":
        await admin.do(records.revoke_token, first.path.read_text().strip(), 1.0)
    elif loss == "the account":
        await admin.do(records.change_account, first.account_id, {"disabled": True})
    else:
        use = {(first.account_id, "2026-11"): Use(1, 0, 0)}
        await admin.do(records.add_usage, "writer", 1, use, {}, 1.0)
    assert await ensure_default(store, tmp_path) is None


def test_the_agents_command_is_ready_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.orig_argv", [".venv/bin/python", "-m", "tunnel.core"])
    place = Path("/data/Application Support/tunnel/default.token")
    assert shlex.split(agent_command("localhost:8443", place, "sha256:ab")) == [
        ".venv/bin/python", "-m", "tunnel.agent", "-server", "localhost:8443", "-token-file", str(place),
        "-server-fingerprint", "sha256:ab", "-local", "http://localhost:3000",
    ]  # fmt: skip
    assert "-tls=false" in shlex.split(agent_command("localhost:8443", place, ""))


async def test_cores_that_start_together_make_one_account(store: Store, tmp_path: Path) -> None:
    made = []

    async def start() -> None:
        made.append(await ensure_default(store, tmp_path))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(start)
    assert sum(first is not None and first.is_new for first in made) == 1
    assert await store.query("account.default", records.count_accounts) == 1


async def test_no_account_without_its_token_file(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        await ensure_default(store, tmp_path / "file")
    assert await store.query("account.default", records.count_accounts) == 0


def test_an_invitation_is_what_an_agent_needs_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "default.token").write_text("tt_word\n")
    leave_invitation(tmp_path / "invite", tmp_path / "default.token", "sha256:" + "ab" * 32)
    left = {path.name: path.read_text() for path in (tmp_path / "invite").iterdir()}
    assert left == {"token": "tt_word\n", "fingerprint": "sha256:" + "ab" * 32 + "\n"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "invite").iterdir()} == {0o600}


def test_an_invitation_without_the_first_token_keeps_the_one_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("tt_of_the_operator\n")
    leave_invitation(tmp_path, tmp_path / "data" / "default.token", "")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"token": "tt_of_the_operator\n"}


def test_an_invitation_that_cannot_be_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="-invite-dir: can't write to"):
        leave_invitation(tmp_path / "file", tmp_path / "none", "sha256:" + "ab" * 32)
