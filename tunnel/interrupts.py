"""A program that is told to end: without a traceback while it still starts, and not in silence while it drains."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tunnel.log import Logger

ADVICE = "a second signal ends it at once"
PERIOD = 5.0  #: seconds between two words on a drain
INTERRUPTED = 130  #: exit code, as a shell gives it to a program that SIGINT has ended


HANGUP = getattr(signal, "SIGHUP", None)  #: a terminal that was closed; shell and kernel may both say so


def endings() -> list[signal.Signals]:
    """The signals that end a program which has no other use for SIGHUP. Who started it with `nohup` has had that
    ignored, and it stays so."""
    known = [signal.SIGTERM, signal.SIGINT]
    if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
        known.append(HANGUP)
    return known


def leave(code: int) -> NoReturn:
    """End the process. A Ctrl-C too many, while the interpreter puts things away, changes nothing of how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


class Terminal:
    """The terminal that the program was started on, if any: closed, it leaves a SIGHUP and nobody who could stop us."""

    def __init__(self) -> None:
        self._descriptors = [number for number in (0, 1, 2) if os.isatty(number)]

    @property
    def has_gone(self) -> bool:
        return bool(self._descriptors) and not any(os.isatty(number) for number in self._descriptors)


def quietly(program: Callable[[], int]) -> int:
    """Run a program's main function; returns its exit code, INTERRUPTED where Ctrl-C has ended it."""
    try:
        return program()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseExceptionGroup as group:
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        return INTERRUPTED


async def say_drain(log: Logger, under_way: Callable[[], int], seconds: float) -> None:
    """Until cancelled: how many are waited for, now and then, and for how long. seconds: that they have."""
    import trio

    deadline = trio.current_time() + seconds
    while True:
        await trio.sleep(PERIOD)
        log.info("still draining", under_way=under_way(), left=f"{max(0.0, deadline - trio.current_time()):.0f}s")
