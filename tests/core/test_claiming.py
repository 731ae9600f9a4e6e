"""Which names an account may claim, and how many: the base domain, names below others, limits; over cores that share a
store."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tunnel.core import claiming, records
from tunnel.core.accounts import Accounts
from tunnel.core.domain import Domain
from tunnel.core.quotas import Limits
from tunnel.core.store import Store
from tunnel.errors import Refused

BASE = Domain("tunnel.example")
MakeCore = Callable[..., Accounts]


@pytest.fixture
def make_core(store: Store, wall: Any, ticks: Any) -> MakeCore:
    """A core on the store, as any of several: what one of them lets an account have the others know."""

    def make(**options: Any) -> Accounts:
        return Accounts(store, domain=BASE, wall=wall, monotonic=ticks, **options)

    return make


@pytest.fixture
def core(make_core: MakeCore) -> Accounts:
    return make_core()


@pytest.fixture
async def ids(store: Store) -> tuple[str, str]:
    def make(conn: Any) -> tuple[str, str]:
        return records.create_account(conn, "a", 0.0).id, records.create_account(conn, "b", 0.0).id

    return await store.query("account.default", make, write=True)


async def do(store: Store, function: Callable[..., Any], *args: Any) -> Any:
    return await store.query("account.default", lambda conn: function(conn, *args), write=True)


async def reserve(store: Store, name: str, account_id: str) -> None:
    await do(store, records.reserve_name, name, account_id, 0.0)


async def refused(core: Accounts, account_id: str, *names: str) -> Refused:
    with pytest.raises(Refused) as caught:
        await core.claim(names, account_id)
    assert "\n" not in str(caught.value)
    return caught.value


async def claimed(store: Store, account_id: str) -> list[str]:
    rows = await store.query("name.owner", lambda conn: records.list_names(conn, account_id))
    return [row["name"] for row in rows if not row["reserved"]]


# The base domain -----------------------------------------------------------------------------------------------------


async def test_the_base_domain_is_served_by_whom_it_was_reserved_for_and_nobody_else(
    core: Accounts, store: Store, ids: tuple[str, str]
) -> None:
    a, b = ids
    for account_id in ids:
        refusal = await refused(core, account_id, "mine", "tunnel.example")
        assert refusal.reason == "name_reserved" and "tunnel reserve tunnel.example ACCOUNT" in str(refusal)
    assert await claimed(store, a) == []  # all or none
    await reserve(store, "tunnel.example", a)
    await core.claim(["tunnel.example"], a)
    assert (await refused(core, b, "tunnel.example")).reason == "name_reserved"
    assert (await refused(core, b, "x.www.tunnel.example", "tunnel.example")).reason == "name_reserved"
    await core.claim(["alice", "x.bob.tunnel.example"], b)  # it gives its account nothing of what is below


async def test_the_base_domain_is_lost_when_it_is_released(core: Accounts, store: Store, ids: tuple[str, str]) -> None:
    a, _ = ids
    await reserve(store, "tunnel.example", a)
    core.names_known = lambda: {"tunnel.example": a, "alice": a}
    await core.watch(lambda: None)
    assert core.take_lost() == {}
    await do(store, records.unreserve_name, "tunnel.example")
    await core.watch(lambda: None)
    lost = core.take_lost()
    assert {name: (owner, why.reason) for name, (owner, why) in lost.items()} == {
        "tunnel.example": (a, "name_reserved")
    }
    assert "base domain" in str(lost["tunnel.example"][1])


async def test_what_looks_like_the_base_domain_is_a_name_like_others(core: Accounts, ids: tuple[str, str]) -> None:
    await core.claim(
        ["tunnel", "example", "tunnel.example.org", "nottunnel.example", "tunnel.example.localhost"], ids[0]
    )


# Below others' names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.alice.tunnel.example", "x.y.alice.tunnel.example", "x.alice.localhost"])
async def test_below_a_name_everything_is_its_accounts(
    core: Accounts, make_core: MakeCore, ids: tuple[str, str], name: str, wall: Any
) -> None:
    a, b = ids
    await core.claim(["alice"], a)
    refusal = await refused(make_core(), b, name)
    assert refusal.reason == "name_taken"
    assert f"the name {name} is below " in str(refusal) and "tunnel reserve" in str(refusal)
    await core.claim([name], a)
    await core.release(["alice", name], a)
    wall.now += 600
    assert (await refused(make_core(), b, name)).reason == "name_taken"  # held is as good as served
    wall.now += 0.1
    await core.claim([name], b)


@pytest.mark.parametrize("name", ["x.alice.tunnel.example", "x.alice.localhost"])
async def test_nobody_sits_below_a_name_before_its_owner_comes(
    core: Accounts, make_core: MakeCore, store: Store, ids: tuple[str, str], name: str, wall: Any, ticks: Any
) -> None:
    a, b = ids
    await core.claim([name], a)
    assert await claimed(store, a) == ["alice", name]
    assert (await refused(make_core(), b, "alice")).reason == "name_taken"
    assert (await refused(make_core(), b, "y.alice.tunnel.example")).reason == "name_taken"
    for in_use in (None, lambda: {name: a}):  # both stay as long as the one is served
        if in_use is not None:
            core.set_names_in_use(in_use)
        for _ in range(20):
            wall.now += 60
            ticks.now += 60
            await core._holds.touch()
        assert (await refused(make_core(), b, "alice")).reason == "name_taken"
    core.set_names_in_use(dict)
    await core.release([name], a)
    wall.now += 600
    assert (await refused(make_core(), b, "alice")).reason == "name_taken"
    wall.now += 0.1
    await make_core().claim(["alice"], b)
    assert (await refused(core, a, name)).reason == "name_taken"


async def test_a_name_that_is_still_served_is_not_released_with_one_below_it(
    store: Store, ids: tuple[str, str], wall: Any, ticks: Any
) -> None:
    a, b = ids
    one, other = (Accounts(store, domain=BASE, name_hold=1.0, wall=wall, monotonic=ticks) for _ in range(2))
    one.set_names_in_use(lambda: {"alice": a})
    await one.claim(["alice", "x.alice.tunnel.example"], a)
    await one.release(["x.alice.tunnel.example"], a)
    wall.now += 10  # below the time that names in use are safe for
    assert (await refused(other, b, "alice")).reason == "name_taken"
    await other.claim(["bob"], b)


async def test_an_administrator_gives_single_names_below_anothers(
    core: Accounts, store: Store, ids: tuple[str, str]
) -> None:
    a, b = ids
    await core.claim(["alice"], a)
    await reserve(store, "x.alice.tunnel.example", b)
    await core.claim(["x.alice.tunnel.example", "y.x.alice.tunnel.example"], b)
    assert await claimed(store, b) == ["y.x.alice.tunnel.example"]  # and nothing of alice's
    assert (await refused(core, b, "y.alice.tunnel.example")).reason == "name_taken"
    refusal = await refused(core, a, "z.x.alice.tunnel.example")
    assert refusal.reason == "name_reserved" and "below x.alice.tunnel.example" in str(refusal)
    await core.claim(["y.alice.tunnel.example"], a)


async def test_reserving_a_name_takes_what_others_have_below_it(
    core: Accounts, store: Store, ids: tuple[str, str]
) -> None:
    a, b = ids
    names = ["x.alice.tunnel.example", "y.alice.localhost", "kept.alice.tunnel.example"]
    await core.claim([*names, "bob"], a)
    await reserve(store, "kept.alice.tunnel.example", a)
    await reserve(store, "alice", b)
    core.names_known = lambda: dict.fromkeys([*names, "bob"], a)
    await core.watch(lambda: None)
    lost = core.take_lost()
    assert {name: why.reason for name, (_, why) in lost.items()} == dict.fromkeys(names[:2], "name_reserved")
    assert "is below alice.tunnel.example" in str(lost[names[0]][1])
    assert (await refused(core, a, "x.alice.tunnel.example")).reason == "name_reserved"
    await core.claim(["x.alice.tunnel.example", "alice"], b)  # at once, whoever held it
    await core.claim(["kept.alice.tunnel.example"], a)


async def test_what_was_claimed_below_a_name_does_not_outlive_its_reservation(
    core: Accounts, store: Store, ids: tuple[str, str]
) -> None:
    a, b = ids
    await core.claim(["x.y.alice.tunnel.example", "login.shop.org"], a)
    await reserve(store, "alice", b)
    await reserve(store, "shop.org", b)
    await core.claim(["x.y.alice.tunnel.example", "z.y.alice.tunnel.example", "a.login.shop.org", "login.shop.org"], b)
    assert (await refused(core, a, "w.y.alice.tunnel.example")).reason == "name_reserved"


# Elsewhere in the DNS ------------------------------------------------------------------------------------------------


async def test_nobody_claims_below_another_accounts_own_domain(
    core: Accounts, make_core: MakeCore, store: Store, ids: tuple[str, str]
) -> None:
    a, b = ids
    await core.claim(["shop.org"], a)
    for name in ("login.shop.org", "a.b.shop.org"):
        refusal = await refused(make_core(), b, name)
        assert refusal.reason == "name_taken" and "below shop.org" in str(refusal)
    await core.claim(["login.shop.org"], a)
    await reserve(store, "shop.com", a)
    assert (await refused(core, b, "login.shop.com")).reason == "name_reserved"
    await reserve(store, "team.shop.org", b)
    await core.claim(["team.shop.org", "api.team.shop.org"], b)
    await core.claim(["notshop.org", "shop.org.uk"], b)


async def test_neighbours_are_not_above_one_another(core: Accounts, store: Store, ids: tuple[str, str]) -> None:
    a, b = ids
    await core.claim(["alice.dyn.org"], a)
    await core.claim(["bob.dyn.org"], b)
    assert await claimed(store, a) == ["alice.dyn.org"]


async def test_who_was_there_first_does_not_lose_a_name_to_one_above_it(
    core: Accounts, make_core: MakeCore, ids: tuple[str, str], wall: Any
) -> None:
    a, b = ids
    await core.claim(["app.shop.org"], a)
    await core.claim(["shop.org"], b)
    await make_core().claim(["app.shop.org"], a)  # its agent dials again
    assert (await refused(core, b, "app.shop.org")).reason == "name_taken"
    assert (await refused(core, a, "new.shop.org")).reason == "name_taken"
    await core.release(["app.shop.org"], a)
    wall.now += 300
    await core.claim(["shop.org", "app2.shop.org"], b)
    wall.now += 300.1
    assert (await refused(core, a, "app.shop.org")).reason == "name_taken"


async def test_of_two_cores_that_claim_at_once_one_gets_both_names(
    make_core: MakeCore, store: Store, ids: tuple[str, str]
) -> None:
    """Neither sees what the other has not committed yet."""
    for number in range(20):
        results: list[str] = []

        async def claim(name: str, account_id: str, results: list[str] = results) -> None:
            try:
                await make_core().claim([name], account_id)
            except Refused as exc:
                results.append(exc.reason)
            else:
                results.append("ok")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(claim, f"n{number}", ids[number % 2])
            nursery.start_soon(claim, f"x.n{number}.tunnel.example", ids[1 - number % 2])
        assert sorted(results) == ["name_taken", "ok"]


# How many ------------------------------------------------------------------------------------------------------------


async def account_with(core: Accounts, store: Store, account_id: str, **limits: Any) -> None:
    await do(store, records.change_account, account_id, limits)
    await core.load(account_id)
    await core.watch(lambda: None)


async def test_an_account_has_so_many_names_in_use_or_held(
    make_core: MakeCore, store: Store, ids: tuple[str, str], wall: Any
) -> None:
    a, b = ids
    cores = [make_core(defaults=Limits(max_names=3)) for _ in range(2)]
    for core in cores:
        for account_id in ids:
            await core.load(account_id)
    await cores[0].claim(["one", "two"], a)
    await cores[1].claim(["three"], a)
    refusal = await refused(cores[1], a, "four")
    assert refusal.reason == "name_quota"
    assert str(refusal) == (
        "the account's limit of 3 names, in use or held, is reached: serve fewer, wait until held ones are free, or "
        f"ask the core's operator for more (account limit {a} -names N)"
    )
    assert cores[1].exceeded["names"] == 1 and cores[0].exceeded["names"] == 0
    await cores[1].claim(["one", "two", "three"], a)  # its agents dial again, or come to another core
    await cores[0].claim(["four", "five", "six"], b)
    await cores[0].release(["one", "two"], a)
    assert (await refused(cores[1], a, "four")).reason == "name_taken"  # b's
    assert (await refused(cores[1], a, "seven")).reason == "name_quota"  # held ones count
    wall.now += 600.1
    await cores[1].claim(["seven", "eight"], a)


async def test_names_that_are_refused_are_not_taken(make_core: MakeCore, store: Store, ids: tuple[str, str]) -> None:
    core = make_core(defaults=Limits(max_names=3))
    await core.load(ids[0])
    assert (await refused(core, ids[0], *"abcd")).reason == "name_quota"
    assert await claimed(store, ids[0]) == []
    await core.claim("abc", ids[0])


async def test_a_flood_of_names_stays_within_the_limit(make_core: MakeCore, store: Store, ids: tuple[str, str]) -> None:
    """A hundred a link, again and again: what is held counts."""
    core = make_core(defaults=Limits(max_names=250))
    await core.load(ids[0])
    reasons = []
    for link in range(10):
        names = [f"n{link}-{number}" for number in range(100)]
        try:
            await core.claim(names, ids[0])
            await core.release(names, ids[0])
        except Refused as exc:
            reasons.append(exc.reason)
    assert reasons == ["name_quota"] * 8
    assert len(await claimed(store, ids[0])) == 200


async def test_reserved_names_count_for_nothing(core: Accounts, store: Store, ids: tuple[str, str]) -> None:
    a, _ = ids
    await account_with(core, store, a, max_names=0)
    for name in ("api", "web", "tunnel.example"):
        await reserve(store, name, a)
    await core.claim(["api", "web", "tunnel.example"], a)
    refusal = await refused(core, a, "api", "other")
    assert refusal.reason == "name_quota" and str(refusal) == (
        "the account serves only names that are reserved for it: choose one of them, or ask the core's operator "
        f"for this one (tunnel reserve NAME {a})"
    )


async def test_names_above_that_come_with_one_count_too(core: Accounts, store: Store, ids: tuple[str, str]) -> None:
    a, _ = ids
    await account_with(core, store, a, max_names=2)
    assert (await refused(core, a, "x.y.alice.tunnel.example")).reason == "name_quota"
    await core.claim(["x.alice.tunnel.example"], a)


async def test_a_lower_limit_takes_no_name_that_is_served_and_lets_none_in_again(
    core: Accounts, store: Store, ids: tuple[str, str]
) -> None:
    a, _ = ids
    await account_with(core, store, a, max_names=3)
    core.names_known = lambda: dict.fromkeys("abc", a)
    await core.claim("abc", a)
    await account_with(core, store, a, max_names=2)
    assert core.take_lost() == {}
    assert (await refused(core, a, "a")).reason == "name_quota"
    await account_with(core, store, a, max_names=None)
    await core.claim("abcd", a)


async def test_one_of_several_claims_at_once_finds_no_room(
    make_core: MakeCore, store: Store, ids: tuple[str, str]
) -> None:
    """Links of one account at several workers or cores."""
    cores = [make_core(defaults=Limits(max_names=5)) for _ in range(4)]
    for core in cores:
        await core.load(ids[0])
    got: list[int] = []

    async def claim(number: int) -> None:
        try:
            await cores[number % 4].claim([f"n{number}"], ids[0])
        except Refused as exc:
            assert exc.reason == "name_quota"
        else:
            got.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(claim, number)
    assert len(got) == len(await claimed(store, ids[0])) == 5


async def test_use_and_limit_are_seen(
    make_core: MakeCore, store: Store, ids: tuple[str, str], wall: Any, ticks: Any
) -> None:
    a, _ = ids
    one, other = (make_core(defaults=Limits(max_names=7, max_ports=2)) for _ in range(2))
    for core in (one, other):
        (await core.load(a)).admit_link()
    one.ports_open = lambda: {a: 1}

    def rows(core: Accounts) -> dict[str, tuple[float, float]]:
        return {row.type: (row.usage, row.limit) for row in core.quotas()}

    await one.claim(["x.alice.tunnel.example", "bob"], a)
    assert rows(one)["names"] == (3, 7) and rows(one)["ports"] == (1, 2)
    await other.claim(["carol"], a)
    assert rows(other)["names"] == (4, 7) and rows(other)["ports"] == (0, 2)
    ticks.now += 60
    await one._flush_quietly()  # it hears of others' within a minute
    assert rows(one)["names"] == (4, 7)
    await one.release(["bob"], a)
    one.set_names_in_use(lambda: {"x.alice.tunnel.example": a})
    other.set_names_in_use(lambda: {"carol": a})
    assert rows(one)["names"] == (4, 7)
    for core in (one, other, one):
        wall.now += 301
        ticks.now += 301
        await core._flush_quietly()
    assert rows(one)["names"] == (3, 7)


# The cost ------------------------------------------------------------------------------------------------------------


async def test_a_claim_costs_a_few_statements_however_many_names_it_has(
    core: Accounts, store: Store, ids: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    real = claiming.claim_names

    def counted(conn: Any, *args: Any) -> Any:
        before, seen = conn.execute, []
        conn.execute = lambda *given, **more: seen.append(given) or before(*given, **more)
        try:
            return real(conn, *args)
        finally:
            counts.append(len(seen))

    monkeypatch.setattr(claiming, "claim_names", counted)
    a, _ = ids
    await core.claim(["alice"], a)
    await core.claim([f"n{number}" for number in range(100)], a)
    assert counts[0] == counts[1] <= 4
    deep = ".".join("abcdefghijklm")
    await core.claim([f"{deep}.n{number}.tunnel.example" for number in range(100)], a)
    assert counts[2] <= 10


# Reserved no more, while it is served --------------------------------------------------------------------------------


async def release(store: Store, name: str, wall: Any) -> None:
    """As `tunnel release` does."""

    def work(conn: Any) -> None:
        claiming.keep_claim(conn, name, records.unreserve_name(conn, name).id, wall.now)

    await store.query("account.default", work, write=True)


@pytest.fixture
def serving(make_core: MakeCore) -> Callable[[dict[str, str]], Accounts]:
    """A core that serves these names (name → account id), and looks at the store every second."""

    def make(names: dict[str, str]) -> Accounts:
        core = make_core()
        core.set_names_in_use(lambda: names)
        core.names_known = lambda: names
        return core

    return make


async def pass_time(seconds: int, core: Accounts, wall: Any, ticks: Any) -> None:
    for _ in range(0, seconds, 5):
        wall.now += 5
        ticks.now += 5
        await core._flush_quietly()
        await core.watch(lambda: None)


async def test_a_name_that_is_released_while_it_is_served_stays_with_its_account(
    make_core: MakeCore, serving: Any, store: Store, ids: tuple[str, str], wall: Any, ticks: Any
) -> None:
    a, b = ids
    core = serving({"api": a})
    await reserve(store, "api", a)
    await core.claim(["api"], a)
    await core.watch(lambda: None)
    assert await claimed(store, a) == []
    await release(store, "api", wall)
    other = make_core()
    assert (await refused(other, b, "api")).reason == "name_taken"
    await pass_time(1500, core, wall, ticks)
    assert (await refused(other, b, "api")).reason == "name_taken"
    assert await claimed(store, a) == ["api"] and core.take_lost() == {}
    wall.now += 601  # nobody serves it any more
    await other.claim(["api"], b)


async def test_with_a_name_that_is_reserved_no_more_comes_what_stands_above_it(
    serving: Any, store: Store, ids: tuple[str, str], wall: Any, ticks: Any
) -> None:
    a, b = ids
    core = serving({"x.alice.tunnel.example": a, "x.bob.tunnel.example": a, "x.carol.tunnel.example": a})
    for name in ("x.alice.tunnel.example", "x.bob.tunnel.example", "carol", "x.carol.tunnel.example"):
        await reserve(store, name, a)
    await core.claim(["bob"], b)
    for name in ("x.alice.tunnel.example", "x.bob.tunnel.example", "x.carol.tunnel.example"):
        await release(store, name, wall)
    await pass_time(10, core, wall, ticks)
    assert await claimed(store, a) == ["alice", "x.alice.tunnel.example", "x.carol.tunnel.example"]
    lost = core.take_lost()
    assert lost.keys() == {"x.bob.tunnel.example"}
    assert lost["x.bob.tunnel.example"][0] == a and lost["x.bob.tunnel.example"][1].reason == "name_taken"
    await core.claim(["x.bob.tunnel.example"], b)  # nothing is left of it


async def test_a_claim_that_was_forgotten_while_its_core_had_no_store_is_made_again(
    make_core: MakeCore, serving: Any, store: Store, ids: tuple[str, str], wall: Any, ticks: Any
) -> None:
    a, b = ids
    names = {f"name{number}": a for number in range(5)}
    core = serving(names)
    await core.claim(names, a)
    wall.now += 700
    ticks.now += 700
    other = make_core()
    await other._flush_quietly()  # forgets what ran out
    await other.claim(["name3"], b)
    assert await claimed(store, a) == []
    await pass_time(10, core, wall, ticks)
    assert await claimed(store, a) == ["name0", "name1", "name2", "name4"]
    assert {name: why.reason for name, (_, why) in core.take_lost().items()} == {"name3": "name_taken"}


async def test_names_of_an_account_that_is_gone_are_not_claimed_again(
    serving: Any, store: Store, ids: tuple[str, str], wall: Any, ticks: Any
) -> None:
    a, _ = ids
    core = serving({"api": a})
    await core.claim(["api"], a)
    await do(store, records.delete_account, a)
    core._holds.clear()
    assert await core._holds.touch() == {}
    await core.watch(lambda: None)
    assert core.take_lost()["api"][1].reason == "account_disabled"


async def test_what_is_reserved_costs_no_claim(
    serving: Any, store: Store, ids: tuple[str, str], wall: Any, ticks: Any, asked: list[str]
) -> None:
    a, b = ids
    core = serving({"alice": a, "x.alice.tunnel.example": a, "tunnel.example": a, "x.bob.tunnel.example": a})
    for name in ("alice", "tunnel.example", "x.bob.tunnel.example"):
        await reserve(store, name, a)
    await reserve(store, "bob", b)
    await core.claim(["alice", "x.alice.tunnel.example", "tunnel.example", "x.bob.tunnel.example"], a)
    asked.clear()
    await pass_time(100, core, wall, ticks)
    assert "name.touch" in asked and "name.claim" not in asked
    assert await claimed(store, a) == ["x.alice.tunnel.example"] and core.take_lost() == {}


# Rows that several change --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["claims", "touches", "deletes"])
async def test_who_changes_the_same_claims_in_another_order_waits(postgresql: Any, tmp_path: Path, other: str) -> None:
    """Two cores whose agents serve the same names, or a core and a command: PostgreSQL ends one of those that wait for
    each other."""
    store = Store(postgresql.database(), tmp_path)
    await store.open()
    account_id = (await do(store, records.create_account, "a", 0.0)).id
    await do(store, claiming.claim_names, ["x", "y"], account_id, 0.0, -600.0, BASE, 9)
    works: dict[str, Callable[[Any], object]] = {
        "claims": lambda conn: claiming.claim_names(conn, ["x", "y"], account_id, 1.0, -600.0, BASE, 9),
        "touches": lambda conn: claiming.touch_names(conn, {"x": account_id, "y": account_id}, 1.0),
        "deletes": lambda conn: records.delete_account(conn, account_id),
    }
    begun, go_on = threading.Event(), threading.Event()

    def touch(conn: Any) -> None:
        claiming.touch_names(conn, {"y": account_id}, 2.0)
        begun.set()
        go_on.wait(10)
        claiming.touch_names(conn, {"x": account_id}, 2.0)

    def count_waiting(conn: Any) -> int:
        return int(conn.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(do, store, touch)
        await trio.to_thread.run_sync(begun.wait, 10)
        nursery.start_soon(do, store, works[other])
        with trio.fail_after(10):
            while not await store.query("name.owner", count_waiting):
                await trio.lowlevel.checkpoint()
        go_on.set()
    await store.close()


async def test_a_name_that_is_reserved_while_it_is_claimed_is_not_both(postgresql: Any, tmp_path: Path) -> None:
    store = Store(postgresql.database(), tmp_path)
    await store.open()
    a, b = [(await do(store, records.create_account, name, 0.0)).id for name in "ab"]
    begun, go_on = threading.Event(), threading.Event()

    def claim(conn: Any) -> None:
        claiming.claim_names(conn, ["api"], a, 0.0, -600.0, BASE, 9)
        begun.set()
        go_on.wait(10)

    def count_waiting(conn: Any) -> int:
        return int(conn.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(do, store, claim)
        await trio.to_thread.run_sync(begun.wait, 10)
        nursery.start_soon(reserve, store, "api", b)
        with trio.fail_after(10):
            while not await store.query("name.owner", count_waiting):
                await trio.lowlevel.checkpoint()
        go_on.set()
    assert await claimed(store, a) == []
    await store.close()


async def test_a_claim_of_the_base_domain_counts_for_nothing(
    make_core: MakeCore, serving: Any, store: Store, ids: tuple[str, str], wall: Any, ticks: Any
) -> None:
    """A command that was not told of the base domain makes one."""
    a, _ = ids
    core = serving({"tunnel.example": a})
    await reserve(store, "tunnel.example", a)
    await core.claim(["tunnel.example"], a)
    await release(store, "tunnel.example", wall)
    assert await make_core().owner_of("tunnel.example") is None
    for account_id in ids:
        assert (await refused(make_core(), account_id, "tunnel.example")).reason == "name_reserved"
    await pass_time(10, core, wall, ticks)
    assert await claimed(store, a) == []
    assert core.take_lost()["tunnel.example"][1].reason == "name_reserved"
