"""A core that is out for harm, or broken: windows without measure, farewells that never end."""

import itertools
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from scripted import Rig as _Rig  # it knows where the links for tests are

from tunnel.agent import places
from tunnel.agent.client import Agent
from tunnel.agent.farewell import MOST_LEFT, PARTING, SPARE
from tunnel.config import AgentSettings
from tunnel.link import transport
from tunnel.link.link import Link
from tunnel.net import Socket
from tunnel.wire import control, frames
from tunnel.wire.control import Hello, TunnelGrant, Welcome
from tunnel.wire.frames import NO_BODY, Open

assert _Rig
Script = Callable[["Core", Link, Hello], Awaitable[None]]
MIB = 1 << 20


class Core:
    """Welcomes each link with `fields`, then does what the script says. links: all there were."""

    def __init__(self, script: Script, **fields: Any) -> None:
        self.script = script
        self.fields = fields
        self.links: list[Link] = []
        self.hellos: list[Hello] = []
        self.changed = trio.Event()
        self.dialed: list[float] = []

    async def serve(self, stream: trio.SocketStream) -> None:
        self.dialed.append(trio.current_time())
        socket = Socket(stream.socket._sock)  # type: ignore[attr-defined]  # Trio's own, as tunnel.net wants it
        async with trio.open_nursery() as nursery:
            link = Link(True, 5, 1e9)
            nursery.start_soon(link.run, await transport.accept(nursery, socket, link.on_message))
            _, payload = await link.receive_control()
            hello = control.decode(Hello, payload)
            grants = [TunnelGrant(one.name, "http", "http://app.example.com") for one in hello.tunnels]
            welcome = Welcome(1, "0", f"conn-{len(self.links)}", "acme", "a", grants, **self.fields)
            link.session.control(frames.WELCOME, control.encode(welcome))
            self.links.append(link)
            self.hellos.append(hello)
            self.changed.set()
            self.changed = trio.Event()
            await self.script(self, link, hello)
            await link.ended.wait()
            nursery.cancel_scope.cancel()

    async def until(self, holds: Callable[[], object]) -> None:
        while not holds():
            await self.changed.wait()


