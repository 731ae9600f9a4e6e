"""Connections to a local service: dialled, kept, used again, thrown away."""

import errno
import socket as stdlib_socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import trio
import trustme

from tunnel.errors import Failure
from tunnel.http import client
from tunnel.http.client import IDLE_TIMEOUT, MAX_IDLE, SWEEP, Service
from tunnel.net import Socket, dial, dialing
from tunnel.tls import TlsSocket


class Clock:
    """Stands for `monotonic`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(client, "monotonic", clock)
    return clock


@asynccontextmanager
async def service(tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Service, list[trio.abc.Stream]]]:
    """A service that accepts and says nothing, and its connections."""
    accepted: list[trio.abc.Stream] = []

    async def serve(stream: trio.abc.Stream) -> None:
        if tls is not None:
            stream = trio.SSLStream(stream, tls, server_side=True)
            try:
                await stream.do_handshake()
            except trio.BrokenResourceError:
                return
        accepted.append(stream)
        await trio.sleep_forever()

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        made = Service("127.0.0.1", listener.socket.getsockname()[1], tls is not None)
        try:
            yield made, accepted
        finally:
            made.close()
            nursery.cancel_scope.cancel()


async def reach(accepted: list[trio.abc.Stream], count: int) -> trio.abc.Stream:
    with trio.fail_after(10):
        while len(accepted) < count:
            await trio.lowlevel.checkpoint()
    return accepted[count - 1]


async def test_the_most_recently_used_is_taken_first(clock: Clock) -> None:
    async with service() as (made, _):
        assert made.take_idle() is None
        one, two = await made.connect(), await made.connect()
        made.keep(one)
        made.keep(two)
        assert made.take_idle() is two
        assert made.take_idle() is one
        assert made.take_idle() is None
        one.close()
        two.close()


async def test_a_connection_that_the_service_closed_is_not_used(clock: Clock) -> None:
    async with service() as (made, accepted):
        good, bad = await made.connect(), await made.connect()
        await reach(accepted, 2)
        made.keep(good)
        made.keep(bad)
        clock.now += 1
        for stream in accepted:
            assert isinstance(stream, trio.SocketStream)
            if stream.socket.getpeername() == bad.sock.getsockname():
                await stream.aclose()
        assert made.take_idle() is good
        assert bad.is_closed
        good.close()


async def test_a_connection_on_which_the_service_spoke_unasked_is_not_used(clock: Clock) -> None:
    async with service() as (made, accepted):
        kept = await made.connect()
        made.keep(kept)
        await (await reach(accepted, 1)).send_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        assert made.take_idle() is None
        assert kept.is_closed


async def test_idle_connections_expire(clock: Clock) -> None:
    async with service() as (made, _):
        old, new = await made.connect(), await made.connect()
        made.keep(old)
        clock.now += IDLE_TIMEOUT - 1
        made.keep(new)
        made.sweep(clock.now)
        assert not old.is_closed
        made.sweep(clock.now + 1)
        assert old.is_closed and not new.is_closed
        clock.now += IDLE_TIMEOUT
        assert made.take_idle() is None
        assert new.is_closed


async def test_what_the_service_has_closed_is_closed_here_within_a_second(clock: Clock) -> None:
    async with service() as (made, accepted):
        sockets = []
        for count in (1, 2, 3):
            sockets.append(await made.connect())
            made.keep(sockets[-1])
            await reach(accepted, count)
        first, closed, last = sockets
        await accepted[2].aclose()
        made.tick(clock.now)
        assert [socket.is_closed for socket in (first, closed, last)] == [False, False, True]
        await accepted[1].aclose()
        made.tick(clock.now + SWEEP / 2)
        assert not closed.is_closed
        made.tick(clock.now + SWEEP)
        assert closed.is_closed and not first.is_closed
        assert made.take_idle() is first
        first.close()


async def test_the_number_of_idle_connections_is_bounded(clock: Clock) -> None:
    async with service() as (made, _):
        sockets = [await made.connect() for _ in range(MAX_IDLE + 1)]
        for socket in sockets:
            made.keep(socket)
        assert sockets[0].is_closed and not sockets[1].is_closed
        made.close()
        assert all(socket.is_closed for socket in sockets)


async def refused(made: Service) -> str:
    with pytest.raises(Failure) as caught:
        await made.connect()
    assert caught.value.outcome == "local_refused"
    assert made.address in caught.value.text
    return caught.value.text


async def test_nobody_listens() -> None:
    with trio.socket.socket() as taken:
        await taken.bind(("127.0.0.1", 0))
        assert "refused" in await refused(Service("127.0.0.1", taken.getsockname()[1], False))


async def test_a_name_that_does_not_exist() -> None:
    await refused(Service("nowhere.invalid", 80, False))


def test_addresses() -> None:
    assert Service("::1", 80, False).address == "[::1]:80"
    assert Service("localhost", 80, False).address == "localhost:80"


@contextmanager
def full_backlog() -> Iterator[int]:
    """A port whose listener takes no more connections: what is sent there waits."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(3):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
            waiting.append(one)
        try:
            yield listener.getsockname()[1]
        finally:
            for one in waiting:
                one.close()


