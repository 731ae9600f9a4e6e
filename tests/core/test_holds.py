"""Names: reserved, claimed, held after the last link, also across a restart; asked for cheaply."""

from typing import Any

import pytest

from tunnel.core import holds, records
from tunnel.core.accounts import Accounts
from tunnel.core.store import Store, StoreError
from tunnel.errors import Refused


@pytest.fixture
def accounts(store: Store, wall: Any, ticks: Any) -> Accounts:
    return Accounts(store, wall=wall, monotonic=ticks)


@pytest.fixture
async def ids(store: Store) -> tuple[str, str]:
    def make(conn: Any) -> tuple[str, str]:
        return records.create_account(conn, "a", 0.0).id, records.create_account(conn, "b", 0.0).id

    return await store.query("account.default", make, write=True)


async def taken(accounts: Accounts, name: str, account_id: str) -> str:
    with pytest.raises(Refused) as caught:
        await accounts.claim([name], account_id)
    return caught.value.reason


async def reserve(store: Store, name: str, account_id: str) -> None:
    await store.query("account.default", lambda conn: records.reserve_name(conn, name, account_id, 0.0), write=True)


async def test_a_name_is_held_for_ten_minutes(
    accounts: Accounts, store: Store, ids: tuple[str, str], wall: Any, ticks: Any
) -> None:
    a, b = ids
    assert await accounts.owner_of("api") is None
    await accounts.claim(["api"], a)
    assert await accounts.owner_of("api") == a
    await accounts.claim(["api"], a)  # another agent of the account
    assert await taken(accounts, "api", b) == "name_taken"
    await accounts.release(["api"], a)
    wall.now += 600
    ticks.now += 600
    assert await accounts.owner_of("api") == a
    assert await taken(Accounts(store, wall=wall), "api", b) == "name_taken"
    wall.now += 0.1
    ticks.now += 3
    assert await accounts.owner_of("api") is None
    await accounts.claim(["api"], b)
    assert await accounts.owner_of("api") == b


@pytest.mark.parametrize("hold", [0.0, 3.0, 29.0])
async def test_a_name_in_use_is_safe_between_two_flushes_however_short_it_is_held_later(
    store: Store, ids: tuple[str, str], wall: Any, ticks: Any, hold: float
) -> None:
    a, b = ids
    one, other = (Accounts(store, name_hold=hold, wall=wall, monotonic=ticks) for _ in range(2))
    one.set_names_in_use(lambda: {"api": a})
    await one.claim(["api"], a)
    for _ in range(10):
        wall.now += 5
        ticks.now += 5
        assert await taken(other, "api", b) == "name_taken"
        await one._flush_quietly()
    one.set_names_in_use(dict)
    await one.release(["api"], a)
    wall.now += hold
    ticks.now += hold
    assert await taken(other, "api", b) == "name_taken"
    wall.now += 0.1
    await other.claim(["api"], b)


async def test_names_of_a_clock_that_was_hours_ahead_are_not_held_for_hours(
    accounts: Accounts, ids: tuple[str, str], wall: Any, ticks: Any
) -> None:
    a, b = ids
    wall.now += 5 * 3600
    await accounts.claim(["api"], a)
    await accounts.release(["api"], a)
    wall.now -= 5 * 3600
    assert await taken(accounts, "api", b) == "name_taken"
    await accounts._holds.touch()  # as it does now and then
    wall.now += 599
    ticks.now += 599
    assert await taken(accounts, "api", b) == "name_taken"
    wall.now += 2
    ticks.now += 2
    await accounts.claim(["api"], b)


async def test_names_in_use_stay_when_the_clock_is_set_forward(
    accounts: Accounts, ids: tuple[str, str], wall: Any
) -> None:
    a, b = ids
    await accounts.claim(["api"], a)
    wall.now += 5 * 3600
    await accounts._holds.touch()
    assert await taken(accounts, "api", b) == "name_taken"


async def test_a_reserved_name_is_its_accounts(
    accounts: Accounts, store: Store, ids: tuple[str, str], wall: Any
) -> None:
    a, b = ids
    await reserve(store, "www.example.com", a)
    assert await accounts.owner_of("www.example.com") == a
    assert await taken(accounts, "www.example.com", b) == "name_reserved"
    await accounts.claim(["www.example.com"], a)
    await accounts.release(["www.example.com"], a)
    wall.now += 10_000
    assert await Accounts(store, wall=wall).owner_of("www.example.com") == a


async def test_reserving_beats_a_claim(accounts: Accounts, store: Store, ids: tuple[str, str]) -> None:
    a, b = ids
    await accounts.claim(["api"], b)
    assert await accounts.owner_of("api") == b
    await reserve(store, "api", a)
    assert await accounts.owner_of("api") == b  # from the cache, until the change is noticed
    await accounts.watch(lambda: None)
    assert await accounts.owner_of("api") == a
    assert await taken(accounts, "api", b) == "name_reserved"


async def test_names_that_are_lost_are_told_once(accounts: Accounts, store: Store, ids: tuple[str, str]) -> None:
    a, b = ids
    known = {"api": b, "shop": b, "mine": a, "www.example.com": a}
    accounts.names_known = lambda: known
    await reserve(store, "api", a)
    await reserve(store, "mine", a)
    await accounts.watch(lambda: None)
    lost = accounts.take_lost()
    assert {name: (owner, why.reason) for name, (owner, why) in lost.items()} == {"api": (b, "name_reserved")}
    assert "reserved for another account" in str(lost["api"][1]) and accounts.take_lost() == {}
    await accounts.watch(lambda: None)
    assert accounts.take_lost() == {}
    del known["api"]
    await store.query("account.default", lambda conn: records.delete_account(conn, b), write=True)
    await accounts.watch(lambda: None)
    lost = accounts.take_lost()
    assert {name: (owner, why.reason) for name, (owner, why) in lost.items()} == {"shop": (b, "account_disabled")}


