"""`python -m tunnel up` as a newcomer starts it: a real process, real requests, signals."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from running import poll
from service import Service

pytestmark = pytest.mark.system

BOUND = 20.0  # seconds for what takes one
COMMAND = [sys.executable, "-P", "-m", "tunnel", "up", "-public-addr=localhost:0"]


class Up:
    """A running `tunnel up` with its output in files."""

    def __init__(self, directory: Path, *words: str) -> None:
        directory.mkdir(exist_ok=True)
        self.out, self.err = directory / "out", directory / "err"
        with self.out.open("w") as out, self.err.open("w") as err:
            command = [*COMMAND, f"-data-dir={directory / 'data'}", *words]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        self.wait_for("status ")
        self.url = self.lines()[0]

    def lines(self) -> list[str]:
        return self.out.read_text().splitlines()

    def wait_for(self, text: str, where: Path | None = None) -> None:
        """Until this is in the output, or in that of errors."""
        deadline = time.monotonic() + BOUND
        where = where or self.out
        while text not in where.read_text():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, f"no {text!r} in {where.read_text()}"
            time.sleep(0.02)

    def connect(self) -> http.client.HTTPConnection:
        """To the public side, by address: not every resolver knows *.localhost."""
        return http.client.HTTPConnection("localhost", urlsplit(self.url).port, timeout=BOUND)

    def get(self, path: str, **fields: str) -> tuple[int, bytes, http.client.HTTPMessage]:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", path, headers={"Host": urlsplit(self.url).netloc, **fields})
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers

    def page(self, name: str) -> str:
        """What a page in the announcement says: the first line of that name."""
        url = next(line.split()[1] for line in self.lines() if line.startswith(name))
        with urllib.request.urlopen(url, timeout=BOUND) as answer:
            return str(answer.read().decode())

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(BOUND)


@contextlib.contextmanager
def running(directory: Path, *words: str) -> Iterator[Up]:
    up = Up(directory, *words)
    try:
        yield up
    finally:
        up.process.kill()
        up.process.wait()


def test_the_sample_service(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        assert re.fullmatch(r"http://hello\.localhost:\d+", up.url)
        assert [line.split()[0] for line in up.lines()[1:]] == ["local", "metrics", "metrics", "health", "status"]
        status, body, _ = up.get("/hello?a=1")
        assert status == 200
        assert body.startswith(b"GET /hello?a=1 HTTP/1.1\n")
        status, body, _ = up.get("/", Accept="text/html")
        assert (status, b"The tunnel works" in body) == (200, True)
        assert 'tunnel_requests_total{code="200"} 2.0' in up.page("metrics")
        assert '"' in up.page("health")
        assert json.loads(up.page("status"))["tunnels"][0]["name"] == "hello"
        up.wait_for("GET /hello 200 ok")
        assert up.end() == 0
        assert up.err.read_text() == ""


def test_an_open_event_stream_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with running(tmp_path) as up, contextlib.closing(up.connect()) as connection:
        connection.request("GET", "/events", headers={"Host": urlsplit(up.url).netloc})
        answer = connection.getresponse()
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.readline() == b"id: 1\n"
        began = time.monotonic()
        assert up.end(signal.SIGTERM) == 0
        assert time.monotonic() - began < 6


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with running(tmp_path) as up, contextlib.closing(up.connect()) as connection:
        connection.request("GET", "/events", headers={"Host": urlsplit(up.url).netloc})
        connection.getresponse().readline()
        up.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + BOUND
        while up.process.poll() is None and time.monotonic() < deadline:  # the first may not have been taken yet
            up.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        assert up.process.returncode == 0


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGHUP, signal.SIGHUP]])
def test_open_requests_are_finished(signals: list[int], tmp_path: Path) -> None:
    """A terminal that is closed may say so twice, by its shell and by the kernel."""
    service = Service()
    try:
        with running(tmp_path, str(service.port)) as up, contextlib.closing(up.connect()) as connection:
            connection.request("GET", "/hold", headers={"Host": urlsplit(up.url).netloc})
            service.wait_request("/hold")
            for number in signals:
                up.process.send_signal(number)
                poll(lambda: is_refusing(up), "no new connections")
            service.release.set()
            assert connection.getresponse().read() == b"held"
            assert up.process.wait(BOUND) == 0
            assert up.err.read_text() == ""
    finally:
        service.close()


def is_refusing(up: Up) -> bool:
    try:
        socket.create_connection(("localhost", urlsplit(up.url).port), timeout=1).close()
    except OSError:
        return True
    return False


def test_it_outlives_its_terminal_where_that_was_asked_for(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does for its child
    try:
        with running(tmp_path) as up:
            up.process.send_signal(signal.SIGHUP)
            assert up.get("/")[0] == 200
            assert up.end() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_its_terminal_is_closed(kind: str, tmp_path: Path) -> None:
    """It has nowhere to write any more, with a live status or without, and drains all the same."""
    service = Service()
    screen, terminal = pty.openpty()
    command = ["setsid", "--ctty", *COMMAND, f"-data-dir={tmp_path}", str(service.port)]
    environment = {**os.environ, "TERM": kind}
    up = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    try:
        seen = read_terminal(screen, b"status ")
        url = urlsplit(seen.split()[0].decode())
        with contextlib.closing(http.client.HTTPConnection("localhost", url.port, timeout=BOUND)) as connection:
            connection.request("GET", "/hold", headers={"Host": url.netloc})
            service.wait_request("/hold")
            os.close(screen)
            time.sleep(0.3)  # what it writes meanwhile goes nowhere
            service.release.set()
            assert connection.getresponse().read() == b"held"
        assert up.wait(BOUND) == 0
    finally:
        up.kill()
        up.wait()
        service.close()


def test_a_service_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")

    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with running(tmp_path / "up", str(server.server_port), "-subdomain=mine") as up:
            assert up.url.startswith("http://mine.localhost:")
            assert up.get("/")[:2] == (200, b"mine")
            assert f"local    http://localhost:{server.server_port}" in up.lines()
            assert up.end() == 0
        server.shutdown()


def test_a_service_that_is_not_there(tmp_path: Path) -> None:
    with running(tmp_path, "1") as up:  # tcpmux: nobody listens there
        up.wait_for("local service is down local=localhost:1 ", up.err)
        status, body, fields = up.get("/")
        assert (status, fields["x-tunnel-outcome"]) == (502, "local_refused")
        assert b"Side: local service" in body
        up.wait_for("GET / 502 local_refused")
        assert up.end() == 0


def test_the_name_stays_over_restarts(tmp_path: Path) -> None:
    names = []
    for _ in range(2):
        with running(tmp_path, "1") as up:
            assert re.fullmatch(r"http://[a-z]+-[a-z]+-[a-z0-9]+\.localhost:\d+", up.url)
            names.append(urlsplit(up.url).hostname)
            assert up.end() == 0
    assert names[0] == names[1]


def test_only_the_url_is_wanted(tmp_path: Path) -> None:
    """`tunnel up | head -1`: it goes on when nobody reads, and ends without complaint."""
    command = [*COMMAND, f"-data-dir={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        process.stdout.close()
        for _ in range(3):
            with contextlib.closing(http.client.HTTPConnection("localhost", urlsplit(url).port, timeout=5)) as one:
                one.request("GET", "/", headers={"Host": urlsplit(url).netloc})
                assert one.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(BOUND) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_on_a_terminal_there_is_a_status(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, f"-data-dir={tmp_path}"]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        try:
            seen = read_terminal(ours, b"0 requests")
            url = urlsplit(seen.split()[0].decode())
            with contextlib.closing(http.client.HTTPConnection("localhost", url.port, timeout=5)) as one:
                one.request("GET", "/seen", headers={"Host": url.netloc})
                assert one.getresponse().status == 200
            seen = read_terminal(ours, b"1 requests", b"/seen")
            process.send_signal(signal.SIGINT)
            assert b"\x1b[?25h" in read_terminal(ours, b"\x1b[?25h")  # the cursor is back
            assert process.wait(BOUND) == 0
        finally:
            process.kill()
            os.close(ours)


def read_terminal(fd: int, *wanted: bytes) -> bytes:
    """What comes until all of `wanted` is in it."""
    seen = b""
    deadline = time.monotonic() + BOUND
    while not all(text in seen for text in wanted):
        ready, _, _ = select.select([fd], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no {wanted} in {seen!r}"
        seen += os.read(fd, 65536)
    return seen
