"""Sockets: what one knows of its peer, a reset that arrives as one, TLS, and what can't be dialled."""

import select
import socket as stdlib_socket
import ssl
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
import trustme

from tunnel import net
from tunnel.net import GONE, HALF_CLOSED, HERE, Socket


def make_pair() -> tuple[Socket, Socket]:
    with stdlib_socket.create_server(("127.0.0.1", 0)) as listener:
        one = stdlib_socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    net.tune(one)
    net.tune(other)
    return Socket(one), Socket(other)


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Socket, Socket]]:
    one, other = make_pair()
    yield one, other
    one.close()
    other.close()


async def test_a_peer_that_vanished_is_noticed_in_minutes(pair: tuple[Socket, Socket]) -> None:
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    idle, between, times = (
        pair[0].sock.getsockopt(stdlib_socket.IPPROTO_TCP, getattr(stdlib_socket, name)) for name in names
    )
    assert pair[0].sock.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE)
    assert idle + between * times == 120


async def test_dialling_where_nobody_listens() -> None:
    with stdlib_socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(OSError):
        await net.dial(*address)


# The peer ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["poll", "peek"])
def peek(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Linux's POLLRDHUP, and without."""
    if request.param == "peek":
        monkeypatch.delattr(select, "POLLRDHUP", raising=False)


@pytest.mark.usefixtures("peek")
async def test_what_a_peer_is_seen_to_do(pair: tuple[Socket, Socket]) -> None:
    one, other = pair
    assert one.peer() == HERE
    other.shutdown()
    await trio.lowlevel.wait_readable(one.sock)
    assert one.peer() == HALF_CLOSED
    assert other.peer() == HERE
    await one.send(b"still heard")
    assert await other.recv() == b"still heard"
    one.close()
    assert one.peer() == GONE


@pytest.mark.usefixtures("peek")
async def test_a_peer_that_broke_off_is_gone(pair: tuple[Socket, Socket]) -> None:
    one, other = pair
    other.abort()
    await trio.lowlevel.wait_readable(one.sock)
    assert one.peer() == GONE


async def test_asking_leaves_what_was_sent_unread(pair: tuple[Socket, Socket]) -> None:
    one, other = pair
    await other.send(b"data")
    await trio.lowlevel.wait_readable(one.sock)
    assert one.peer() == HERE
    assert await one.recv() == b"data"


async def test_an_end_behind_unread_bytes_is_seen(pair: tuple[Socket, Socket]) -> None:
    one, other = pair
    await other.send(b"data")
    other.shutdown()
    with trio.fail_after(10):
        while one.peer() == HERE:
            await trio.lowlevel.checkpoint()
    assert one.peer() == HALF_CLOSED
    assert [await one.recv(), await one.recv()] == [b"data", b""]


async def test_an_abort_arrives_as_a_reset(pair: tuple[Socket, Socket]) -> None:
    one, other = pair
    await other.send(b"half an answ")
    other.abort()
    with trio.fail_after(10):
        await trio.lowlevel.wait_readable(one.sock)
        with pytest.raises(trio.BrokenResourceError) as caught:
            while await one.recv():
                pass
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    other.abort()
    other.close()


async def test_a_close_arrives_as_an_end(pair: tuple[Socket, Socket]) -> None:
    one, other = pair
    other.close()
    assert await one.recv() == b""
    with pytest.raises(trio.ClosedResourceError):
        await other.send(b"x")


async def test_who_waits_on_a_socket_that_is_closed_here_is_told(pair: tuple[Socket, Socket]) -> None:
    one, _ = pair
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await one.recv()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        one.close()


async def test_waiting_first_hears_the_same(pair: tuple[Socket, Socket]) -> None:
    one, other = pair
    await other.send(b"there already")
    assert await one.recv_later() == b"there already"
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            assert await one.recv_later() == b"later"
            with pytest.raises(trio.BrokenResourceError):
                await one.recv_later()
            one.close()
            with pytest.raises(trio.ClosedResourceError):
                await one.recv_later()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await other.send(b"later")
        other.abort()


async def test_who_waits_first_on_a_socket_that_is_closed_here_is_told(pair: tuple[Socket, Socket]) -> None:
    one, _ = pair
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await one.recv_later()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        one.close()


async def test_an_idle_connection_is_stale_once_anything_happened(pair: tuple[Socket, Socket]) -> None:
    one, other = pair
    assert not one.is_stale()
    await other.send(b"unasked")
    await trio.lowlevel.wait_readable(one.sock)
    assert one.is_stale()
    other.close()
    await trio.lowlevel.wait_readable(one.sock)
    assert one.is_stale()


# TLS -----------------------------------------------------------------------------------------------------------------


async def tls_pair(buffers: int = 0) -> tuple[Socket, Socket]:
    """Server and client, the handshake done. buffers: bytes of the kernel's, on the way to the client."""
    authority = trustme.CA()
    server_context, client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("core.test").configure_cert(server_context)
    authority.configure_trust(client_context)
    near, far = make_pair()
    if buffers:
        near.sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF, buffers)
        far.sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVBUF, buffers)
    server = net.with_tls(near, server_context, server_side=True)
    client = net.with_tls(far, client_context, server_side=False, server_name="core.test")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.handshake)
            await client.handshake()
    return server, client


