"""Requests at the core: what reaches the agent, what comes back, and how each failure becomes an answer."""

import errno
import logging
import math

import pytest
import trio
from inprocess import body_of, core, head, opened, respond, until, without_tls

from tunnel.core.quotas import Account, Limits
from tunnel.link.stream import RawStream, Stream
from tunnel.wire.frames import NO_BODY, SMALL_BODY, UNKNOWN, UPGRADE, Response

pytestmark = pytest.mark.usefixtures("way")


async def hello(stream: Stream) -> None:
    respond(stream, b"hello")


async def echo(stream: Stream) -> None:
    respond(stream, await body_of(stream))


async def silence(stream: Stream) -> None:
    await trio.sleep_forever()


# What works -------------------------------------------------------------------------------------------------------


async def test_a_small_answer_and_keep_alive() -> None:
    async with core() as app:
        await app.agent(hello)
        visitor = app.visitor()
        for _ in range(3):
            answer = await visitor.get("/x?y=1", "app.example.com", "X-Request-Id: mine")
            assert (answer.status, answer.body) == (200, b"hello")
            assert answer.fields[b"x-request-id"] == b"mine"
            assert b"connection" not in answer.fields
        await app.finished(3)
        first = app.requests[0]
        assert (first.outcome, first.status, first.bytes_in, first.bytes_out) == ("ok", 200, 0, 5)
        assert (first.target, first.host, first.tunnel, first.agent_id) == (
            "/x?y=1", "app.example.com", "app", "agent-0"
        )  # fmt: skip
        assert list(first.marks) == ["head", "opened", "answered", "first_byte"]
        assert (first.agent_us, first.local_us) == (900, 500)
        assert [one.outcome for one in app.streams] == ["ok"] * 3
        assert app.account.requests == 3
        assert app.exchanger.bytes_out == 15
        assert app.exchanger.active == 0


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with core() as app:

        async def target(stream: Stream) -> None:
            respond(stream, opened(stream).head.split(b" ")[1] + b"+" + await body_of(stream))

        await app.agent(target)
        visitor = app.visitor()
        post = head("POST", "/b", "app.example.com", "Content-Length: 3") + b"one"
        chunked = head("POST", "/c", "app.example.com", "Transfer-Encoding: chunked") + b"3\r\ntwo\r\n0\r\n\r\n"
        await visitor.send(head("GET", "/a") + post + chunked + head("GET", "/d") + b"GET ")
        assert [(await visitor.answer()).body for _ in range(4)] == [b"/a+", b"/b+one", b"/c+two", b"/d+"]
        await visitor.send(head("GET", "/e").removeprefix(b"GET "))
        assert (await visitor.answer()).body == b"/e+"


@pytest.mark.parametrize("size", [1, SMALL_BODY, SMALL_BODY + 1, 300_000, 3_000_000])
@pytest.mark.parametrize("chunked", [False, True])
async def test_bodies_both_ways(size: int, chunked: bool) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    async with core() as app:

        async def mirror(stream: Stream) -> None:
            assert opened(stream).length == (UNKNOWN if chunked else size)
            stream.link.session.respond(stream, Response(200, UNKNOWN if chunked else size, 0, 0, b"OK\r\n"))
            while part := await stream.receive():
                await stream.send(part)
            stream.finish(stream.trailers)

        await app.agent(mirror)
        visitor = app.visitor()
        await visitor.socket.handshake()

        async def upload() -> None:
            if chunked:
                await visitor.send(head("POST", "/", "app.example.com", "Transfer-Encoding: chunked"))
                for at in range(0, size, 70_000):
                    await visitor.send(b"%x;x=y\r\n%b\r\n" % (len(body[at : at + 70_000]), body[at : at + 70_000]))
                await visitor.send(b"0\r\nX-Sum: 1\r\nHost: evil\r\n\r\n")
            else:
                await visitor.send(head("POST", "/", "app.example.com", f"Content-Length: {size}") + body)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload)
            answer = await visitor.answer()
        assert answer.body == body
        assert answer.trailers == ({b"x-sum": b"1"} if chunked else {})
        request = await app.finished()
        assert (request.bytes_in, request.bytes_out) == (size, size)
        assert app.account.bytes_in == app.account.bytes_out == size


@pytest.mark.parametrize(
    ("method", "status", "length"), [("HEAD", 200, 5), ("HEAD", 200, NO_BODY), ("GET", 204, NO_BODY), ("GET", 304, 7)]
)
async def test_answers_without_a_body(method: str, status: int, length: int) -> None:
    async with core() as app:

        async def bare(stream: Stream) -> None:
            respond(stream, status=status, length=length)

        await app.agent(bare)
        visitor = app.visitor()
        for _ in range(2):
            await visitor.send(head(method))
            answer = await visitor.answer(method)
            assert (answer.status, answer.body) == (status, b"")
            assert answer.fields.get(b"content-length") == (b"%d" % length if length >= 0 else None)


