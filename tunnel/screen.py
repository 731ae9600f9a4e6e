"""What `tunnel up` shows while it runs: a live status on a terminal, a line for each request otherwise.

The core's run loop only appends to a `Feed`; formatting happens in a task of its own and writing in a thread, so that
neither a flood of requests nor a pipe that nobody reads slows the tunnel. What doesn't fit is counted and said.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, TextIO

import trio

from tunnel.errors import OUTCOMES
from tunnel.handler import RequestVisit, monotonic

if TYPE_CHECKING:
    from rich.console import Console, Group

RECENT = 10  # requests that the live status lists
PENDING = 200  # lines that wait to be written
SAMPLE = 1000  # newest requests that the quantiles are of
PAUSE = 0.2  # seconds between two writes at least
LAST = 0.5  # seconds that the last lines may take at the end


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished request, as shown. seconds: first byte of its head to the last of its answer. error: the cause."""

    at: float  # seconds since the epoch
    method: str
    path: str
    status: int
    outcome: str
    seconds: float
    error: str = ""

    def __str__(self) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(self.at))
        cause = f" ({self.error})" if self.error else ""
        return f"{clock} {self.method} {self.path} {self.status} {self.outcome} {show_time(self.seconds)}{cause}"


class Feed:
    """What is to be shown. `add` is the core's `on_request`; it never raises, waits or grows without bound."""

    def __init__(self) -> None:
        self.total = 0
        self.missed = 0  # lines that were never shown
        self.outcomes: Counter[str] = Counter()
        self.recent: deque[Finished] = deque(maxlen=RECENT)
        self.pending: deque[Finished | str] = deque()
        self._seconds: deque[float] = deque(maxlen=SAMPLE)
        self._changed = trio.Event()

    def add(self, visit: RequestVisit) -> None:
        """A request has ended."""
        seconds = monotonic() - visit.started
        path = visit.target.partition("?")[0]
        finished = Finished(
            time.time(),
            visit.method or "?",
            path or "/",
            visit.status,
            visit.outcome,
            seconds,
            visit.error or visit.cause,
        )
        self.total += 1
        self.outcomes[visit.outcome] += 1
        self._seconds.append(seconds)
        self.recent.append(finished)
        self.say(finished)

    def say(self, line: Finished | str) -> None:
        """Show this line too."""
        if len(self.pending) < PENDING:
            self.pending.append(line)
        else:
            self.missed += 1
        self._changed.set()

    def take(self) -> list[Finished | str]:
        """The lines that wait, once."""
        lines, self.pending = list(self.pending), deque()
        if self.missed:
            lines.append(f"({self.missed} more not shown)")
            self.missed = 0
        return lines

    def quantile(self, share: float) -> float:
        """Seconds within which this share of the newest requests was answered; 0 before the first."""
        ordered = sorted(self._seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    async def wait_changed(self) -> None:
        await self._changed.wait()
        self._changed = trio.Event()


class LogLines:
    """A text stream for tunnel.log that leads into the feed: on a terminal, log lines must not tear the live status.

    Written to from any thread; what comes after the end of the run goes to standard error.
    """

    def __init__(self, feed: Feed, token: trio.lowlevel.TrioToken) -> None:
        self._feed = feed
        self._token = token

    def write(self, text: str) -> int:
        for line in text.splitlines():
            try:
                self._token.run_sync_soon(self._feed.say, line)
            except trio.RunFinishedError:
                write_lines(sys.stderr, line)
        return len(text)

    def flush(self) -> None:
        pass


async def show_lines(feed: Feed, stream: TextIO) -> None:
    """Write a line for each request, until cancelled or nobody reads any more."""

    def write(lines: list[Finished | str]) -> bool:
        return write_lines(stream, *map(str, lines))

    await _show(feed, write)


async def show_live(feed: Feed, console: Console) -> None:
    """Keep a status at the foot of the terminal, until cancelled or the terminal is closed."""
    from rich.live import Live

    live = Live(render(feed), console=console, auto_refresh=False)

    def show(lines: list[Finished | str]) -> None:
        said = "\n".join(line for line in lines if isinstance(line, str))
        if said:  # above the status
            console.print(said, markup=False, highlight=False, soft_wrap=True)
        live.update(render(feed), refresh=True)

    def write(lines: list[Finished | str]) -> bool:
        return attempt(console.file, lambda: show(lines))

    if attempt(console.file, lambda: live.start(refresh=True)):
        try:
            await _show(feed, write)
        finally:
            attempt(console.file, live.stop)


async def _show(feed: Feed, write: Callable[[list[Finished | str]], bool]) -> None:
    try:
        while True:
            await feed.wait_changed()
            if not await trio.to_thread.run_sync(write, feed.take(), abandon_on_cancel=True):
                return
            await trio.sleep(PAUSE)
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(LAST):
            await trio.to_thread.run_sync(write, feed.take(), abandon_on_cancel=True)


def write_lines(stream: TextIO, *lines: str) -> bool:
    """False when nobody reads any more."""

    def write() -> None:
        stream.write("".join(f"{line}\n" for line in lines))
        stream.flush()

    return attempt(stream, write)


def attempt(stream: IO[str], write: Callable[[], object]) -> bool:
    """False when nobody reads this stream any more (`… | head -1`, a terminal that was closed).

    That is no reason to end, nor to complain at exit, where Python tries once more to write what is left.
    """
    try:
        write()
    except OSError:
        if stream in (sys.stdout, sys.stderr):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        return False
    except ValueError:  # closed by us
        return False
    return True


def show_time(seconds: float) -> str:
    """ "3.1ms", "120ms", "1.20s"."""
    milliseconds = seconds * 1000
    if milliseconds < 10:
        return f"{milliseconds:.1f}ms"
    return f"{milliseconds:.0f}ms" if milliseconds < 1000 else f"{seconds:.2f}s"


def render(feed: Feed) -> Group:
    """The live status: counts, latencies, the last requests with their outcomes."""
    from rich.console import Group
    from rich.text import Text

    counts = Text(f"{feed.total} requests", "bold")
    if feed.total:
        counts.append(f"   p50 {show_time(feed.quantile(0.5))}   p99 {show_time(feed.quantile(0.99))}", "default")
    for outcome, count in sorted(feed.outcomes.items()):
        counts.append(f"   {outcome} {count}", _style(outcome))
    rows = []
    for one in reversed(feed.recent):
        clock = time.strftime("%H:%M:%S  ", time.localtime(one.at))
        style = _style(one.outcome)
        rows.append(
            Text.assemble(
                (clock, "dim"),
                (f"{one.status}  ", style),
                f"{one.method} {one.path}  ",
                (one.outcome, style),
                f"  {show_time(one.seconds)}  ",
                (one.error, "dim"),
                no_wrap=True,
                overflow="ellipsis",
            )
        )
    return Group("", counts, *rows, Text("Ctrl-C ends it.", "dim"))


def _style(outcome: str) -> str:
    if outcome == "ok":
        return "green"
    row = OUTCOMES.get(outcome)
    return "red" if row is not None and row.failed else "yellow"
