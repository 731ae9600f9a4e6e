"""For which names certificates are got, and when: on a clock that tests move, with an authority that does as told."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from acmeserver import Root, pem_of
from cryptography.hazmat.primitives.asymmetric import ec
from trio.abc import Clock

from tunnel.core.certificates import for_visitors
from tunnel.core.database import StoreError
from tunnel.core.issuing import issuer as module
from tunnel.core.issuing.authority import Issued, OrderError, Stopped
from tunnel.core.issuing.challenges import Challenges
from tunnel.core.issuing.issuer import Issuer
from tunnel.core.issuing.ledger import Ledger

DAY = 86400.0
NAME = "app.tunnel.test"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path, "authority")


class Shop:
    """What a test looks at: an issuer with its surroundings. `orders` are (name, fake seconds since the start)."""

    def __init__(self, tmp_path: Path, root: Root, configured: tuple[str, ...] = (), **options: Any) -> None:
        chance = options.pop("chance", 0.0)
        self.root = root
        self.life = 90 * DAY
        self.began = time.time()
        self.orders: list[tuple[str, float]] = []
        self.looked_at: list[str] = []
        self.ours = {NAME}
        self.problems: list[Exception] = []  # of the next orders
        self.store_problem: StoreError | None = None
        self.renew_at: float | None = None
        self.forgotten = 0
        self.directory = tmp_path / "acme" / "certificates"
        self.directory.mkdir(parents=True, exist_ok=True)
        settings: Any = type("S", (), {"public_tls": True, "public_cert": "", "public_key": "", "public_cert_dir": ""})
        certificates = for_visitors(settings, self.directory)
        assert certificates is not None
        self.certificates = certificates
        ledger = Ledger(tmp_path / "acme" / "state.json", options.pop("max_orders", 10), self.wall, lambda: 0.0)
        self.issuer = Issuer(
            self, ledger, Challenges(tmp_path / "acme" / "challenges"), certificates, self.directory, configured,
            options.pop("on_demand", True), self.knows, self.wall, lambda: chance,
            is_shared=options.pop("is_shared", False),
        )  # fmt: skip
        certificates.on_missing = self.issuer.ask

    def wall(self) -> float:
        return self.began + trio.current_time()

    async def knows(self, name: str) -> bool:
        await trio.lowlevel.checkpoint()
        self.looked_at.append(name)
        if self.store_problem is not None:
            raise self.store_problem
        return name in self.ours

    # What stands for the authority

    def order(self, name: str, stop: threading.Event) -> Issued:
        self.orders.append((name, round(trio.current_time())))
        if self.problems:
            raise self.problems.pop(0)
        return self.make(name)

    def make(self, name: str) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        return Issued(pem_of(key).decode(), self.root.sign(key.public_key(), [name], self.life, now=self.wall()))

    def renewal_time(self, chain_pem: str) -> tuple[float | None, float]:
        return self.renew_at, self.wall() + 6 * 3600

    def forget_account(self) -> None:
        self.forgotten += 1

    def times(self, name: str = NAME) -> list[float]:
        return [at for one, at in self.orders if one == name]


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> Clock:
    """Work of threads is done at once: the clock must not jump while they work. Days pass in steps of six hours."""
    monkeypatch.setattr(module, "TICK", 6 * 3600.0)
    monkeypatch.setattr(module, "WATCH", 3600.0)

    async def run_sync(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return work(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    return autojump_clock


@asynccontextmanager
async def running(shop: Shop) -> AsyncIterator[Shop]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shop.issuer.run)
        await trio.sleep(0.1)
        yield shop
        nursery.cancel_scope.cancel()


async def test_configured_names_are_got_at_once_and_renewed_at_two_thirds(
    tmp_path: Path, root: Root, inline: Clock
) -> None:
    async with running(Shop(tmp_path, root, (NAME,))) as shop:
        assert shop.certificates.covers(NAME) is not None
        assert shop.looked_at == [], "the operator's word does"
        await trio.sleep(59 * DAY)
        assert shop.times() == [0]
        await trio.sleep(2 * DAY)
        assert len(shop.times()) == 2 and abs(shop.times()[1] - 60 * DAY) < 120
        await trio.sleep(365 * DAY)
        assert len(shop.times()) == 8
    assert shop.issuer.results["ok"] == 8 and shop.issuer.failing == 0


async def test_what_lies_there_is_used(tmp_path: Path, root: Root, inline: Clock) -> None:
    async with running(Shop(tmp_path, root, (NAME,))):
        pass
    async with running(Shop(tmp_path, root, (NAME,))) as shop:
        assert shop.certificates.covers(NAME) is not None
        await trio.sleep(DAY)
        assert shop.orders == []


async def test_a_visitor_brings_about_an_order_for_a_name_of_ours(tmp_path: Path, root: Root, inline: Clock) -> None:
    async with running(Shop(tmp_path, root)) as shop:
        for _ in range(5):
            shop.issuer.ask(NAME)
        await trio.sleep(1)
        assert shop.times() == [0] and shop.certificates.covers(NAME) is not None
        shop.issuer.ask(NAME)
        await trio.sleep(1)
        assert len(shop.orders) == 1


async def test_strangers_names_bring_about_nothing(tmp_path: Path, root: Root, inline: Clock) -> None:
    async with running(Shop(tmp_path, root)) as shop:
        for _ in range(3):
            shop.issuer.ask("nobody.tunnel.test")
            await trio.sleep(1)
        assert shop.looked_at == ["nobody.tunnel.test"], "once in half a minute"
        shop.ours.add("nobody.tunnel.test")
        await trio.sleep(module.STRANGER_TIME)
        shop.issuer.ask("nobody.tunnel.test")
        await trio.sleep(1)
        assert [name for name, _ in shop.orders] == ["nobody.tunnel.test"]
        odd = (
            "localhost",
            "app.localhost",
            "10.0.0.1",
            "a..b",
            "-a.test",
            "*.test",
            "a b.test",
            "x" * 64 + ".test",
            "a.9",
        )
        before = len(shop.looked_at)
        for name in odd:
            shop.issuer.ask(name)
        await trio.sleep(1)
        assert len(shop.looked_at) == before


async def test_a_flood_of_names_is_bounded(tmp_path: Path, root: Root, inline: Clock) -> None:
    async with running(Shop(tmp_path, root)) as shop:
        for number in range(10_000):
            shop.issuer.ask(f"n{number}.tunnel.test")
        shop.issuer.ask(NAME)
        await trio.sleep(1)
        assert len(shop.looked_at) == module.MAX_ASKED and shop.orders == []
        shop.issuer.ask(NAME)
        await trio.sleep(1)
        assert len(shop.orders) == 1, "the next visitor is heard"


async def test_not_on_demand(tmp_path: Path, root: Root, inline: Clock) -> None:
    async with running(Shop(tmp_path, root, on_demand=False)) as shop:
        shop.issuer.ask(NAME)
        await trio.sleep(1)
        assert shop.looked_at == [] and shop.orders == []


async def test_so_many_orders_an_hour_that_visitors_ask_for(tmp_path: Path, root: Root, inline: Clock) -> None:
    names = [f"n{number}.tunnel.test" for number in range(4)]
    async with running(Shop(tmp_path, root, ("www.tunnel.test", "api.tunnel.test"), max_orders=3)) as shop:
        shop.ours.update(names)
        for name in names:
            shop.issuer.ask(name)
        await trio.sleep(600)
        assert len(shop.orders) == 2 + 3, "the operator's own are not counted"
        await trio.sleep(3600)
        assert len(shop.orders) == 2 + 4


async def test_failures_wait_longer_and_longer(
    tmp_path: Path, root: Root, inline: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Shop(tmp_path, root, (NAME,))
    shop.problems = [OrderError("invalid", "connection: refused", "look at port 80") for _ in range(9)]
    async with running(shop):
        assert shop.issuer.failing == 1 and shop.issuer.results["invalid"] == 1
        await trio.sleep(3600)
        assert shop.times() == [0, 120, 480, 1560], "four in an hour"
        await trio.sleep(36 * 3600)
        gaps = [later - earlier for earlier, later in zip(shop.times(), shop.times()[1:], strict=False)]
        assert gaps[-1] == 6 * 3600 and len(shop.times()) == 10
        assert shop.issuer.failing == 0 and shop.issuer.results["ok"] == 1
    said = [record for record in caplog.records if record.msg == "certificate not issued"]
    assert len(said) == 9
    fields: dict[str, Any] = said[0].fields  # type: ignore[attr-defined]
    assert fields["host"] == NAME and fields["error"] == "connection: refused" and fields["advice"] == "look at port 80"


async def test_an_authority_that_wants_fewer_orders_gets_none_at_all(tmp_path: Path, root: Root, inline: Clock) -> None:
    shop = Shop(tmp_path, root, (NAME,))
    shop.problems = [OrderError("rate_limited", "too many", "", 7200)]
    async with running(shop):
        shop.ours.add("b.tunnel.test")
        shop.issuer.ask("b.tunnel.test")
        await trio.sleep(7100)
        assert len(shop.orders) == 1 and shop.issuer.results["rate_limited"] == 1
        await trio.sleep(200)
        assert sorted(name for name, _ in shop.orders[1:]) == [NAME, "b.tunnel.test"]
        assert shop.issuer.results["ok"] == 2


async def test_a_forgotten_account_is_made_again(tmp_path: Path, root: Root, inline: Clock) -> None:
    shop = Shop(tmp_path, root, (NAME,))
    shop.problems = [OrderError("refused", "accountDoesNotExist: there is no such account")]
    async with running(shop):
        assert shop.forgotten == 1
        await trio.sleep(200)
        assert shop.issuer.results["ok"] == 1


async def test_a_failing_renewal_is_the_operators_matter_and_the_old_one_stays(
    tmp_path: Path, root: Root, inline: Clock
) -> None:
    async with running(Shop(tmp_path, root)) as shop:
        shop.problems = [OrderError("unreachable", "gone")]
        shop.issuer.ask(NAME)
        await trio.sleep(1)
        assert shop.issuer.failing == 0, "a tenant's name that never worked is not"
        await trio.sleep(200)
        shop.problems = [OrderError("unreachable", "gone") for _ in range(4)]
        await trio.sleep(60 * DAY)
        assert shop.issuer.failing == 1 and shop.certificates.covers(NAME) is not None
        await trio.sleep(DAY)
        assert shop.issuer.failing == 0 and shop.issuer.results["ok"] == 2


async def test_a_failing_name_that_nobody_serves_any_more_is_nobodys_matter(
    tmp_path: Path, root: Root, inline: Clock
) -> None:
    async with running(Shop(tmp_path, root)) as shop:
        shop.issuer.ask(NAME)
        await trio.sleep(1)
        shop.problems = [OrderError("unreachable", "gone") for _ in range(100)]
        await trio.sleep(61 * DAY)
        assert shop.issuer.failing == 1
        shop.ours.clear()
        await trio.sleep(2 * DAY)
        assert shop.issuer.failing == 0 and shop.certificates.covers(NAME) is not None


async def test_a_store_that_is_away_is_no_failure_of_an_order(tmp_path: Path, root: Root, inline: Clock) -> None:
    async with running(Shop(tmp_path, root)) as shop:
        shop.issuer.ask(NAME)
        await trio.sleep(1)
        await trio.sleep(59 * DAY)
        shop.store_problem = StoreError("gone")
        await trio.sleep(2 * DAY)
        assert shop.issuer.failing == 0 and len(shop.times()) == 1
        shop.store_problem = None
        await trio.sleep(DAY)
        assert len(shop.times()) == 2


async def test_a_name_that_nobody_serves_any_more_is_given_up(tmp_path: Path, root: Root, inline: Clock) -> None:
    async with running(Shop(tmp_path, root)) as shop:
        shop.issuer.ask(NAME)
        await trio.sleep(1)
        shop.ours.clear()
        await trio.sleep(70 * DAY)
        assert shop.certificates.covers(NAME) is not None, "it may come back"
        await trio.sleep(3 * DAY)
        assert shop.certificates.covers(NAME) is None and len(shop.orders) == 1
        assert list(shop.directory.iterdir()) == []
        shop.ours.add(NAME)
        shop.issuer.ask(NAME)
        await trio.sleep(1)
        assert len(shop.orders) == 2


async def test_of_two_processes_one_orders(tmp_path: Path, root: Root, inline: Clock) -> None:
    async with running(Shop(tmp_path, root)) as one, running(Shop(tmp_path, root, chance=1.0)) as other:
        other.began = one.began
        one.issuer.ask(NAME)
        await trio.sleep(1)
        other.issuer.ask(NAME)
        await trio.sleep(10)
        assert len(one.orders) == 1 and other.orders == []
        assert other.certificates.covers(NAME) is not None
        await trio.sleep(70 * DAY)
        assert (len(one.orders), len(other.orders)) == (2, 0), "the renewed one was found"
        assert one.certificates.covers(NAME) is not None and other.certificates.covers(NAME) is not None


async def test_what_another_worker_got_is_served_before_anybody_asks(tmp_path: Path, root: Root, inline: Clock) -> None:
    one, other = (Shop(tmp_path, root, is_shared=True, chance=chance) for chance in (0.0, 1.0))
    async with running(one), running(other):
        one.issuer.ask(NAME)
        await trio.sleep(module.WATCH)
        assert other.certificates.covers(NAME) is not None and other.orders == [] and other.looked_at == []
        before = other.certificates.covers(NAME)
        await trio.sleep(61 * DAY)
        assert len(one.orders) + len(other.orders) == 2
        assert before is not other.certificates.covers(NAME) is not None, "the renewed one too"


async def test_what_failed_in_another_process_is_known_here(tmp_path: Path, root: Root, inline: Clock) -> None:
    one = Shop(tmp_path, root, (NAME,))
    one.problems = [OrderError("invalid", "refused") for _ in range(3)]
    async with running(one):
        await trio.sleep(500)
    other = Shop(tmp_path, root, (NAME,))
    other.began = one.began + 500
    async with running(other):
        assert other.orders == [] and other.issuer.failing == 1, "from its start"


async def test_the_authority_wants_one_renewed_early(tmp_path: Path, root: Root, inline: Clock) -> None:
    async with running(Shop(tmp_path, root, (NAME,))) as shop:
        await trio.sleep(DAY)
        assert len(shop.orders) == 1
        shop.renew_at = shop.wall() - 60
        await trio.sleep(DAY)
        assert 2 <= len(shop.orders) <= 5, "an authority that always wants it is not flooded"


async def test_a_file_that_somebody_took_away(tmp_path: Path, root: Root, inline: Clock) -> None:
    async with running(Shop(tmp_path, root)) as shop:
        shop.issuer.ask(NAME)
        await trio.sleep(1)
        (shop.directory / f"{NAME}.pem").unlink()
        await shop.certificates.reload()
        assert shop.certificates.covers(NAME) is None
        shop.issuer.ask(NAME)
        await trio.sleep(1)
        assert len(shop.orders) == 2 and shop.certificates.covers(NAME) is not None


async def test_the_store_is_away(tmp_path: Path, root: Root, inline: Clock) -> None:
    async with running(Shop(tmp_path, root)) as shop:
        shop.store_problem = StoreError("the store is away")
        shop.issuer.ask(NAME)
        await trio.sleep(31)
        shop.store_problem = None
        shop.issuer.ask(NAME)
        await trio.sleep(1)
        assert len(shop.orders) == 1


async def test_a_bug_in_an_order_costs_that_order(tmp_path: Path, root: Root, inline: Clock) -> None:
    shop = Shop(tmp_path, root, (NAME,))
    shop.problems = [RuntimeError("a bug")]
    async with running(shop):
        await trio.sleep(121)
        assert shop.times() == [0, 120]


async def test_a_full_disk_does_not_bring_about_one_order_after_the_other(
    tmp_path: Path, root: Root, inline: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_secret", full)
    async with running(Shop(tmp_path, root, (NAME,))) as shop:
        await trio.sleep(3600)
        assert len(shop.times()) == 4 and shop.issuer.failing == 1
        assert shop.issuer.results["ok"] == 0


async def test_orders_never_hold_up_the_run_loop_and_end_with_it(tmp_path: Path, root: Root) -> None:
    """In real threads: an authority that takes its time, four at once, and a core that ends meanwhile."""
    shop = Shop(tmp_path, root, tuple(f"n{number}.tunnel.test" for number in range(6)))
    begun, ended = threading.Semaphore(0), threading.Semaphore(0)
    running_now: list[str] = []

    def order(name: str, stop: threading.Event) -> Issued:
        running_now.append(name)
        begun.release()
        assert stop.wait(30)
        ended.release()
        raise Stopped

    shop.order = order  # type: ignore[method-assign]
    shop.issuer._ledger = Ledger(tmp_path / "acme" / "other.json", 10)  # its clock is read in threads
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shop.issuer.run)
        with trio.fail_after(20):
            for _ in range(module.MAX_AT_ONCE):
                await trio.to_thread.run_sync(begun.acquire, abandon_on_cancel=True)
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        assert len(running_now) == module.MAX_AT_ONCE
        nursery.cancel_scope.cancel()
    for _ in range(module.MAX_AT_ONCE):
        assert await trio.to_thread.run_sync(lambda: ended.acquire(timeout=10))
