"""What the tests of life and blame look through: pages, samples, a relay that can hold the link, a span receiver.

get(core.metrics, "/readyz")              # (status, text) of a program's own page, within 5 s
sample(core.metrics, "tunnel_connections_active")          # a number from /metrics; labels as keywords
with Relay(core.agents) as relay: relay.hold(); relay.release()    # TCP in between; agents dial relay.address
with SpanTap(tmp_path) as tap: tap.endpoint, tap.wait(request_id)  # a real OTLP receiver process (oteltap)
run_core(...), run_agent(...)             # a program that is to end by itself: (exit code, stdout, stderr)
ask(core, "GET /echo")                    # one request on a connection of its own: an Answer
Asking(core, "GET /hang").result()        # the same in a thread; wait_served(core, 5) polls until it is answered
"""

from __future__ import annotations

import json
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from running import Address, RunningCore, clean_environment, poll
from visiting import Answer, Broken, Connection


def get(where: Address, path: str, **fields: str) -> tuple[int, str]:
    """A program's own page. Raises OSError."""
    request = urllib.request.Request(f"http://{where[0]}:{where[1]}{path}", headers=fields)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.code, answer.read().decode()


def samples(where: Address, path: str = "/metrics") -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All samples of a metrics page by (name, labels)."""
    found = {}
    for line in get(where, path)[1].splitlines():
        match = re.fullmatch(r"([a-z_]+)(?:\{(.*)\})? (\S+)", line)
        if match is not None:
            labels = frozenset(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
            found[match[1], labels] = float(match[3])
    return found


def sample(where: Address, name: str, **labels: str) -> float:
    """One sample; 0 when there is none with these labels."""
    return samples(where).get((name, frozenset(labels.items())), 0.0)


def ask(core: RunningCore, line: str, *fields: str, host: str = "app.localhost", body: bytes | None = None) -> Answer:
    with Connection(core.public, host) as visitor:
        return visitor.ask(line, *fields, body=body)


class Asking(threading.Thread):
    """A request in a thread of its own; `answer` is an Answer or the error, `took` seconds."""

    def __init__(self, core: RunningCore, line: str = "GET /hang", host: str = "app.localhost") -> None:
        super().__init__(daemon=True)
        self._core, self._line, self._host = core, line, host
        self.answer: Answer | Exception | None = None
        self.took = 0.0
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        try:
            self.answer = ask(self._core, self._line, host=self._host)
        except Exception as exc:
            self.answer = exc
        self.took = time.monotonic() - began

    def result(self, timeout: float = 10) -> Answer:
        self.join(timeout)
        assert isinstance(self.answer, Answer), repr(self.answer)
        return self.answer


def wait_served(core: RunningCore, timeout: float, host: str = "app.localhost") -> None:
    poll(lambda: status_of(core, host) == 200, f"{host} is served again", timeout, 0.05)


def status_of(core: RunningCore, host: str = "app.localhost") -> int:
    """The status of a plain request; 0 when there is no answer."""
    try:
        return ask(core, "GET /echo", host=host).status
    except (OSError, Broken):
        return 0


def run_core(*flags: str, timeout: float = 20, **environment: str) -> tuple[int, str, str]:
    return _run("tunnel.core", flags, timeout, environment)


def run_agent(*flags: str, timeout: float = 20, **environment: str) -> tuple[int, str, str]:
    return _run("tunnel.agent", flags, timeout, environment)


def _run(module: str, flags: tuple[str, ...], timeout: float, environment: dict[str, str]) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *flags], env=clean_environment(**environment), stdin=subprocess.DEVNULL,
        capture_output=True, encoding="utf-8", timeout=timeout, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


class Relay:
    """Passes TCP connections on to `target`. While it holds, nothing passes, and nothing ends: a black hole."""

    def __init__(self, target: Address) -> None:
        self._target = target
        self._open = threading.Event()
        self._open.set()
        self._ended = threading.Event()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: Address = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._open.set()
        for sock in [self._listener, *self._sockets]:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target, 5)
            except OSError:
                return
            self._sockets += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while not self._ended.is_set():
                if not self._open.wait(0.1):
                    continue
                if not select.select([one], [], [], 0.05)[0] or not self._open.is_set():
                    continue
                data = one.recv(65536)
                if not data:
                    other.shutdown(socket.SHUT_WR)
                    return
                other.sendall(data)
        except (OSError, ValueError):
            with suppress(OSError):
                other.shutdown(socket.SHUT_RDWR)


class SpanTap:
    """An OTLP/HTTP receiver process; `spans` are those it has got so far, as OTLP's JSON has them."""

    def __init__(self, directory: Path) -> None:
        self._output = directory / "spans.ndjson"
        port = free_port()
        self.endpoint = f"http://127.0.0.1:{port}"
        with self._output.open("wb") as out:
            self._process = subprocess.Popen([sys.executable, "-u", "-m", "oteltap", "--port", str(port)], stdout=out)
        poll(lambda: _answers(port), "oteltap listens", 20)

    def __enter__(self) -> SpanTap:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(10)

    @property
    def spans(self) -> list[dict[str, Any]]:
        text = self._output.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.startswith("{")]

    def find(self, span_id: str) -> dict[str, Any] | None:
        return next((span for span in self.spans if span["spanId"] == span_id), None)

    def wait(self, span_id: str) -> dict[str, Any]:
        """The attributes of the span with this id."""
        span: dict[str, Any] = poll(lambda: self.find(span_id), f"the span {span_id}", 10, 0.05)
        return {one["key"]: next(iter(one["value"].values())) for one in span["attributes"]}


def free_port() -> int:
    """A port that was free a moment ago, for a program that can't tell which one the kernel gave it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.5).close()
    except OSError:
        return False
    return True
