"""One worker of an agent: started by its supervisor, with settings from there. SIGTERM ends this one politely, and the
supervisor puts another in its place; when the supervisor is gone, it ends too."""

from __future__ import annotations

import os
import signal
from typing import Any

import msgspec
import trio

from tunnel.agent.client import Agent, Stopped
from tunnel.config import AgentSettings
from tunnel.errors import ConfigError
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger, setup
from tunnel.tuning import tune_gc
from tunnel.workers.channel import ChannelLost
from tunnel.workers.member import Member, Place, find_place

log = get_logger("tunnel.agent")

LAST_WORDS_SECONDS = 2.0


def work() -> int:
    """The exit code: 0 when stopped, 1 when it gave up (its supervisor says why), 2 when it can't work."""
    place = find_place(os.environ)
    assert place is not None
    setup(place.log_level, place.log_json)
    try:
        return trio.run(_work, place)
    except ConfigError as exc:
        log.error("can't start", error=str(exc))
        return 2


async def _work(place: Place) -> int:
    member = Member(place)
    code = 0
    async with open_pair() as nursery:
        nursery.start_soon(member.run)
        await member.wait_orders()
        agent = Agent(msgspec.convert(member.orders["settings"], AgentSettings), member)
        tune_gc()

        def stop(message: Any, files: list[int]) -> None:
            agent.stop()

        member.on("stop", stop)
        member.on("report", lambda message, files: agent.send_report(message))
        await nursery.start(_watch_signals, agent, nursery)
        nursery.start_soon(_watch_supervisor, agent, member)
        try:
            if member.number == 0:
                nursery.start_soon(_tell, member, "ready")
            else:
                await _tell(member, "ready")  # until the first one has a link
            async with open_pair() as running:
                await running.start(agent.run)
                await _tell(member, "up")
        except Stopped as exc:
            code = 1
            await _tell(member, "stopped", [str(exc), exc.reason])
        with trio.move_on_after(LAST_WORDS_SECONDS):
            await _tell(member, "parting", member.make_offers())
        nursery.cancel_scope.cancel()
    return code


async def _tell(member: Member, name: str, message: Any = None) -> None:
    """And wait until it is heard."""
    try:
        await member.channel.call(name, message)
    except ChannelLost:
        pass


async def _watch_supervisor(agent: Agent, member: Member) -> None:
    await member.is_alone.wait()
    agent.stop()


async def _watch_signals(agent: Agent, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None]) -> None:
    """The first lets open requests finish, the second ends all now."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        is_stopping = False
        async for _ in signals:
            if is_stopping:
                nursery.cancel_scope.cancel()
            is_stopping = True
            agent.stop()