async def test_a_name_that_comes_while_the_store_is_read_is_looked_at_next(
    accounts: Accounts, store: Store, ids: tuple[str, str]
) -> None:
    a, b = ids
    await reserve(store, "api", a)
    answers = [{}, {"api": b}, {"api": b}, {"api": b}]
    accounts.names_known = lambda: answers.pop(0)
    await accounts.watch(lambda: None)
    assert accounts.take_lost() == {}
    await accounts.watch(lambda: None)
    assert accounts.take_lost().keys() == {"api"}


async def test_a_killed_core_keeps_and_ends_the_hold(store: Store, ids: tuple[str, str], wall: Any, ticks: Any) -> None:
    a, _ = ids
    first = Accounts(store, wall=wall, monotonic=ticks)
    await first.claim(["api"], a)
    for _ in range(100):  # in use for 5,000 s, then killed
        wall.now += 50
        ticks.now += 50
        await first._flush_quietly()
    second = Accounts(store, wall=wall)
    wall.now += 500
    assert await second.owner_of("api") == a
    wall.now += 101
    assert await Accounts(store, wall=wall).owner_of("api") is None


async def test_only_names_really_in_use_stay_held(
    accounts: Accounts, store: Store, ids: tuple[str, str], wall: Any
) -> None:
    a, b = ids
    await accounts.claim(["served"], a)
    await accounts.claim(["refused"], b)  # and then its agent was refused for another reason
    accounts.set_names_in_use(lambda: {"served": a})
    wall.now += 599
    await accounts._holds.touch()
    wall.now += 2
    other = Accounts(store, wall=wall)
    assert await other.owner_of("served") == a
    assert await other.owner_of("refused") is None


async def test_an_agents_names_are_claimed_together_or_not_at_all(
    accounts: Accounts, store: Store, ids: tuple[str, str]
) -> None:
    a, b = ids
    await reserve(store, "mine", a)
    await reserve(store, "theirs", b)
    await accounts.claim(["mine", "one", "two"], a)
    assert [await accounts.owner_of(name) for name in ("mine", "one", "two")] == [a, a, a]
    for name, reason in (("two", "name_taken"), ("mine", "name_reserved")):
        with pytest.raises(Refused, match=f"the name {name} ") as caught:
            await accounts.claim(["free", name, "theirs"], b)
        assert caught.value.reason == reason
    assert await accounts.owner_of("free") is None
    await accounts.claim(["theirs"], b)  # nothing to write


async def test_what_an_agent_costs_the_store_does_not_grow_with_its_names(
    accounts: Accounts, ids: tuple[str, str], asked: list[str]
) -> None:
    a, _ = ids
    names = [f"name{number}" for number in range(100)]
    asked.clear()
    await accounts.claim(names, a)
    await accounts.release(names, a)
    assert asked == ["name.claim", "name.release"]


async def test_answers_are_cached_for_a_moment(
    accounts: Accounts, ids: tuple[str, str], ticks: Any, asked: list[str]
) -> None:
    a, _ = ids
    asked.clear()
    for _ in range(10):
        assert await accounts.owner_of("api") is None
    assert asked == ["name.owner"]
    await accounts.claim(["api"], a)
    assert await accounts.owner_of("api") == a  # at once
    ticks.now += 2
    assert await accounts.owner_of("api") == a
    assert asked.count("name.owner") == 3


async def test_random_names_fill_no_memory(accounts: Accounts, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    async def query(operation: str, work: Any, **more: Any) -> Any:
        return None

    store.query = query  # type: ignore[method-assign]
    monkeypatch.setattr(holds, "CACHE_SIZE", 10)
    for i in range(100):
        await accounts.owner_of(f"random-{i}")
    assert len(accounts._holds._cache) == 10


async def test_old_claims_are_cleared_away(accounts: Accounts, store: Store, ids: tuple[str, str], wall: Any) -> None:
    a, b = ids
    await accounts.claim(["old"], a)
    await accounts.release(["old"], a)
    wall.now += 601
    await accounts.claim(["new"], b)
    await accounts._holds.touch()
    rows = await store.query("name.owner", records.list_names)
    assert [row["name"] for row in rows] == ["new"]


async def test_a_release_survives_an_outage(
    accounts: Accounts, store: Store, ids: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async def query(operation: str, work: Any, **more: Any) -> Any:
        raise StoreError("the store is away")

    await accounts.claim(["api"], ids[0])
    store.query = query  # type: ignore[method-assign]
    await accounts.release(["api"], ids[0])
    assert [record.getMessage() for record in caplog.records] == ["names not released in the store"]


async def test_who_is_refused_after_its_claim_leaves_nothing_in_memory(
    accounts: Accounts, ids: tuple[str, str]
) -> None:
    """Again and again with other names: for a port that is not to be had, say."""
    accounts.set_names_in_use(dict)
    for number in range(10):
        await accounts.claim([f"n{number}"], ids[0])
    assert accounts._holds._claimed == {}
