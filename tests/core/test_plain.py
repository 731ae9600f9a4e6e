"""The plain side: challenges that are pending, the way to https, and nothing to hold on to."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from inprocess import Caller
from linking import socket_pair

from tunnel.core.door import Door
from tunnel.core.forwarding import Forwarding
from tunnel.core.issuing.challenges import LIFE, PREFIX, Challenges
from tunnel.core.limits import Shares, no_refusals
from tunnel.core.plain import PlainSide
from tunnel.core.proxied import ProxyHeaders
from tunnel.link.sweeper import Sweeper

HOST = "app.tunnel.test"
TOKEN = "evaGxfADs6pSRb2LAv9IZf17Dt3juxGJ-PCt92wr-oA"


class Plain:
    def __init__(self, nursery: trio.Nursery, challenges: Challenges | None, port: int, shares: Shares) -> None:
        self.refusals = no_refusals()
        side = PlainSide(
            Forwarding(()), self.refusals, outside_port=lambda: port, max_head=4096, max_target=1024, max_fields=20,
            head_timeout=10, find=challenges.find if challenges is not None else None,
        )  # fmt: skip
        self.door = Door(
            side, Sweeper(lambda exc: None), tls=None, proxies=ProxyHeaders(()), handshake_timeout=10,
            keepalive_timeout=60, shares=shares,
        )  # fmt: skip
        self._nursery = nursery

    async def ask(self, raw: bytes) -> tuple[int, dict[str, str], bytes]:
        """(status, fields, body) of the answer; the connection has ended then."""
        near, far = socket_pair()
        self._nursery.start_soon(self.door._serve, near, ("192.0.2.1", 1))
        caller = Caller(far)
        await caller.socket.send(raw)
        got = b""
        while part := await caller.socket.recv():
            got += part
        far.close()
        head, _, body = got.partition(b"\r\n\r\n")
        line, *rest = head.decode().split("\r\n")
        return int(line.split()[1]), {name.lower(): value for name, value in (one.split(": ", 1) for one in rest)}, body

    async def get(self, target: str, host: str = HOST, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        return await self.ask(f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())


@asynccontextmanager
async def plain(challenges: Challenges | None = None, port: int = 443, most: int = 0) -> AsyncIterator[Plain]:
    async with trio.open_nursery() as nursery:
        yield Plain(nursery, challenges, port, Shares(most, 0))
        nursery.cancel_scope.cancel()


async def test_a_pending_challenge_is_answered_under_its_own_name_only(tmp_path: Path) -> None:
    challenges = Challenges(tmp_path / "challenges")
    async with plain(challenges) as side:
        assert (await side.get(PREFIX + TOKEN))[0] == 308
        challenges.put(HOST, TOKEN, f"{TOKEN}.thumb")
        status, fields, body = await side.get(PREFIX + TOKEN, f"{HOST.upper()}:80")
        assert (status, body) == (200, f"{TOKEN}.thumb".encode())
        assert fields["content-type"] == "application/octet-stream" and fields["connection"] == "close"
        assert await side.get(PREFIX + TOKEN, method="HEAD") == (200, fields, b"")
        for target, host, method in (
            (PREFIX + TOKEN, "other.tunnel.test", "GET"),
            (PREFIX + TOKEN + "x", HOST, "GET"),
            (PREFIX + TOKEN + "?a", HOST, "GET"),
            (PREFIX + "../" + TOKEN, HOST, "GET"),
            (PREFIX + "%2e%2e/state.json", HOST, "GET"),
            (PREFIX, HOST, "GET"),
            (PREFIX + TOKEN, HOST, "POST"),
        ):
            assert (await side.get(target, host, method))[0] == 308, target
        challenges.drop(HOST)
        assert (await side.get(PREFIX + TOKEN))[0] == 308, "not a moment longer"
        assert left(tmp_path / "challenges") == []


def left(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def test_another_process_answers_for_the_one_that_ordered(tmp_path: Path) -> None:
    ordering, answering = Challenges(tmp_path), Challenges(tmp_path)
    ordering.put(HOST, TOKEN, "answer")
    assert (tmp_path / TOKEN).stat().st_mode & 0o777 == 0o600
    assert await answering.find(HOST, TOKEN) == b"answer"
    assert await answering.find("other.test", TOKEN) is None
    for odd in ("", ".", "..", "../x", "a/b", "x" * 200, "a\0b"):
        assert await answering.find(HOST, odd) is None
    long_ago = time.time() - LIFE - 1
    os.utime(tmp_path / TOKEN, (long_ago, long_ago))
    assert await answering.find(HOST, TOKEN) is None, "the one that ordered was killed"
    answering.sweep()
    assert left(tmp_path) == []
    with pytest.raises(ValueError, match="malformed"):
        ordering.put(HOST, "../x", "answer")


async def test_all_else_is_sent_to_https() -> None:
    async with plain(port=8443) as side:
        for method in ("GET", "POST", "HEAD", "DELETE"):
            status, fields, body = await side.get("/a/b?c=d&e", method=method)
            assert (status, fields["location"], body) == (308, f"https://{HOST}:8443/a/b?c=d&e", b"")
        assert (await side.get("*", method="OPTIONS"))[1]["location"] == f"https://{HOST}:8443/"
        assert (await side.get("http://" + HOST + "/x"))[1]["location"] == f"https://{HOST}:8443/x"
        assert (await side.get("//evil.test/x"))[1]["location"] == f"https://{HOST}:8443//evil.test/x"
    async with plain(port=443) as side:
        assert (await side.get("/x", "App.Tunnel.Test:80"))[1]["location"] == f"https://{HOST}/x"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x@evil.test\r\n\r\n", 400),
        (b"GET /\nX: y HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /\r\r\n HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET /" + b"x" * 2000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 20 + b"\r\n", 431),
    ],
    ids=range(10),
)
async def test_what_is_no_request(raw: bytes, status: int) -> None:
    async with plain() as side:
        got, fields, _ = await side.ask(raw)
        assert got == status and fields["connection"] == "close" and "location" not in fields


async def test_it_shares_the_limit_on_connections() -> None:
    async with plain(most=1) as side:
        near, far = socket_pair()
        side._nursery.start_soon(side.door._serve, near, ("192.0.2.1", 1))
        await trio.testing.wait_all_tasks_blocked()
        assert (await side.get("/"))[0] == 503
        assert side.refusals["connections"] == 1
        far.close()


async def test_a_head_that_does_not_come_is_not_waited_for() -> None:
    async with plain() as side:
        near, far = socket_pair()
        side._nursery.start_soon(side.door._serve, near, ("192.0.2.1", 1))
        await far.send(b"GET / HTTP/1.1\r\n")
        while not side.door.visitors:
            await trio.lowlevel.checkpoint()
        (visitor,) = side.door.visitors
        while visitor.phase != "head":
            await trio.lowlevel.checkpoint()
        visitor.tick(visitor.deadline + 1)
        assert await far.recv() == b""
        far.close()
