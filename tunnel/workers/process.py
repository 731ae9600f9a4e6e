"""A worker's process: how it is started, what is known of it, what it says of itself, and how it has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import trio

from tunnel.workers import VARIABLE
from tunnel.workers.channel import Channel, ChannelLost
from tunnel.workers.member import Place

GOOD_SECONDS = 10.0  #: a worker that was ready for so long is replaced at once
LOOK_SECONDS = 1.0  #: for a worker to say how it is: whoever asks for a page waits so long

#: meant for one process only
_OURS = (
    VARIABLE, "TUNNEL_HANDOVER", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES",
    "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID",
)  # fmt: skip

Said = Mapping[str, bytes]


class Worker:
    """One process. key: tells it from those before it in the same place."""

    def __init__(self, number: int, turn: int, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self.number = number
        self.key = f"{number}.{turn}"
        self.process = process
        self.channel = channel
        self.ready_since: float | None = None  # by trio's clock
        self.said: dict[str, bytes] = {}  # what it offers, by name, as of its newest answer
        self.last_words: Said | None = None
        self.pinged: float | None = None  # since when it owes us an answer to a ping
        self._heard: dict[str, int] = {}  # by name: in which look
        self.code: int | None = None  # its exit code

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_ready(self) -> bool:
        return self.ready_since is not None

    @property
    def has_served(self) -> bool:
        """Whether it was good for something. How long its start took says more of the machine."""
        return self.ready_since is not None and trio.current_time() - self.ready_since > GOOD_SECONDS

    @property
    def is_silent(self) -> bool:
        return self.pinged is not None and trio.current_time() - self.pinged > LOOK_SECONDS

    def hear(self, look: int, offers: Said) -> None:
        """What was asked for earlier never replaces what was asked for later."""
        for name, data in offers.items():
            if look > self._heard.get(name, 0):
                self._heard[name] = look
                self.said[name] = data

    async def look(self, look: int, names: Sequence[str]) -> bool:
        """Ask what it offers under these names, at most LOOK_SECONDS: it is in `said` then. Whether it has answered."""
        with trio.move_on_after(LOOK_SECONDS), suppress(ChannelLost):
            self.hear(look, await self.channel.call("offers", names))
            return True
        return False


def open_process(command: Sequence[str], place: Place, far: int) -> subprocess.Popen[bytes]:
    """The process for a place, whose log goes to `far`. Raises OSError."""
    environ = {name: value for name, value in os.environ.items() if name not in _OURS}
    environ[VARIABLE] = place.write()
    return subprocess.Popen(
        [*command, "worker", str(place.number)],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=far if place.log_json else None,
        stderr=None if place.log_json else far,
        pass_fds=[place.channel],
        process_group=0,  # a terminal's Ctrl-C is for the supervisor alone
    )


def command(module: str) -> list[str]:
    """`python -m tunnel.core`, with this interpreter and its options, however this program itself was started.

    A worker imports what we do: it looks into the current directory only if we look there too.
    """
    options = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    if not is_here_imported() and "-P" not in options:
        options.append("-P")
    return [sys.executable, *options, "-m", module]


def is_here_imported() -> bool:
    try:
        return "" in sys.path or str(Path.cwd()) in sys.path
    except OSError:  # it is there no longer
        return False


def how_ended(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"
