"""What is odd about a request and how the core says so: versions, expectations, methods, upgrades, empty lines."""

import pytest
import trio
from inprocess import Core, core, head, opened, respond, without_tls

from tunnel.link.stream import Stream
from tunnel.wire.frames import MAX_HEAD, NO_BODY, Response

#: some thousand heads, of which TLS in front changes nothing: test_framing_kept.py has it, too
pytestmark = [pytest.mark.usefixtures("way"), without_tls]


async def hello(stream: Stream) -> None:
    respond(stream, b"hello")


async def refused(app: Core, raw: bytes, status: int, outcome: str = "bad_request") -> None:
    """One answer, then the end; nothing has reached an agent."""
    await app.agent(hello)
    visitor = app.visitor()
    await visitor.send(raw + head())
    answer = await visitor.answer()
    assert (answer.status, answer.outcome, answer.fields[b"connection"]) == (status, outcome, b"close")
    assert await visitor.rest() == b""
    assert app.streams == []
    request = await app.finished()
    assert (request.status, request.outcome, request.error) == (status, outcome, "")


@pytest.mark.parametrize("version", ["2.0", "0.9", "1.2", "3.0"])
async def test_other_versions_are_505(version: str) -> None:
    async with core() as app:
        await refused(app, head().replace(b"HTTP/1.1", b"HTTP/" + version.encode()), 505)


async def test_a_preface_of_http_2_is_505() -> None:
    async with core() as app:
        await refused(app, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 505)


@pytest.mark.parametrize("fields", [["Expect: cake"], ["Expect: 100-continue, cake"], ["Expect: 100-continue"] * 2])
async def test_other_expectations_are_417(fields: list[str]) -> None:
    async with core() as app:
        await refused(app, head("POST", "/", "app.example.com", *fields, "Content-Length: 2") + b"hi", 417)


@pytest.mark.parametrize("method", ["connect", "Connect", "trace", "tRACE"])
async def test_refused_methods_are_refused_in_any_case(method: str) -> None:
    async with core() as app:
        await refused(app, head(method), 405, "method_not_allowed")


async def test_head_in_small_letters_is_no_method() -> None:
    async with core() as app:
        await refused(app, head("head"), 400)


async def test_one_empty_line_before_a_request_is_skipped() -> None:
    async with core() as app:
        await app.agent(hello)
        visitor = app.visitor()
        for _ in range(2):
            await visitor.send(b"\r\n" + head())
            assert (await visitor.answer()).body == b"hello"
        for byte in b"\r\n" + head():  # also when it comes in pieces
            await visitor.send(bytes([byte]))
        assert (await visitor.answer()).body == b"hello"


@pytest.mark.parametrize("lines", [b"\r\n\r\n", b"\r\n\r", b"\r\n\n", b"\n", b"\r\r\n"])
@pytest.mark.parametrize("trickles", [False, True])
async def test_more_empty_lines_are_refused(lines: bytes, trickles: bool) -> None:
    async with core() as app:
        await app.agent(hello)
        visitor = app.visitor()
        raw = lines + head()
        for part in [bytes([byte]) for byte in raw] if trickles else [raw]:
            try:
                await visitor.send(part)
            except trio.BrokenResourceError:  # answered before all of it came
                break
        answer = await visitor.answer()
        assert (answer.status, answer.fields[b"connection"]) == (400, b"close")
        assert app.streams == []


UPGRADE = ("Connection: Upgrade", "Upgrade: websocket, chat")


async def test_data_behind_an_upgrade_is_refused() -> None:
    async with core() as app:
        await refused(app, head("GET", "/", "app.example.com", *UPGRADE), 400)


async def test_a_declined_upgrade_ends_the_connection() -> None:
    """To whoever is in front of us the connection may have changed its protocol."""
    async with core() as app:
        await app.agent(hello)
        visitor = app.visitor()
        await visitor.send(head("GET", "/", "app.example.com", *UPGRADE))
        answer = await visitor.answer()
        assert (answer.status, answer.body, answer.fields[b"connection"]) == (200, b"hello", b"close")
        assert await visitor.rest() == b""


@pytest.mark.parametrize("fields", [b"", b"Upgrade: h2c\r\n", b"Upgrade: websocket, h2c\r\n", b"X: Upgrade: chat\r\n"])
async def test_a_101_to_what_was_not_asked_for_is_broken(fields: bytes) -> None:
    async def switch(stream: Stream) -> None:
        stream.link.session.respond(stream, Response(101, NO_BODY, 0, 0, b"Switching\r\n" + fields))

    async with core() as app:
        await app.agent(switch)
        visitor = app.visitor()
        await visitor.send(head("GET", "/", "app.example.com", *UPGRADE))
        answer = await visitor.answer("UPGRADE")
        assert (answer.status, answer.outcome) == (502, "local_broken")


async def test_a_101_to_one_of_those_asked_for_is_fine() -> None:
    async def switch(stream: Stream) -> None:
        stream.link.session.respond(stream, Response(101, NO_BODY, 0, 0, b"Switching\r\nupgrade: Chat\r\n"))

    async with core() as app:
        await app.agent(switch)
        visitor = app.visitor()
        await visitor.send(head("GET", "/", "app.example.com", *UPGRADE))
        assert (await visitor.answer("UPGRADE")).status == 101


async def test_426_says_what_to_upgrade_to() -> None:
    async def demand(stream: Stream) -> None:
        respond(stream, b"no", status=426, fields=b"Upgrade: websocket\r\n")

    async with core() as app:
        await app.agent(demand)
        answer = await app.visitor().get()
        assert (answer.status, answer.fields[b"upgrade"], answer.fields[b"connection"]) == (
            426, b"websocket", b"Upgrade"
        )  # fmt: skip


async def test_a_head_that_grows_beyond_a_frame_is_the_visitors_fault() -> None:
    async with core(max_head=2 * MAX_HEAD) as app:
        await app.agent(hello)
        visitor = app.visitor()
        await visitor.send(head("GET", "/", "app.example.com", *["A:"] * (MAX_HEAD // 4)))
        answer = await visitor.answer()
        assert (answer.status, answer.outcome, answer.fields[b"connection"]) == (431, "head_too_large", b"close")


async def test_what_proxies_say_of_a_visitor_is_not_the_visitors_to_say() -> None:
    claims = ["X-Real-IP: 6.6.6.6", "X-Forwarded-Port: 1", "X-Forwarded-Prefix: /x", "x-forwarded-ssl: on"]
    seen: list[bytes] = []

    async def look(stream: Stream) -> None:
        seen.append(opened(stream).head)
        respond(stream)

    for trusted in ((), ("192.0.2.0/24",)):
        async with core(trusted=trusted) as app:
            await app.agent(look)
            await app.visitor("192.0.2.1").get("/", "app.example.com", *claims, "X-Other: 1")
    assert all(claim.encode() not in seen[0] for claim in claims) and b"X-Other: 1" in seen[0]
    assert all(seen[1].count(claim.encode() + b"\r\n") == 1 for claim in claims)
