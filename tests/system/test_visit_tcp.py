"""TCP tunnels: bytes as they are, each direction with its own end, back-pressure, and PostgreSQL's own client."""

import hashlib
import importlib.util
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pair import Tunnel
from running import RunningAgent, poll
from visiting import Broken, Connection

pytestmark = pytest.mark.system


class TcpService:
    """Does with each connection that begins with "!" what `behave` says, in a thread of its own.

    The agent's probes connect too, and say nothing.
    """

    def __init__(self, behave: Callable[[socket.socket], None]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self._behave = behave
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, suppress(OSError):
            if sock.recv(1):
                self._behave(sock)

    def close(self) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def open_port(tunnel: Tunnel, start_agent: Callable[..., RunningAgent], ending: Any) -> Callable[..., tuple[str, int]]:
    """The public address of a TCP tunnel to a service that behaves so."""

    def start(behave: Callable[[socket.socket], None]) -> tuple[str, int]:
        service = TcpService(behave)
        ending.callback(service.close)
        agent = start_agent(tunnel.core, f"raw=tcp://127.0.0.1:{service.port}", agent_id="raw")
        url = agent.tunnels["raw"]
        assert url.startswith("tcp://localhost:")
        return "127.0.0.1", int(url.rpartition(":")[2])

    return start


def visit(address: tuple[str, int], timeout: float = 10.0) -> Connection:
    visitor = Connection(address, "", timeout)
    visitor.send(b"!")
    return visitor


def echo(sock: socket.socket) -> None:
    while data := sock.recv(65536):
        sock.sendall(data)
    sock.sendall(b"-end-")


def test_bytes_come_back_and_each_direction_ends_alone(open_port: Callable[..., tuple[str, int]]) -> None:
    address = open_port(echo)
    for size in (0, 1, 70_000, 5_000_000):
        sent = (bytes(range(256)) * (size // 256 + 1))[:size]
        with visit(address) as visitor:

            def send(visitor: Connection = visitor, sent: bytes = sent) -> None:
                visitor.send(sent)
                visitor.half_close()

            sender = threading.Thread(target=send)
            sender.start()
            assert visitor.exactly(size + 5) == sent + b"-end-"
            assert visitor.ends() == "closed"
            sender.join(5)


def test_the_service_may_end_its_direction_first(open_port: Callable[..., tuple[str, int]]) -> None:
    heard: list[bytes] = []

    def behave(sock: socket.socket) -> None:
        sock.sendall(b"I have said all")
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(65536):
            heard.append(data)
        heard.append(b"")

    with visit(open_port(behave)) as visitor:
        visitor.exactly(15)
        with pytest.raises(Broken, match="closed"):
            visitor.receive()
        visitor.send(b"and I go on")
        poll(lambda: b"".join(heard) == b"and I go on", "the visitor's words")
        visitor.half_close()
        poll(lambda: heard[-1] == b"", "the visitor's end")


def test_a_reset_of_the_service_is_a_reset_for_the_visitor(open_port: Callable[..., tuple[str, int]]) -> None:
    def behave(sock: socket.socket) -> None:
        sock.recv(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with visit(open_port(behave)) as visitor:
        visitor.send(b"go")
        assert visitor.ends() == "reset"


def test_a_visitor_who_leaves_is_seen_by_the_service(open_port: Callable[..., tuple[str, int]]) -> None:
    ended = threading.Event()

    def behave(sock: socket.socket) -> None:
        sock.sendall(b"hello")
        try:
            while sock.recv(100):
                pass
        finally:
            ended.set()

    visitor = visit(open_port(behave))
    visitor.exactly(5)
    visitor.reset()
    assert ended.wait(3)


def test_nobody_who_does_not_read_fills_memory(tunnel: Tunnel, open_port: Callable[..., tuple[str, int]]) -> None:
    """A service that pours gets stuck while the visitor reads nothing; then all of it comes."""
    poured = [0]
    size = 60_000_000

    def behave(sock: socket.socket) -> None:
        block = b"p" * 65536
        while poured[0] < size:
            poured[0] += sock.send(block[: size - poured[0]])

    address = open_port(behave)
    before = tunnel.core.rss()
    with visit(address, timeout=30) as visitor:
        last = [-1]

        def stuck() -> bool:
            old, last[0] = last[0], poured[0]
            return old == last[0] > 0

        poll(stuck, "the service waits", 20, interval=0.3)
        assert poured[0] < 30_000_000
        assert tunnel.core.rss() - before < 20_000_000
        digest, got = hashlib.sha256(), 0
        while got < size:
            part = visitor.receive()
            got += len(part)
            digest.update(part)
        assert digest.hexdigest() == hashlib.sha256(b"p" * size).hexdigest()


def test_a_service_that_is_down_resets(tunnel: Tunnel, start_agent: Callable[..., RunningAgent]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    agent = start_agent(tunnel.core, f"off=tcp://127.0.0.1:{port}", agent_id="off")
    seen = tunnel.core.mark()
    with Connection(("127.0.0.1", int(agent.tunnels["off"].rpartition(":")[2])), "") as visitor:
        assert visitor.ends() == "reset"
    record = tunnel.core.wait_for("tcp connection failed", after=seen)
    assert (record["outcome"], record["tunnel"], record["client"]) == ("local_refused", "off", "127.0.0.1")
    assert record["agent_id"] == "off" and "Connection refused" in str(record["error"])


def test_each_connection_is_a_record(tunnel: Tunnel, open_port: Callable[..., tuple[str, int]]) -> None:
    def answer(sock: socket.socket) -> None:
        sock.sendall(sock.recv(100) * 2)

    address = open_port(answer)
    seen = tunnel.core.mark()
    with Connection(address, "") as visitor:
        visitor.send(b"!abc")
        assert visitor.receive() == b"abcabc"
        assert visitor.ends() == "closed"
    record = tunnel.core.wait_for("tcp connection", after=seen)
    facts = {
        name: record[name] for name in ("level", "tunnel", "client", "outcome", "bytes_in", "bytes_out", "agent_id")
    }
    assert facts == {
        "level": "INFO", "tunnel": "raw", "client": "127.0.0.1", "outcome": "ok", "bytes_in": 4, "bytes_out": 6,
        "agent_id": "raw",
    }  # fmt: skip
    assert re.fullmatch(r"\d\.\d{3}s", str(record["duration"])) and record["account_id"]


def test_a_core_without_ports_refuses(start_core: Callable[..., Any], start_agent: Callable[..., RunningAgent]) -> None:
    core = start_core("-agent-tls=false")
    agent = start_agent(core, "db=tcp://127.0.0.1:1", "-max-retries=0", ready=False)
    agent.expected_code = 1
    assert agent.wait_for("connection refused")["reason"] == "no_port"
    assert agent.wait() == 1
    core.wait_for("agent refused", reason="no_port")


def test_ports_are_of_the_range_and_run_out(
    start_core: Callable[..., Any], start_agent: Callable[..., RunningAgent]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    core = start_core("-agent-tls=false", f"-tcp-ports={port}-{port}")
    first = start_agent(core, "one=tcp://127.0.0.1:1")
    assert first.tunnels["one"].endswith(f":{port}")
    second = start_agent(core, "two=tcp://127.0.0.1:1", "-max-retries=0", agent_id="second", ready=False)
    second.expected_code = 1
    assert second.wait_for("connection refused")["reason"] == "no_port"
    assert second.wait() == 1
    first.terminate()
    first.wait()
    with pytest.raises(ConnectionRefusedError):
        poll(lambda: Connection(("127.0.0.1", port), "").close(), "the port is closed")
    start_agent(core, "two=tcp://127.0.0.1:1", agent_id="third")


# PostgreSQL ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Any]:
    path = Path(__file__).parents[1] / "core" / "postgres.py"
    spec = importlib.util.spec_from_file_location("tests_core_postgres_for_tunnels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.PostgreSQL()
    yield server
    server.remove()


def test_a_postgresql_session(tunnel: Tunnel, start_agent: Callable[..., RunningAgent], postgresql: Any) -> None:
    """Log in, write, read back, COPY megabytes both ways, an error, a cancelled query: all through the tunnel."""
    url = postgresql.database()
    agent = start_agent(tunnel.core, f"db=tcp://127.0.0.1:{postgresql.port}", agent_id="db")
    port = agent.tunnels["db"].rpartition(":")[2]
    url = url.replace(f":{postgresql.port}/", f":{port}/")
    with psycopg.connect(url, connect_timeout=10) as session:
        session.execute("CREATE TABLE t (id int PRIMARY KEY, text text)")
        with session.cursor() as cursor:
            rows = [(n, "word " * (n % 50)) for n in range(20_000)]
            with cursor.copy("COPY t FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
            cursor.execute("SELECT id, text FROM t ORDER BY id")
            assert cursor.fetchall() == rows
        session.commit()
        with pytest.raises(psycopg.errors.UniqueViolation):
            session.execute("INSERT INTO t VALUES (1, 'again')")
        session.rollback()
        timer = threading.Timer(0.2, session.cancel)
        timer.start()
        with pytest.raises(psycopg.errors.QueryCanceled):
            session.execute("SELECT pg_sleep(30)")
        session.rollback()
        assert session.execute("SELECT count(*) FROM t").fetchone() == (20_000,)
