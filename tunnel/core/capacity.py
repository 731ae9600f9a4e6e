"""Whether what the limits let in also fits into what the system lets us have."""

from __future__ import annotations

from tunnel.config import CoreSettings
from tunnel.log import Logger
from tunnel.openfiles import make_room

OURS = 600  #: files that are no visitor's or agent's: two addresses with pages (256 connections each), store, log, …


def make_room_for_files(settings: CoreSettings, log: Logger) -> None:
    """Before anything else is started: workers inherit it. Each of them has its part of the visitors, for it takes them
    in turn, and a link of every agent."""
    workers = settings.workers
    agents = settings.max_connections + -(-settings.max_attaching // workers)

    def fitting(room: int) -> str:
        visitors = (room - agents) * workers
        if settings.max_visitors and visitors > 0:
            return f"set -max-visitors={min(visitors, settings.max_visitors)}"
        return "set lower limits of -max-connections and -max-attaching, then of -max-visitors"

    make_room(agents + -(-settings.max_visitors // workers), OURS, fitting, log)
