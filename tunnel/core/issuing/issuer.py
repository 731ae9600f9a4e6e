"""For which names the core gets certificates, and when.

Names are those that the operator has configured, at once, and those of tunnels, when a visitor first asks for one in a
TLS handshake. Anybody can ask for any name, so asking costs nothing: it is a look into a dictionary and a place in a
short queue. One task looks whether the name is one of ours (`knows`), which only an authenticated agent or the
operator can bring about, and only then there may be an order, within so many an hour.

A certificate is renewed when two thirds of its life are over, or when its authority says so (RFC 9773). A name that
nobody serves any more by then is given up. Until there is a certificate, and while none can be had, visitors get the
default one: nothing here is ever waited for by a handshake or by the start.

All orders run in threads. Several processes may share the directory: who finds that another one has got a certificate
takes that.
"""

from __future__ import annotations

import math
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from tunnel.core.certificates import Certificates, Loaded, Pair
from tunnel.core.issuing.authority import RESULTS, Issued, OrderError, Stopped
from tunnel.core.issuing.challenges import Challenges
from tunnel.core.issuing.ledger import Ledger, Permit, delay_after
from tunnel.core.private import write_secret
from tunnel.errors import TunnelError
from tunnel.log import get_logger

log = get_logger("tunnel.core")

RENEW_AT = 2 / 3  #: of a certificate's life
SPREAD = 1 / 30  #: of its life, added at random: a thousand that came together do not go together
GIVE_UP_AT = 4 / 5  #: of its life, for a name that nobody serves any more
LOOK_AGAIN = 3600.0  #: seconds, at such a name
ASK_AGAIN = 6 * 3600.0  #: seconds between two questions about renewal, where the authority names none
WATCH = 1.0  #: seconds between looks for what other processes have got
TICK = 60.0  #: seconds between looks at the clock on the wall, which may jump
MAX_AT_ONCE = 4  #: orders
MAX_ASKED = 256  #: names that wait to be looked at
MAX_STRANGERS = 10_000  #: names that are remembered as not ours
STRANGER_TIME = 30.0  #: seconds that they are
MAX_NAMES = 10_000  #: that we get certificates for

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"(?=.{{4,253}}$)(?:{_LABEL}\.)+(?!\d+$){_LABEL}")


class Orders(Protocol):
    """Where certificates come from (tunnel/core/issuing/authority.py). Called in threads."""

    def order(self, name: str, stop: threading.Event) -> Issued: ...

    def renewal_time(self, chain_pem: str) -> tuple[float | None, float]: ...

    def forget_account(self) -> None: ...


@dataclass(eq=False, slots=True)
class _Name:
    """configured: by the operator, so it is never given up. Times are seconds since 1970."""

    name: str
    configured: bool
    loaded: Loaded | None = None
    due: float = 0.0  # when there is something to do: order, renew, look again
    ask: float = math.inf  # when to ask the authority about renewal
    failures: int = 0
    why: str = ""  # it waits, if it does: logged once
    busy: bool = False

    @property
    def is_missed(self) -> bool:
        """Should have a certificate, or a newer one, and orders fail: the operator's matter."""
        return self.failures > 0 and (self.configured or self.loaded is not None)


