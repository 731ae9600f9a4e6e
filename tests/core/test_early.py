"""What the log says of a connection to the agents' port that never became a link: our words, not OpenSSL's source."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio

from tunnel.core.certificate import ensure_certificate
from tunnel.core.early import why_early
from tunnel.errors import TunnelError

HELLO = bytes.fromhex("16030100050100010000")  # a ClientHello that goes on


class Server:
    """The core's end of a TLS connection in memory."""

    def __init__(self, directory: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*ensure_certificate(directory))
        self.inbox, self.outbox = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.inbox, self.outbox, server_side=True)

    def failure(self, *parts: bytes, ends: bool = False) -> ssl.SSLError:
        """What the handshake raises when this comes."""
        for part in parts:
            self.inbox.write(part)
        if ends:
            self.inbox.write_eof()
        with pytest.raises(ssl.SSLError) as caught:
            self.tls.do_handshake()
        return caught.value


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00" * 64, b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_what_is_no_tls(server: Server, said: bytes) -> None:
    assert why_early(server.failure(said)) == "it does not speak TLS, which this port wants of agents (-tls)"


@pytest.mark.parametrize("said", [b"", HELLO])
def test_who_goes_away(server: Server, said: bytes) -> None:
    assert why_early(server.failure(said, ends=True)) == "it was closed within the TLS handshake"


def test_who_does_not_trust_our_certificate(server: Server) -> None:
    context = ssl.create_default_context()
    inbox, outbox = ssl.MemoryBIO(), ssl.MemoryBIO()
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # where the alert comes within the server's handshake
    client = context.wrap_bio(inbox, outbox, server_hostname="core.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    server.failure(outbox.read())  # wants more
    inbox.write(server.outbox.read())
    with pytest.raises(ssl.SSLCertVerificationError):
        client.do_handshake()
    assert why_early(server.failure(outbox.read())) == (
        "the other end broke TLS off (unknown ca); does it trust this core's certificate (-server-fingerprint)?"
    )


def test_what_has_words_keeps_them() -> None:
    assert why_early(trio.BrokenResourceError("the connection was lost")) == "the connection was lost"
    assert why_early(TunnelError("the link ended before the hello")) == "the link ended before the hello"


def test_anything_else_of_tls_has_its_name(server: Server) -> None:
    too_old = ssl.SSLError(1, "[SSL: UNSUPPORTED_PROTOCOL] unsupported protocol (_ssl.c:1006)")
    too_old.reason = "UNSUPPORTED_PROTOCOL"
    assert why_early(too_old) == "the TLS handshake failed (UNSUPPORTED_PROTOCOL)"
