"""What stands around the tunnels: nginx as the local service, the floor, and a sink for spans."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
from benchmarks.processes import Process, poll, which

SMALL = 1024  #: bytes of the small answer
BIG = 100 * 1024 * 1024  #: bytes of the big one

#: A bare trio + h11 server that answers 1 KiB: what Python can do without a tunnel.
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
            if conn.our_state is h11.MUST_CLOSE:
                return
            conn.start_next_cycle()
async def main():
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        print(listeners[0].socket.getsockname()[1], flush=True)
trio.run(main)
"""

#: Takes spans over OTLP/HTTP and forgets them.
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

#: One process: a worker would outlive a master that is killed.
NGINX = """
master_process off; daemon off; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 100000000; keepalive_timeout 3600s;
  client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3; uwsgi_temp_path {dir}/t4;
  scgi_temp_path {dir}/t5;
  server {{
    listen 127.0.0.1:{port} backlog=4096; listen 127.0.0.1:{tls_port} ssl backlog=4096;
    ssl_certificate {dir}/cert.pem; ssl_certificate_key {dir}/key.pem; root {dir}/www; client_max_body_size 0;
    location /put {{ dav_methods PUT; }}
  }}
}}
"""


@dataclass
class Servers:
    """directory: for whatever a run needs, cert.pem and key.pem in it; big: a file of BIG bytes to send up."""

    directory: Path
    nginx: Process
    nginx_port: int
    nginx_tls_port: int
    floor: Process
    floor_port: int
    sink_url: str
    big: Path


@contextmanager
def start_servers(directory: Path) -> Iterator[Servers]:
    www = directory / "www"
    www.mkdir()
    (www / "k1").write_bytes(b"x" * SMALL)
    big = www / "big"
    big.write_bytes(os.urandom(1024 * 1024) * (BIG // (1024 * 1024)))
    issued = trustme.CA().issue_cert("app.localhost")
    issued.private_key_pem.write_to_path(str(directory / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
    port, tls_port = free_port(), free_port()
    conf = directory / "nginx.conf"
    conf.write_text(NGINX.format(dir=directory, port=port, tls_port=tls_port))
    started: list[Process] = []

    def start(*command: str) -> Process:
        started.append(Process(*command, directory=directory))
        return started[-1]

    try:
        nginx = start(which("nginx"), "-c", str(conf), "-e", str(directory / "error.log"))
        floor, sink = start(sys.executable, "-c", FLOOR), start(sys.executable, "-c", SINK)
        floor_port, sink_port = (int(one.wait_line(r"^(\d+)$")[1]) for one in (floor, sink))
        poll(lambda: is_listening(port), "nginx listens")
        yield Servers(directory, nginx, port, tls_port, floor, floor_port, f"http://127.0.0.1:{sink_port}", big)
    finally:
        for process in reversed(started):
            process.stop()


def free_port() -> int:
    """For programs that can't be asked which port the kernel gave them."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
