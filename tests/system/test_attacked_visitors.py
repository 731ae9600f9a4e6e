"""Visitors who mean to wear the core out: heads that never end, readers that stop; and the bound on memory holds."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from running import RunningAgent, RunningCore, address, poll
from service import Service
from visiting import Connection
from watching import ask, sample

pytestmark = pytest.mark.system

KIB, MIB = 1024, 1024 * 1024
SLOW = 500
STOPPED = 20
HEAD_TIMEOUT = 2.0


def served_within_a_second(core: RunningCore) -> None:
    began = time.monotonic()
    assert ask(core, "GET /echo").status == 200
    assert time.monotonic() - began < 1


def test_slow_heads_are_closed_in_time_and_hold_up_nobody(
    start_core: Callable[..., RunningCore], start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service], ending: ExitStack,
) -> None:  # fmt: skip
    core = start_core(f"-head-timeout={HEAD_TIMEOUT:g}s")
    start_agent(core, start_service().url, "-subdomain=app")
    slow = []
    began = time.monotonic()
    for number in range(SLOW):
        sock = ending.enter_context(socket.create_connection(core.public, 10))
        sock.sendall(b"GET / HTTP/1.1\r\nHost: app.localhost\r\nX-Slow: " + b"y" * (number % 100))
        slow.append(sock)
        if number % 100 == 99:
            served_within_a_second(core)
    took = time.monotonic() - began  # the first ones may be over by now
    for sock in slow[::10]:
        try:
            sock.sendall(b"z")  # a byte now and then buys no time
        except OSError:
            pass
    served_within_a_second(core)
    for sock in slow:
        answer = b""
        try:
            while data := sock.recv(4096):
                answer += data
        except ConnectionResetError:
            pass
        assert answer.startswith(b"HTTP/1.1 408 ") or not answer
    assert time.monotonic() - began < took + HEAD_TIMEOUT + 4
    assert sample(core.metrics, "tunnel_limit_refusals_total", limit="head_time") == SLOW
    served_within_a_second(core)


def test_slow_uploads_take_half_of_a_tunnel_at_most(
    start_core: Callable[..., RunningCore], start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service], ending: ExitStack,
) -> None:  # fmt: skip
    """One address holds what it gets of a link, by bodies of a byte each; others are served, a TCP tunnel's too."""
    core = start_core("-proxy-protocol=127.0.0.1", "-max-streams=60", "-tcp-ports=0")
    service = start_service()
    agent = start_agent(core, f"app={service.url},raw=tcp://{service.url.removeprefix('http://')}")
    raw = address(agent.tunnels["raw"])[1]
    slow: list[Connection] = []

    def come(source: str, port: int = 0) -> Connection:
        visitor = ending.enter_context(Connection(("127.0.0.1", port or core.public[1]), "app.localhost"))
        visitor.send(f"PROXY TCP4 {source} 198.51.100.1 1234 80\r\n".encode())
        return visitor

    def refusals() -> float:
        return sample(core.metrics, "tunnel_limit_refusals_total", limit="streams_per_address")

    def open_now() -> float:
        return sample(core.metrics, "tunnel_streams_active")

    for sent in (95, 100):  # twice, for a probe of the tunnel may have had a place of the first ones
        while len(slow) < sent:
            slow.append(come("203.0.113.1"))
            slow[-1].send(slow[-1].request("POST /upload", "Content-Length: 1000000") + b"x")
        poll(lambda sent=sent: refusals() + open_now() == sent, "what is beyond its share is refused")  # type: ignore[misc]
    held = open_now()
    assert held in (30, 31)
    answer = come("203.0.113.1").ask("GET /echo")
    assert (answer.status, answer.outcome, answer["retry-after"]) == (503, "overloaded", "1")
    assert come("203.0.113.1", raw).ends() == "reset"
    assert refusals() + held == 102
    for visitor in (come("203.0.113.2"), come("203.0.113.2", raw)):
        for _ in range(3):
            assert visitor.ask("GET /echo").status == 200
    assert refusals() + held == 102 and open_now() == held + 1  # the TCP connection


