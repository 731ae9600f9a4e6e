"""The open loop's arithmetic, and its client against servers that answer, stall, and break off."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from benchmarks.openloop import Paced, Plan, is_complete, paced, percentile
from benchmarks.processes import Failed

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(one) for one in range(1, 101)]
    assert [percentile(values, percent) for percent in (50, 99, 100, 1)] == [50, 99, 100, 1]
    assert percentile([3.0], 99) == 3.0
    assert percentile([2.0, 1.0], 50) == 1.0


def test_requests_become_due_one_by_one() -> None:
    plan = Plan(rate=100, count=3, now=5.0)
    assert plan.until_next(5.0) == 0
    assert list(plan.due(5.0)) == [0]
    assert plan.until_next(5.0) == pytest.approx(0.01)
    assert list(plan.due(5.009)) == []
    assert list(plan.due(7.0)) == [1, 2]  # late: both at once
    assert plan.until_next(7.0) == float("inf") and list(plan.due(8.0)) == []


def test_latency_counts_from_the_planned_send() -> None:
    plan = Plan(rate=10, count=2, now=0.0)
    plan.due(0.5)
    plan.sent(0, 0.5)
    plan.answered(0, 0.6)
    assert plan.lateness == [0.5] and plan.latencies == [0.6] and not plan.is_over
    plan.answered(1, 0.6)
    assert plan.latencies == [0.6, pytest.approx(0.5)] and plan.is_over


def test_a_stall_counts_for_all_who_would_have_been_served_meanwhile() -> None:
    """A server that takes 1 ms, and stands still in the sixth second of ten: a tenth of the requests has waited."""
    plan = Plan(rate=200, count=2000, now=0.0)
    for index in range(2000):
        planned = plan.planned(index)
        plan.answered(index, 6.001 if 5.0 <= planned < 6.0 else planned + 0.001)
    plan.sent(0, 0.0)
    found = Paced.of(plan)
    assert found.p50 == pytest.approx(1)
    assert found.p99 == pytest.approx(901, abs=10)  # a closed loop would have sent one request then, and said 1 ms
    assert found.worst == pytest.approx(1001)


@pytest.mark.parametrize(
    ("head", "body", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5", b"hello", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5", b"hell", False),
        (b"HTTP/1.1 200\r\ncontent-length: 0", b"", True),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0", b"", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked", b"", None),
    ],
)
def test_only_whole_good_answers_count(head: bytes, body: bytes, expected: bool | None) -> None:
    if expected is None:
        with pytest.raises(Failed, match="not the answer"):
            is_complete(head, body)
    else:
        assert is_complete(head, body) is expected


@contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server with a thread for each connection; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def guarded(connection: socket.socket) -> None:
        with connection:
            serve(connection)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=guarded, args=(connection,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (accepting, *threads):
            thread.join(10)


def test_the_client_sends_all_and_hears_all() -> None:
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        while data := connection.recv(65536):
            seen.append(data)
            connection.sendall(ANSWER[:20])
            connection.sendall(ANSWER[20:])

    with serving(serve) as port:
        found = paced(port, "app.localhost", 500, 0.2)
    assert len(seen) == 100
    assert all(one == b"GET /k1 HTTP/1.1\r\nHost: app.localhost\r\n\r\n" for one in seen)
    assert 0 < found.p50 <= found.p99 <= found.worst


def test_the_client_goes_on_sending_while_answers_are_out() -> None:
    """All requests have been sent before the first is answered: over more connections, each has one at a time."""
    everyone = threading.Barrier(20, timeout=10)

    def serve(connection: socket.socket) -> None:
        while connection.recv(65536):
            everyone.wait()
            connection.sendall(ANSWER)

    with serving(serve) as port:
        began = time.monotonic()
        found = paced(port, "a", 1000, 0.02)
        assert found.worst <= (time.monotonic() - began) * 1000


def test_an_answer_that_breaks_off_is_no_answer() -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(ANSWER[:10])

    with serving(serve) as port, pytest.raises(Failed, match="closed instead of an answer"):
        paced(port, "a", 100, 0.05)