async def test_a_body_that_must_not_be_there_is_not_written() -> None:
    async with core() as app:
        await app.agent(hello)
        visitor = app.visitor()
        for _ in range(2):
            await visitor.send(head("HEAD"))
            assert (await visitor.answer("HEAD")).body == b""
        (agent,) = app.registry.links.values()
        assert not agent.link.session.streams


async def test_http_1_0() -> None:
    async with core() as app:

        async def unknown(stream: Stream) -> None:
            respond(stream, b"hello", length=UNKNOWN)

        await app.agent(hello, "known")
        await app.agent(unknown, "unknown")
        visitor = app.visitor()
        keep = b"GET / HTTP/1.0\r\nHost: known.example.com\r\nConnection: Keep-Alive\r\n\r\n"
        await visitor.send(keep)
        answer = await visitor.answer()
        assert (answer.body, answer.fields[b"connection"]) == (b"hello", b"keep-alive")
        await visitor.send(keep.replace(b"Keep-Alive", b"Keep-Alive, close"))
        assert (await visitor.rest()).endswith(b"\r\n\r\nhello")
        visitor = app.visitor()
        await visitor.send(keep.replace(b"known", b"unknown"))
        raw = await visitor.rest()
        assert raw.endswith(b"\r\n\r\nhello")
        assert b"ransfer-" not in raw
        assert b"\r\nConnection: close\r\n" in raw
        visitor = app.visitor()
        await visitor.send(b"GET / HTTP/1.0\r\n\r\n")
        assert b"X-Tunnel-Outcome: no_tunnel" in await visitor.rest()


async def test_connection_close_is_obeyed_and_said() -> None:
    async with core() as app:
        await app.agent(hello)
        visitor = app.visitor()
        answer = await visitor.get("/", "app.example.com", "Connection: close")
        assert answer.fields[b"connection"] == b"close"
        assert await visitor.rest() == b""


async def test_expect_and_interim_answers() -> None:
    async with core() as app:

        async def careful(stream: Stream) -> None:
            assert b"\r\nExpect: 100-continue\r\n" in opened(stream).head
            respond(stream, status=103, end=False, length=NO_BODY, fields=b"Link: </a>\r\n")
            respond(stream, status=100, end=False, length=NO_BODY)
            respond(stream, await body_of(stream))

        await app.agent(careful)
        visitor = app.visitor()
        await visitor.send(head("PUT", "/", "app.example.com", "Content-Length: 2", "Expect: 100-continue"))
        assert (await visitor.socket.recv()).startswith(b"HTTP/1.1 103 OK\r\nLink: </a>\r\n\r\n")
        await visitor.send(b"hi")
        answer = await visitor.answer()
        assert answer.body == b"hi"
        assert (await app.finished()).outcome == "ok"


async def test_an_early_answer_ends_the_upload_and_the_connection() -> None:
    async with core() as app:

        async def early(stream: Stream) -> None:
            respond(stream, b"no", status=413)
            stream.reset("ok", "the answer is complete")

        await app.agent(early)
        visitor = app.visitor()
        await visitor.send(head("POST", "/", "app.example.com", "Content-Length: 1000000") + b"x" * 100_000)
        answer = await visitor.answer()
        assert (answer.status, answer.body, answer.fields[b"connection"]) == (413, b"no", b"close")
        assert ((await app.finished()).outcome, app.streams[0].outcome) == ("ok", "ok")


@without_tls
async def test_upgrade_and_its_end() -> None:
    async with core() as app:

        async def switch(stream: Stream) -> None:
            assert opened(stream).protocol == UPGRADE
            assert opened(stream).head.endswith(b"\r\n")
            assert b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" in opened(stream).head
            stream.link.session.respond(stream, Response(101, NO_BODY, 0, 0, b"Switching\r\nUpgrade: websocket\r\n"))
            raw = RawStream(stream)
            while data := await raw.receive_some():
                await raw.send_all(data.upper())
            await raw.send_eof()

        await app.agent(switch)
        visitor = app.visitor()
        await visitor.send(head("GET", "/", "app.example.com", "Connection: Upgrade", "Upgrade: websocket"))
        answer = await visitor.answer("UPGRADE")
        assert (answer.status, answer.fields[b"upgrade"], answer.fields[b"connection"]) == (
            101, b"websocket", b"Upgrade"
        )  # fmt: skip
        await visitor.send(b"early")
        await visitor.send(b" late")
        visitor.socket.shutdown()
        assert await visitor.rest() == b"EARLY LATE"
        request = await app.finished()
        assert (request.outcome, request.status, request.bytes_in, request.bytes_out) == ("ok", 101, 10, 10)