async def test_the_same_over_tls() -> None:
    server, client = await tls_pair()
    data = bytes(range(256)) * 4096
    received = bytearray()

    async def receive() -> None:
        while part := await server.recv():
            received.extend(part)

    with trio.fail_after(20):
        assert client.peer() == HERE
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await client.send(data)
            client.shutdown()
    assert received == data
    server.close()
    client.close()


async def test_what_is_here_under_tls_is_read_over_several_records() -> None:
    server, client = await tls_pair()
    assert server.recv_here() is None
    for part in (b"one", b"two", b"three"):
        client.send_nowait(part)
    assert server.recv_here() == b"onetwothree"
    assert not server.has_rest and not server.is_stale()
    client.send_nowait(b"x" * 10_000)
    client.send_nowait(b"y" * 10_000)
    assert server.recv_here(12_000) == b"x" * 10_000 + b"y" * 2000
    assert server.has_rest
    assert server.recv_here(12_000) == b"y" * 8000  # OpenSSL's own rest, of which the kernel knows nothing
    assert not server.has_rest
    client.send_nowait(b"last")
    client.shutdown()
    assert server.recv_here() == b"last"
    assert server.has_rest and server.is_stale()
    assert server.recv_here() == b""
    server.close()
    client.close()


async def test_tiny_records_let_others_have_their_turn() -> None:
    """Each costs as much as a large one: who sends them must not hold the run loop up."""
    server, client = await tls_pair()
    for _ in range(40):
        client.send_nowait(b"x")
    read = []
    while data := server.recv_here():
        read.append((len(data), server.has_rest))
    assert read == [(net.RECORDS, True), (net.RECORDS, True), (40 - 2 * net.RECORDS, False)]
    server.close()
    client.close()


@pytest.mark.parametrize("size", [20_000, 65_545, 131_072, 200_000])
async def test_under_tls_the_rest_may_leave_in_smaller_parts(size: int) -> None:
    """A slow reader's connection takes a part of a large write; what is left of it follows in slices."""
    server, client = await tls_pair(buffers=30_000)
    data = bytes(range(256)) * 4096 * 8
    received = bytearray()
    waited = 0

    async def receive() -> None:
        while part := await client.recv(5000):
            received.extend(part)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for at in range(0, len(data), size):
                rest = data[at : at + size]
                sent = server.send_nowait(rest)
                rest = rest[sent:]
                if rest and not waited:
                    nursery.start_soon(receive)
                waited += bool(rest)
                while rest:
                    await server.send(rest[:65536])
                    rest = rest[65536:]
            await server.finish()  # for close_notify, too, there may be no room
    assert received == data
    assert waited > 10
    server.close()
    client.close()


@pytest.mark.parametrize("said", [b"", b"x", b"\x16\x03\x01"], ids=["nothing", "a byte", "TLS"])
@pytest.mark.parametrize("server_side", [True, False])
async def test_tls_over_a_connection_that_was_reset(
    pair: tuple[Socket, Socket], said: bytes, server_side: bool
) -> None:
    """ssl looks for the peer before any handshake; whoever it is must not be able to break more than the connection."""
    near, far = pair
    far.send_nowait(said)
    far.abort()
    while near.peer() != GONE:
        await trio.lowlevel.checkpoint()
    context = ssl.create_default_context() if not server_side else ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    secured = near
    with pytest.raises(trio.BrokenResourceError):
        secured = net.with_tls(near, context, server_side=server_side, server_name="localhost")
        await secured.handshake()
    secured.close()


def test_addresses_as_text() -> None:
    assert net.address_text(("127.0.0.1", 80)) == "127.0.0.1:80"
    assert net.address_text(("::ffff:192.0.2.7", 80, 0, 0)) == "192.0.2.7:80"
    assert net.address_text(("::1", 80, 0, 0)) == "[::1]:80"
