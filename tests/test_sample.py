"""The sample service over memory streams, spoken to by an h11 client."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h11
import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from tunnel.sample import IDLE, MAX_HEAD, main, serve_connection, serve_sample


class Client:
    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.conn = h11.Connection(h11.CLIENT)

    async def ask(self, method: str, target: str, body: bytes = b"", **fields: str) -> tuple[h11.Response, bytes]:
        await self.send(method, target, body, **fields)
        head = await self.next()
        assert isinstance(head, h11.Response)
        answer = b""
        while isinstance(event := await self.next(), h11.Data):
            answer += event.data
        assert isinstance(event, h11.EndOfMessage)
        if self.conn.our_state is h11.DONE:
            self.conn.start_next_cycle()
        return head, answer

    async def send(self, method: str, target: str, body: bytes = b"", **fields: str) -> None:
        headers = [("Host", "sample"), *fields.items()]
        if body:
            headers.append(("Content-Length", str(len(body))))
        data = self.conn.send(h11.Request(method=method, target=target, headers=headers)) or b""
        if body:
            data += self.conn.send(h11.Data(data=body)) or b""
        await self.stream.send_all(data + (self.conn.send(h11.EndOfMessage()) or b""))

    async def next(self) -> object:
        while (event := self.conn.next_event()) is h11.NEED_DATA:
            self.conn.receive_data(bytes(await self.stream.receive_some()))
        return event


@asynccontextmanager
async def connected() -> AsyncIterator[Client]:
    near, far = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, far)
        yield Client(near)
        nursery.cancel_scope.cancel()


async def test_a_request_is_echoed_as_text() -> None:
    async with connected() as client:
        head, body = await client.ask("POST", "/some/path?a=1", b"hello", **{"X-Case": "Kept"})
        assert head.status_code == 200
        assert body.startswith(b"POST /some/path?a=1 HTTP/1.1\n")
        assert b"X-Case: Kept\n" in body
        assert b"(5 bytes of body)" in body


async def test_browsers_get_pages_with_everything_escaped() -> None:
    async with connected() as client:
        for target, title in (("/", b"The tunnel works"), ("/x", b"What the local service received")):
            head, body = await client.ask("GET", target, Accept="text/html,*/*", Evil="<script>alert(1)</script>")
            assert dict(head.headers)[b"content-type"] == b"text/html; charset=utf-8"
            assert title in body
            assert b"<script>alert" not in body


async def test_one_connection_serves_many_requests_and_head() -> None:
    async with connected() as client:
        for _ in range(3):
            await client.ask("GET", "/")
        head, body = await client.ask("HEAD", "/x")
        assert body == b""
        assert int(dict(head.headers)[b"content-length"]) > 0


async def test_a_client_that_waits_to_be_told_is_told() -> None:
    async with connected() as client:
        request = h11.Request(
            method="POST", target="/", headers=[("Host", "x"), ("Content-Length", "3"), ("Expect", "100-continue")]
        )
        await client.stream.send_all(client.conn.send(request) or b"")
        informed = await client.next()
        assert isinstance(informed, h11.InformationalResponse)
        assert informed.status_code == 100
        data = (client.conn.send(h11.Data(data=b"abc")) or b"") + (client.conn.send(h11.EndOfMessage()) or b"")
        await client.stream.send_all(data)
        assert isinstance(await client.next(), h11.Response)


async def test_events_come_one_a_second_until_the_visitor_leaves(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, far)
        client = Client(near)
        await client.send("GET", "/events")
        head = await client.next()
        assert isinstance(head, h11.Response)
        assert dict(head.headers)[b"content-type"] == b"text/event-stream"
        for number in range(1, 4):
            event = await client.next()
            assert isinstance(event, h11.Data)
            assert bytes(event.data).startswith(b"id: %d\ndata: event %d at " % (number, number))
            assert trio.current_time() < number
        await near.aclose()  # then the service's write fails, and its task ends


async def test_an_idle_client_is_let_go(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()
    began = trio.current_time()
    await serve_connection(far)
    assert trio.current_time() - began == IDLE
    assert await near.receive_some() == b""


async def test_what_is_not_http_is_told_so() -> None:
    for nonsense, status in ((b"nonsense\r\n\r\n", b"400"), (b"GET / HTTP/1.1\r\na: " + b"x" * 2 * MAX_HEAD, b"431")):
        near, far = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_connection, far)
            await near.send_all(nonsense)
            assert (await near.receive_some()).startswith(b"HTTP/1.1 " + status)


async def test_a_client_that_goes_is_no_error() -> None:
    near, far = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, far)
        await near.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        await near.aclose()


async def test_it_listens_on_loopback_only() -> None:
    async with trio.open_nursery() as nursery:
        host, port = await nursery.start(serve_sample)
        assert host == "127.0.0.1"
        client = Client(await trio.open_tcp_stream(host, port))
        _, body = await client.ask("GET", "/real")
        assert body.startswith(b"GET /real ")
        await client.stream.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("words", [["x"], ["127.0.0.1:99999"], ["3000", "more"], [""]])
def test_as_a_program_it_says_what_is_wrong(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "is no address; write 3000, :3000 (all interfaces) or HOST:3000" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["--help", "more"]])
def test_as_a_program_it_says_how_it_is_used(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: python -m tunnel.sample") and "default: 3000" in out and err == ""


def test_as_a_program_it_says_when_its_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([f"127.0.0.1:{taken.getsockname()[1]}"]) == 2
    assert "choose another address" in capsys.readouterr().err
