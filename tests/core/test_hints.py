"""What an agent's first bytes say about the worker it wants: real ClientHellos, whole and byte by byte."""

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tunnel.core.hints import MAX_NAMES, MAX_PEEK, alpn_names, wanted_worker, worker_of
from tunnel.net import Socket


@asynccontextmanager
async def tcp_pair() -> AsyncIterator[tuple[Socket, Socket]]:
    """Two ends of a real TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
    ends = Socket(near), Socket(far)
    for end in ends:
        end.sock.setblocking(False)
    try:
        yield ends
    finally:
        for end in ends:
            end.close()


def client_hello(*protocols: str, size: int = 0) -> bytes:
    """As OpenSSL writes it."""
    context = ssl.create_default_context()
    if protocols:
        context.set_alpn_protocols([*protocols, *(f"p{at}" * 20 for at in range(size))])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection = context.wrap_bio(incoming, outgoing, server_hostname="core.example.com")
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


def test_the_alpn_name_of_a_client_hello() -> None:
    assert alpn_names(client_hello("http/1.1", "x-tunnel-worker/3")) == [b"http/1.1", b"x-tunnel-worker/3"]
    assert worker_of(client_hello("http/1.1", "x-tunnel-worker/3")) == 3
    assert worker_of(client_hello("x-tunnel-worker/12345")) is None
    assert worker_of(client_hello("x-tunnel-worker/")) is None
    assert worker_of(client_hello("http/1.1")) is None
    assert worker_of(client_hello()) is None


def test_so_many_names_and_no_empty_ones() -> None:
    """A record has room for 16,000."""
    names = [f"p{at}" for at in range(MAX_NAMES - 1)]
    assert worker_of(client_hello(*names, "x-tunnel-worker/3", "z")) == 3
    assert worker_of(client_hello(*names, "z", "x-tunnel-worker/3")) is None
    assert len(alpn_names(client_hello(*names, *names))) == MAX_NAMES
    whole = client_hello("http/1.1", "x", "x-tunnel-worker/3")
    assert alpn_names(whole.replace(b"\x01x\x11", b"\0x\x11")) == [b"http/1.1"]


@pytest.mark.parametrize(
    ("line", "worker"),
    [
        (b"GET /link?worker=2 HTTP/1.1\r\n", 2),
        (b"GET /link?a=b&worker=10&c HTTP/1.1\r\n", 10),
        (b"GET /link HTTP/1.1\r\n", None),
        (b"GET /link?worker=x HTTP/1.1\r\n", None),
        (b"GET /link?worker=-1 HTTP/1.1\r\n", None),
        (b"GET /link?noworker=1 HTTP/1.1\r\n", None),
        (b"GET /link?worker=99999 HTTP/1.1\r\n", None),
        (b"POST /link?worker=1 HTTP/1.1\r\n", None),
        (b"\x00\x01\x02", None),
    ],
)
def test_the_query_of_a_plain_handshake(line: bytes, worker: int | None) -> None:
    assert worker_of(line) == worker


def test_a_damaged_client_hello_names_nobody_and_breaks_nothing() -> None:
    whole = client_hello("http/1.1", "x-tunnel-worker/3")
    for cut in range(len(whole)):
        assert worker_of(whole[:cut]) in (None, 3)
        for value in (0, 0x7F, 0xFF):
            damaged = whole[:cut] + bytes((value,)) + whole[cut + 1 :]
            assert worker_of(damaged) is None or worker_of(damaged) in range(10_000)


@pytest.mark.parametrize("step", [1, 7, 100, 100_000])
@pytest.mark.parametrize(
    "first",
    [client_hello("http/1.1", "x-tunnel-worker/1"), client_hello("x-tunnel-worker/1", size=100),
     b"GET /link?worker=1 HTTP/1.1\r\nHost: a\r\n\r\n"],
)  # fmt: skip
async def test_it_waits_for_what_it_needs_and_takes_nothing(first: bytes, step: int) -> None:
    async with tcp_pair() as (near, far):
        found: list[int | None] = []
        async with trio.open_nursery() as nursery:

            async def look() -> None:
                found.append(await wanted_worker(near))

            nursery.start_soon(look)
            for at in range(0, len(first), step):
                await trio.testing.wait_all_tasks_blocked()
                far.sock.send(first[at : at + step])
        assert found == [1]
        data = b""
        while len(data) < len(first):
            data += await near.recv()
        assert data == first


async def test_who_says_nothing_is_waited_for_and_who_leaves_is_not() -> None:
    async with tcp_pair() as (near, far):
        with trio.move_on_after(0.05) as scope:
            await wanted_worker(near)
        assert scope.cancelled_caught
        far.sock.send(b"GET /li")
        far.sock.shutdown(socket.SHUT_WR)
        with trio.fail_after(5):
            assert await wanted_worker(near) is None


async def test_a_record_too_long_to_look_at_is_served_where_it_is() -> None:
    async with tcp_pair() as (near, far):
        far.sock.send(b"\x16\x03\x01\xff\xff" + b"x" * 100)
        with trio.fail_after(5):
            assert await wanted_worker(near) is None
    assert MAX_PEEK < 65535
