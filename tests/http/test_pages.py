"""The page server, over real sockets on kernel-chosen ports; time is the autojump clock's where time-outs matter."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from tunnel.handler import PageAnswer, PageRequest
from tunnel.http import pages as server
from tunnel.http.pages import serve_pages


async def hello(request: PageRequest) -> PageAnswer:
    return PageAnswer(200, b"hello\n", headers={"X-Seen": request.headers.get("x-a", "")})


async def echo(request: PageRequest) -> PageAnswer:
    return PageAnswer(200, f"{request.path}|{request.query}".encode())


async def styled(request: PageRequest) -> PageAnswer:
    return PageAnswer(200, b"", headers={"Content-Security-Policy": "default-src 'self'"})


async def broken(request: PageRequest) -> PageAnswer:
    raise ValueError("secret of the page")


async def impossible(request: PageRequest) -> PageAnswer:
    return PageAnswer(200, b"", headers={"X-A": "a\r\nX-B: b"})


async def slow(request: PageRequest) -> PageAnswer:
    await trio.sleep_forever()
    raise AssertionError


async def big(request: PageRequest) -> PageAnswer:
    return PageAnswer(200, b"x" * 20_000_000)


PAGES = {
    "/hello": hello,
    "/echo": echo,
    "/styled": styled,
    "/broken": broken,
    "/impossible": impossible,
    "/slow": slow,
    "/big": big,
}


@pytest.fixture
def patient_clock(autojump_clock: MockClock) -> MockClock:
    """Jumps only after real milliseconds of silence: the kernel may be carrying something."""
    autojump_clock.autojump_threshold = 0.02
    return autojump_clock


@asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """The port of a server of PAGES."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_pages, listeners, PAGES)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def everything(stream: trio.SocketStream) -> bytes:
    """What comes until the server closes."""
    data = b""
    with trio.fail_after(300):
        async for part in stream:
            data += part
    return data


