"""One worker of a core: started by its supervisor, with settings and sockets from there.

SIGTERM drains this one, and the supervisor puts another in its place. When the supervisor is gone, it drains too.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import msgspec
import trio

from tunnel.config import CoreSettings
from tunnel.core.certificates import ignore_odd_names
from tunnel.core.database import StoreError
from tunnel.core.server import Core
from tunnel.errors import ConfigError
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger, setup
from tunnel.tuning import tune_gc
from tunnel.workers.channel import ChannelLost
from tunnel.workers.member import Member, Place, find_place

log = get_logger("tunnel.core")

LAST_WORDS_SECONDS = 2.0


def work() -> int:
    """The exit code: 0 when it has drained, 1 when the store is away, 2 when it can't work."""
    place = find_place(os.environ)
    assert place is not None
    setup(place.log_level, place.log_json)
    ignore_odd_names()
    try:
        trio.run(_work, place)
    except (ConfigError, StoreError) as exc:
        log.error("can't start", error=str(exc))
        return 2 if isinstance(exc, ConfigError) else 1
    return 0


async def _work(place: Place) -> None:
    member = Member(place)
    async with open_pair() as nursery:
        nursery.start_soon(member.run)
        await member.wait_orders()
        core = Core(msgspec.convert(member.orders["settings"], CoreSettings), member)
        tune_gc()
        _obey(core, member)
        await nursery.start(_watch_signals, core, nursery)

        async def watch_supervisor() -> None:
            await member.is_alone.wait()
            core.drain()

        nursery.start_soon(watch_supervisor)
        await core.run()
        with trio.move_on_after(LAST_WORDS_SECONDS):
            try:
                await member.part()
            except ChannelLost:
                pass
        nursery.cancel_scope.cancel()


def _obey(core: Core, member: Member) -> None:
    """What the supervisor says during an upgrade, a reload, and at the end."""

    async def reload(message: Any, files: list[int]) -> str:
        await core.reload()
        return core.fingerprint

    async def close(message: Any, files: list[int]) -> None:
        await core.close(bool(message))

    member.on("reload", reload)
    member.on("close", close)
    member.on("stop taking agents", lambda message, files: core.stop_taking_agents())
    member.on("send agents away", lambda message, files: core.send_agents_away())


async def _watch_signals(core: Core, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None]) -> None:
    """The first drains, the second ends all now."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        is_draining = False
        async for _ in signals:
            if is_draining:
                nursery.cancel_scope.cancel()
            is_draining = True
            core.drain()
