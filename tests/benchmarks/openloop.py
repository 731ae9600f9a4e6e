"""Open-loop load: requests at a fixed rate, whatever becomes of them, and latency counted from the planned send.

A client that waits for an answer before it sends the next request measures least when a server stalls: it sends
nothing then. Here the plan says when each request is due. One that can't be sent in time, because all connections are
taken or the client itself is late, has waited since then, and that counts.
"""

from __future__ import annotations

import gc
import math
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.processes import Failed

MAX_CONNECTIONS = 128
PATIENCE = 10.0  #: seconds after the last planned send


def percentile(values: Iterable[float], percent: float) -> float:
    """By the nearest rank: a value that was measured."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]


class Plan:
    """`count` requests, `rate` a second, the first at once. Times are seconds of one clock, given from outside."""

    def __init__(self, rate: float, count: int, now: float) -> None:
        self._rate = rate
        self._count = count
        self._began = now
        self._next = 0
        self.latencies: list[float] = []  #: of answers, seconds from the planned send
        self.lateness: list[float] = []  #: of sends, seconds after the planned time: the client's own share

    def planned(self, index: int) -> float:
        return self._began + index / self._rate

    def due(self, now: float) -> range:
        """The requests that have become due since the last call."""
        first = self._next
        while self._next < self._count and self.planned(self._next) <= now:
            self._next += 1
        return range(first, self._next)

    def until_next(self, now: float) -> float:
        """Seconds until another is due; infinite after the last."""
        return max(0.0, self.planned(self._next) - now) if self._next < self._count else math.inf

    def sent(self, index: int, now: float) -> None:
        self.lateness.append(now - self.planned(index))

    def answered(self, index: int, now: float) -> None:
        self.latencies.append(now - self.planned(index))

    @property
    def is_over(self) -> bool:
        return len(self.latencies) == self._count


@dataclass
class Paced:
    """Milliseconds. late_p99: how late the client itself was with its sends, which p50 and p99 contain."""

    p50: float
    p99: float
    worst: float
    late_p99: float

    @classmethod
    def of(cls, plan: Plan) -> Paced:
        values = [seconds * 1000 for seconds in plan.latencies]
        return cls(percentile(values, 50), percentile(values, 99), max(values), percentile(plan.lateness, 99) * 1000)


class _Connection:
    """A kept connection with one request on it at most."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.index = -1
        self._answer = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, index: int, request: bytes) -> None:
        self.index = index
        if self.socket.send(request) < len(request):
            raise Failed("a small request did not fit the socket's buffer")

    def has_answer(self) -> bool:
        """Reads what is there. Raises Failed for an answer that is broken off, or is no 200 with a length."""
        data = self.socket.recv(65536)
        if not data:
            raise Failed(f"the connection was closed instead of an answer, after {self._answer[:200]!r}")
        self._answer += data
        head, found, body = self._answer.partition(b"\r\n\r\n")
        if not found:
            return False
        if not is_complete(head, body):
            return False
        self._answer = b""
        return True


def is_complete(head: bytes, body: bytes) -> bool:
    """Whether this is a whole answer. Raises Failed for what is no 200 with a length."""
    lines = head.lower().split(b"\r\n")
    lengths = [int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:")]
    if b" 200 " not in lines[0] + b" " or len(lengths) != 1:
        raise Failed(f"not the answer that was expected: {head[:300]!r}")
    return len(body) >= lengths[0]


@contextmanager
def undisturbed() -> Iterator[None]:
    """What would delay the client, and count as the server's: the collector, and, if we may, programs that compute."""
    before = os.sched_getscheduler(0)
    gc.collect()
    gc.disable()
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        pass
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))
        gc.enable()


def paced(port: int, host: str, rate: float, seconds: float, path: str = "/k1") -> Paced:
    """So many requests a second for so long. Raises Failed when one gets no good answer."""
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    waiting: deque[int] = deque()
    idle = [_Connection(port) for _ in range(4)]
    busy: set[_Connection] = set()
    try:
        with undisturbed():
            plan = Plan(rate, round(rate * seconds), time.monotonic())
            end = time.monotonic() + seconds + PATIENCE
            while not plan.is_over:
                now = time.monotonic()
                if now > end:
                    raise Failed(f"{len(busy)} requests have had no answer for {PATIENCE:g} s")
                waiting.extend(plan.due(now))
                while waiting and (idle or len(busy) < MAX_CONNECTIONS):
                    connection = idle.pop() if idle else _Connection(port)
                    connection.send(waiting[0], request)
                    plan.sent(waiting.popleft(), time.monotonic())
                    busy.add(connection)
                pause = min(plan.until_next(time.monotonic()), PATIENCE)
                for connection in select.select(busy, (), (), pause)[0]:  # to the microsecond; epoll knows milliseconds
                    if connection.has_answer():
                        plan.answered(connection.index, time.monotonic())
                        busy.discard(connection)
                        idle.append(connection)
            return Paced.of(plan)
    except OSError as exc:
        raise Failed(f"a connection broke: {exc}") from exc
    finally:
        for connection in (*idle, *busy):
            connection.socket.close()
