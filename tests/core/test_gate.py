"""Agents at the gate: what is refused and why, who supersedes whom, and what the end of a link leaves behind."""

import logging
import re
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
from inprocess import until
from linking import OPEN, socket_pair

from tunnel.core.admission import MAX_TUNNELS
from tunnel.core.database import StoreError
from tunnel.core.gate import Gate
from tunnel.core.limits import Rate, no_refusals
from tunnel.core.quotas import MAX_LINKS_EACH, Account, Limits
from tunnel.core.registry import Registry
from tunnel.core.reports import Reports
from tunnel.core.tokens import Grant
from tunnel.errors import REFUSALS, Failure, Refused
from tunnel.handler import ConnectVisit, Handler, LinkVisit
from tunnel.link import transport
from tunnel.link.link import Link
from tunnel.link.sweeper import Sweeper
from tunnel.net import Socket
from tunnel.wire import control, frames
from tunnel.wire.control import Hello, RefusedMessage, TunnelRequest, Welcome


class Accounts:
    """Tokens are account names; "bad" is none, and "broken" means that the store does not answer."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.claimed: list[str] = []
        self.released: list[str] = []
        self.refusal: Refused | None = None  # of links that are there
        self.lost: dict[str, tuple[str, Refused]] = {}
        self.revision = 1
        self.looks_again = False
        self.refuses: Refused | None = None  # whoever comes

    async def authenticate(self, token: str, agent_id: str, parent: object = None) -> Grant:
        await trio.lowlevel.checkpoint()
        if self.refuses is not None:
            raise self.refuses
        if token == "broken":
            raise StoreError("the disk is full")
        if token == "bad":
            raise Refused("bad_token", "the token is not known")
        return Grant(token, token, agent_id or "agent-x")

    async def load(self, account_id: str, parent: object = None) -> Account:
        return self.accounts.setdefault(account_id, Account(account_id, account_id))

    async def claim(self, names: Collection[str], account_id: str) -> None:
        await trio.lowlevel.checkpoint()
        if "late" in names:
            self.revision += 1
        if "reserved" in names:
            raise Refused("name_reserved", "it is another account's")
        self.claimed.extend(names)

    async def release(self, names: Collection[str], account_id: str) -> None:
        self.released.extend(names)

    def check(self, grant: Grant) -> Refused | None:
        return self.refusal

    def take_lost(self) -> dict[str, tuple[str, Refused]]:
        lost, self.lost = self.lost, {}
        return lost

    def look_again(self) -> None:
        self.looks_again = True


class Rig:
    """connects, links: visits that ended."""

    def __init__(
        self, nursery: trio.Nursery, max_connections: int, max_attaching: int = 1000, max_handshakes: float = 0
    ) -> None:
        self.nursery = nursery
        self.refusals = no_refusals()
        self.accounts = Accounts()
        self.connects: list[ConnectVisit] = []
        self.links: list[LinkVisit] = []
        self.registry = Registry("example.com", 600)
        self.reports = Reports()
        self.sockets: list[Socket] = []
        self.gate = Gate(
            self.registry, cast(Any, self.accounts), cast(Any, None), self.reports, Sweeper(lambda exc: None),
            [self._layer], lambda tunnel: f"http://{tunnel.name}.example.com", tls=None,
            max_connections=max_connections, max_streams=100, auth_timeout=5.0, heartbeat=5.0, heartbeat_timeout=15.0,
            refusals=self.refusals, max_attaching=max_attaching, rate=Rate(max_handshakes),
        )  # fmt: skip

    def _layer(self, handler: Handler) -> Handler:
        async def layered(visit: Any) -> None:
            try:
                await handler(visit)
            finally:
                (self.connects if isinstance(visit, ConnectVisit) else self.links).append(visit)

        return layered

    async def dial(self, *names: str, token: str = "acme", **fields: Any) -> tuple[Link, Welcome | RefusedMessage]:
        """An agent's link, and what the core says to its hello."""
        link = await self.connect()
        tunnels = [TunnelRequest(name) for name in names or ("app",)]
        hello = {"versions": [1], "agent_version": "1", "agent_id": "a", "token": token, "tunnels": tunnels, **fields}
        link.session.control(frames.HELLO, control.encode(Hello(**hello)))
        with trio.fail_after(10):
            kind, payload = await link.receive_control()
        if kind == frames.WELCOME:
            return link, control.decode(Welcome, payload)
        assert kind == frames.REFUSED
        return link, control.decode(RefusedMessage, payload)

    async def connect(self) -> Link:
        near, far = socket_pair()
        self.sockets += near, far
        self.nursery.start_soon(self.gate._serve, near, ("192.0.2.5", 4711))
        link = Link(False, 5, 15)
        self.nursery.start_soon(link.run, await transport.connect(self.nursery, far, "core.test", link.on_message))
        return link

    async def refused(self, *names: str, **options: Any) -> RefusedMessage:
        before = len(self.connects)
        link, said = await self.dial(*names, **options)
        assert isinstance(said, RefusedMessage)
        with trio.fail_after(10):
            await link.ended.wait()
        await until(lambda: len(self.connects) > before)
        visit = self.connects[-1]
        assert (visit.outcome, visit.reason) == ("refused", said.reason)
        return said

    async def welcomed(self, *names: str, **options: Any) -> tuple[Link, Welcome]:
        link, said = await self.dial(*names, **options)
        assert isinstance(said, Welcome), said
        return link, said


