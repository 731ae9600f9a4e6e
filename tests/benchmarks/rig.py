"""What the benchmarks run on: nginx with a 1 KiB and a 100 MiB answer, a bare trio + h11 server as the floor, a core
and an agent as processes, wrk as the load. CPU time comes from the kernel; figures are only compared with the floor of
the same run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
BIG = 100 * 1024 * 1024

FLOOR = """
import h11, trio
BODY = b"x" * 1024
HEADERS = [("Content-Length", "1024"), ("Content-Type", "text/plain")]
async def serve(stream):
    conn = h11.Connection(h11.SERVER)
    while True:
        event = conn.next_event()
        if event is h11.NEED_DATA:
            try:
                data = await stream.receive_some(65536)
            except trio.BrokenResourceError:
                return
            conn.receive_data(data)
            if not data:
                return
        elif isinstance(event, h11.EndOfMessage):
            answer = conn.send(h11.Response(status_code=200, headers=HEADERS))
            await stream.send_all(answer + conn.send(h11.Data(data=BODY)) + conn.send(h11.EndOfMessage()))
            conn.start_next_cycle()
async def main():
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        print(listeners[0].socket.getsockname()[1], flush=True)
trio.run(main)
"""

SINK = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""

NGINX = """
worker_processes 1; daemon off; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 100000000;
  client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3; uwsgi_temp_path {dir}/t4;
  scgi_temp_path {dir}/t5;
  server {{ listen 127.0.0.1:{port}; root {dir}/www; client_max_body_size 0; location /put {{ dav_methods PUT; }} }}
}}
"""


@dataclass
class Load:
    """One run of wrk: answers a second, latency percentiles in ms, how many answers, how many that were not 2xx."""

    rps: float
    p50: float
    p99: float
    requests: int
    bad: int


class Process:
    """A process whose CPU time is measured. Its standard output goes to a file, whose reader costs nothing."""

    def __init__(self, *command: str, env: dict[str, str] | None = None) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self._popen = subprocess.Popen(
            command, stdout=self._output, env={**os.environ, **(env or {})}, start_new_session=True
        )

    def wait_line(self, pattern: str, seconds: float = 15) -> re.Match[str]:
        end = time.monotonic() + seconds
        while True:
            text = os.pread(self._output.fileno(), 65536, 0).decode()
            for line in text.splitlines():
                if match := re.search(pattern, line):
                    return match
            assert time.monotonic() < end and self._popen.poll() is None, f"no {pattern!r} in {text}"
            time.sleep(0.02)

    def last_failure(self) -> str:
        """The last ERROR record of what it has logged."""
        size = os.fstat(self._output.fileno()).st_size
        text = os.pread(self._output.fileno(), 1_000_000, max(0, size - 1_000_000)).decode("utf-8", "replace")
        return next((line for line in reversed(text.splitlines()) if '"ERROR"' in line), "")

    def cpu(self) -> float:
        """Seconds of CPU used so far, all threads."""
        fields = Path(f"/proc/{self._popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def rss(self) -> int:
        """Resident bytes."""
        text = Path(f"/proc/{self._popen.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]

    def stop(self) -> None:
        self._popen.send_signal(signal.SIGTERM)
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._output.close()


@dataclass
class Tunnel:
    core: Process
    agent: Process
    port: int

    def stop(self) -> None:
        self.agent.stop()
        self.core.stop()


class Rig:
    """The servers of one benchmark run, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.chmod(0o755)
        www = directory / "www"
        www.mkdir()
        www.chmod(0o777)
        (www / "k1").write_bytes(b"x" * 1024)
        (www / "big").write_bytes(os.urandom(1024 * 1024) * (BIG // (1024 * 1024)))
        self.nginx_port = free_port()
        conf = directory / "nginx.conf"
        conf.write_text(NGINX.format(dir=directory, port=self.nginx_port))
        self.nginx = Process(which("nginx"), "-c", str(conf))
        self.floor = Process(sys.executable, "-c", FLOOR)
        self.sink = Process(sys.executable, "-c", SINK)
        self.sink_url = "http://127.0.0.1:" + self.sink.wait_line(r"^(\d+)$")[1]
        self.floor_port = int(self.floor.wait_line(r"^(\d+)$")[1])

    def stop(self) -> None:
        self.nginx.stop()
        self.floor.stop()
        self.sink.stop()

    @contextmanager
    def tunnel(self, *flags: str, env: dict[str, str] | None = None, tls: bool = False) -> Iterator[Tunnel]:
        """A core and an agent, JSON logs on, with these flags for both."""
        data = self.directory / f"data-{time.monotonic_ns()}"
        common = ["-log-json", "-metrics-addr", "127.0.0.1:0", *flags]
        core = Process(
            sys.executable, "-m", "tunnel.core", "-public-addr", "127.0.0.1:0", "-agent-addr", "127.0.0.1:0",
            "-dashboard-addr", "", "-data-dir", str(data), f"-agent-tls={str(tls).lower()}", *common, env=env,
        )  # fmt: skip
        ready: dict[str, Any] = json.loads(core.wait_line("core ready").string)
        trust = ["-server-fingerprint", ready["fingerprint"]] if tls else ["-tls=false"]
        agent = Process(
            sys.executable, "-m", "tunnel.agent", "-server", ready["agents"], "-token-file",
            str(data / "default.token"), "-subdomain", "app", "-local", f"http://127.0.0.1:{self.nginx_port}",
            *trust, *common, env=env,
        )  # fmt: skip
        agent.wait_line("tunnel ready")
        tunnel = Tunnel(core, agent, int(ready["public"].rpartition(":")[2]))
        try:
            yield tunnel
        finally:
            tunnel.stop()

    def load(self, port: int, connections: int, seconds: int, path: str = "/k1") -> Load:
        """wrk for so long, all connections kept alive."""
        done = subprocess.run(
            [which("wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-H", "Host: app.localhost",
             f"http://127.0.0.1:{port}{path}"],
            capture_output=True, text=True, check=True, timeout=seconds + 30,
        )  # fmt: skip
        text = done.stdout
        bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
        return Load(
            float(_found(r"Requests/sec:\s+([\d.]+)", text)),
            _ms(_found(r"\s50%\s+([\d.]+\w+)", text)),
            _ms(_found(r"\s99%\s+([\d.]+\w+)", text)),
            int(_found(r"(\d+) requests in", text)),
            int(bad[1]) if bad else 0,
        )

    def cost(self, port: int, processes: list[Process], connections: int, seconds: int) -> tuple[Load, list[float]]:
        """A load, and what each process paid for it: CPU µs a request."""
        before = [one.cpu() for one in processes]
        load = self.load(port, connections, seconds)
        assert load.bad == 0, f"{load.bad} bad answers: {[one.last_failure() for one in processes]}"
        return load, [(one.cpu() - start) / load.requests * 1e6 for one, start in zip(processes, before, strict=True)]


def which(name: str) -> str:
    found = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    assert found, f"{name} is missing; scripts/packages installs it"
    return found


def free_port() -> int:
    """nginx can't be asked which port the kernel gave it."""
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match[1]


def _ms(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]
