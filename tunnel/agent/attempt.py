"""A link of an agent's from its dialling to its end, and the visits in which layers see it."""

from __future__ import annotations

import trio

from tunnel.agent.quick import Quick
from tunnel.agent.served import ServedStream
from tunnel.agent.slots import Slot
from tunnel.handler import ConnectVisit, LinkVisit
from tunnel.link.link import Link
from tunnel.link.stream import Stream
from tunnel.link.workers import Workers


class Attempt:
    """A link from dialling to its end. over: the next one is due `wait` seconds from now; failed: it never came up.
    number: from 1, since the slot's last link; is_told: what is said of it is no repetition. is_surplus: it has come to
    a worker of the core that has one of ours already, and is given up."""

    __slots__ = (
        "connected",
        "core",
        "core_drain",
        "failed",
        "is_surplus",
        "is_told",
        "link",
        "max_streams",
        "number",
        "over",
        "quick",
        "slot",
        "traced",
        "wait",
        "was_up",
        "went_away",
        "workers",
    )

    def __init__(self, slot: Slot, number: int) -> None:
        self.slot = slot
        self.number = number
        self.is_told = number == 1
        self.link: Link
        self.max_streams = 0  # that it may bring at a time
        self.traced: dict[str, str] = {}  # of its span, for the log
        self.core = ""  # the run of the core that welcomed it
        self.core_drain = 0.0  # seconds that the core's last requests get
        self.workers: Workers[Stream | ServedStream] | None = None
        self.quick: Quick | None = None
        self.connected = False
        self.was_up = self.went_away = self.is_surplus = False
        self.failed = False
        self.wait = 0.0
        self.over = trio.Event()

    def settle(self, wait: float, *, failed: bool = False) -> None:
        if not self.over.is_set():
            self.wait, self.failed = wait, failed
            self.over.set()


class Connecting(ConnectVisit, kw_only=True):
    """An attempt to get a link up. worker: of the core, that it is meant for."""

    nursery: trio.Nursery
    attempt: Attempt
    link: Link
    slot: Slot
    worker: int | None


class Attached(LinkVisit, kw_only=True):
    attempt: Attempt