@asynccontextmanager
async def rig(max_connections: int = 100, max_attaching: int = 1000, max_handshakes: float = 0) -> AsyncIterator[Rig]:
    async with trio.open_nursery() as nursery:
        made = Rig(nursery, max_connections, max_attaching, max_handshakes)
        try:
            yield made
        finally:
            nursery.cancel_scope.cancel()
            for socket in made.sockets:
                socket.close()


async def test_a_welcome_and_the_end() -> None:
    async with rig() as app:
        link, welcome = await app.welcomed("app", "APP2.example.com", "www.example.org", agent_id="agent-7")
        assert [one.name for one in welcome.tunnels] == ["app", "app2", "www.example.org"]
        assert welcome.tunnels[0].url == "http://app.example.com"
        assert (welcome.account_id, welcome.agent_id) == ("acme", "agent-7")
        agent = app.registry.links[welcome.connection_id]
        assert agent.indexes == {"app": 0, "app2": 1, "www.example.org": 2}
        assert app.accounts.accounts["acme"].links == 1
        link.session.control(frames.REPORT, b"up 1\n")
        await until(lambda: app.reports.all() and app.reports.all()[0].text)
        link.close("the agent stops")
        await until(lambda: app.links)
        assert (app.connects[0].outcome, app.connects[0].remote) == ("ok", "192.0.2.5:4711")
        assert app.links[0].parent is app.connects[0]
        assert app.registry.links == {} and app.accounts.accounts["acme"].links == 0
        assert sorted(app.accounts.released) == ["app", "app2", "www.example.org"]
        assert not app.reports.all()[0].connected


@pytest.mark.parametrize(
    ("reason", "names", "options"),
    [
        ("bad_token", (), {"token": "bad"}),
        ("unavailable", (), {"token": "broken"}),
        ("version", (), {"versions": [7, 8]}),
        ("version", (), {"versions": []}),
        ("version", (), {"versions": [2] * 5000}),
        ("bad_name", ("-x",), {}),
        ("bad_name", ("app", "APP.example.com"), {}),
        ("bad_name", tuple(f"n{i}" for i in range(MAX_TUNNELS + 1)), {}),
        ("bad_name", (), {"tunnels": []}),
        ("bad_name", (), {"tunnels": [TunnelRequest("x", "udp")]}),
        ("name_reserved", ("reserved",), {}),
        ("name_taken", ("taken",), {}),
    ],
)
async def test_refusals(reason: str, names: tuple[str, ...], options: dict[str, Any]) -> None:
    async with rig() as app:
        await app.welcomed("taken", token="other")
        said = await app.refused(*names, **options)
        assert said.reason == reason
        assert "disk" not in said.text and len(said.text) < 200
        assert len(app.registry.links) == 1
        assert "acme" not in app.accounts.accounts or app.accounts.accounts["acme"].links == 0


