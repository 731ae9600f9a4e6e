"""TLS of running programs: certificates read again on SIGHUP while a link and a visitor stay; nothing below TLS 1.2."""

from __future__ import annotations

import signal
import socket
import ssl
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from running import Address, RunningAgent, RunningCore, poll
from service import Service
from watching import sample

pytestmark = pytest.mark.system


def write(authority: trustme.CA, cert: Path, key: Path, *names: str) -> None:
    issued = authority.issue_cert(*names)
    cert.write_bytes(issued.cert_chain_pems[0].bytes())
    key.write_bytes(issued.private_key_pem.bytes())


def visitor(authority: trustme.CA, where: Address, name: str) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context.wrap_socket(socket.create_connection(where, 10), server_hostname=name)


def served(connection: ssl.SSLSocket) -> bool:
    connection.sendall(b"GET /echo HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
    return connection.recv(65536).startswith(b"HTTP/1.1 200")


def serial(connection: ssl.SSLSocket) -> object:
    return (connection.getpeercert() or {})["serialNumber"]


@pytest.mark.parametrize("said", [b"", b"x", b"\x16\x03\x01"], ids=["nothing", "a byte", "the beginning of TLS"])
def test_who_resets_at_once_breaks_nothing(tmp_path: Path, start_core: Callable[..., RunningCore], said: bytes) -> None:
    """Connections that are gone before the core looks at them, on each of its TLS ports."""
    authority = trustme.CA()
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    write(authority, cert, key, "app.localhost")
    core = start_core(f"-public-cert={cert}", f"-public-key={key}")
    for where in (core.public, core.agents, core.metrics):
        core.stop()  # so that it sees them only when they are gone
        for _ in range(5):
            with socket.create_connection(where, 10) as hasty:
                hasty.sendall(said)
                hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        core.cont()
    with visitor(authority, core.public, "app.localhost") as late:
        late.sendall(b"GET / HTTP/1.1\r\nHost: app.localhost\r\nConnection: close\r\n\r\n")
        assert late.recv(65536).startswith(b"HTTP/1.1 404 ")
    assert sample(core.metrics, "tunnel_connections_active") == 0
    assert not [one for one in core.records if one["level"] == "ERROR"]


def test_slow_readers_get_all_of_it(
    tmp_path: Path,
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    """Who takes little at a time is written to again and again in the middle of what was to leave at once."""
    authority = trustme.CA()
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    write(authority, cert, key, "app.localhost")
    core = start_core("-public-tls", f"-public-cert={cert}", f"-public-key={key}")
    start_agent(core, start_service().url, "-subdomain=app")
    size = 20_000_000
    for path in (f"/download?size={size}", f"/chunked?size={size // 400}&parts=400"):
        with visitor(authority, core.public, "app.localhost") as slow:
            slow.sendall(b"GET %b HTTP/1.1\r\nHost: app.localhost\r\nConnection: close\r\n\r\n" % path.encode())
            got = 0
            while data := slow.recv(16384):
                got += len(data)
                time.sleep(0.001)
            assert got > size, path
    said = ["ok", "ok"]
    poll(lambda: [one["outcome"] for one in core.records if one["msg"] == "request"] == said, "both in the log")


def test_certificates_are_read_again(
    tmp_path: Path,
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    write(authority, cert, key, "localhost", "127.0.0.1", "app.localhost")
    pair = [f"-{side}-{what}={path}" for side in ("agent", "public") for what, path in (("cert", cert), ("key", key))]
    core = start_core("-public-tls", *pair, "-base-domain=localhost")
    core.fingerprint = ""  # the agent is to check it by the authority
    flags = ("-subdomain=app", "-tls=true", f"-ca-cert={tmp_path / 'ca.pem'}")
    agent = start_agent(core, start_service().url, *flags)
    early = visitor(authority, core.public, "app.localhost")
    old = serial(early)
    assert served(early)

    write(authority, cert, key, "localhost", "127.0.0.1", "app.localhost")
    core.signal(signal.SIGHUP)
    for listener in ("agent", "public"):
        assert core.wait_for("certificates read again", listener=listener)["kept"] == 0
    late = visitor(authority, core.public, "app.localhost")
    new = serial(late)
    assert new != old and served(late) and served(early)

    key.write_text("no key\n")
    core.signal(signal.SIGHUP)
    for listener in ("agent", "public"):
        core.wait_for("can't use a certificate; the old one stays", listener=listener)
    with visitor(authority, core.public, "app.localhost") as again:
        assert serial(again) == new and served(again)
    assert served(early)
    early.close()
    late.close()
    assert len(agent.find("tunnel ready")) == 1 and not core.find("agent disconnected")
    for listener in ("agent", "public"):
        assert sample(core.metrics, "tunnel_certificate_expiry_timestamp_seconds", listener=listener) > 1.7e9
    refuses_tls_1_1(core.public)
    refuses_tls_1_1(core.agents)


def refuses_tls_1_1(where: Address) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with socket.create_connection(where, 10) as plain, pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        context.wrap_socket(plain)
