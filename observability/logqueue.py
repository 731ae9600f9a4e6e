"""A log handler that does not wait: lines go to a bounded queue, one thread writes them in batches.

The thread is woken by the first line of a batch and then lets 20 ms of lines gather, so a busy program pays one wake-up
and one write per 20 ms. A full pipe or disk fills the queue; then lines are dropped and counted, and once the output
takes lines again, a record says how many were lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

PAUSE = 0.02  # seconds a batch may gather
MAX_BYTES = 4 << 20  # of lines waiting; at 350 bytes a line about 12,000 of them
FLUSH = 0.8  # seconds that the last batches have at exit
JOIN = 1.0  # seconds that exit waits for the thread


class Sink(Protocol):
    """Where lines go: the sink of the handler that the program installed."""

    is_broken: bool

    def write(self, data: bytes, wait: float) -> int: ...

    def abandon(self, data: bytes, taken: int) -> int: ...


class Writer:
    """The queue and its thread. `put` may be called from any thread; it costs well under a microsecond.

    after: what takes lines once the writer is closed. notice: renders the record about lost lines.
    """

    def __init__(self, sink: Sink, after: Callable[[bytes], None], notice: Callable[[int], bytes]) -> None:
        self.dropped = 0
        self.is_closed = False
        self._sink = sink
        self._after = after
        self._notice = notice
        self._reported = 0
        self._lock = threading.RLock()  # reentrant: a finaliser may log while this thread holds it
        self._queue: list[bytes] = []
        self._size = 0
        self._is_idle = True
        self._wake = threading.Lock()
        self._wake.acquire()
        self._stop = threading.Event()
        self._deadline = float("inf")
        # daemon, because a hung disk would otherwise keep the process from ending; close() flushes
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Queue one line (or several), its line break included."""
        with self._lock:
            if not self.is_closed:
                size = self._size + len(line)
                if size > MAX_BYTES:
                    self.dropped += line.count(b"\n")
                    return
                self._size = size
                self._queue.append(line)
                if self._is_idle:
                    self._is_idle = False
                    self._wake.release()
                return
        self._after(line)

    def close(self) -> None:
        """Write what is queued, for at most a second, and end the thread. Later lines go to `after`. Blocks."""
        self._deadline = time.monotonic() + FLUSH
        self._stop.set()
        with self._lock:
            if self._is_idle:
                self._is_idle = False
                self._wake.release()
        self._thread.join(JOIN)
        with self._lock:
            self.is_closed = True
            self.dropped += len(self._queue)
            self._queue.clear()

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            self._stop.wait(PAUSE)
            while self._write_batch():
                pass
            if self.is_closed:
                return

    def _write_batch(self) -> bool:
        """Take and write all that is queued; at the end, close. Returns whether to look again at once."""
        with self._lock:
            batch, self._queue, self._size = self._queue, [], 0
            is_stopping = self._stop.is_set()
            if not batch or not is_stopping:
                self._is_idle = True
            if not batch and is_stopping:
                self.is_closed = True
        if batch:
            self._write(b"".join(batch))
        return bool(batch) and is_stopping

    def _write(self, data: bytes) -> None:
        try:
            while data:
                taken = self._sink.write(data, min(0.1, max(0.0, self._deadline - time.monotonic())))
                if taken < len(data) and (self._sink.is_broken or time.monotonic() >= self._deadline):
                    self._lose(self._sink.abandon(data, taken))
                    return
                data = data[taken:]
            lost = self.dropped - self._reported
            if lost:
                self._reported += lost
                line = self._notice(lost)
                self._sink.abandon(line, self._sink.write(line, 0.1))
        except Exception:  # a sink that breaks its promise must not end the thread
            self._lose(data.count(b"\n"))

    def _lose(self, lines: int) -> None:
        with self._lock:
            self.dropped += lines


class QueueHandler(logging.Handler):
    """Renders records where they are made (the current span is known there) and queues the line."""

    def __init__(self, writer: Writer, formatter: logging.Formatter) -> None:
        super().__init__()
        self.writer = writer
        self.replaced: logging.Handler | None = None  # whose place this one took
        self.setFormatter(formatter)

    def write_lines(self, lines: bytes) -> None:
        """Whole lines that are ready, of another process."""
        self.writer.put(lines)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.writer.put((self.format(record) + "\n").encode("utf-8", "backslashreplace"))
        except Exception:
            self.writer.dropped += 1
