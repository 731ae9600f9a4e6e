"""Files that the real certbot keeps do for the core, and are read again after it has renewed them."""

from __future__ import annotations

import shlex
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from acmeserver import AcmeServer
from running import RunningAgent, RunningCore, clean_environment, poll
from service import Service
from watching import free_port

pytestmark = pytest.mark.system

NAME = "app.tunnel.test"
CERTBOT = Path(sys.executable).with_name("certbot")


def certbot(directory: Path, server: AcmeServer, *words: str) -> None:
    places = [f"--{what}-dir={directory / what}" for what in ("config", "work", "logs")]
    done = subprocess.run(
        [CERTBOT, *words, *places, "--non-interactive", f"--server={server.directory}"],
        env=clean_environment(REQUESTS_CA_BUNDLE=str(server.web_ca)), capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def serial(server: AcmeServer, core: RunningCore) -> str:
    with server.visit(core.public, NAME) as secured:
        assert is_served(secured)
        return str((secured.getpeercert() or {})["serialNumber"])


def is_served(secured: ssl.SSLSocket) -> bool:
    secured.sendall(f"GET /echo HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode())
    return secured.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.skipif(not CERTBOT.exists(), reason="certbot is not installed beside this Python")
@pytest.mark.parametrize("by", ["directory", "file"])
def test_its_files_are_served_and_read_again_when_renewed(
    tmp_path: Path,
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
    by: str,
) -> None:
    server = AcmeServer(tmp_path / "authority")
    try:
        port = free_port()
        server.tell(http_port=port)
        alone = ("--standalone", "--http-01-address=127.0.0.1", f"--http-01-port={port}")
        agree = ("--agree-tos", "--register-unsafely-without-email")
        certbot(tmp_path, server, "certonly", "-d", NAME, *alone, *agree)
        live = tmp_path / "config" / "live"
        assert (live / NAME / "fullchain.pem").is_symlink()
        pair = (f"-public-cert={live / NAME / 'fullchain.pem'}", f"-public-key={live / NAME / 'privkey.pem'}")
        where = pair if by == "file" else (f"-public-cert-dir={live}",)
        core = start_core("-public-tls", "-base-domain=tunnel.test", *where)
        start_agent(core, start_service().url, "-subdomain=app")
        first = serial(server, core)
        with server.visit(core.public, NAME) as early:
            hook = f"--deploy-hook={shlex.join(['kill', '-HUP', str(core.pid)])}"
            certbot(tmp_path, server, "renew", "--force-renewal", "--no-random-sleep-on-renew", hook, *alone)
            assert core.wait_for("certificates read again", listener="public")["kept"] == 0
            poll(lambda: serial(server, core) != first, "the renewed certificate", 5, 0.05)
            assert is_served(early)
        assert server.seen()["issued"] == [NAME, NAME]
    finally:
        server.close()