@pytest.mark.parametrize("reason", REFUSALS)
async def test_the_log_says_what_it_was(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """A name that is taken is no failed authentication, and whoever looks for those wants no others."""
    caplog.set_level(logging.WARNING, "tunnel.core")
    async with rig() as app:
        app.accounts.refuses = Refused(reason, "no")
        await app.refused()
        await until(lambda: caplog.records)
    [record] = caplog.records
    is_credential = reason in ("missing_token", "bad_token", "revoked", "expired", "account_disabled")
    assert record.getMessage() == ("authentication failed" if is_credential else "agent refused")
    assert vars(record)["fields"]["reason"] == reason


async def test_refusals_for_load() -> None:
    async with rig(max_connections=2) as app:
        app.accounts.accounts["small"] = Account("small", "small", Limits(max_connections=1))
        await app.welcomed("one", token="small")
        assert (await app.refused("two", token="small")).reason == "connection_quota"
        await app.welcomed("two")
        assert (await app.refused("three")).reason == "too_many_connections"
        app.gate.links.send_away("the core restarts")
        assert (await app.refused("four")).reason == "draining"


async def test_who_may_have_no_link_takes_no_names_and_who_gets_no_name_has_no_link() -> None:
    async with rig() as app:
        account = app.accounts.accounts["none"] = Account("none", "none", Limits(max_connections=0))
        assert (await app.refused("one", "two", token="none")).reason == "connection_quota"
        assert app.accounts.claimed == []
        account.set_limits(Limits(max_connections=1))
        assert (await app.refused("reserved", token="none")).reason == "name_reserved"
        assert (account.links, account.agents, account.attached) == (0, 0, 0)
        await app.welcomed("one", token="none")
        assert app.accounts.claimed == ["one"]


async def test_an_agent_that_dials_again_supersedes_itself() -> None:
    async with rig(max_connections=1) as app:
        app.accounts.accounts["acme"] = Account("acme", "acme", Limits(max_connections=1))
        old, first = await app.welcomed(instance="i-1")
        new, second = await app.welcomed(instance="i-1")
        assert list(app.registry.links) == [second.connection_id] != [first.connection_id]
        with trio.fail_after(10):
            await old.ended.wait()
        await until(lambda: app.links)
        assert list(app.registry.links) == [second.connection_id]
        assert app.accounts.accounts["acme"].links == 1
        tunnel = app.registry.find("app.example.com")
        assert tunnel is not None and len(tunnel.links) == 1
        assert not new.end_reason
        assert (await app.refused(instance="i-2")).reason == "too_many_connections"


async def test_the_same_instance_of_another_account_is_another_agent() -> None:
    async with rig() as app:
        await app.welcomed("one", instance="i-1")
        await app.welcomed("two", instance="i-1", token="other")
        await app.welcomed("three", instance="")
        await app.welcomed("four", instance="")
        assert len(app.registry.links) == 4


async def test_a_go_away_of_the_agent_takes_its_names_out_of_service() -> None:
    async with rig() as app:
        link, _ = await app.welcomed()
        link.session.control(frames.GOAWAY, control.pack_goaway("the agent stops"))
        await until(lambda: app.accounts.released)
        tunnel = app.registry.find("app.example.com")
        assert tunnel is not None and not tunnel.links
        assert app.accounts.accounts["acme"].links == 0
        link.close("done")
        await until(lambda: app.links)
        assert app.links[0].outcome == "ok"


@pytest.mark.parametrize(
    ("streams", "told", "lasts"),
    [(0, None, 5), (1, None, 30), (1, 70.0, 70), (1, 1.0, 1), (1, 1e9, 3600), (1, -1.0, 0)],
)
async def test_a_link_whose_agent_said_go_away_and_keeps_it_is_ended(
    streams: int, told: float | None, lasts: float, autojump_clock: trio.testing.MockClock
) -> None:
    """When its last requests have had the time that the agent gives them, or ours where it does not say."""
    async with rig() as app:
        link, welcome = await app.welcomed(drain_timeout=told)
        assert welcome.drain_timeout == 30
        (agent,) = app.registry.links.values()
        for _ in range(streams):
            agent.link.session.open(OPEN)
        began = trio.current_time()
        link.session.control(frames.GOAWAY, control.pack_goaway("the agent stops"))
        with trio.fail_after(4000):
            await link.ended.wait()
        assert lasts <= trio.current_time() - began < lasts + 1
        assert link.end_reason == "closed by the other end (1000 the agent said GOAWAY and had time to finish)"
        await until(lambda: app.links)
        assert app.links[0].outcome == "ok" and not app.registry.links


async def test_links_that_only_finish_what_they_have_are_bounded_too() -> None:
    async with rig() as app:
        account = app.accounts.accounts["acme"] = Account("acme", "acme", Limits(max_connections=1))
        for number in range(MAX_LINKS_EACH):
            link, _ = await app.welcomed()
            link.session.control(frames.GOAWAY, control.pack_goaway("the agent stops"))
            await until(lambda: account.links == 0)
            assert account.attached == number + 1
        said = await app.refused()
        assert said.reason == "connection_quota" and "still finishing" in said.text
        assert account.exceeded["connection"] == 1


async def test_each_link_that_is_closed_hears_why_also_where_another_serves_its_names() -> None:
    async with rig() as app:
        links = [(await app.welcomed())[0] for _ in range(3)]
        app.gate.links.close_all("the core is shutting down")
        with trio.fail_after(10):
            for link in links:
                await link.ended.wait()
                assert link.end_reason == "closed by the other end (1000 the core is shutting down)"


@pytest.mark.parametrize(
    ("most", "windows"),
    [
        (0, (2**20, 2**25)),
        (2**30, (2**20, 2**25)),
        (2**21, (2**20, 2**21)),
        (2**18, (2**18, 2**18)),
        (1, (2**16, 2**16)),
    ],
)
async def test_windows_are_those_that_the_agent_has_memory_for(most: int, windows: tuple[int, int]) -> None:
    async with rig() as app:
        _, welcome = await app.welcomed(link_window=most)
        assert (welcome.stream_window, welcome.link_window) == windows
        (agent,) = app.registry.links.values()
        assert agent.link.session.open(OPEN).receivable == windows[0]


async def test_a_lost_link_is_lost() -> None:
    async with rig() as app:
        await app.welcomed()
        app.sockets[1].abort()
        await until(lambda: app.links)
        assert app.links[0].outcome == "link_lost" and app.links[0].error
        tunnel = app.registry.find("app.example.com")
        assert tunnel is not None and not tunnel.links


async def test_revoked_while_connected() -> None:
    async with rig() as app:
        link, _ = await app.welcomed()
        app.gate.links.recheck()
        assert not link.end_reason
        app.accounts.refusal = Refused("revoked", "the token was revoked")
        app.gate.links.recheck()
        with trio.fail_after(10):
            kind, payload = await link.receive_control()
            await link.ended.wait()
        assert kind == frames.REFUSED
        assert control.decode(RefusedMessage, payload).reason == "revoked"
        await until(lambda: app.links)


async def test_a_name_that_is_lost_while_it_is_served() -> None:
    """Its links end with a word, those of others stay, and whose it is now need not wait for a hold."""
    async with rig() as app:
        link, _ = await app.welcomed("app", "more")
        other, _ = await app.welcomed("other")
        app.accounts.lost = {
            "app": ("acme", Refused("name_reserved", "the name app is reserved for another account")),
            "other": ("somebody", Refused("name_reserved", "of one who served it before")),
        }
        app.gate.links.recheck()
        assert app.registry.find("app.example.com") is None
        with trio.fail_after(10):
            kind, payload = await link.receive_control()
            await link.ended.wait()
        assert kind == frames.REFUSED
        assert control.decode(RefusedMessage, payload).reason == "name_reserved"
        await until(lambda: app.links)
        assert app.accounts.released == ["more"] and not other.end_reason
        link, _ = await app.welcomed("app", token="owner")
        tunnel = app.registry.find("app.example.com")
        assert tunnel is not None and (tunnel.account_id, len(tunnel.links)) == ("owner", 1)
        app.gate.links.recheck()
        assert not link.end_reason


async def test_names_of_an_account_that_is_gone_are_free_at_once() -> None:
    """Also those that are only held, and although its links have not ended yet."""
    async with rig() as app:
        link, _ = await app.welcomed("held")
        link.close("the agent stops")
        await until(lambda: app.links)
        gone = Refused("account_disabled", "the account is no longer there")
        await app.welcomed("app")
        said = await app.refused("held", token="other")
        assert said.reason == "name_taken" and re.search(r"held for \d+ s more for another account", said.text)
        assert "in use by another account" in (await app.refused("app", token="other")).text
        app.accounts.refusal, app.accounts.lost = gone, {"held": ("acme", gone), "app": ("acme", gone)}
        app.gate.links.recheck()
        app.accounts.refusal = None
        await app.welcomed("held", "app", token="other")


async def test_the_store_is_looked_at_again_after_a_change_in_the_middle_of_a_hello() -> None:
    async with rig() as app:
        await app.welcomed("app")
        assert not app.accounts.looks_again
        await app.welcomed("late")
        assert app.accounts.looks_again


async def test_what_is_no_hello() -> None:
    async with rig() as app:
        for number, (kind, payload) in enumerate(
            [(frames.REPORT, b"x"), (frames.HELLO, b"{}"), (frames.HELLO, b"\xff"), (frames.GOAWAY, b"x")], 1
        ):
            link = await app.connect()
            link.session.control(kind, payload)
            with trio.fail_after(10):
                await link.ended.wait()
            await until(lambda: len(app.connects) == number)  # noqa: B023
            assert (app.connects[-1].outcome, app.connects[-1].reason) == ("refused", "protocol")


async def test_bytes_that_are_no_websocket() -> None:
    async with rig() as app:
        app.gate._auth_timeout = 0.05
        for number, raw in enumerate((b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01\x00", b""), 1):
            near, far = socket_pair()
            app.sockets += near, far
            app.nursery.start_soon(app.gate._serve, near, ("192.0.2.5", 1))
            await far.send(raw)
            far.shutdown()
            await until(lambda: len(app.connects) == number)  # noqa: B023
            assert app.connects[-1].outcome in ("refused", "link_lost")
        assert not app.registry.links


async def test_nothing_at_all_has_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async with rig() as app:
        near, far = socket_pair()
        app.sockets += near, far
        with trio.fail_after(60):
            await app.gate._serve(near, ("192.0.2.5", 1))
        assert (app.connects[0].outcome, app.connects[0].reason) == ("refused", "timeout")
        assert near.is_closed


async def test_the_links_of_one_run_of_an_agent_have_one_place() -> None:
    async with rig(max_connections=1) as app:
        first, said = await app.dial("app", instance="run", link="0.0")
        second, said = await app.dial("app", instance="run", link="1.0")
        assert isinstance(said, Welcome) and len(app.registry.links) == 2
        assert (await app.refused("app", instance="other")).reason == "too_many_connections"
        # The same link again is the same one: the older is ended.
        third, said = await app.dial("app", instance="run", link="1.0")
        assert isinstance(said, Welcome)
        with trio.fail_after(10):
            await second.ended.wait()
        assert len(app.registry.links) == 2 and not first.end_reason and not third.end_reason
        assert len(app.registry.agents) == 1


async def test_an_agent_that_knows_no_workers_hears_of_none() -> None:
    async with rig() as app:
        _, said = await app.dial("app", capabilities=["workers"])
        assert isinstance(said, Welcome)
        assert (said.workers, said.worker, said.capabilities) == (1, 0, [])


async def test_a_link_gets_no_requests_before_its_welcome() -> None:
    """Other workers may know of it already, and the port of a TCP tunnel may take a moment."""
    async with rig() as app:
        _, said = await app.dial("app", instance="one")
        assert isinstance(said, Welcome)
        tunnel = app.registry.tunnels["app"]
        [first] = tunnel.links
        first.is_welcomed = False
        assert not first.has_room
        with pytest.raises(Failure) as caught:
            tunnel.choose()
        assert caught.value.outcome == "no_agent"
        await app.dial("app", instance="two")
        assert all(tunnel.choose() is not first for _ in range(4))
        first.is_welcomed = True
        assert {tunnel.choose() for _ in range(4)} == set(tunnel.links)
