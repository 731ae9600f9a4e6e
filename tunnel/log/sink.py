"""Where log lines go: a descriptor that is never waited for longer than told.

A blocking write to a full pipe would stop the run loop, and switching the descriptor itself to non-blocking would do
so for every process that shares it (the terminal's shell, a supervisor). So, by what the descriptor is:

1. a regular file: one plain write;
2. a pipe, on Linux: opened a second time through /proc, which gives us a description of our own, non-blocking;
3. anything else (terminal, socket, a pipe that we may not open): wait until it is writable, then at most 4096 bytes
   (PIPE_BUF), which the kernel takes without blocking;
4. no descriptor at all (a StringIO): the stream's own `write`.
"""

from __future__ import annotations

import logging
import os
import select
import stat
import time
from typing import TextIO

from tunnel.log.lines import LineFormatter

PIPE_BUF = 4096
WAIT = 0.05  # seconds that the synchronous handler waits for a full pipe, once


class Sink:
    """Writes bytes that are whole lines. Not safe for two threads at once: one writer at a time.

    `is_broken` says of the last write that it failed for good (reader gone, disk full), not that time ran out.
    """

    def __init__(self, stream: TextIO) -> None:
        self.is_broken = False
        self._stream: TextIO | None = None
        self._fd = -1
        self._piece = PIPE_BUF
        self._own = -1
        self._is_torn = False  # the last line was cut: the next write begins with a line break
        try:
            stream.flush()
            self._fd = stream.fileno()
            mode = os.fstat(self._fd).st_mode
        except (AttributeError, OSError, ValueError):
            self._stream = stream
            return
        self._is_file = stat.S_ISREG(mode)
        if stat.S_ISFIFO(mode):
            self._reopen()
        if self._is_file or self._own >= 0:
            self._piece = 1 << 30
        self._poll = select.poll() if hasattr(select, "poll") else None
        if self._poll is not None:
            self._poll.register(self._fd, select.POLLOUT)

    def _reopen(self) -> None:
        try:
            self._own = os.open(f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_NONBLOCK)
            self._fd = self._own
        except OSError:
            pass  # no /proc, or a pipe of another user: case 3

    def write(self, data: bytes, wait: float) -> int:
        """Write what goes within `wait` seconds. Returns the bytes taken; fewer than all: `abandon` or try again."""
        self.is_broken = False
        if self._stream is not None:
            return self._write_stream(data)
        if self._is_torn:
            if not self._write_some(b"\n", 0):
                return 0
            self._is_torn = False
        view = memoryview(data)
        done = 0
        deadline = time.monotonic() + wait
        while done < len(data):
            taken = self._write_some(view[done : done + self._piece], deadline)
            if not taken:
                break
            done += taken
        return done

    def _write_some(self, data: bytes | memoryview, deadline: float) -> int:
        """Bytes taken; 0 when the deadline passed or the descriptor is broken."""
        try:
            while self._is_file or self._poll is None or self._is_writable(deadline):
                try:
                    return os.write(self._fd, data)
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        return 0
        except OSError:
            self.is_broken = True
        return 0

    def _is_writable(self, deadline: float) -> bool:
        assert self._poll is not None
        left = max(0.0, deadline - time.monotonic())
        return bool(self._poll.poll(left * 1000))

    def _write_stream(self, data: bytes) -> int:
        assert self._stream is not None
        try:
            self._stream.write(data.decode("utf-8", "replace"))
            self._stream.flush()
        except Exception:
            self.is_broken = True
            return 0
        return len(data)

    def abandon(self, data: bytes, taken: int) -> int:
        """Give up the rest of `data`. Returns the lines lost, the cut one included."""
        if taken and data[taken - 1 : taken] != b"\n":
            self._is_torn = True
        return data.count(b"\n", taken)

    def close(self) -> None:
        """Give back what was opened; the stream itself stays open."""
        if self._own >= 0:
            os.close(self._own)
            self._own = -1
            self.is_broken, self._fd = True, -1


class SyncHandler(logging.Handler):
    """Writes each record at once. A pipe that stays full is waited for once (50 ms); then records are dropped."""

    def __init__(self, sink: Sink, formatter: LineFormatter) -> None:
        super().__init__()
        self.sink = sink
        self.setFormatter(formatter)
        self.dropped = 0
        self._is_stalled = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
            taken = self.sink.write(line, 0 if self._is_stalled else WAIT)
            self._is_stalled = taken < len(line)
            if self._is_stalled:
                self.dropped += self.sink.abandon(line, taken)
        except Exception:
            self.dropped += 1

    def write_lines(self, lines: bytes) -> None:
        """Whole lines that are ready, of another process."""
        taken = self.sink.write(lines, 0 if self._is_stalled else WAIT)
        self._is_stalled = taken < len(lines)
        if self._is_stalled:
            self.dropped += self.sink.abandon(lines, taken)

    def handleError(self, record: logging.LogRecord) -> None:
        self.dropped += 1

    def close(self) -> None:
        self.sink.close()
        super().close()
