"""Certificates from an authority: a real core and agent, a real ACME server, TLS clients that trust only it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from acmeserver import AcmeServer, Root, certificate_of, pem_of
from cryptography.hazmat.primitives.asymmetric import ec
from running import RunningAgent, RunningCore, poll
from service import Service
from watching import free_port, sample

pytestmark = pytest.mark.system

BASE = "tunnel.test"
LOOPBACK = ["127.0.0.1"]
Start = Callable[..., RunningCore]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AcmeServer]:
    made = AcmeServer(tmp_path / "authority")
    yield made
    made.close()


@pytest.fixture
def start(start_core: Start, server: AcmeServer) -> Start:
    """A core that gets its certificates from the server, which reads challenges from it."""

    def begin(*flags: str, **options: Any) -> RunningCore:
        core = start_core(
            "-public-tls", "-http-addr=127.0.0.1:0", "-acme-agree", f"-acme-directory={server.directory}",
            f"-acme-ca-cert={server.web_ca}", f"-base-domain={BASE}", *flags, **options,
        )  # fmt: skip
        if server.process.poll() is None:
            server.tell(http_port=core.http[1])
        return core

    return begin


def ask(server: AcmeServer, core: RunningCore, name: str, path: str = "/echo") -> tuple[int, str]:
    """(status, serial number) of a visitor who trusts the authority only. Raises ssl.SSLError."""
    with visitor(server, core, name) as secured:
        return status(secured, name, path), serial(secured)


def visitor(server: AcmeServer, core: RunningCore, name: str) -> ssl.SSLSocket:
    return server.visit(core.public, name)


def status(secured: ssl.SSLSocket, name: str, path: str = "/echo") -> int:
    secured.sendall(f"GET {path} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
    return int(secured.recv(65536).split()[1])


def serial(secured: ssl.SSLSocket) -> str:
    return str((secured.getpeercert() or {})["serialNumber"])


def is_trusted(server: AcmeServer, core: RunningCore, name: str) -> bool:
    try:
        ask(server, core, name)
    except ssl.SSLCertVerificationError:
        return False
    return True


def plain(core: RunningCore, path: str, host: str, method: str = "GET") -> tuple[int, str]:
    """(status, Location) of the plain side."""
    connection = http.client.HTTPConnection(*core.http, timeout=10)
    connection.request(method, path, headers={"Host": host})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.headers.get("Location", "")


def orders(core: RunningCore, result: str) -> float:
    return sample(core.metrics, "tunnel_acme_orders_total", result=result)


def test_a_certificate_at_the_first_handshake(
    server: AcmeServer,
    start: Start,
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    core = start("-acme-email=ops@example.com")
    agent = start_agent(core, start_service().url, "-subdomain=app")
    name = f"app.{BASE}"
    assert agent.tunnels == {"app": f"https://{name}:{core.public[1]}"}
    assert certificate_of(core.public, name).issuer.rfc4514_string() == "CN=tunnel core", "self-signed until then"
    poll(lambda: is_trusted(server, core, name), "a certificate", 20, 0.1)
    assert ask(server, core, name)[0] == 200
    issued = core.wait_for("certificate issued", host=name)
    assert issued["expires"] > issued["renewal"] > issued["time"][:10]
    core.wait_for("challenge answered", host=name)
    core.wait_for("acme account", terms="https://authority.test/terms")
    seen = server.seen()
    assert seen["orders"] == [name] and seen["accounts"] == [["mailto:ops@example.com"]]
    assert orders(core, "ok") == 1 and sample(core.metrics, "tunnel_acme_names_failing") == 0

    # Names that are nobody's bring about no order, however often they are asked for.
    for odd in ("nobody", "xn--nobody", "a.app", "10.0.0.1"):
        for _ in range(3):
            certificate_of(core.public, f"{odd}.{BASE}" if odd[0] != "1" else odd)
    certificate_of(core.public, "somebody.example.org")
    # The base domain and a reserved name are ours, without an agent too.
    core.command("tunnel", "reserve", "shop", "default")
    certificate_of(core.public, BASE)
    certificate_of(core.public, f"shop.{BASE}")
    poll(lambda: len(server.seen()["issued"]) == 3, "the reserved name's certificate", 20, 0.1)
    assert set(server.seen()["orders"]) == {name, BASE, f"shop.{BASE}"}

    # The plain side sends to https, and answers nothing that is not pending.
    token = seen["fetched"][0]["token"]
    where = f"https://{name}:{core.public[1]}"
    assert plain(core, f"/.well-known/acme-challenge/{token}", name) == (
        308, f"{where}/.well-known/acme-challenge/{token}",
    )  # fmt: skip
    assert plain(core, "/a?b=c", name, "POST") == (308, f"{where}/a?b=c")
    # The tunnel has that path for itself.
    assert ask(server, core, name, f"/.well-known/acme-challenge/{token}")[0] == 200

    # Everything is kept: a new start orders nothing.
    before = ask(server, core, name)[1]
    agent.close()
    core.close()
    again = core.again()
    with visitor(server, again, name) as secured:
        assert serial(secured) == before
    assert len(server.seen()["orders"]) == 3
    files = [path for path in (core.data_dir / "acme").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    again.close()


def test_it_starts_and_serves_while_the_authority_is_dead(
    server: AcmeServer,
    start: Start,
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    server.close()
    began = time.monotonic()
    core = start(f"-acme-names=www.{BASE}")
    assert time.monotonic() - began < 10
    start_agent(core, start_service().url, "-subdomain=app")
    failed = core.wait_for("certificate not issued", host=f"www.{BASE}")
    assert failed["result"] == "unreachable" and failed["level"] == "ERROR" and failed["failures"] == 1
    assert "-acme-directory" in failed["advice"] and failed["again"] > failed["time"]
    assert orders(core, "unreachable") == 1 and sample(core.metrics, "tunnel_acme_names_failing") == 1
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(core.public, 10) as raw, context.wrap_socket(raw, server_hostname="x") as secured:
        assert status(secured, f"app.{BASE}") == 200
    # The wait is kept over a start, so that a core that starts again and again does not hammer on the authority.
    server.again(http_port=core.http[1])
    core.close()
    again = core.again()
    waits = again.wait_for("certificate waits", host=f"www.{BASE}")
    assert waits["reason"] == "it failed before" and waits["again"] == failed["again"]
    assert server.seen()["orders"] == []
    again.close()


def test_renewal_drops_nobody(
    server: AcmeServer,
    start: Start,
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    server.tell(life=9)
    core = start()
    start_agent(core, start_service().url, "-subdomain=app")
    name = f"app.{BASE}"
    poll(lambda: is_trusted(server, core, name), "a certificate", 20, 0.05)
    with visitor(server, core, name) as early:
        first = serial(early)
        poll(lambda: len(server.seen()["issued"]) == 2, "a renewal", 20, 0.1)
        poll(lambda: len(core.find("certificate issued", host=name)) == 2, "it is said", 5, 0.05)
        poll(lambda: ask(server, core, name)[1] != first, "the new certificate is served", 5, 0.1)
        assert status(early, name) == 200
    assert orders(core, "ok") == 2


def test_an_upgrade_takes_the_plain_side_along(server: AcmeServer, start: Start) -> None:
    core = start(f"-acme-names=www.{BASE}")
    core.wait_for("certificate issued", timeout=20)
    core.signal(signal.SIGUSR2)
    pid = core.wait_for("upgrade: successor started", timeout=20)["pid"]
    try:
        poll(lambda: not core.is_running, "the old core has ended", 30)
        assert plain(core, "/x", f"www.{BASE}")[0] == 308
        with visitor(server, core, f"www.{BASE}"):
            assert server.seen()["orders"] == [f"www.{BASE}"]
    finally:
        os.kill(pid, signal.SIGTERM)
        poll(lambda: len(core.find("stopped")) == 2, "the successor has ended", 20)


def test_several_workers_get_one_certificate_and_all_serve_it(
    server: AcmeServer,
    start: Start,
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    core = start("-workers=3", f"-acme-names=www.{BASE}")
    start_agent(core, start_service().url, "-subdomain=app")
    name = f"app.{BASE}"
    for _ in range(20):
        certificate_of(core.public, name)
    for host in (name, f"www.{BASE}"):
        poll(lambda host=host: all(is_trusted(server, core, host) for _ in range(20)), "all of them have it", 20, 0.1)  # type: ignore[misc]
    assert {ask(server, core, name)[0] for _ in range(20)} == {200}
    seen = server.seen()
    assert sorted(seen["issued"]) == sorted(seen["orders"]) == sorted([name, f"www.{BASE}"])
    assert orders(core, "ok") == 2 and sample(core.metrics, "tunnel_acme_names_failing") == 0
    assert plain(core, "/", name)[0] == 308
    core.signal(signal.SIGTERM)
    core.wait()
    with pytest.raises(OSError):
        plain(core, "/", name)


@pytest.mark.skipif(not shutil.which("pebble"), reason="pebble is not here")
def test_with_an_authority_that_is_not_ours(tmp_path: Path, start_core: Start) -> None:
    """Pebble, which Let's Encrypt tests clients with: it refuses a fifth of all nonces, and decides when it likes."""
    Root(tmp_path, "web-ca")
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "web.key").write_bytes(pem_of(key))
    (tmp_path / "web.pem").write_text(Root(tmp_path, "web-ca").sign(key.public_key(), ["localhost"], 86400, LOOPBACK))
    port, management, names = free_port(), free_port(), free_port()
    core = start_core(
        "-public-tls", "-http-addr=127.0.0.1:0", "-acme-agree", f"-acme-directory=https://127.0.0.1:{port}/dir",
        f"-acme-ca-cert={tmp_path / 'web-ca.pem'}", f"-base-domain={BASE}", "-acme-email=ops@example.com",
    )  # fmt: skip
    settings = {
        "listenAddress": f"127.0.0.1:{port}", "managementListenAddress": f"127.0.0.1:{management}",
        "certificate": str(tmp_path / "web.pem"), "privateKey": str(tmp_path / "web.key"),
        "httpPort": core.http[1], "tlsPort": 1, "certificateValidityPeriod": 90 * 86400,
    }  # fmt: skip
    (tmp_path / "pebble.json").write_text(json.dumps({"pebble": settings}))
    none = [f"-{one}=" for one in ("http01", "https01", "tlsalpn01", "defaultIPv6")]
    none.append(f"-management=127.0.0.1:{free_port()}")
    dns = ["pebble-challtestsrv", *none, f"-dns01=127.0.0.1:{names}", "-defaultIPv4=127.0.0.1"]
    authority = ["pebble", "-config", str(tmp_path / "pebble.json"), "-strict", f"-dnsserver=127.0.0.1:{names}"]
    environment = {**os.environ, "PEBBLE_WFE_NONCEREJECT": "20", "PEBBLE_AUTHZREUSE": "0"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with ExitStack() as stack:
        for command in (dns, authority):
            process = stack.enter_context(subprocess.Popen(command, env=environment, **quiet))  # type: ignore[call-overload]
            stack.callback(process.kill)
        web = ssl.create_default_context(cafile=tmp_path / "web-ca.pem")
        root = poll(lambda: fetch(web, management, "/roots/0"), "pebble's root", 20, 0.1)
        trusting = ssl.create_default_context(cadata=root)
        certificate_of(core.public, BASE)
        issued = core.wait_for("certificate issued", host=BASE, timeout=60)
        assert not core.find("certificate not issued"), core.tail()
        connection = socket.create_connection(core.public, 10)
        with trusting.wrap_socket(connection, server_hostname=BASE) as secured:
            assert status(secured, BASE) == 404, "no tunnel there, but it is really us"
        assert issued["expires"] > issued["renewal"]


def fetch(context: ssl.SSLContext, port: int, path: str) -> str:
    """ "" while nobody is there."""
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    except OSError:
        return ""
    finally:
        connection.close()