async def test_a_service_that_does_not_accept_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CONNECT_TIMEOUT", 0.01)
    with full_backlog() as port:
        assert "within 0.01 s" in await refused(Service("127.0.0.1", port, False))


async def test_cancelled_while_it_dials_is_cancelled_and_no_group() -> None:
    with full_backlog() as port, trio.CancelScope() as scope:
        scope.cancel()
        with pytest.raises(trio.Cancelled):
            await dial("127.0.0.1", port)
    with full_backlog() as port, trio.move_on_after(0.01) as scope:
        with pytest.raises(trio.Cancelled):  # now within the nursery in there
            await dial("127.0.0.1", port)
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


# TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


async def test_tls_to_loopback_takes_any_certificate(authority: trustme.CA, clock: Clock) -> None:
    async with service(server_context(authority, "some.example")) as (made, accepted):
        socket = await made.connect()
        assert isinstance(socket.sock, TlsSocket)
        await (await reach(accepted, 1)).send_all(b"hello")
        with trio.fail_after(10):
            assert await socket.recv() == b"hello"
        made.keep(socket)
        clock.now += 1
        assert made.take_idle() is socket  # the session tickets of TLS 1.3 are nothing unasked
        socket.close()


async def test_tls_to_others_is_verified(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> None:
    async with service(server_context(authority, "some.example")) as (local, _):

        async def dial_there(host: str, port: int) -> Socket:
            return await dial("127.0.0.1", local.port)

        monkeypatch.setattr(client, "dial", dial_there)
        made = Service("some.example", local.port, True)
        assert "TLS" in await refused(made) and "certificate" in (await refused(made)).lower()
        assert made._tls is not None
        authority.configure_trust(made._tls)
        (await made.connect()).close()
        other = Service("other.example", local.port, True)
        assert other._tls is not None
        authority.configure_trust(other._tls)
        assert "certificate" in (await refused(other)).lower()


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b"", None])
async def test_tls_with_a_service_that_speaks_none(said: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers in plain HTTP, or closes the connection, or waits for more; what to do is said in each case."""

    async def plain(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        if said is None:
            await trio.sleep_forever()
        await stream.send_all(said or b"")

    if said is None:
        monkeypatch.setattr(client, "CONNECT_TIMEOUT", 0.05)
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, plain, [listener])
        made = Service("127.0.0.1", listener.socket.getsockname()[1], True)
        reason = await refused(made)
        assert "TLS" in reason and reason.endswith(f"as http://{made.address}")
        assert "can't connect" not in reason and "WRONG_VERSION" not in reason
        nursery.cancel_scope.cancel()


async def test_a_service_that_refuses_in_terms_of_tls_is_not_taken_for_a_plain_one() -> None:
    async def alert(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"\x15\x03\x03\x00\x02\x02\x28")  # fatal, handshake_failure

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, alert, [listener])
        reason = await refused(Service("127.0.0.1", listener.socket.getsockname()[1], True))
        assert "HANDSHAKE_FAILURE" in reason and "http://" not in reason
        nursery.cancel_scope.cancel()


# Localhost: RFC 6761, 6.3 -----------------------------------------------------------------------------------------


@pytest.fixture(params=["127.0.0.1", "::1", None])
def resolver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows one loopback address of localhost only, or none."""
    real = trio.socket.getaddrinfo

    async def find(host: Any, port: Any, *options: Any, **more: Any) -> Any:
        if "localhost" not in str(host):
            return await real(host, port, *options, **more)
        if request.param is None:
            raise stdlib_socket.gaierror(stdlib_socket.EAI_NONAME, "Name or service not known")
        return await real(request.param, port, *options, **more)

    monkeypatch.setattr(trio.socket, "getaddrinfo", find)


@pytest.mark.usefixtures("resolver")
@pytest.mark.parametrize("name", ["localhost", "LocalHost.", "app.localhost"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_localhost_is_both_loopback_addresses(name: str, address: str) -> None:
    family = stdlib_socket.AF_INET6 if ":" in address else stdlib_socket.AF_INET
    with stdlib_socket.create_server((address, 0), family=family) as listener:
        made = Service(name, listener.getsockname()[1], False)
        socket = await made.connect()
        assert socket.sock.getpeername()[0] == address
        socket.close()


@pytest.mark.usefixtures("resolver")
async def test_which_addresses_of_localhost_were_tried_is_said() -> None:
    with stdlib_socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    reason = await refused(Service("localhost", port, False))
    assert reason in (
        f"can't connect to localhost:{port}: Connection refused (tried 127.0.0.1 and ::1)",
        f"can't connect to localhost:{port}: Connection refused (tried ::1 and 127.0.0.1)",
    )


async def test_out_of_files_is_not_the_services_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(host: str, port: int) -> Socket:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(dialing, "_dial", fail)
    with pytest.raises(Failure) as caught:
        await Service("localhost", 80, False).connect()
    assert caught.value.outcome == "overloaded"
