"""PROXY protocol with a real HAProxy in front, and with none where one is expected."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trustme
from pair import Tunnel
from running import RunningAgent, RunningCore, address, poll
from service import Service
from visiting import Broken, Connection
from watching import sample

pytestmark = pytest.mark.system

Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]

CONFIG = """
defaults
    mode tcp
    timeout connect 5s
    timeout client 10s
    timeout server 10s
listen tunnel
    bind fd@{fd}
    server core {host}:{port} {option}
"""


@contextmanager
def haproxy(directory: Path, behind: tuple[str, int], option: str) -> Iterator[tuple[str, int]]:
    """HAProxy in front of an address, on a socket that it is given; the address of that."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = directory / "haproxy.cfg"
        config.write_text(CONFIG.format(fd=listener.fileno(), host=behind[0], port=behind[1], option=option))
        program = shutil.which("haproxy") or "/usr/sbin/haproxy"
        process = subprocess.Popen([program, "-db", "-q", "-f", str(config)], pass_fds=[listener.fileno()])
        try:
            yield listener.getsockname()
        finally:
            process.terminate()
            process.wait(10)


@pytest.mark.parametrize("option", ["send-proxy", "send-proxy-v2"])
def test_behind_haproxy(
    option: str, start_core: Start, start_agent: StartAgent, start_service: StartService, tmp_path: Path
) -> None:
    core, service = start_core("-proxy-protocol=127.0.0.1", "-tcp-ports=0"), start_service()
    host, port = address(service.url)
    agent = start_agent(core, f"app={service.url},raw=tcp://{host}:{port}")
    with haproxy(tmp_path, core.public, option) as front:
        for _ in range(3):
            # the visitor has another address than the proxy, which only the header tells
            with Connection(front, "app.localhost", source="127.0.0.9") as visitor:
                for _ in range(2):
                    assert visitor.ask("GET /echo", "X-Forwarded-For: 203.0.113.1").status == 200
                    assert service.requests[-1].get("x-forwarded-for") == "127.0.0.9"
    raw = ("127.0.0.1", address(agent.tunnels["raw"])[1])
    with haproxy(tmp_path, raw, option) as front, Connection(front, "local") as visitor:
        assert visitor.ask("GET /echo").status == 200


def test_limits_of_an_address_behind_haproxy(
    start_core: Start, start_agent: StartAgent, start_service: StartService, tmp_path: Path
) -> None:
    core, service = start_core("-proxy-protocol=127.0.0.1", "-max-visitors-per-address=2"), start_service()
    start_agent(core, service.url, "-subdomain=app")
    with haproxy(tmp_path, core.public, "send-proxy-v2") as front, ExitStack() as open_now:
        for source in ("127.0.0.8", "127.0.0.9"):
            for _ in range(2):
                visitor = open_now.enter_context(Connection(front, "app.localhost", source=source))
                assert visitor.ask("GET /echo").status == 200
        with Connection(front, "app.localhost", source="127.0.0.9") as one_too_many:
            answer = one_too_many.read()
            assert (answer.status, answer.outcome) == (503, "overloaded")
        with Connection(front, "app.localhost", source="127.0.0.10") as another:
            assert another.ask("GET /echo").status == 200
    assert sample(core.metrics, "tunnel_limit_refusals_total", limit="connections_per_address") == 1


def test_limits_of_an_address_on_a_tcp_port(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core("-tcp-ports=0", "-max-visitors-per-address=2"), start_service()
    host, port = address(service.url)
    agent = start_agent(core, f"raw=tcp://{host}:{port}")
    raw = ("127.0.0.1", address(agent.tunnels["raw"])[1])
    with Connection(raw, "local", source="127.0.0.9") as one, Connection(raw, "local", source="127.0.0.9") as two:
        assert one.ask("GET /echo").status == two.ask("GET /echo").status == 200
        try:
            with Connection(raw, "local", source="127.0.0.9") as one_too_many:
                assert one_too_many.ends() == "reset"
        except ConnectionResetError:  # it came before we had it
            pass
        with Connection(raw, "local", source="127.0.0.10") as another:
            assert another.ask("GET /echo").status == 200
        with Connection(core.public, "nobody.localhost", source="127.0.0.9") as elsewhere:
            assert elsewhere.read().status == 503
    assert sample(core.metrics, "tunnel_limit_refusals_total", limit="connections_per_address") == 2

    def served() -> bool:
        try:
            with Connection(raw, "local", source="127.0.0.9") as again:
                return again.ask("GET /echo").status == 200
        except (OSError, Broken):
            return False

    poll(served, "there is room again", 5)


def test_over_tls(start_core: Start, tmp_path: Path) -> None:
    """The header comes before TLS, and not a byte of the handshake is lost."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    authority = trustme.CA()
    issued = authority.issue_cert("app.localhost")
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    core = start_core("-proxy-protocol=127.0.0.1", "-public-tls", f"-public-cert={certificate}", f"-public-key={key}")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with (
        haproxy(tmp_path, core.public, "send-proxy-v2") as front,
        socket.create_connection(front, 10) as plain,
        trusting.wrap_socket(plain, server_hostname="app.localhost") as visitor,
    ):
        visitor.sendall(b"GET / HTTP/1.1\r\nHost: app.localhost\r\nConnection: close\r\n\r\n")
        assert visitor.recv(65536).startswith(b"HTTP/1.1 404 ")


def test_without_a_header_where_one_is_due(start_core: Start) -> None:
    core = start_core("-proxy-protocol=127.0.0.1", "-head-timeout=1s")
    with Connection(core.public, "app.localhost") as visitor:
        visitor.send(visitor.request("GET /echo"))
        assert visitor.ends() == "reset"  # what came is not read to its end
    refused = core.wait_for("connection from a proxy refused")
    assert "does not begin with a PROXY protocol header" in refused["reason"]
    with Connection(core.public, "app.localhost") as visitor:  # and one that says nothing
        assert visitor.ends() == "closed"


def test_a_header_from_anybody_else_is_a_bad_request(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        visitor.send(b"PROXY TCP4 192.0.2.1 198.51.100.1 1 2\r\n" + visitor.request("GET /echo"))
        assert visitor.read_head().status == 400
