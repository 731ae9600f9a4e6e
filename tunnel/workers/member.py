"""A worker's view: which one it is, and the channel to its supervisor."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any

import trio

from tunnel.handler import PageAnswer, PageRequest
from tunnel.plugins import Program
from tunnel.workers import VARIABLE
from tunnel.workers.channel import Channel, ChannelLost, Handler

LAST_WORDS_SECONDS = 2.0


class Place:
    """What a worker finds in its environment, as JSON: its number, and the file descriptor of its channel."""

    def __init__(self, number: int, channel: int, log_level: str, log_json: bool) -> None:
        self.number = number
        self.channel = channel
        self.log_level = log_level
        self.log_json = log_json

    def write(self) -> str:
        return json.dumps(vars(self))


def find_place(environ: MutableMapping[str, str]) -> Place | None:
    """The place of this process, if it is a worker; its own children are none."""
    text = environ.pop(VARIABLE, "")
    return Place(**json.loads(text)) if text else None


class Member:
    """number: of this worker, from 0. orders: what the supervisor says at the start, with open files.

    Handlers may come while the program starts: what is told before waits for them.
    """

    def __init__(self, place: Place) -> None:
        self.number = place.number
        self.orders: Any = None
        self.files: list[int] = []
        self.program: Program | None = None
        self.is_alone = trio.Event()  # the supervisor is gone
        self._began = trio.Event()
        handlers: dict[str, Handler] = {
            "begin": self._begin,
            "ping": lambda message, files: os.getpid(),
            "offers": self._make_offers,
            "page": self._make_page,
        }
        self.channel = Channel(socket.socket(fileno=place.channel), handlers)

    async def run(self) -> None:
        """Serve the channel until the supervisor is gone."""
        await self.channel.run()
        self.is_alone.set()

    async def wait_orders(self) -> None:
        await self._began.wait()

    def _begin(self, message: Any, files: list[int]) -> None:
        self.orders, self.files = message, files
        self._began.set()

    def _make_offers(self, names: Any, files: list[int]) -> dict[str, bytes]:
        return self.make_offers(names)

    def make_offers(self, names: list[str] | None = None) -> dict[str, bytes]:
        """What the program's parts have to say to the supervisor's; None: all of them."""
        offers = self.program.offers if self.program is not None else {}
        return {name: make() for name, make in offers.items() if names is None or name in names}

    async def _make_page(self, message: Any, files: list[int]) -> Any:
        path, query, headers = message
        pages = self.program.pages if self.program is not None else {}
        if path not in pages:
            return None
        answer: PageAnswer = await pages[path](PageRequest(path, query, headers))
        return [answer.status, answer.body, answer.content_type, answer.headers]

    async def tell(self, name: str, message: Any = None) -> None:
        """And wait until it is heard, or the supervisor is gone."""
        with suppress(ChannelLost):
            await self.channel.call(name, message)

    async def part(self) -> None:
        """Last words: what has been counted."""
        with trio.move_on_after(LAST_WORDS_SECONDS):
            await self.tell("parting", self.make_offers())

    async def watch_end(
        self, end: Callable[[], None], nursery: trio.Nursery, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """`end` is called at the first signal, and when the supervisor is gone. The second signal ends the nursery.

        A SIGHUP to all processes is the supervisor's, who tells the workers what follows from it.
        """
        hangup = getattr(signal, "SIGHUP", None)

        async def watch_supervisor() -> None:
            await self.is_alone.wait()
            end()

        nursery.start_soon(watch_supervisor)
        known = (signal.SIGTERM, signal.SIGINT, *([hangup] if hangup is not None else []))
        with trio.open_signal_receiver(*known) as signals:
            task_status.started()
            is_ending = False
            async for number in signals:
                if number == hangup:
                    continue
                if is_ending:
                    nursery.cancel_scope.cancel()
                is_ending = True
                end()

    def on(self, name: str, handler: Callable[[Any, list[int]], Any]) -> None:
        self.channel.on(name, handler)
