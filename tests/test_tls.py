"""TLS in bounded bites: what a peer may send without data, and sending where the kernel takes little."""

import random
import select
import socket
import ssl
from collections.abc import Iterator

import pytest
import trustme

from tunnel.tls import BITE, MOST_HANDSHAKE, MOST_SILENT, TlsSocket

WAITS = (ssl.SSLWantReadError, ssl.SSLWantWriteError)


def connected(buffers: int = 0) -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for one in (near, far):
        one.setblocking(False)
        if buffers:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
    return near, far


def secured(buffers: int = 0) -> tuple[TlsSocket, TlsSocket]:
    """Server and client, before the handshake."""
    authority = trustme.CA()
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("core.test").configure_cert(ours)
    authority.configure_trust(theirs)
    near, far = connected(buffers)
    return (
        TlsSocket(near, ours, server_side=True, server_name=""),
        TlsSocket(far, theirs, server_side=False, server_name="core.test"),
    )


def read(one: TlsSocket, size: int = 65_536) -> bytes:
    """Wait for what comes next."""
    for _ in range(1000):
        try:
            return one.recv(size)
        except ssl.SSLWantReadError:
            assert select.select([one], [], [], 10)[0], "nothing comes"
    raise AssertionError("no end of records without data")


def shake(*pair: TlsSocket) -> None:
    left = set(pair)
    for _ in range(10_000):
        for one in list(left):
            try:
                one.do_handshake()
                left.discard(one)
            except WAITS:
                pass
        if not left:
            return
    raise AssertionError("no end of the handshake")


@pytest.fixture(params=[0, 4096], ids=["usual buffers", "small buffers"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[TlsSocket, TlsSocket]]:
    made = secured(request.param)
    shake(*made)
    yield made
    for one in made:
        one.close()


class Silent:
    """An OpenSSL that finds records without data in whatever it is given. bites: how much that was each time."""

    def __init__(self, incoming: ssl.MemoryBIO) -> None:
        self.bites: list[int] = []
        self._incoming = incoming

    def read(self, size: int) -> bytes:
        if taken := len(self._incoming.read()):
            self.bites.append(taken)
        raise ssl.SSLWantReadError

    def do_handshake(self) -> None:
        self.read(1)

    def pending(self) -> int:
        return 0


@pytest.mark.parametrize(("what", "most"), [("recv", MOST_SILENT), ("do_handshake", MOST_HANDSHAKE)])
def test_a_peer_that_never_sends_data_is_cut_off(what: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS 1.3 has records (KeyUpdate) of which any number may come; OpenSSL would go on as long as they do."""
    server, client = secured()
    silent = Silent(server._incoming)
    monkeypatch.setattr(server, "_tls", silent)
    call = (lambda: server.recv(1)) if what == "recv" else server.do_handshake
    sent = 0
    with pytest.raises(ConnectionAbortedError, match="without data"):
        while sent < 4 * most:
            try:
                sent += socket.socket.send(client, bytes(65536))
            except BlockingIOError:
                pass
            with pytest.raises(ssl.SSLWantReadError):
                call()
    assert max(silent.bites) <= BITE
    assert sum(silent.bites) <= most + BITE
    server.close()
    client.close()


def test_data_in_between_is_no_silence(pair: tuple[TlsSocket, TlsSocket]) -> None:
    server, client = pair
    got, part = 0, bytes(1000)
    while got < 2 * MOST_SILENT:
        try:
            client.send(part)
        except WAITS:
            pass
        try:
            got += len(server.recv(65536))
        except WAITS:
            pass


def test_whatever_the_kernel_takes_all_arrives_once_and_in_order(pair: tuple[TlsSocket, TlsSocket]) -> None:
    server, client = pair
    chance = random.Random(1)
    data = chance.randbytes(60_000)
    sent, refused, received = 0, 0, b""
    while len(received) < len(data):
        if sent < len(data):
            try:
                sent += server.send(data[sent : sent + chance.choice((1, 2, 100, 16_384, 50_000))])
            except ssl.SSLWantWriteError:
                refused += 1
        if refused % 3 == 0 or chance.random() < 0.2 or sent == len(data):
            try:
                received += client.recv(chance.choice((1, 1000, 65_536)))
            except ssl.SSLWantReadError:
                if sent == len(data):
                    received += read(client)
    assert received == data


def test_the_last_byte_counts_once_all_has_left() -> None:
    server, client = secured(4096)
    shake(server, client)
    data, sent = bytes(range(256)) * 512, 0
    with pytest.raises(ssl.SSLWantWriteError):
        while sent < len(data):
            sent += server.send(data[sent:])
    assert server._unsent  # the kernel is full, a record has not left: its last byte is to be offered again
    received = b""
    while len(received) < len(data):
        try:
            sent += server.send(data[sent:]) if sent < len(data) else 0
        except ssl.SSLWantWriteError:
            pass
        try:
            received += client.recv(65_536)
        except ssl.SSLWantReadError:
            assert any(select.select([client], [server] if sent < len(data) else [], [], 10)), "nothing moves"
    assert received == data
    server.close()
    client.close()


def test_what_comes_after_our_end_is_read(pair: tuple[TlsSocket, TlsSocket]) -> None:
    """OpenSSL looks for the other end's close_notify when ours is sent, and finds data there."""
    server, client = pair
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for part in (b"one", b"two"):
        client.send(part)
    assert read(server, 1) == b"o"  # so the rest is here, and perhaps half a record
    client.send(b"before")
    assert select.select([server], [], [], 10)[0]
    with pytest.raises(ssl.SSLWantReadError):
        server.unwrap()
    client.send(b"after")
    with pytest.raises(ssl.SSLWantReadError):
        client.unwrap()
    received = b""
    while part := read(server, 2):
        received += part
    assert received == b"netwobeforeafter"
    assert read(client) == b""


def test_an_end_with_and_without_a_word(pair: tuple[TlsSocket, TlsSocket]) -> None:
    server, client = pair
    client.send(b"last")
    with pytest.raises(ssl.SSLWantReadError):
        client.unwrap()
    assert read(server) == b"last"
    assert read(server) == b""
    server.close()
    assert read(client) == b""  # no close_notify came
