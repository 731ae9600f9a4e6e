"""Odd requests on a connection that has brought a normal one: judged, passed on and answered as on a new connection.

The core recognises heads that repeat the last one (tunnel/http/repeated.py); nothing may get past its checks by that,
nor take anything from the request before. The cases are those of tests/framing/requestcases.py.
"""

import random
import re
from collections.abc import Awaitable, Callable

import pytest
import trio
from framing.requestcases import CASES, CHUNKED, GET, POST, Case
from inprocess import Caller, Core, body_of, core, head, opened, respond, until

from tunnel.core.request import Request
from tunnel.link.stream import Stream
from tunnel.wire.frames import UPGRADE

pytestmark = pytest.mark.usefixtures("way")

NEXT = b"GET /next HTTP/1.1\r\nHost: app.localhost\r\n\r\n"
FIRSTS = {
    "get": GET + b"\r\n",
    "post": POST + b"Content-Length: 5\r\n\r\nhello",
    "chunked": CHUNKED + b"2\r\nhi\r\n0\r\n\r\n",
}
#: what one connection came to: answers (status, outcome, says close), requests at the agent, requests in the log
Judged = tuple[list[tuple[int, str, bool]], list[tuple[object, ...]], list[tuple[object, ...]]]


async def judge(app: Core, seen: list[tuple[object, ...]], first: bytes, case: Case) -> Judged:
    """Send the case on a connection of its own, behind `first` and its answer."""
    visitor = app.visitor()
    if first:
        await visitor.send(first)
        assert (await visitor.answer()).status == 200
        await until(lambda: app.only_visitor().request is None)
    seen.clear()
    app.requests.clear()
    await visitor.send(case.raw + NEXT * case.followed)
    answers = await answered(visitor, case)
    visitor.socket.close()
    await until(lambda: not app.door.visitors)
    log = [(one.method, one.target, one.status, one.outcome, one.error) for one in app.requests]
    return answers, list(seen), log


async def answered(visitor: Caller, case: Case) -> list[tuple[int, str, bool]]:
    """All answers until the connection ends or /next is answered."""
    got: list[tuple[int, str, bool]] = []
    for number in range(len(case.passed) + 1):
        is_passed = number < len(case.passed)
        answer = await visitor.answer(case.passed[number].first.partition(b" ")[0].decode() if is_passed else "GET")
        got.append((answer.status, answer.outcome, answer.fields.get(b"connection") == b"close"))
        if got[-1][2]:
            break
    return got


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
async def test_behind_a_normal_request_it_is_what_it_is_alone(case: Case) -> None:
    seen: list[tuple[object, ...]] = []

    async def look(stream: Stream) -> None:
        asked = opened(stream)
        passed = re.sub(rb"X-Request-Id: .*\r\n", b"", asked.head)
        body = b"" if asked.protocol == UPGRADE else await body_of(stream)  # what comes before its answer is no body
        seen.append((asked.protocol, passed, asked.length, body, stream.trailers))
        respond(stream)

    async with core() as app:
        await app.agent(look)
        alone = await judge(app, seen, b"", case)
        assert alone[0][-1][0] in (case.status, 200)
        firsts = dict(FIRSTS)
        if not case.closes and len(case.passed) == 1:
            firsts["itself"] = case.raw
        for name, first in firsts.items():
            assert (name, await judge(app, seen, first, case)) == (name, alone)


async def test_a_repeated_head_is_recognised_there() -> None:
    """What the cases stand behind: a kept head."""

    async def hello(stream: Stream) -> None:
        await trio.lowlevel.checkpoint()
        respond(stream)

    async with core() as app:
        await app.agent(hello)
        visitor = app.visitor()
        for _ in range(2):
            await visitor.send(NEXT)
            assert (await visitor.answer()).status == 200
        known = app.only_visitor().known
        assert known is not None and known.forwarded


METHODS = ["GET", "POST", "HEAD", "OPTIONS"]
HOSTS = ["app.example.com", "APP.example.com:80", "other.example.com"]
FIELDS = [
    [],
    ["Accept: text/html"],
    ["Accept: application/json"],
    ["X-Request-Id: mine"],
    ["X-Request-Id: not one"],
    ["X-Forwarded-For: 203.0.113.7", "X-Forwarded-Proto: https"],
    ["X-Forwarded-For: 203.0.113.8", "X-Forwarded-Proto: https"],
    ["X-Forwarded-For: 203.0.113.8", "X-Request-Id: mine"],
    ["Forwarded: for=203.0.113.9", "X-Real-IP: 203.0.113.9"],
    ["Connection: A", "A: hop by hop"],
    ["A: no longer", "Cookie: a=b"],
]


