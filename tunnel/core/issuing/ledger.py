"""What one process must know of orders that others made, or that it made itself before it was started again.

A file with three things, changed under a lock: when each name may be tried next and how often it has failed, so that a
core that starts again and again spends no authority's patience; which names somebody is at work on; and when orders
were begun for names that visitors asked for, of which an hour has only so many. Called in threads.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunnel.core.private import write_secret

try:
    import fcntl
except ImportError:  # pragma: no cover  (not a Unix: one process is all there is)
    fcntl = None  # type: ignore[assignment]

FIRST_DELAY = 120.0  #: seconds after a first failure; each further one waits three times as long. Four tries in the
#: first hour: Let's Encrypt lets an account fail five times an hour for a name
GROWTH = 3.0
MAX_DELAY = 6 * 3600.0
SPREAD = 0.1  #: of each delay, at random, so that many names do not come back at once
FARTHEST = 9 * 86400.0  #: seconds; an authority may send us away for a week (authority.MAX_RETRY_AFTER)
LEASE = 240.0  #: seconds that somebody who is at work on a name is believed to be
HOUR = 3600.0
MAX_NAMES = 10_000  #: with failures that are remembered


@dataclass(frozen=True, slots=True)
class Permit:
    """Whether an order may begin now. until: when to ask again (seconds since 1970). why: "" or what is in the way.

    failures: of this name, in a row.
    """

    is_given: bool
    until: float = 0.0
    why: str = ""
    failures: int = 0


def delay_after(failures: int) -> float:
    """Seconds."""
    return min(MAX_DELAY, FIRST_DELAY * GROWTH ** min(failures - 1, 20))


class Ledger:
    """max_orders: begun an hour for names that visitors asked for."""

    def __init__(
        self,
        path: Path,
        max_orders: int,
        wall: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._path = path
        self._max_orders = max_orders
        self._wall = wall
        self._chance = chance

    def begin(self, name: str, counted: bool) -> Permit:
        """Ask to order for a name; pair with `end`. counted: it is one of the hour's. Raises OSError."""
        now = self._wall()
        with self._opened() as book:
            failed = book["failed"].get(name)
            if failed is not None and failed["until"] > now:
                return Permit(False, failed["until"], "it failed before", failed["count"])
            failures = failed["count"] if failed is not None else 0
            everybody = book["everybody"]
            if everybody > now:
                return Permit(False, everybody, "the authority wants fewer orders", failures)
            pid, since = book["busy"].get(name, (0, 0.0))
            if now - since < LEASE and _is_other(pid):
                return Permit(False, now + 2.0, "another process is at work on it", failures)
            begun = book["begun"]
            if counted and len(begun) >= self._max_orders:
                return Permit(False, begun[0] + HOUR, "too many orders in the last hour", failures)
            book["busy"][name] = (os.getpid(), now)
            if counted:
                begun.append(now)
            return Permit(True)

    def end(self, name: str) -> None:
        """It has its certificate. Raises OSError."""
        with self._opened() as book:
            book["busy"].pop(name, None)
            book["failed"].pop(name, None)

    def leave(self, name: str) -> None:
        """It was not decided. Raises OSError."""
        with self._opened() as book:
            book["busy"].pop(name, None)

    def fail(self, name: str, retry_after: float = 0.0, everybody: bool = False) -> tuple[float, int]:
        """It failed; returns when to try again and how many times it has. retry_after: seconds, at least so long.

        everybody: the authority wants no orders at all for so long. Raises OSError.
        """
        now = self._wall()
        with self._opened() as book:
            book["busy"].pop(name, None)
            count = book["failed"].pop(name, {"count": 0})["count"] + 1
            until = now + max(delay_after(count), retry_after) * (1 + SPREAD * self._chance())
            book["failed"][name] = {"count": count, "until": until}
            if everybody:
                book["everybody"] = max(book["everybody"], now + retry_after)
            while len(book["failed"]) > MAX_NAMES:
                del book["failed"][next(iter(book["failed"]))]
        return until, count

    @contextmanager
    def _opened(self) -> Iterator[dict[str, Any]]:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            book = self._read()
            before = json.dumps(book)
            yield book
            if (after := json.dumps(book)) != before:
                write_secret(self._path, after + "\n")
        finally:
            os.close(lock)

    def _read(self) -> dict[str, Any]:
        """An unreadable one is as good as none; so is what lies further ahead than any delay: a clock was wrong."""
        now = self._wall()
        try:
            found = json.loads(self._path.read_text())
            failed = {str(name): (int(one["count"]), float(one["until"])) for name, one in found["failed"].items()}
            everybody = float(found["everybody"])
            return {
                "failed": {
                    name: {"count": count, "until": until}
                    for name, (count, until) in failed.items()
                    if until < now + FARTHEST
                },
                "busy": {str(name): (int(pid), float(at)) for name, (pid, at) in found["busy"].items() if at <= now},
                "begun": [float(at) for at in found["begun"] if now - HOUR < at <= now],
                "everybody": everybody if everybody < now + FARTHEST else 0.0,
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {"failed": {}, "busy": {}, "begun": [], "everybody": 0.0}


def _is_other(pid: int) -> bool:
    """Whether this is a living process beside us."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