async def ask(port: int, text: str, end: bool = True) -> bytes:
    """Send this, and half-close if `end`; gives all that comes until the server closes."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(text.replace("\n", "\r\n").encode("latin-1"))
        if end:
            await stream.send_eof()
        return await everything(stream)


async def test_get() -> None:
    async with serving() as port:
        answer = await ask(port, "GET /hello HTTP/1.1\nHost: a\nX-A: 1\nx-a: 2\n\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"\r\nContent-Length: 6" in head
    assert b"\r\nContent-Type: text/plain; charset=utf-8" in head
    assert b"\r\nDate: " in head
    assert b"\r\nX-Seen: 1, 2" in head
    assert body == b"hello\n"


async def test_head_has_the_length_and_no_body() -> None:
    async with serving() as port:
        answer = await ask(port, "HEAD /hello HTTP/1.1\nHost: a\n\n")
    assert b"\r\nContent-Length: 6" in answer
    assert answer.endswith(b"\r\n\r\n")


async def test_path_and_query() -> None:
    async with serving() as port:
        assert (await ask(port, "GET /echo?a=1?b HTTP/1.1\nHost: a\n\n")).endswith(b"\r\n\r\n/echo|a=1?b")


async def test_keep_alive_and_pipelining() -> None:
    async with serving() as port:
        answer = await ask(port, "GET /hello HTTP/1.1\nHost: a\n\nHEAD /hello HTTP/1.1\nHost: a\n\n" * 3)
        assert answer.count(b"HTTP/1.1 200") == 6
        assert answer.count(b"hello\n") == 3
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            for _ in range(3):
                await stream.send_all(b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n")
                data = b""
                while not data.endswith(b"hello\n"):
                    data += await stream.receive_some()


@pytest.mark.parametrize("text", ["GET /hello HTTP/1.0\n\n", "GET /hello HTTP/1.1\nHost: a\nConnection: close\n\n"])
async def test_close_when_asked(text: str) -> None:
    async with serving() as port:
        assert (await ask(port, text, end=False)).endswith(b"hello\n")


async def test_a_page_may_say_what_a_browser_may_load_in_it() -> None:
    async with serving() as port:
        head = await ask(port, "GET /styled HTTP/1.1\nHost: a\n\n")
        assert head.count(b"Content-Security-Policy:") == 1 and b"default-src 'self'\r\n" in head
        assert b"default-src 'none'; frame" in await ask(port, "GET /hello HTTP/1.1\nHost: a\n\n")


async def test_a_path_that_is_none_names_those_that_are() -> None:
    async with serving() as port:
        answer = await ask(port, "GET / HTTP/1.1\nHost: a\n\n")
    assert answer.startswith(b"HTTP/1.1 404") and b"/broken, /echo, /hello" in answer


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("GET /nothing HTTP/1.1\nHost: a\n\n", b"404"),
        ("GET http://a/hello HTTP/1.1\nHost: a\n\n", b"404"),
        ("DELETE /hello HTTP/1.1\nHost: a\n\n", b"405"),
        ("POST /nothing HTTP/1.1\nHost: a\nContent-Length: 0\n\n", b"404"),
        ("nonsense\n\n", b"400"),
        ("GET /hello HTTP/1.1\n\n", b"400"),
        ("GET /hello HTTP/1.1\nHost: a\nA: " + "x" * server.MAX_HEAD, b"431"),
    ],
)
async def test_refusals(text: str, status: bytes) -> None:
    async with serving() as port:
        answer = await ask(port, text)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert (b"Allow: GET, HEAD" in answer) == (status == b"405")
        assert len(answer.partition(b"\r\n\r\n")[2].splitlines()) == 1


@pytest.mark.parametrize("framing", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_body_is_not_read(method: str, framing: str) -> None:
    """The answer comes at once, and the connection ends: the rest can't be taken for a request."""
    async with serving() as port:
        answer = await ask(port, f"{method} /hello HTTP/1.1\nHost: a\n{framing}\n\nGET /echo HTTP/1.1\n\n")
    assert answer.startswith(b"HTTP/1.1 " + (b"200" if method == "GET" else b"405"))
    assert b"\r\nConnection: close" in answer
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("path", ["/broken", "/impossible"])
async def test_a_page_that_breaks(path: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as port:
        answer = await ask(port, f"GET {path} HTTP/1.1\nHost: a\n\nGET /hello HTTP/1.1\nHost: a\n\n")
    first, second = answer.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"500")
    assert first.endswith(b"\r\n\r\nthis page broke; the log has the details\n")
    assert second.startswith(b"200")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("tunnel.http", logging.ERROR)
    assert record.fields["path"] == path  # type: ignore[attr-defined]
    assert ("ValueError: secret of the page" in record.fields["error"]) == (path == "/broken")  # type: ignore[attr-defined]


async def test_a_page_that_hangs(patient_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    started = trio.current_time()
    async with serving() as port:
        answer = await ask(port, "GET /slow HTTP/1.1\nHost: a\n\n")
    assert answer.startswith(b"HTTP/1.1 500")
    assert trio.current_time() - started == pytest.approx(server.PAGE_TIMEOUT, abs=1)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", server.HEAD_TIMEOUT),
        ("GET /hello HTTP/1.1\nHost", server.HEAD_TIMEOUT),
        ("GET /hello HTTP/1.1\nHost: a\n\n", server.IDLE_TIMEOUT),
    ],
)
async def test_silence_is_ended(text: str, seconds: float, patient_clock: MockClock) -> None:
    async with serving() as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        started = trio.current_time()
        await stream.send_all(text.replace("\n", "\r\n").encode())
        async for _ in stream:
            pass
        assert trio.current_time() - started == pytest.approx(seconds, abs=1)


