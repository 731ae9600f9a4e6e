"""Probes: every tunnel's turn, new ones first, and no more of them where there are thousands."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

sys.path.insert(0, str(Path(__file__).parents[1] / "link"))

from linking import NOTHING, OPEN, Linked, linked

from tunnel.core.probing import INTERVAL, PER_SECOND, TURN, Prober
from tunnel.core.quotas import Account
from tunnel.core.registry import AgentLink, Registry
from tunnel.handler import ConnectVisit, LinkVisit
from tunnel.link.stream import Stream
from tunnel.wire import frames


@pytest.fixture
def registry() -> Registry:
    return Registry("example.com", 600)


def attach(registry: Registry, pair: Linked, id: str, *names: str) -> AgentLink:
    agent = AgentLink(pair.core, LinkVisit(ConnectVisit("192.0.2.1:1", id)), Account("acme", "acme"), 10_000)
    for index, name in enumerate(names):
        registry.attach(agent, name, "http", index)
    return agent


def answering(pair: Linked, on_probe: Callable[[Stream], None]) -> None:
    """The agent's end calls this for each probe."""
    pair.agent.on_opened = on_probe


def good(pair: Linked, seen: list[int]) -> Callable[[Stream], None]:
    def answer(stream: Stream) -> None:
        assert stream.head.protocol == frames.PROBE  # type: ignore[union-attr]
        seen.append(stream.head.tunnel)  # type: ignore[union-attr]
        pair.agent.session.respond(stream, NOTHING, end=True)

    return answer


async def test_each_tunnel_has_its_turn(registry: Registry, autojump_clock: Any, nursery: trio.Nursery) -> None:
    seen: list[int] = []
    async with linked() as pair:
        answering(pair, good(pair, seen))
        attach(registry, pair, "conn-1", "api", "web")
        prober = Prober(registry, 15)
        nursery.start_soon(prober.run)
        await trio.sleep(TURN * 1.5)
        assert sorted(seen) == [0, 1]
        found = prober.details()
        assert found.keys() == {"api", "web"}
        assert found["api"]["conn-1"]["up"] and found["api"]["conn-1"]["outcome"] == "ok"
        await trio.sleep(INTERVAL - TURN)
        assert len(seen) == 2
        await trio.sleep(TURN * 2)
        assert sorted(seen) == [0, 0, 1, 1]
        nursery.cancel_scope.cancel()


async def test_a_probe_takes_no_visitors_place(registry: Registry, autojump_clock: Any, nursery: trio.Nursery) -> None:
    begun: list[Stream] = []
    async with linked() as pair:
        answering(pair, begun.append)
        agent = attach(registry, pair, "conn-1", "api", "web")
        agent.max_streams = 1
        nursery.start_soon(Prober(registry, 15).run)
        await trio.sleep(TURN * 1.5)
        assert len(begun) == len(pair.core.session.streams) == 2
        assert agent.has_room
        pair.core.session.open(OPEN)
        assert not agent.has_room
        for stream in begun:
            pair.agent.session.respond(stream, NOTHING, end=True)
        await trio.sleep(0.1)
        assert len(pair.core.session.streams) == 1 and not agent.probes and not agent.has_room
        nursery.cancel_scope.cancel()


async def test_an_answered_probe_leaves_no_place_before_its_task_hears_of_it(
    registry: Registry, autojump_clock: Any, nursery: trio.Nursery
) -> None:
    begun: list[Stream] = []
    free: list[int] = []
    async with linked() as pair:
        answering(pair, begun.append)
        agent = attach(registry, pair, "conn-1", "api", "web")
        agent.max_streams = 3
        nursery.start_soon(Prober(registry, 15).run)
        await trio.sleep(TURN * 1.5)
        pair.core.session.open(OPEN)
        for stream in list(pair.core.session.streams.values()):
            stream.on_change = lambda: free.append(agent.free_places)  # type: ignore[attr-defined]
        for stream in begun[:2]:
            pair.agent.session.respond(stream, NOTHING, end=True)
        await trio.sleep(0.1)
        assert free == [2, 2] and agent.free_places == 2
        nursery.cancel_scope.cancel()


async def test_thousands_share_the_rate_and_new_ones_come_first(
    registry: Registry, autojump_clock: Any, nursery: trio.Nursery
) -> None:
    seen: list[int] = []
    async with linked() as pair:
        answering(pair, good(pair, seen))
        attach(registry, pair, "conn-1", *(f"t{number}" for number in range(30 * PER_SECOND)))
        prober = Prober(registry, 15)
        nursery.start_soon(prober.run)
        await trio.sleep(10 + TURN / 2)
        assert len(seen) == 10 * PER_SECOND
        attach(registry, pair, "conn-2", "fresh")
        await trio.sleep(TURN)
        assert "conn-2" in prober.details()["fresh"]
        await trio.sleep(20)  # the first are due again since 15 s, and come after the last that never had a turn
        assert len(prober.details()) == 30 * PER_SECOND + 1
        nursery.cancel_scope.cancel()


async def test_what_is_gone_is_forgotten(registry: Registry, autojump_clock: Any, nursery: trio.Nursery) -> None:
    seen: list[int] = []
    async with linked() as pair:
        answering(pair, good(pair, seen))
        agent = attach(registry, pair, "conn-1", "api")
        attach(registry, pair, "conn-2", "api")
        prober = Prober(registry, 15)
        nursery.start_soon(prober.run)
        await trio.sleep(TURN * 1.5)
        assert prober.details()["api"].keys() == {"conn-1", "conn-2"}
        registry.withdraw(agent)
        registry.detach(agent)
        await trio.sleep(TURN)
        assert prober.details()["api"].keys() == {"conn-2"}
        before = len(seen)
        await trio.sleep(INTERVAL)
        assert len(seen) == before + 1
        nursery.cancel_scope.cancel()


async def test_what_does_not_answer_is_down(registry: Registry, autojump_clock: Any, nursery: trio.Nursery) -> None:
    async with linked(heartbeat_timeout=1000) as pair:
        answers: dict[int, Callable[[Stream], None]] = {
            0: lambda stream: None,
            1: lambda stream: stream.reset("local_refused", "nobody listens"),
        }
        answering(pair, lambda stream: answers[stream.head.tunnel](stream))  # type: ignore[union-attr]
        attach(registry, pair, "conn-1", "silent", "refused")
        prober = Prober(registry, 3)
        nursery.start_soon(prober.run)
        await trio.sleep(TURN + 3.1)
        found = {name: by["conn-1"] for name, by in prober.details().items()}
        assert (found["silent"]["up"], found["silent"]["outcome"]) == (False, "timeout")
        assert (found["refused"]["up"], found["refused"]["outcome"]) == (False, "local_refused")
        nursery.cancel_scope.cancel()
