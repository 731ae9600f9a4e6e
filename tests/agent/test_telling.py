"""What an agent without a core says, and how often."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tunnel.agent.attempt import Attempt, Connecting
from tunnel.agent.client import Agent
from tunnel.agent.telling import EVERY, MAX_REASONS, Telling
from tunnel.config import load_agent
from tunnel.errors import Refused, TunnelError


def test_a_reason_is_told_once_and_then_every_minute() -> None:
    telling = Telling()
    told = [telling.failed("refused", float(second)) for second in range(121)]
    assert {second: count for second, count in enumerate(told) if count} == {0: 1, 60: 60, 120: 60}


def test_another_reason_is_told_at_once() -> None:
    telling = Telling()
    assert [telling.failed(reason, 0.0) for reason in ("refused", "refused", "reset")] == [1, 0, 1]
    # In turn, neither is news.
    assert [telling.failed(reason, EVERY / 2) for reason in ("refused", "reset")] == [0, 0]
    assert [telling.failed(reason, EVERY) for reason in ("refused", "reset")] == [3, 2]


def test_after_a_link_all_is_news() -> None:
    telling = Telling()
    assert [telling.failed("refused", 0.0) for _ in range(2)] == [1, 0]
    telling.came_up()
    assert telling.failed("refused", 1.0) == 1


def test_reasons_that_always_differ_are_forgotten() -> None:
    telling = Telling()
    for number in range(1000):
        assert telling.failed(f"full for {number} s", 0.0) == 1
    assert len(telling._told) == MAX_REASONS
    assert [telling.failed(f"full for {number} s", 0.0) for number in (999, 0)] == [0, 1]


def agent_that(reach: Callable[[int], None], draining: bool = False) -> Agent:
    """An agent whose attempts end as `reach` says, which is given their numbers. draining: an earlier link is up."""
    agent = Agent(load_agent(["-server=core.test:8443", "-token=x", "-tls=false", "-metrics-addr="], {}))
    tried = 0

    async def dial(visit: Connecting) -> Any:
        nonlocal tried
        tried += 1
        await trio.lowlevel.checkpoint()
        reach(tried)

    keeper = agent._keeper
    keeper._connector._dial = dial  # type: ignore[method-assign] # a network that does as it is told
    if draining:
        old = Attempt(keeper._slots.all[0], 1)
        old.connected = old.went_away = True
        old.link = type("Link", (), {"round_trips": [], "session": None})()  # type: ignore[assignment] # looked at, not used
        keeper.attempts.append(old)
    return agent


def said(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[tuple[str, dict[str, Any]]]:
    return [(one.getMessage(), vars(one)["fields"]) for one in caplog.records if one.levelno >= level]


async def run_for(agent: Agent, seconds: float) -> None:
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as agent._keeper._keeping:
            await agent._keeper._keep(agent._keeper._slots.all[0])


async def test_a_core_that_is_away_for_ten_minutes(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(number: int) -> None:
        raise TunnelError("can't reach the core: connection refused")

    caplog.set_level(logging.DEBUG, "tunnel.agent")
    agent = agent_that(refuse)
    await run_for(agent, 600)
    lines = said(caplog)
    assert lines[0] == ("connecting to server", {"server": "core.test:8443"})
    assert lines[1][1]["attempts"] == 1 and lines[2][1]["attempt"] == 2
    failed = [fields for msg, fields in lines if msg == "connection failed"]
    assert 9 <= len(failed) <= 11
    assert [msg for msg, _ in lines[1:]] == ["connection failed", "reconnecting"] * len(failed)
    # Nothing is lost: the counts say how many there were, and at level debug there is each of them.
    tried = sum(msg == "connection failed" for msg, _ in said(caplog, logging.DEBUG))
    assert agent.statistics().consecutive_errors == tried > 400
    assert sum(one["attempts"] for one in failed) >= tried - 70
    assert max(one["attempts"] for one in failed) >= 40
    assert (agent.statistics().reconnections, agent.statistics().reconnection_errors) == (0, 0), "it never had a link"
    assert [fields["attempt"] for msg, fields in said(caplog, logging.DEBUG) if msg == "reconnecting"] == [
        *range(2, tried + 2)
    ]


async def test_reconnections_are_of_a_link_that_was_there(autojump_clock: MockClock) -> None:
    """The third attempt brings a link, which ends at once; then the core is away for three attempts."""
    agent = agent_that(lambda number: None)
    tried = 0

    async def connect(visit: Any) -> None:
        nonlocal tried
        tried += 1
        if tried == 7:
            agent._keeper.is_draining = True
        if tried != 3:
            raise TunnelError("refused")

    async def attached(visit: Any) -> None:
        await trio.lowlevel.checkpoint()

    agent._keeper._handle_connect, agent._keeper._handle_link = connect, attached
    await run_for(agent, 600)
    counts = agent.statistics()
    assert (tried, counts.reconnections, counts.reconnection_errors) == (7, 4, 3)


async def test_a_change_of_the_reason_is_told(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    def fail(number: int) -> None:
        if number == 5:
            raise Refused("no_port", "all ports are taken")
        raise TunnelError("refused" if number < 5 else "reset")

    caplog.set_level(logging.INFO, "tunnel.agent")
    await run_for(agent_that(fail), 30)
    told = [(msg, fields["error"]) for msg, fields in said(caplog, logging.ERROR)]
    assert told == [
        ("connection failed", "refused"), ("connection refused", "all ports are taken"), ("connection failed", "reset")
    ]  # fmt: skip


async def test_attempts_count_while_a_core_drains(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """Its link still serves, so they are no steps towards -max-retries; but they are attempts."""

    def refuse(number: int) -> None:
        raise Refused("draining", "the core is shutting down")

    caplog.set_level(logging.DEBUG, "tunnel.agent")
    agent = agent_that(refuse, draining=True)
    await run_for(agent, 60)
    numbers = [fields["attempt"] for msg, fields in said(caplog, logging.DEBUG) if msg == "reconnecting"]
    assert len(numbers) > 5 and numbers == [*range(2, len(numbers) + 2)]


@pytest.mark.parametrize(
    ("reason", "least", "most"),
    [("name_taken", 5, 80), ("name_reserved", 5, 80), ("no_port", 5, 80), ("draining", 5, 80), ("timeout", 400, 1000)],
)
async def test_what_only_a_person_can_mend_is_not_tried_every_second(
    autojump_clock: MockClock, reason: str, least: int, most: int
) -> None:
    """Each attempt is a WARNING at the core: in ten minutes, some 45 with waits of 15 s on average."""
    tried = 0

    def refuse(number: int) -> None:
        nonlocal tried
        tried += 1
        raise Refused(reason, "no")

    await run_for(agent_that(refuse), 600)
    assert least <= tried <= most
