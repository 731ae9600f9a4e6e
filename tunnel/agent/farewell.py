"""Links that are to end: the core has sent us away from one, or it is one too many.

What has come is served to its end, and streams may still come while the news is on the way. But a core can say that it
ends, and not do it: so a link has the time that the core gave for its own end, and some to spare, and of links to one
worker that we were sent away from there are few at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from tunnel.link.link import Link
from tunnel.log import get_logger
from tunnel.wire import control, frames

log = get_logger("tunnel.agent")

GIVE_UP = 1.0  #: seconds for the core to hear that a link is given up
SPARE = 30.0  #: seconds beyond the core's drain: an upgrade sends agents away first, and drains when they are elsewhere
PARTING = 2.0  #: seconds for a polite close to leave
MOST_LEFT = 4  #: links of one kind that serve to their end at a time


async def see_off(link: Link, seconds: float) -> None:
    """The core has sent us away: it closes this link when it is done, or we do. seconds: that the core gives its own
    requests."""
    await trio.sleep(seconds + SPARE)
    await _close(link, f"the core sent this agent away {seconds + SPARE:.0f} s ago and has not closed the link")


async def leave_oldest(links: Sequence[Link]) -> None:
    """links: of one slot, that we were sent away from, the oldest first. Too many mean a core that only says so."""
    for link in links[:-MOST_LEFT]:
        await _close(link, "the core sends away one link after another")


async def give_up(link: Link, server: str, seconds: float) -> None:
    """Take nothing new, and end the link when what had come meanwhile is served, within so many seconds."""
    log.info("link given up", server=server, reason="its worker of the core has another one")
    link.session.control(frames.GOAWAY, control.pack_goaway("this agent has a link to this worker already"))
    with trio.move_on_after(seconds):
        while True:
            await trio.sleep(GIVE_UP)  # until the core has heard it
            if not link.session.streams:
                break
    link.close("this agent has a link to this worker already")


async def _close(link: Link, reason: str) -> None:
    link.close(reason)
    with trio.move_on_after(PARTING):
        await link.ended.wait()
    link.end(reason)