class Issuer:
    """directory: where the certificates lie; `certificates` reads it. configured: names to have in any case.

    on_demand: whether visitors' names are got too. knows: whether a name is one of ours now; may raise TunnelError.
    is_shared: other processes put certificates there as well, which are to be served here at once.
    """

    def __init__(
        self,
        orders: Orders,
        ledger: Ledger,
        challenges: Challenges,
        certificates: Certificates,
        directory: Path,
        configured: Iterable[str],
        on_demand: bool,
        knows: Callable[[str], Awaitable[bool]],
        wall: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
        is_shared: bool = False,
    ) -> None:
        self.results: dict[str, int] = dict.fromkeys(RESULTS, 0)
        self._orders = orders
        self._ledger = ledger
        self._challenges = challenges
        self._certificates = certificates
        self._directory = directory
        self._on_demand = on_demand
        self._knows = knows
        self._is_shared = is_shared
        self._wall = wall
        self._chance = chance
        self._names = {name: _Name(name, True) for name in configured}
        self._asked: OrderedDict[str, None] = OrderedDict()
        self._strangers: OrderedDict[str, float] = OrderedDict()  # name: until (monotonic clock of Trio)
        self._wake = trio.Event()
        self._changed = False
        self._at_work = 0

    @property
    def failing(self) -> int:
        """Names that should have a certificate, or a newer one, and whose orders fail."""
        return sum(one.is_missed for one in self._names.values())

    def ask(self, name: str) -> None:
        """A visitor wants to be served under this name, and no certificate is for it. Never waits, never raises."""
        known = self._names.get(name)
        if known is not None:
            if known.loaded is not None and not known.busy:  # somebody took the file away
                known.loaded, known.due = None, 0.0
                self._tell()
            return
        if not self._on_demand or name in self._asked or len(self._asked) >= MAX_ASKED:
            return
        if _NAME.fullmatch(name) is None or name.endswith(".localhost"):
            return
        if self._strangers.get(name, 0.0) > trio.current_time():
            return
        self._asked[name] = None
        self._wake.set()

    async def run(self) -> None:
        """Get and renew, until cancelled."""
        stop = threading.Event()
        try:
            await trio.to_thread.run_sync(self._challenges.sweep)
            self._take_stock()
            async with trio.open_nursery() as nursery:
                if self._is_shared:
                    nursery.start_soon(self._watch)
                while True:
                    self._begin_due(nursery, stop)
                    await self._wait_for_work()
        finally:
            stop.set()

    async def _wait_for_work(self) -> None:
        """Until something is due or done, or a new name is ours. A stranger's name costs one look at that name."""
        self._changed = False
        with trio.move_on_after(self._until_next()):
            while not self._changed:
                await self._look_at_asked()
                if not self._changed:
                    await self._wake.wait()
                    self._wake = trio.Event()

    def _tell(self) -> None:
        self._changed = True
        self._wake.set()

    # What is to be done -------------------------------------------------------------------------------------------

    def _take_stock(self) -> None:
        """What lies in the directory from before."""
        for pair, loaded in self._certificates.loaded_from(self._directory):
            name = pair.cert.stem
            one = self._names.setdefault(name, _Name(name, False))
            self._take(one, loaded)

    async def _watch(self) -> None:
        """Take what other processes have got, so that a visitor finds it in whichever process he comes to."""
        known = await trio.to_thread.run_sync(_list_files, self._directory)
        while True:
            await trio.sleep(WATCH)
            found = await trio.to_thread.run_sync(_list_files, self._directory)
            for path in [path for path, stamp in found.items() if known.get(path) != stamp]:
                one = self._names.setdefault(path.stem, _Name(path.stem, False))
                if not one.busy:
                    await self._find_other(one)
            known = found

    def _take(self, one: _Name, loaded: Loaded) -> None:
        one.loaded = loaded
        one.failures, one.why = 0, ""
        life = loaded.expiry - loaded.begin
        one.due = loaded.begin + life * (RENEW_AT + SPREAD * self._chance())
        one.ask = self._wall() + ASK_AGAIN * (1 + self._chance())  # one that it always wants renewed is no flood

    async def _look_at_asked(self) -> None:
        while self._asked:
            name, _ = self._asked.popitem(last=False)
            try:
                is_ours = len(self._names) < MAX_NAMES and await self._knows(name)
            except TunnelError:
                is_ours = False  # the store is away: the next visitor asks again
            except Exception as exc:  # a bug costs this one name
                is_ours = False
                log.error("can't tell whether a name is ours", host=name, error=exc)
            if is_ours:
                self._names.setdefault(name, _Name(name, False))
                self._changed = True
                continue
            self._strangers[name] = trio.current_time() + STRANGER_TIME
            self._strangers.move_to_end(name)
            if len(self._strangers) > MAX_STRANGERS:
                self._strangers.popitem(last=False)

    def _begin_due(self, nursery: trio.Nursery, stop: threading.Event) -> None:
        now = self._wall()
        for one in list(self._names.values()):
            if not one.busy and min(one.due, one.ask) <= now and self._at_work < MAX_AT_ONCE:
                one.busy = True
                self._at_work += 1
                nursery.start_soon(self._work, one, stop)

    def _until_next(self) -> float:
        waiting = [min(one.due, one.ask) for one in self._names.values() if not one.busy]
        if not waiting or self._at_work >= MAX_AT_ONCE:
            return TICK  # or until one is done, which wakes us
        return min(max(min(waiting) - self._wall(), 0.0), TICK)

    # One name -----------------------------------------------------------------------------------------------------

    async def _work(self, one: _Name, stop: threading.Event) -> None:
        try:
            if one.due <= self._wall():
                await self._obtain(one, stop)
            else:
                await self._ask_about(one)
        except Exception as exc:  # the store, the disk, or a bug: it costs this one try
            one.failures += 1
            one.due = self._wall() + delay_after(one.failures)
            log.error("certificate not issued", host=one.name, error=exc, again=_date(one.due))
        finally:
            one.busy = False
            self._at_work -= 1
            self._tell()

    async def _obtain(self, one: _Name, stop: threading.Event) -> None:
        if await self._find_other(one) or not await self._is_wanted(one):
            return
        counted = not one.configured and one.loaded is None
        permit = await trio.to_thread.run_sync(self._ledger.begin, one.name, counted)
        if not permit.is_given:
            self._wait(one, permit)
            return
        one.why = ""
        began = trio.current_time()
        try:
            issued = await trio.to_thread.run_sync(self._orders.order, one.name, stop, abandon_on_cancel=True)
        except OrderError as exc:
            await self._failed(one, exc)
        except Stopped:
            await trio.to_thread.run_sync(self._ledger.leave, one.name)
        else:
            await self._keep(one, issued)
            self.results["ok"] += 1
            assert one.loaded is not None
            log.info(
                "certificate issued",
                host=one.name,
                expires=_date(one.loaded.expiry),
                renewal=_date(one.due),
                lasted=f"{trio.current_time() - began:.1f}s",
            )

    def _wait(self, one: _Name, permit: Permit) -> None:
        one.due = permit.until
        one.failures = permit.failures
        if permit.why != one.why:
            one.why = permit.why
            log.info("certificate waits", host=one.name, reason=permit.why, again=_date(one.due))

    async def _keep(self, one: _Name, issued: Issued) -> None:
        pair = self._pair(one)
        await trio.to_thread.run_sync(write_secret, pair.cert, issued.pem)
        self._take(one, await self._certificates.add(pair))
        await trio.to_thread.run_sync(self._ledger.end, one.name)

    async def _failed(self, one: _Name, exc: OrderError) -> None:
        everybody = exc.result == "rate_limited"
        until, one.failures = await trio.to_thread.run_sync(self._ledger.fail, one.name, exc.retry_after, everybody)
        if "accountDoesNotExist" in str(exc):
            await trio.to_thread.run_sync(self._orders.forget_account)
        one.due = until
        self.results[exc.result] += 1
        log.error(
            "certificate not issued",
            host=one.name,
            result=exc.result,
            error=str(exc),
            advice=exc.advice or "the core tries again by itself",
            again=_date(until),
            failures=one.failures,
        )

    async def _find_other(self, one: _Name) -> bool:
        """Has another process got it meanwhile?"""
        pair = self._pair(one)
        if not await trio.to_thread.run_sync(pair.cert.exists):
            return False
        before = one.loaded
        try:
            loaded = await self._certificates.add(pair)
        except ValueError:
            return False  # broken: a new one takes its place
        if before is not None and loaded.fingerprint == before.fingerprint:
            return False
        self._take(one, loaded)
        return one.due > self._wall()

    async def _is_wanted(self, one: _Name) -> bool:
        """Is it still one of ours? If it is not for long, it is forgotten, or the alerts would ring for it."""
        if one.configured:
            return True
        now = self._wall()
        try:
            if await self._knows(one.name):
                return True
        except TunnelError:  # the store is away, which says nothing about the name nor about its orders
            one.due = now + TICK
            return False
        one.failures = 0  # what nobody serves is missed by nobody
        if one.loaded is not None and now < one.loaded.begin + (one.loaded.expiry - one.loaded.begin) * GIVE_UP_AT:
            one.due = now + min(LOOK_AGAIN, (one.loaded.expiry - one.loaded.begin) / 100)
            return False
        del self._names[one.name]
        if one.loaded is not None:
            pair = self._pair(one)
            self._certificates.forget(pair)
            await trio.to_thread.run_sync(lambda: pair.cert.unlink(missing_ok=True))
            log.info("certificate given up, nobody serves the name", host=one.name)
        return False

    async def _ask_about(self, one: _Name) -> None:
        """Does the authority want it renewed earlier, because it is to be revoked for one thing?"""
        one.ask = self._wall() + ASK_AGAIN
        try:
            chain = await trio.to_thread.run_sync(self._pair(one).cert.read_text)
            wanted, again = await trio.to_thread.run_sync(self._orders.renewal_time, chain, abandon_on_cancel=True)
        except (OrderError, OSError) as exc:
            log.debug("authority not asked about renewal", host=one.name, reason=str(exc))
            return
        one.ask = max(again, self._wall() + TICK)
        if wanted is not None and wanted < one.due:
            log.info("the authority wants a certificate renewed early", host=one.name, renewal=_date(wanted))
            one.due = wanted

    def _pair(self, one: _Name) -> Pair:
        path = self._directory / f"{one.name}.pem"
        return Pair(path, path)


def _list_files(directory: Path) -> dict[Path, int]:
    """Certificates by path, with when they were written."""
    try:
        return {path: path.stat().st_mtime_ns for path in directory.iterdir() if path.suffix == ".pem"}
    except OSError:
        return {}


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