@pytest.mark.parametrize(
    "raw",
    [
        head("GET", "/", "app.example.com", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: A"),
        head("GET", "/", "app.example.com", "Connection: Upgrade", "Upgrade: websocket").replace(b"/1.1", b"/1.0"),
        head("GET", "/", "app.example.com", "Upgrade: websocket"),
        head("POST", "/", "app.example.com", "Connection: Upgrade", "Upgrade: x", "Content-Length: 1") + b"x",
    ],
)
async def test_what_is_no_upgrade(raw: bytes) -> None:
    async with core() as app:
        heads: list[bytes] = []

        async def look(stream: Stream) -> None:
            heads.append(opened(stream).head)
            respond(stream)

        await app.agent(look)
        visitor = app.visitor()
        await visitor.send(raw)
        assert (await visitor.answer()).status == 200
        assert b"pgrade" not in heads[0]
        assert app.streams[0].protocol == "http"


async def test_an_event_stream_may_be_silent_from_its_first_moment() -> None:
    async with core() as app:
        go = trio.Event()

        async def events(stream: Stream) -> None:
            respond(stream, end=False, length=UNKNOWN, fields=b"Content-Type: text/event-stream\r\n")
            await go.wait()
            await stream.send(b"data: 1\n\n")
            stream.finish()

        await app.agent(events)
        visitor = app.visitor()
        await visitor.send(head())
        assert b"text/event-stream" in await visitor.socket.recv()
        app.tick(3600)
        go.set()
        assert (await visitor.socket.recv()).startswith(b"9\r\ndata: 1\n\n\r\n")
        assert (await app.finished()).outcome == "ok"
        assert {"event", "first_byte"} <= app.requests[0].marks.keys()


async def test_server_timing_adds_up() -> None:
    async with core(server_timing=True) as app:
        await app.agent(hello)
        timing = (await app.visitor().get()).fields[b"server-timing"].decode()
        parts = {name: float(value) for name, _, value in (part.partition(";dur=") for part in timing.split(", "))}
        assert parts.keys() == {"core", "link", "agent", "local"}
        waited = (await app.finished()).marks["answered"] - app.requests[0].marks["opened"]
        assert math.isclose(parts["link"] + parts["agent"] + parts["local"], waited * 1e3, abs_tol=0.03)


async def test_a_shaped_download_is_not_taken_for_a_silent_service() -> None:
    """The pause that a quota asks for is nobody's silence."""
    async with core() as app:
        slow = Account("slow", "slow", Limits(bandwidth_bytes_per_second=1000))

        async def big(stream: Stream) -> None:
            respond(stream, end=False, length=100_000)
            await stream.send(b"x" * 100_000, end=True)

        await app.agent(big, account=slow)
        visitor = app.visitor()
        await visitor.send(head())
        await until(lambda: slow.bytes_out > 31_000)
        app.tick(31)
        request = app.only_visitor().request
        assert request is not None and request.stream is not None
        assert request.stream.failure is None


@pytest.mark.parametrize("how", ["no body", "a page of ours", "trailers only", "an interim answer first"])
async def test_a_small_body_passes_its_accounts_bandwidth_whatever_the_answer(
    how: str, autojump_clock: trio.abc.Clock
) -> None:
    async def agent(stream: Stream) -> None:
        if how == "a page of ours":
            stream.reset("timeout", "it took too long")
            return
        if how == "an interim answer first":
            respond(stream, b"", False, status=103)
        if how == "trailers only":
            respond(stream, b"", False, length=UNKNOWN)
            stream.finish(b"X-End: 1\r\n")
        else:
            respond(stream, status=204, length=NO_BODY)

    async with core() as app:
        slow = Account("slow", "slow", Limits(bandwidth_bytes_per_second=1000))
        await app.agent(agent, account=slow)
        began = trio.current_time()
        visitor = app.visitor()
        await visitor.send(head("POST", "/", "app.example.com", "Content-Length: 9000") + bytes(9000))
        assert (await visitor.answer("POST")).status == (
            504 if how == "a page of ours" else 200 if "trailers" in how else 204
        )
        assert 8 < trio.current_time() - began < 10


async def test_a_visitor_who_leaves_while_its_answer_is_put_off_holds_nothing_up() -> None:
    async with core() as app:
        await app.agent(hello, account=Account("slow", "slow", Limits(bandwidth_bytes_per_second=100)))
        visitor = app.visitor()
        await visitor.send(head("POST", "/", "app.example.com", "Content-Length: 9000") + bytes(9000))
        await until(lambda: app.door.visitors and (request := app.only_visitor().request) and request.gone is not None)
        visitor.socket.abort()
        app.tick(1)
        assert (await app.finished()).outcome == "visitor_aborted"


async def test_internal_errors_are_ours(caplog: pytest.LogCaptureFixture) -> None:
    async with core() as app:
        app.names.broken = OSError(errno.EIO, "the store is on fire")
        with caplog.at_level(logging.ERROR):
            answer = await app.visitor().get("/", "other.example.com")
        assert (answer.status, answer.outcome) == (500, "internal")
        assert b"fire" not in answer.body
        assert "request broke" in caplog.text
