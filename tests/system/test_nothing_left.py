"""Hundreds of visitors who do what they like at once, services that break, links that are cut: afterwards nothing of it
is left. All gauges are where they were, so are the open files; nobody got another one's answer; nothing came twice."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from framing import requestcases
from running import Address, Program, RunningAgent, RunningCore, poll
from service import Service
from troubled import Troubled
from visiting import Broken, Connection
from watching import samples

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]

SECONDS = 6.0  #: of disorder
VISITORS = 16  #: at a time
GAUGES = ("tunnel_streams_active", "tunnel_held_bytes", "tunnel_link_queued_bytes", "tunnel_streams_stalled")
HOST = "app.localhost"


class Crowd:
    """Threads that visit until told to stop. wrong: what should not have been; answered: right answers."""

    def __init__(self, where: Address, seed: int) -> None:
        self.answered = 0
        self.wrong: list[str] = []
        self._where = where
        self._ended = threading.Event()
        self._numbers = iter(range(1, 1 << 30))
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._visit, args=(seed * 100 + n,)) for n in range(VISITORS)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _visit(self, seed: int) -> None:
        chance = random.Random(seed)
        deeds = [
            self._ask, self._ask, self._ask, self._leave_a_download, self._leave_an_upload, self._leave_a_wait,
            self._upgrade, self._talk_nonsense, self._break_chunks, self._be_let_down, self._pipeline_and_go,
        ]  # fmt: skip
        while not self._ended.is_set():
            deed = chance.choice(deeds)
            try:
                deed(chance)
            except (OSError, Broken):
                pass  # links are cut, services break: the answer may be none
            except Exception as exc:
                self.wrong.append(f"{deed.__name__}: {exc!r}")

    def _number(self) -> int:
        with self._lock:
            return next(self._numbers)

    def _connect(self) -> Connection:
        return Connection(self._where, HOST, 10)

    def _end(self, visitor: Connection, chance: random.Random) -> None:
        """By a reset, an end of both directions, or of ours only, for a while."""
        how = chance.randrange(3)
        with suppress(OSError):
            if how == 0:
                visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif how == 1:
                visitor.sock.shutdown(socket.SHUT_WR)
                time.sleep(chance.random() * 0.1)

    # What they do

    def _ask(self, chance: random.Random) -> None:
        """Some requests on one connection; each must get its own answer."""
        with self._connect() as visitor:
            for _ in range(chance.randrange(1, 6)):
                body = f"{self._number()} ".encode() * chance.choice((1, 10, 3000, 30_000))
                answer = visitor.ask(f"POST /echo?n={body.split(b' ')[0].decode()}", body=body)
                if answer.status == 200:
                    self.answered += 1
                    if answer.body != body:
                        self.wrong.append(f"asked with {body[:20]!r}, answered {answer.body[:20]!r}")
                elif answer.status not in (502, 503, 504):
                    self.wrong.append(f"POST /echo: {answer.status}")

    def _leave_a_download(self, chance: random.Random) -> None:
        with self._connect() as visitor:
            target = chance.choice(
                ("/download?size=3000000", "/chunked?parts=50&size=60000", "/close-delimited?size=900000")
            )
            visitor.send(visitor.request(f"GET {target}"))
            for _ in range(chance.randrange(8)):
                visitor.sock.recv(chance.choice((1, 1000, 100_000)))
            self._end(visitor, chance)

    def _leave_an_upload(self, chance: random.Random) -> None:
        with self._connect() as visitor:
            fields = chance.choice(("Content-Length: 3000000", "Content-Length: 3000000\r\nExpect: 100-continue"))
            visitor.send(f"POST /upload HTTP/1.1\r\nHost: {HOST}\r\n{fields}\r\n\r\n".encode())
            for _ in range(chance.randrange(6)):
                visitor.send(b"x" * chance.choice((1, 1000, 300_000)))
            self._end(visitor, chance)

    def _leave_a_wait(self, chance: random.Random) -> None:
        with self._connect() as visitor:
            visitor.send(visitor.request(chance.choice(("GET /hang", "GET /sse?n=50&ms=20", "GET /stall"))))
            time.sleep(chance.random() * 0.2)
            self._end(visitor, chance)

    def _upgrade(self, chance: random.Random) -> None:
        with self._connect() as visitor:
            visitor.send(visitor.request("GET /upgrade", "Connection: Upgrade", "Upgrade: raw"))
            visitor.sock.recv(100)
            for _ in range(chance.randrange(5)):
                visitor.send(b"y" * chance.choice((1, 100_000)))
            self._end(visitor, chance)

    def _talk_nonsense(self, chance: random.Random) -> None:
        raw = chance.choice(requestcases.CASES).raw
        with self._connect() as visitor:
            visitor.send(raw[: chance.randrange(len(raw) + 1)] if chance.random() < 0.5 else raw)
            if chance.random() < 0.5:
                visitor.sock.recv(1000)
            self._end(visitor, chance)

    def _break_chunks(self, chance: random.Random) -> None:
        with self._connect() as visitor:
            visitor.send(f"POST /upload HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(chance.randrange(4)):
                visitor.send(b"1000\r\n" + b"z" * 4096 + b"\r\n")
            visitor.send(chance.choice((b"zz\r\n", b"-1\r\n", b"5\r\nhello!", b"0\r\nContent-Length: 5\r\n\r\n", b"5")))
            if chance.random() < 0.7:
                visitor.sock.recv(1000)
            self._end(visitor, chance)

    def _be_let_down(self, chance: random.Random) -> None:
        with self._connect() as visitor:
            target = chance.choice(
                ("/break-length", "/break-chunked", "/break-close", "/break-head", "/garbage", "/nothing", "/early-413",
                 "/refuse", "/hints", "/trailers", "/status/304", "/status/204", "/early-200")
            )  # fmt: skip
            visitor.ask(f"{chance.choice(('GET', 'HEAD', 'POST'))} {target}")

    def _pipeline_and_go(self, chance: random.Random) -> None:
        with self._connect() as visitor:
            visitor.send(visitor.request("GET /echo") * chance.randrange(1, 30))
            if chance.random() < 0.5:
                visitor.sock.recv(1000)
            self._end(visitor, chance)


def gauges(core: RunningCore) -> dict[str, float]:
    page = samples(core.metrics)
    return {name: sum(value for (one, _), value in page.items() if one == name) for name in GAUGES}


def open_files(program: Program) -> int:
    return len(list(Path(f"/proc/{program.pid}/fd").iterdir()))


@pytest.mark.parametrize("seed", [1, 2])
def test_disorder_leaves_nothing(
    start_core: Start, start_agent: StartAgent, start_service: StartService, seed: int
) -> None:
    core = start_core("-keepalive-timeout=2s", "-body-idle-timeout=2s", "-request-timeout=3s", "-head-timeout=2s")
    service = start_service()
    with Troubled(core.agents) as net:
        cut = start_agent(core, service.url, "-subdomain=app", net.flag, agent_id="cut")
        sound = start_agent(core, service.url, "-subdomain=app", agent_id="sound")
        programs: list[Program] = [core, cut, sound]
        before = [open_files(program) for program in programs]
        crowd, chance = Crowd(core.public, seed), random.Random(seed)
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            time.sleep(chance.random() * 1.5)
            net.cut(reset=chance.random() < 0.5)
        crowd.end()
        assert not crowd.wrong, crowd.wrong[:5]
        assert crowd.answered > 50
        poll(lambda: not any(gauges(core).values()), "the gauges are back at nothing", 20, 0.2)
        poll(lambda: len(core.find("agent connected")) - len(core.find("agent disconnected")) == 2, "both agents", 10)
        for program, count in zip(programs, before, strict=True):
            # kept connections to the service, and descriptors that come with the first request
            poll(lambda p=program, n=count: open_files(p) <= n + 40, f"{program} has closed its files", 30, 0.5)
        numbers = [one for one in service.begun if one.startswith("/echo?n=")]
        assert len(numbers) == len(set(numbers))
        for program in programs:
            broke = [one for one in program.records if "broke" in one["msg"] and "broke off" not in one["msg"]]
            assert program.is_running and not broke, broke
            left = [
                one for one in program.records if one.get("outcome") == "visitor_aborted" and one["level"] == "ERROR"
            ]
            assert not left, left[:3]  # who leaves is no failure of ours
