"""Long exchanges and how they end: events, WebSockets, visitors who leave or end their direction, broken answers."""

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pair import Tunnel
from running import RunningAgent, address, poll
from service import Service
from visiting import Broken
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import Server, ServerConnection, serve

pytestmark = pytest.mark.system

GONE = 3.0  #: seconds within which the local service sees that the visitor has left


def test_events_pass_at_once(tunnel: Tunnel) -> None:
    """Both ends are on this machine, so its clock tells how long each was on its way."""
    with tunnel.connect() as visitor:
        visitor.send(visitor.request("GET /sse?n=8&ms=60", "Accept: text/event-stream"))
        head = visitor.read_head()
        assert (head["content-type"], head["transfer-encoding"]) == ("text/event-stream", "chunked")
        late = []
        while size := int(visitor.until(b"\r\n"), 16):
            event = visitor.exactly(size + 2).decode().strip()
            late.append(time.monotonic() - float(event.removeprefix("data: ")))
    assert len(late) == 8 and max(late) < 0.1, late


def test_parts_of_a_request_pass_at_once(tunnel: Tunnel) -> None:
    """A body in dribbles: the upgrade echo shows each byte's way there and back."""
    with tunnel.connect() as visitor:
        visitor.send(visitor.request("GET /upgrade", "Connection: Upgrade", "Upgrade: echo"))
        answer = visitor.read_head()
        assert (answer.status, answer["upgrade"], answer["connection"].lower()) == (101, "echo", "upgrade")
        for number in range(20):
            began = time.monotonic()
            visitor.send(b"%2d" % number)
            assert visitor.exactly(2) == b"%2d" % number
            assert time.monotonic() - began < 0.1