@pytest.mark.parametrize("trusted", [(), ("192.0.2.0/24",)])
@pytest.mark.parametrize("seed", range(4))
async def test_requests_take_nothing_from_those_before(seed: int, trusted: tuple[str, ...]) -> None:
    """Many on one connection, as visitors behind one proxy are; each is told as on a connection of its own."""
    chance = random.Random(seed)
    told: list[tuple[str, bytes]] = []

    def script(name: str) -> Callable[[Stream], Awaitable[None]]:
        async def look(stream: Stream) -> None:
            await trio.lowlevel.checkpoint()
            told.append((name, opened(stream).head))
            respond(stream)

        return look

    async def ask(app: Core, visitor: Caller, raw: bytes) -> tuple[object, ...]:
        app.requests.clear()
        await visitor.send(raw)
        await visitor.answer(raw.partition(b" ")[0].decode())
        one = await app.finished()
        name, passed = told.pop()
        if (own := re.search(rb"X-Request-Id: ([0-9a-f]{16})\r\n$", passed)) is not None:
            assert own[1].decode() == one.request_id
            assert one.request_id not in ids  # made anew for each
            ids.add(one.request_id)
            passed = passed[: own.start()]
        else:
            assert passed.endswith(b"X-Request-Id: %b\r\n" % one.request_id.encode())
        facts = one.method, one.target, one.host, one.client, one.scheme, one.tunnel, one.http_version
        return name, passed, *facts, list(one.request_headers)

    ids: set[str] = set()
    async with core(trusted=trusted) as app:
        for name in ("app", "other"):
            await app.agent(script(name), name)
        kept = app.visitor()
        recognised = 0
        raw = b""
        for _ in range(150):
            method = chance.choice(METHODS)
            target = f"/{chance.randrange(1000)}"
            if raw and chance.random() < 0.6:  # most repeat the one before
                raw = re.sub(rb" /\d+ ", b" %b " % target.encode(), raw, count=1)
            else:
                raw = head(method, target, chance.choice(HOSTS), *chance.choice(FIELDS))
            on_kept = await ask(app, kept, raw)
            request = app.requests[-1]
            assert isinstance(request, Request)
            recognised += request.known is not None and request.head is not request.known.head.head
            alone = app.visitor()
            assert on_kept == await ask(app, alone, raw)
            alone.socket.close()
            await until(lambda: len(app.door.visitors) == 1)
    assert recognised > 20


@pytest.mark.parametrize("seed", range(6))
async def test_repeated_heads_with_bodies_at_once_and_in_any_pieces(seed: int) -> None:
    """Each body stays with its own head, wherever the bytes are cut."""
    chance = random.Random(seed)

    async def echo(stream: Stream) -> None:
        target = opened(stream).head.split(b" ")[1]
        respond(stream, target + b" " + await body_of(stream))

    raw, expected = b"", []
    for number in range(60):
        body = chance.choice([b"GET /", NEXT[:5], b"\r\n\r\nG", b"12345"])
        kind = chance.choice([b"counted", b"counted", b"counted", b"chunked", b"none"])
        target = b"/%d" % number
        if kind == b"counted":
            raw += (POST + b"Content-Length: 5\r\n\r\n").replace(b" / ", b" %b " % target) + body
        elif kind == b"chunked":
            raw += CHUNKED.replace(b" / ", b" %b " % target) + b"5\r\n" + body + b"\r\n0\r\n\r\n"
        else:
            body = b""
            raw += (GET + b"\r\n").replace(b" / ", b" %b " % target)
        expected.append(target + b" " + body)
    async with core() as app:
        await app.agent(echo)
        visitor = app.visitor()
        await visitor.socket.handshake()
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                at = 0
                while at < len(raw):
                    size = chance.choice([1, 3, 20, 100, 1000])
                    await visitor.send(raw[at : at + size])
                    at += size
                    for _ in range(chance.randrange(8)):
                        await trio.lowlevel.checkpoint()

            nursery.start_soon(send)
            assert [(await visitor.answer()).body for _ in expected] == expected