def formula(document: str, program: str, **values: int) -> int:
    """What the formula in SECURITY.md says, bytes. program: the line to take, by what it begins with."""
    (line,) = [
        one.strip() for one in document.splitlines() if one.startswith("    ") and one.strip().startswith(program)
    ]
    for name in sorted(values, key=len, reverse=True):
        line = line.replace(name, str(values[name]))
    line = re.sub(r"(\d+) KiB", lambda found: str(int(found[1]) * KIB), line)
    line = re.sub(r"(\d+) MiB", lambda found: str(int(found[1]) * MIB), line).replace("\N{MULTIPLICATION SIGN}", "*")
    assert re.fullmatch(r"[\d\s+*(),min]+", line), line
    return int(eval(line))


def test_memory_stays_below_the_formula_with_readers_that_stop(
    start_core: Callable[..., RunningCore], start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service], ending: ExitStack,
) -> None:  # fmt: skip
    """20 visitors ask for 100 MiB each and read nothing."""
    core = start_core("-body-idle-timeout=60s")
    agent = start_agent(core, start_service().url, "-subdomain=app")
    for _ in range(20):
        served_within_a_second(core)  # what a first request brings along is not the readers' doing
    before = {"core": core.rss(), "agent": agent.rss()}
    for _ in range(STOPPED):
        visitor = ending.enter_context(Connection(core.public, "app.localhost"))
        visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        visitor.send(visitor.request(f"GET /download?size={100 * MIB}"))
    held = [-1.0]

    def is_steady() -> bool:
        held.append(sample(core.metrics, "tunnel_held_bytes"))
        served_within_a_second(core)
        return len(held) > 5 and held[-1] == held[-4] > MIB

    poll(is_steady, "the windows are used up", timeout=20, interval=0.1)
    grown = {"core": core.rss() - before["core"], "agent": agent.rss() - before["agent"]}
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    windows = {"-stream-window": MIB, "-link-window": 32 * MIB}
    most = {
        "core": formula(
            text, "visitors", visitors=STOPPED + 1, streams=STOPPED + 1, links=1, attaching=0,
            **{"-max-head": 64 * KIB, "-max-buffer": 512 * MIB}, **windows,
        ),
        "agent": formula(text, "streams", streams=STOPPED + 1, links=1, **{"-max-buffer": 256 * MIB}, **windows),
    }  # fmt: skip
    print(f"grown {grown}, at most {most}, held {held[-1]:.0f}")
    assert grown["core"] < most["core"] and grown["agent"] < most["agent"], (grown, most)
    assert max(held) <= 32 * MIB
    served_within_a_second(core)


def test_bytes_in_all_are_bounded_over_all_links(
    start_core: Callable[..., RunningCore], start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service], ending: ExitStack,
) -> None:  # fmt: skip
    """With -max-buffer=2MiB readers that stop are given up; those that read are served as before."""
    core = start_core("-max-buffer=2MiB")
    start_agent(core, start_service().url, "-subdomain=app")
    for _ in range(8):
        visitor = ending.enter_context(Connection(core.public, "app.localhost"))
        visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        visitor.send(visitor.request(f"GET /download?size={20 * MIB}"))
    poll(lambda: sample(core.metrics, "tunnel_limit_refusals_total", limit="buffer") >= 1, "some are given up")
    assert sample(core.metrics, "tunnel_held_bytes") <= 2 * MIB
    served_within_a_second(core)
    assert len(ask(core, f"GET /download?size={MIB}").body) == MIB


def test_a_smaller_window_holds_less(
    start_core: Callable[..., RunningCore], start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service], ending: ExitStack,
) -> None:  # fmt: skip
    core = start_core("-stream-window=128KiB", "-link-window=1MiB")
    start_agent(core, start_service().url, "-subdomain=app")
    visitor = ending.enter_context(Connection(core.public, "app.localhost"))
    visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    visitor.send(visitor.request(f"GET /download?size={20 * MIB}"))
    poll(lambda: sample(core.metrics, "tunnel_held_bytes") >= 32 * KIB, "a share of the window is used up")
    assert sample(core.metrics, "tunnel_held_bytes") <= 128 * KIB
    assert len(ask(core, f"GET /download?size={4 * MIB}").body) == 4 * MIB
    assert ask(core, "POST /echo", body=b"x" * MIB).body == b"x" * MIB