@asynccontextmanager
async def attacked(core: Core, **settings: Any) -> AsyncIterator[Agent]:
    """An agent of this core, running."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, core.serve, [listener])
        given = {"local": "http://127.0.0.1:1", "subdomain": "app", "metrics_addr": "", "layers": (), **settings}
        address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        agent = Agent(AgentSettings(server=address, tls=False, token="t", agent_id="a", **given))
        nursery.start_soon(agent.run)
        yield agent
        nursery.cancel_scope.cancel()


async def nothing(core: Core, link: Link, hello: Hello) -> None:
    """It just serves."""


# Memory --------------------------------------------------------------------------------------------------------------


async def test_windows_beyond_what_was_asked_for_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    core = Core(nothing, stream_window=frames.MOST_WINDOW, link_window=frames.MOST_WINDOW)
    async with attacked(core, max_buffer=64 * MIB) as agent:
        with trio.fail_after(10):
            await core.until(lambda: core.links)
            await core.links[0].ended.wait()
        assert core.hellos[0].link_window == 16 * MIB
        assert "a link's window of 2147483647 bytes is more than the 16777216" in core.links[0].end_reason
        await core.until(lambda: len(core.links) > 1)  # it tries again
        [failed] = [vars(one)["fields"] for one in caplog.records if one.msg == "connection failed"]
        assert "this agent takes (-max-buffer)" in failed["error"]
        assert not agent.tunnels


async def test_windows_that_it_may_have_are_taken() -> None:
    core = Core(nothing, stream_window=16 * MIB, link_window=16 * MIB)
    async with attacked(core, max_buffer=64 * MIB) as agent:
        with trio.fail_after(10):
            while not agent.tunnels:
                await trio.lowlevel.checkpoint()


async def test_all_links_together_hold_no_more_than_they_may() -> None:
    """Requests whose bodies nobody takes, each within its windows, on links to as many workers as the core likes."""
    stuck: list[trio.SocketStream] = []

    async def upload(core: Core, link: Link, hello: Hello) -> None:
        await core.until(lambda: len(core.links) == 8)
        for _ in range(8):
            opened = Open(frames.HTTP, 0, 0, 2**30, b"", b"POST / HTTP/1.1\r\nHost: a\r\n")
            stream = link.session.open(opened, b"", False)
            while room := link.session.sendable(stream):
                link.session.send_data(stream, bytes(room))
                await trio.lowlevel.checkpoint()

    workers = iter(range(100))

    class Crowd(Core):
        async def serve(self, stream: trio.SocketStream) -> None:
            self.fields["worker"] = next(workers)
            await super().serve(stream)

    core = Crowd(upload, stream_window=MIB, link_window=MIB, workers=8, core="c", capabilities=[control.WORKERS])
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def service(stream: trio.SocketStream) -> None:
            stuck.append(stream)
            await trio.sleep_forever()

        nursery.start_soon(trio.serve_listeners, service, [listener])
        port = listener.socket.getsockname()[1]
        async with attacked(core, max_buffer=4 * MIB, local=f"http://127.0.0.1:{port}") as agent:
            with trio.fail_after(20):
                while agent._keeper.held.refused == 0:
                    await trio.lowlevel.checkpoint()
            assert len(core.links) == 8
            assert agent._keeper.held.bytes <= 4 * MIB
        nursery.cancel_scope.cancel()


async def test_no_stream_begins_while_all_is_full() -> None:
    core = Core(nothing)
    async with attacked(core) as agent:
        with trio.fail_after(10):
            while not agent.tunnels:
                await trio.lowlevel.checkpoint()
            agent._keeper.held.bytes += agent._keeper.held.most
            stream: Any = core.links[0].session.open(
                Open(frames.HTTP, 0, 0, NO_BODY, b"", b"GET / HTTP/1.1\r\n"), end=True
            )
            while stream.failure is None:
                await trio.lowlevel.checkpoint()
            assert stream.failure[0] == 15 and "-max-buffer" in stream.failure[1]
            agent._keeper.held.bytes -= agent._keeper.held.most


# More requests than fit ----------------------------------------------------------------------------------------------


def workers(count: int, script: Script = nothing) -> Core:
    """Each link is at the next worker of so many."""
    numbers = itertools.count()

    class Crowd(Core):
        async def serve(self, stream: trio.SocketStream) -> None:
            self.fields["worker"] = next(numbers) % count
            await super().serve(stream)

    return Crowd(script, workers=count, core="c", capabilities=[control.WORKERS])


@pytest.mark.parametrize(
    ("allowed", "count", "told"),
    [
        (sys.maxsize, 1, [1000]),
        (1024, 1, [724]),
        (340, 1, [40]),
        (256, 1, [1]),
        (4300, 4, [1000] * 4),
        (1024, 4, [724, 181, 181, 181]),  # the first does not know yet how many there will be
        (301, 4, [1] * 4),
    ],
)
async def test_a_core_is_told_what_the_limit_of_open_files_allows(
    allowed: int, count: int, told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "allowed_now", lambda: allowed)
    core = workers(count)
    async with attacked(core):
        with trio.fail_after(10):
            await core.until(lambda: len(core.links) == count)
    assert [hello.max_streams for hello in core.hellos] == told


async def test_the_limit_of_now_counts_when_a_link_is_dialled_again(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(places, "allowed_now", lambda: 340)
    core = Core(nothing)
    async with attacked(core, heartbeat_timeout=1e6):
        await core.until(lambda: core.links)
        monkeypatch.setattr(places, "allowed_now", lambda: 640)
        core.links[0].close("come again")
        await core.until(lambda: len(core.links) == 2)
    assert [hello.max_streams for hello in core.hellos] == [40, 340]


@pytest.mark.parametrize("count", [1, 2])
async def test_what_is_beyond_that_is_refused_over_all_links(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "allowed_now", lambda: 310)
    monkeypatch.setattr(places, "PROBES", 6)
    streams: list[Any] = []
    served: list[trio.SocketStream] = []
    core = workers(count)
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def service(stream: trio.SocketStream) -> None:
            served.append(stream)
            await trio.sleep_forever()

        nursery.start_soon(trio.serve_listeners, service, [listener])
        port = listener.socket.getsockname()[1]
        async with attacked(core, local=f"http://127.0.0.1:{port}") as agent:
            with trio.fail_after(10):
                await core.until(lambda: len(core.links) == count)
                while not all(one.connected for one in agent._keeper.attempts):
                    await trio.lowlevel.checkpoint()
                for number in range(20):
                    link = core.links[number % count]
                    streams.append(
                        link.session.open(Open(frames.HTTP, 0, 0, NO_BODY, b"", b"GET / HTTP/1.1\r\n"), end=True)
                    )
                while sum(stream.failure is not None for stream in streams) + len(served) < 20:
                    await trio.lowlevel.checkpoint()
            refused = [stream.failure for stream in streams if stream.failure is not None]
            assert len(refused) == 4  # of 20; 10 fit, and 6 might have been probes
            assert {(code, "more open requests than it said" in text) for code, text in refused} == {(15, True)}
        nursery.cancel_scope.cancel()


# Farewells that never end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("told", "lasts"), [(None, 20.0), (70.0, 70.0), (1e9, 3600.0)])
async def test_a_core_that_sends_its_agent_away_and_keeps_the_link_loses_it(
    told: float | None, lasts: float, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """When its requests have had the time that the core gives them, or ours where it does not say."""
    caplog.set_level(logging.INFO)

    async def send_away(core: Core, link: Link, hello: Hello) -> None:
        if len(core.links) == 1:
            link.session.open(Open(frames.TCP, 0, 0, frames.UNKNOWN, b"", b""))
            for _ in range(20):
                link.session.control(frames.GOAWAY, control.pack_goaway("the core is shutting down"))
                await trio.sleep(0.1)

    core = Core(send_away, drain_timeout=told)
    async with attacked(core, drain_timeout=20.0, heartbeat_timeout=1e6):
        await core.until(lambda: len(core.links) == 2)
        began = core.dialed[0]
        assert core.dialed[1] - began < 1
        await core.links[0].ended.wait()
        assert lasts + SPARE <= trio.current_time() - began < lasts + SPARE + 2 * PARTING
        assert "sent this agent away" in core.links[0].end_reason
        assert len([one for one in caplog.messages if one.startswith("the core sends us away")]) == 1
        assert not core.links[1].end_reason and len(core.links) == 2


async def test_a_core_that_sends_each_link_away_is_dialled_ever_more_rarely(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Also where each link has held for a while; and of those that it keeps there are few."""

    async def send_away(core: Core, link: Link, hello: Hello) -> None:
        await trio.sleep(10)
        link.session.control(frames.GOAWAY, control.pack_goaway("once more"))

    core = Core(send_away, drain_timeout=3600.0)
    async with attacked(core, heartbeat_timeout=1e6):
        with trio.fail_after(10_000):
            await core.until(lambda: len(core.links) == 40)
        up = [link for link in core.links if not link.end_reason]
        assert len(up) <= MOST_LEFT + 2
        waits = [after - before - 10 for before, after in zip(core.dialed, core.dialed[1:], strict=False)]
        assert waits[0] < 1
        assert max(waits) > 15 and sum(waits[20:]) / len(waits[20:]) > 5