def test_an_upgraded_connection_ends_one_direction_at_a_time(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        visitor.send(visitor.request("GET /upgrade?half", "Connection: upgrade", "Upgrade: echo"))
        assert visitor.read_head().status == 101
        visitor.send(b"sent along")
        assert visitor.exactly(10) == b"sent along"
        visitor.half_close()
        assert visitor.exactly(3) == b"bye"
        assert visitor.ends() == "closed"


def test_an_upgrade_may_be_declined(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask("GET /status/200", "Connection: Upgrade", "Upgrade: websocket")
        assert (answer.status, answer.body, answer["connection"]) == (200, b"status 200\n", "close")
        assert visitor.ends() == "closed"


# WebSocket, with an implementation of others on both ends ------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tunnel: Tunnel) -> Iterator[str]:
    """The URL of a WebSocket server behind a tunnel: it echoes, and closes as it is told ("close 4001 reason")."""

    def converse(connection: ServerConnection) -> None:
        try:
            for message in connection:
                if isinstance(message, str) and message.startswith("close "):
                    _, code, reason = message.split(" ", 2)
                    connection.close(int(code), reason)
                elif message == "drop":
                    connection.socket.close()
                else:
                    connection.send(message)
        except (ConnectionClosed, OSError):
            pass
        closes.append((connection.close_code, connection.close_reason))

    server: Server = serve(converse, "127.0.0.1", 0, subprotocols=["chat.v1"], max_size=4 << 20)  # type: ignore[list-item]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    agent = RunningAgent(tunnel.core, f"http://127.0.0.1:{server.socket.getsockname()[1]}", "-subdomain=chat")
    yield f"ws://127.0.0.1:{tunnel.core.public[1]}/talk"
    agent.close()
    server.shutdown()
    thread.join()


closes: list[tuple[int | None, str | None]] = []


def visit(url: str, **options: Any) -> ClientConnection:
    options.setdefault("subprotocols", ["chat.v1"])
    sock = socket.create_connection(address(url), 10)  # *.localhost is not known to every resolver
    url = url.replace("127.0.0.1", "chat.localhost")
    connection: ClientConnection = connect(url, sock=sock, max_size=4 << 20, open_timeout=10, **options)
    return connection


def test_websocket_messages_of_all_sizes(chat: str) -> None:
    with visit(chat, subprotocols=["chat.v0", "chat.v1"]) as talk:
        assert talk.subprotocol == "chat.v1"
        for message in ("", "hello", "ä€😀" * 100, b"", bytes(range(256)) * 256, b"\x55" * (1 << 20), "x" * (1 << 20)):
            talk.send(message)
            assert talk.recv(10) == message
        assert talk.ping().wait(5)


def test_websocket_messages_in_a_crowd(chat: str) -> None:
    """Many at once in both directions, fragments among them, in order."""
    with visit(chat, compression=None) as talk:

        def send() -> None:
            for number in range(500):
                talk.send([f"{number}", "-"] if number % 2 else f"{number}-")

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        assert [talk.recv(10) for _ in range(500)] == [f"{n}-" for n in range(500)]
        thread.join(5)


def test_websocket_closes_reach_the_other_end(chat: str) -> None:
    with visit(chat) as talk:
        talk.send("close 4001 go home")
        with pytest.raises(ConnectionClosed):
            talk.recv(10)
        assert (talk.close_code, talk.close_reason) == (4001, "go home")
    before = len(closes)
    with visit(chat) as talk:
        talk.close(3999, "done here")
    poll(lambda: (3999, "done here") in closes[before:], "the visitor's close at the service")


def test_a_dropped_websocket_is_no_clean_close(chat: str) -> None:
    with visit(chat) as talk:
        talk.send("drop")
        with pytest.raises(ConnectionClosedError):
            talk.recv(10)
        assert talk.close_code == 1006


# Visitors who leave --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("path", ["/hang", "/stall", "/sse", "/upgrade"])
def test_a_visitor_who_leaves_ends_the_work(tunnel: Tunnel, path: str, how: str) -> None:
    """The service sees its connection end, the log says who left, and the stream is gone."""
    name = f"{path}-{how}"
    seen = tunnel.core.mark()
    visitor = tunnel.connect()
    upgrade = ["Connection: Upgrade", "Upgrade: echo"] if path == "/upgrade" else []
    visitor.send(visitor.request(f"GET {path}?n=1000&ms=50&{how}", f"X-Request-Id: {name}", *upgrade))
    tunnel.service.wait_request(path)
    if path != "/hang":
        visitor.read_head()
    left = time.monotonic()
    if how == "close":
        visitor.close()
    else:
        visitor.reset()
    limit = GONE if path != "/stall" or how == "reset" else 7.5  # within a silent body only silence tells
    while True:
        target, _, at = tunnel.service.wait_closed(path, limit + 1)
        if target.endswith(how):
            break
        assert time.monotonic() < left + limit, f"{path} was not ended"
        time.sleep(0.01)
    assert at - left < limit
    record = tunnel.core.wait_for("request", after=seen, request_id=name)
    expected = {"ok", "visitor_aborted"} if path == "/upgrade" else {"visitor_aborted"}
    assert record["outcome"] in expected, record  # leaving is how an upgraded connection ends


def test_a_visitor_who_leaves_within_its_body_ends_the_work(tunnel: Tunnel) -> None:
    seen = tunnel.core.mark()
    visitor = tunnel.connect()
    visitor.send(
        visitor.request("POST /upload?half", "Content-Length: 100000", "X-Request-Id: half-a-body") + b"x" * 50_000
    )
    poll(lambda: "/upload?half" in tunnel.service.begun, "the service has the head")
    visitor.close()
    record = tunnel.core.wait_for("request", after=seen, request_id="half-a-body")
    assert record["outcome"] == "visitor_aborted"
    target, _, _ = tunnel.service.wait_closed("/upload", GONE)
    assert target == "/upload?half"
    assert not [one for one in tunnel.service.requests if one.target == "/upload?half"]  # never taken for a whole one


@pytest.mark.parametrize("path", ["/echo", "/slow?ms=3000", "/download?size=3000000", "/sse?n=3&ms=50"])
def test_a_visitor_who_ends_its_direction_gets_the_answer(tunnel: Tunnel, path: str) -> None:
    with tunnel.connect() as visitor:
        visitor.send(visitor.request(f"POST {path}", body=b"some"))
        visitor.half_close()
        answer = visitor.read()
        assert answer.status == 200
        assert len(answer.body) == {"/echo": 4, "/slow": 4, "/download": 3_000_000}.get(
            path.split("?")[0], len(answer.body)
        )
        assert visitor.ends() == "closed"


def test_pipelined_requests_before_a_half_close_are_all_answered(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        visitor.send(b"".join(visitor.request("POST /echo", body=b"%d" % n) for n in range(5)))
        visitor.half_close()
        assert [visitor.read().body for _ in range(5)] == [b"%d" % n for n in range(5)]
        assert visitor.ends() == "closed"


def test_a_slow_reader_gets_everything(tunnel: Tunnel) -> None:
    """Back-pressure: nothing is lost, and others are served meanwhile."""
    with tunnel.connect(timeout=20) as slow, tunnel.connect() as other:
        slow.send(slow.request("GET /download?size=20000000"))
        slow.read_head()
        for _ in range(5):
            assert other.ask("GET /echo").status == 200
        got = slow.exactly(20_000_000)
    assert got == (bytes(range(256)) * 78126)[:20_000_000]


# Answers that break off ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "partial"), [("/break-length", 500), ("/break-chunked", 5), ("/break-close", 500)])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_broken_answer_looks_broken(tunnel: Tunnel, path: str, partial: int, version: str) -> None:
    """In no framing can it be taken for complete: not even where the end of the connection is the end of the body."""
    seen = tunnel.core.mark()
    name = f"{path}-{version}"
    with tunnel.connect() as visitor, pytest.raises(Broken) as caught:
        visitor.ask(f"GET {path}", f"X-Request-Id: {name}", version=version)
    assert len(caught.value.partial) <= partial
    if version == "1.0" and path != "/break-length":
        assert str(caught.value) == "reset"
    record = tunnel.core.wait_for("request", after=seen, request_id=name)
    assert record["outcome"] == "local_broken" and record["level"] == "ERROR", record


@pytest.mark.parametrize("path", ["/break-head", "/garbage", "/nothing"])
def test_no_answer_at_all_is_502(tunnel: Tunnel, path: str) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask(f"GET {path}")
        assert (answer.status, answer.outcome) == (502, "local_broken")
        assert visitor.ask("GET /echo").status == 200


def test_a_service_that_is_down_is_502(
    tunnel: Tunnel, start_agent: Callable[..., RunningAgent], start_service: Callable[..., object]
) -> None:
    service = Service()
    port = service.port
    service.close()
    start_agent(tunnel.core, f"http://127.0.0.1:{port}", "-subdomain=down", agent_id="down")
    with tunnel.connect() as visitor:
        answer = visitor.ask("GET /", "Host: down.localhost")
        assert (answer.status, answer.outcome) == (502, "local_refused")
        start_service(port)
        assert visitor.ask("GET /echo", "Host: down.localhost").status == 200


def test_streams_leave_nothing_behind(tunnel: Tunnel) -> None:
    def streams() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{tunnel.core.dashboard[1]}/status", timeout=5) as page:
            return sum(link["streams"] for link in json.load(page)["links"])

    poll(lambda: streams() == 0, "all streams are over")
