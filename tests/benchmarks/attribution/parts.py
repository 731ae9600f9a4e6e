"""What each part costs on its own: the same functions, called again and again in this process, µs a call.

Less than the attribution says of the same part, which has cold caches and everything around it; but it does not depend
on anything else, so it shows what a change to one part did.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import h11
import trio
from benchmarks.attribution import layered

from tunnel.http.forwarded import local_head, read_forwarded
from tunnel.http.heads import forwarded_head, parse_request
from tunnel.http.response import find_head, parse_answer
from tunnel.wire.frames import HTTP, NO_BODY, Open, Response
from tunnel.wire.session import Session
from tunnel.wire.stream import Stream

ROUNDS = 7
SECONDS = 0.05  #: of each round

REQUEST = b"GET /k1 HTTP/1.1\r\nHost: app.localhost\r\n\r\n"
BROWSER = (
    b"GET /k1?page=2 HTTP/1.1\r\nHost: app.localhost\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) "
    b"Gecko/20100101 Firefox/140.0\r\nAccept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n"
    b"Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br\r\nReferer: http://app.localhost/\r\n"
    b"Connection: keep-alive\r\nCookie: session=0123456789abcdef\r\nUpgrade-Insecure-Requests: 1\r\n"
    b"Cache-Control: max-age=0\r\n\r\n"
)
OWN = b"X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: http\r\nX-Request-Id: 0123456789abcdef\r\n"
ANSWER = (
    b"HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: Sat, 28 Nov 2026 12:00:00 GMT\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 1024\r\nConnection: keep-alive\r\n\r\n"
)


def timed(work: Callable[[], object]) -> float:
    """µs a call: the median of some rounds."""
    rounds = []
    for _ in range(ROUNDS):
        count, began = 0, time.perf_counter()
        while (now := time.perf_counter()) - began < SECONDS:
            for _ in range(20):
                work()
            count += 20
        rounds.append((now - began) / count * 1e6)
    return statistics.median(rounds)


def h11_request(raw: bytes) -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(raw)
    connection.next_event()


def round_trip() -> Callable[[], object]:
    """A request and its answer over the wire's state machines, both ends, without a socket."""
    core, agent = (Session(opens, Stream, lambda: None) for opens in (True, False))
    opened = Open(HTTP, 0, 30_000, NO_BODY, b"", forwarded_head(parse_request(REQUEST, 4096), OWN, upgrade=False))
    response = Response(200, 1024, 100, 50, b"OK\r\nContent-Type: text/plain\r\n")
    body = b"x" * 1024

    def exchange() -> None:
        stream = core.open(opened, b"", True)
        agent.receive(core.take()[0])
        agent.respond(agent.streams[stream.id], response, body, True)
        core.receive(agent.take()[0])
        core.next_part(stream)
        core.forget(stream)

    return exchange


@contextmanager
def loopback() -> Iterator[Callable[[], object]]:
    """1 KiB sent and received over TCP, by one thread that never waits."""
    data = b"x" * 1024
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as one,
        listener.accept()[0] as other,
    ):
        yield lambda: (one.send(data), other.recv(65536))


async def wake_ups() -> float:
    """µs for a task to wake another one that waits, and to wait for it in turn: two turns of the run loop."""
    rounds = []
    for _ in range(ROUNDS):
        ping, pong = trio.open_memory_channel[None](0), trio.open_memory_channel[None](0)
        count = 2000

        async def echo(ping=ping, pong=pong, count=count) -> None:  # type: ignore[no-untyped-def]
            for _ in range(count):
                await ping[1].receive()
                await pong[0].send(None)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            began = time.perf_counter()
            for _ in range(count):
                await ping[0].send(None)
                await pong[1].receive()
            rounds.append((time.perf_counter() - began) / count * 1e6)
    return statistics.median(rounds)


async def checkpoints() -> float:
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(5000):
            await trio.lowlevel.checkpoint()
        rounds.append((time.perf_counter() - began) / 5000 * 1e6)
    return statistics.median(rounds)


def measure() -> list[tuple[str, str, float]]:
    """(part, what, µs a call)"""
    small, browser = parse_request(REQUEST, 4096), parse_request(BROWSER, 4096)
    travelling = forwarded_head(browser, OWN, upgrade=False)
    judged = read_forwarded(travelling)
    found = [
        ("parse", "h11 reads a small request head", timed(lambda: h11_request(REQUEST))),
        ("parse", "a small request head, all checks", timed(lambda: parse_request(REQUEST, 4096))),
        ("parse", "a browser's request head, all checks", timed(lambda: parse_request(BROWSER, 4096))),
        ("parse", "the same at the agent, seen before", timed(lambda: read_forwarded(travelling))),
        ("parse", "a local answer's head", timed(lambda: parse_answer(ANSWER, find_head(ANSWER), b"GET"))),
        ("emit", "a small request head for the link", timed(lambda: forwarded_head(small, OWN, upgrade=False))),
        ("emit", "a browser's request head for the link", timed(lambda: forwarded_head(browser, OWN, upgrade=False))),
        ("emit", "the same for the local service", timed(lambda: local_head(judged, {}, NO_BODY))),
        ("link", "a request and its answer, both ends' states", timed(round_trip())),
        ("scheduler", "a checkpoint", trio.run(checkpoints)),
        ("scheduler", "two tasks wake each other over channels, there and back", trio.run(wake_ups)),
    ]
    for role in ("core", "agent"):
        for sampled, said in ((False, "not traced"), (True, "traced")):
            what = f"metrics, logs and tracing of the {role}, a request that is {said}"
            found.append(("layers", what, layered.added(role, sampled)))
    with loopback() as pass_on:
        found.append(("sockets", "1 KiB sent and received over loopback", timed(pass_on)))
    return found


def show(found: list[tuple[str, str, float]]) -> str:
    rows = ["each part on its own, µs a call:"]
    rows += [f"  {part:10} {micros:7.2f}  {what}" for part, what, micros in found]
    return "\n".join(rows)
