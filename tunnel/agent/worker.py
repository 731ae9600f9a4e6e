"""One worker of an agent: started by its supervisor, with settings from there. SIGTERM ends this one politely, and the
supervisor puts another in its place; when the supervisor is gone, it ends too."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import trio

from tunnel.agent.client import Agent, Stopped
from tunnel.config import AgentSettings
from tunnel.errors import ConfigError
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger, setup
from tunnel.tuning import tune
from tunnel.workers.member import Member, Place, find_place

log = get_logger("tunnel.agent")


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


class _Up(trio.TaskStatus[None]):
    """Has the supervisor told of the first link, if there ever is one."""

    def __init__(self, nursery: trio.Nursery, member: Member) -> None:
        self._nursery, self._member = nursery, member

    def started(self, value: None = None) -> None:
        self._nursery.start_soon(self._member.tell, "up")


async def _work(place: Place) -> int:
    member = Member(place)
    code = 0
    async with open_pair() as nursery:
        nursery.start_soon(member.run)
        await member.wait_orders()
        agent = Agent(msgspec.convert(member.orders["settings"], AgentSettings), member)
        tune()

        def stop(message: Any, files: list[int]) -> None:
            agent.stop()

        member.on("stop", stop)
        member.on("report", lambda message, files: agent.send_report(message))
        await nursery.start(member.watch_end, agent.stop, nursery)
        try:
            if member.number == 0:
                nursery.start_soon(member.tell, "ready")
            else:
                await member.tell("ready")  # until the first one has a link
            async with open_pair() as telling:
                await agent.run(task_status=_Up(telling, member))
        except Stopped as exc:
            code = 1
            await member.tell("stopped", [str(exc), exc.reason])
        await member.part()
        nursery.cancel_scope.cancel()
    return code
