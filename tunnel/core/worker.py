"""One worker of a core: started by its supervisor, with settings and sockets from there.

SIGTERM drains this one, and the supervisor puts another in its place. When the supervisor is gone, it drains too.
"""

from __future__ import annotations

import os
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
from tunnel.tuning import tune
from tunnel.workers.member import Member, Place, find_place

log = get_logger("tunnel.core")


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
        tune()
        _obey(core, member)
        await nursery.start(member.watch_end, core.drain, nursery)
        await core.run()
        await member.part()
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
