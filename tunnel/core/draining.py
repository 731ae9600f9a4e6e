"""The end of a core: nothing new is accepted any more, and what was accepted has a deadline."""

from __future__ import annotations

import trio

from tunnel.core.door import Door
from tunnel.core.exchange import Exchanger
from tunnel.core.gate import Gate
from tunnel.core.registry import Registry
from tunnel.core.upgrade import KEEP_SECONDS
from tunnel.interrupts import say_drain
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger

log = get_logger("tunnel.core")

DRAIN_POLL = 0.02  #: seconds
CUT_OFF_TIME = 0.5  #: seconds that requests have to be answered with "draining" at the deadline
PARTING_TIME = 1.0  #: seconds for links to be closed


async def finish(
    exchanger: Exchanger, door: Door, gate: Gate, registry: Registry, timeout: float, *, is_handed_over: bool
) -> None:
    """Let every accepted request finish, within the deadline, then close the links."""
    exchanger.is_draining = True
    if not is_handed_over:
        gate.links.send_away("the core is shutting down")
    keep = KEEP_SECONDS if is_handed_over else 0.0
    async with open_pair() as nursery:
        nursery.start_soon(say_drain, log, lambda: exchanger.active, timeout)
        with trio.move_on_after(timeout) as scope:
            while True:
                waiting = door.close_idle(keep)
                if not waiting and not exchanger.active:
                    break
                await trio.sleep(DRAIN_POLL)
        nursery.cancel_scope.cancel()
    if scope.cancelled_caught:
        log.warning("drain deadline reached", requests=exchanger.active)
        door.cut_off()
        with trio.move_on_after(CUT_OFF_TIME):
            await exchanger.wait_idle()
    door.close_idle()
    gate.links.close_all("the core is shutting down")
    with trio.move_on_after(PARTING_TIME):
        for agent in list(registry.links.values()):
            await agent.link.ended.wait()