async def test_a_client_that_does_not_read_is_left(patient_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        await trio.sleep(server.SEND_TIMEOUT + 1)  # the mock clock's seconds
        received = 0
        try:
            async for part in stream:
                received += len(part)
        except trio.BrokenResourceError:
            pass
        assert received < 20_000_000
    assert not caplog.records


async def hold(port: int, nursery: trio.Nursery, text: bytes, source: str = "127.0.0.1") -> trio.SocketStream:
    """A connection from this address that has sent this, until the nursery ends."""
    stream = await trio.open_tcp_stream("127.0.0.1", port, local_address=source)

    async def close_at_the_end() -> None:
        async with stream:
            await trio.sleep_forever()

    nursery.start_soon(close_at_the_end)
    if text:
        await stream.send_all(text)
    return stream


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"GET /hello HTTP/1.1\r\nHost",
        b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n",
        b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
    ids=["silent", "half a head", "kept", "lingering", "not reading"],
)
async def test_who_keeps_the_server_waiting_gives_way(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(server, "LINGER_TIMEOUT", math.inf)
    async with serving() as port, trio.open_nursery() as held:
        first = await hold(port, held, text)
        for _ in range(20):
            await hold(port, held, text)
            with trio.fail_after(5):
                assert (await ask(port, "GET /hello HTTP/1.1\nHost: a\n\n")).endswith(b"hello\n")
        with suppress(trio.BrokenResourceError):
            await everything(first)  # it ends
        held.cancel_scope.cancel()


async def test_a_crowd_gives_way_and_not_who_came_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 5)
    async with serving() as port, trio.open_nursery() as held:
        request = b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n"
        scraper = await hold(port, held, request, "127.0.0.2")
        assert (await scraper.receive_some()).endswith(b"hello\n")
        for _ in range(20):
            await hold(port, held, b"", "127.0.0.3")
        assert (await ask(port, "GET /hello HTTP/1.1\nHost: a\n\n")).endswith(b"hello\n")
        with trio.fail_after(5):
            await scraper.send_all(request)
            assert (await scraper.receive_some()).endswith(b"hello\n")
        held.cancel_scope.cancel()


async def test_who_is_being_answered_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    going_on = trio.Event()

    async def later(request: PageRequest) -> PageAnswer:
        await going_on.wait()
        return PageAnswer(200, b"late\n")

    monkeypatch.setitem(PAGES, "/later", later)
    async with serving() as port, trio.open_nursery() as held:
        waiting = [await hold(port, held, b"GET /later HTTP/1.1\r\nHost: a\r\n\r\n") for _ in range(2)]
        async with await trio.open_tcp_stream("127.0.0.1", port) as third:
            assert await everything(third) == b""
        going_on.set()
        for stream in waiting:
            assert (await stream.receive_some()).endswith(b"late\n")
        held.cancel_scope.cancel()


async def test_pages_may_be_added_while_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as port:
        monkeypatch.setitem(PAGES, "/later", hello)
        assert (await ask(port, "GET /later HTTP/1.1\nHost: a\n\n")).endswith(b"hello\n")


async def test_connections_in_anothers_nursery() -> None:
    """Accepting ends, the connection stays, and the listener is closed."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            await accepting.start(serve_pages, listeners, PAGES, connections)
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n")
            assert await stream.receive_some()
            accepting.cancel_scope.cancel()
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        connections.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("bound", "host", "origin", "status"),
    [
        ("127.0.0.1", "localhost:9090", "", b"200"),
        ("127.0.0.1", "127.0.0.1", "", b"200"),
        ("::1", "[::1]:9090", "", b"200"),
        ("127.0.0.1", "evil.example:9090", "", b"403"),
        ("127.0.0.1", "127.0.0.1.evil.example", "", b"403"),
        ("127.0.0.1", "localhost:9090", "http://localhost:9090", b"200"),
        ("127.0.0.1", "localhost:9090", "http://evil.example", b"403"),
        ("127.0.0.1", "localhost:9090", "null", b"403"),
        ("0.0.0.0", "tunnel-core:9090", "", b"200"),
        ("192.0.2.7", "10.1.2.3:9090", "", b"200"),
        ("0.0.0.0", "tunnel-core:9090", "http://evil.example", b"403"),
    ],
)
async def test_other_sites_do_not_reach_a_page(bound: str, host: str, origin: str, status: bytes) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    field = f"Origin: {origin}\n" if origin else ""
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_pages, listeners, PAGES, bound=bound))
        port = listeners[0].socket.getsockname()[1]
        answer = await ask(port, f"GET /hello HTTP/1.1\nHost: {host}\n{field}\n")
        nursery.cancel_scope.cancel()
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"access-control" not in answer.lower() and b"X-Frame-Options: DENY" in answer
