"""Many at once that do nothing: agents (all in one process) and visitors."""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from benchmarks.processes import Failed, Process, poll
from benchmarks.servers import Servers
from benchmarks.tunnels import Ours

IDLE_AGENTS = Path(__file__).with_name("idleagents.py")
MANY_AGENTS = Path(__file__).parents[1] / "system" / "manyagents.py"


def sample(metrics_url: str, name: str) -> float:
    """One sample without labels, from a page of metrics."""
    with urllib.request.urlopen(metrics_url, timeout=30) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
    raise Failed(f"{metrics_url} has no {name}")


def idle_agents(servers: Servers, tunnel: Ours, count: int, tunnels: int = 1) -> AbstractContextManager[None]:
    """`count` agents with so many tunnels each (many0, many1, …; many0x0, many0x1, …), which only keep their links."""
    return _attached(servers, tunnel, count, str(IDLE_AGENTS), str(tunnel.link_port), str(count), str(tunnels))


def serving_agents(servers: Servers, tunnel: Ours, count: int) -> AbstractContextManager[None]:
    """`count` whole agents in one process, that serve many0, many1, … from nginx."""
    local = f"http://127.0.0.1:{servers.nginx_port}"
    return _attached(servers, tunnel, count, str(MANY_AGENTS), str(tunnel.link_port), "-", local, str(count))


@contextmanager
def _attached(servers: Servers, tunnel: Ours, count: int, *command: str) -> Iterator[None]:
    """Until so many more links are there, and until the block ends."""
    before = sample(tunnel.metrics_url, "tunnel_connections_active")
    token = tunnel.token_file.read_text().strip()
    process = Process(sys.executable, *command, directory=servers.directory, env={"AGENT_TOKEN": token})
    try:

        def attached() -> bool:
            if not process.is_running:
                raise Failed(f"agents ended: {process.output()[-2000:]}")
            return sample(tunnel.metrics_url, "tunnel_connections_active") >= before + count

        # Rarely: the page that is asked lists every link.
        poll(attached, f"{count} agents are attached", 120, count / 2000)
        yield
    finally:
        process.stop(30)


@contextmanager
def idle_visitors(tunnel: Ours, count: int) -> Iterator[None]:
    """Each has had one answer and keeps its connection."""
    request = f"GET /k1 HTTP/1.1\r\nHost: {tunnel.host}\r\n\r\n".encode()
    with ExitStack() as stack:
        for _ in range(count):
            visitor = stack.enter_context(socket.create_connection(("127.0.0.1", tunnel.port)))
            visitor.sendall(request)
            seen = b""
            while b"\r\n\r\n" not in seen or len(seen.partition(b"\r\n\r\n")[2]) < 1024:
                if not (data := visitor.recv(65536)):
                    raise Failed(f"a visitor was turned away: {seen[:300]!r}")
                seen += data
        yield
