"""What HTTP/1.1 can ask for, through a real core and agent: methods, bodies, framing, interim answers, connections."""

import hashlib
import json

import pytest
from pair import Tunnel
from visiting import Broken

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    "method",
    ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "QUERY", "get", "M-SEARCH", "X!#$%&'*+.^_`|~"],
)
def test_methods_pass_as_they_are(tunnel: Tunnel, method: str) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask(f"{method} /echo", body=b"some")
    assert (answer.status, answer["x-method"], answer.body) == (200, method, b"some")


@pytest.mark.parametrize("line", ["CONNECT /echo", "CONNECT app.localhost:443", "TRACE /echo"])
def test_connect_and_trace_are_refused(tunnel: Tunnel, line: str) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask(line)
    assert (answer.status, answer.outcome) == (405, "method_not_allowed")
    assert "GET" in answer["allow"] and "TRACE" not in answer["allow"]


def test_targets_pass_as_they_are(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        for target in ("/head?a=1&b=%20%C3%A4&&c", "/head//two/../dots", "/head/;p=1?", '/head?q=[]|{}^"<>`\\'):
            assert visitor.ask(f"GET {target}").body.split(b" ")[1] == target.encode()
        assert visitor.ask("OPTIONS *").status == 200
        assert tunnel.service.wait_request("*").method == "OPTIONS"


# Bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1000, 65536, 3_000_001])
def test_a_body_of_known_length_goes_both_ways(tunnel: Tunnel, size: int) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    with tunnel.connect() as visitor:
        answer = visitor.ask("POST /upload", body=body)
        assert answer.body == b"%d %b" % (size, hashlib.sha256(body).hexdigest().encode())
        received = tunnel.service.requests[-1]
        assert (received.get("content-length"), received.get("transfer-encoding")) == (str(size), "")
        answer = visitor.ask(f"GET /download?size={size}")
        assert (answer.framing, answer.body) == ("length", body[:size])


def test_a_chunked_request_stays_chunked(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        visitor.send(visitor.request("POST /echo", "Transfer-Encoding: chunked"))
        visitor.send(b"5;ext=1\r\nhello\r\n")
        visitor.send(b"6\r\n there\r\n0\r\nX-Sum: 11\r\nX-More: yes\r\n\r\n")
        assert visitor.read().body == b"hello there"
        assert visitor.ask("GET /echo").status == 200  # the connection goes on behind it
    received = tunnel.service.wait_request("/echo")
    received = [one for one in tunnel.service.requests if one.size == 11][-1]
    assert (received.get("transfer-encoding"), received.get("content-length")) == ("chunked", "")
    assert received.trailers == [("X-Sum", "11"), ("X-More", "yes")]


def test_a_body_is_passed_on_as_it_comes(tunnel: Tunnel) -> None:
    """/early-200 answers before it reads, so an answer shows that the head went without the body."""
    with tunnel.connect() as visitor:
        visitor.send(visitor.request("POST /early-200", "Content-Length: 10") + b"01234")
        answer = visitor.read()
    assert (answer.status, answer.body) == (200, b"early")


def test_chunked_answers_arrive_whole(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        for parts, size in ((0, 0), (1, 1), (3, 10), (50, 4000), (20, 100_000)):
            answer = visitor.ask(f"GET /chunked?parts={parts}&size={size}")
            assert answer.framing == "chunked"
            assert answer.body == b"".join((b"%d" % (n % 10)) * size for n in range(parts))


def test_close_delimited_answers_become_chunked(tunnel: Tunnel) -> None:
    """So the visitor's connection goes on, and an end by accident can be told from the real one."""
    with tunnel.connect() as visitor:
        for size in (0, 10, 300_000):
            answer = visitor.ask(f"GET /close-delimited?size={size}")
            assert (answer.framing, len(answer.body)) == ("chunked", size)


def test_trailers_of_an_answer_arrive(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask("GET /trailers", "TE: trailers")
        assert (answer.body, answer.trailers, answer["trailer"]) == (b"body", [("X-Sum", "42")], "X-Sum")
        assert visitor.ask("GET /echo").status == 200


# Expect: 100-continue -------------------------------------------------------------------------------------------


def test_the_services_100_reaches_the_visitor(tunnel: Tunnel) -> None:
    body = b"b" * 20_000
    with tunnel.connect() as visitor:
        visitor.send(visitor.request("PUT /continue", "Expect: 100-continue", f"Content-Length: {len(body)}"))
        assert visitor.read_head().status == 100
        visitor.send(body)
        assert visitor.read().status == 200
        assert tunnel.service.wait_request("/continue").size == len(body)
        assert visitor.ask("GET /echo").status == 200


def test_a_service_that_says_no_100_gets_the_body_that_comes_anyway(tunnel: Tunnel) -> None:
    """No 100 is made up on the way (RFC 9110, 10.1.1); a visitor waits a moment, then sends."""
    with tunnel.connect() as visitor:
        visitor.send(visitor.request("PUT /upload", "Expect: 100-continue", "Content-Length: 5"))
        visitor.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            visitor.receive()
        visitor.sock.settimeout(10)
        visitor.send(b"12345")
        assert visitor.read().body.startswith(b"5 ")
        assert visitor.ask("GET /echo").status == 200


def test_a_visitor_that_does_not_wait_is_served(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        for path in ("/continue", "/upload"):
            assert visitor.ask(f"PUT {path}", "Expect: 100-continue", body=b"here already").status == 200


@pytest.mark.parametrize(("path", "status"), [("/refuse", 417), ("/early-413", 413)])
def test_a_refused_expectation_needs_no_body(tunnel: Tunnel, path: str, status: int) -> None:
    with tunnel.connect(timeout=5) as visitor:
        visitor.send(visitor.request(f"PUT {path}", "Expect: 100-continue", "Content-Length: 100000"))
        answer = visitor.read_head()
        if answer.status == 100:  # we may have promised already; the service's word still comes
            answer = visitor.read_head()
        assert (answer.status, answer.outcome) == (status, "")


def test_other_expectations_are_refused(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        assert visitor.ask("PUT /echo", "Expect: miracles", body=b"x").status in (400, 417)


def test_an_early_answer_stops_a_big_body(tunnel: Tunnel) -> None:
    """The service says 413 while the visitor still sends: the visitor gets to read it."""
    with tunnel.connect() as visitor:
        visitor.send(visitor.request("POST /early-413", "Content-Length: 50000000") + b"x" * 200_000)
        answer = visitor.read()
        assert (answer.status, answer.body, answer["connection"]) == (413, b"too much", "close")


# Answers without a body -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/echo", "/download?size=5000000", "/status/404"])
def test_head_has_the_length_and_no_body(tunnel: Tunnel, path: str) -> None:
    with tunnel.connect() as visitor:
        asked = visitor.ask(f"GET {path}")
        answer = visitor.ask(f"HEAD {path}")
        if path.startswith(("/echo", "/status")):
            assert answer["content-length"] == asked["content-length"]
            assert visitor.ask("GET /echo").status == 200
        assert answer.status == asked.status


@pytest.mark.parametrize("status", [204, 304])
def test_bodiless_statuses(tunnel: Tunnel, status: int) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask(f"GET /status/{status}")
        assert (answer.status, answer["etag"], answer["transfer-encoding"]) == (status, '"x"', "")
        assert status != 204 or answer["content-length"] == ""
        assert visitor.ask("GET /echo").status == 200


def test_statuses_keep_their_number_and_words(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        for status in (200, 201, 206, 299, 301, 400, 404, 418, 429, 500, 502, 503, 599, 799):
            answer = visitor.ask(f"GET /status/{status}")
            assert (answer.status, answer.reason, answer.outcome) == (status, "Own Words", "")


def test_early_hints_pass(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        visitor.send(visitor.request("GET /hints"))
        hints = visitor.read_head()
        assert (hints.status, hints["link"]) == (103, "</style.css>; rel=preload")
        assert visitor.read().body == b"after the hints"
        visitor.send(visitor.request("GET /hints", version="1.0"))
        assert visitor.read_head().status == 200  # an HTTP/1.0 client does not know 1xx


# Connections ----------------------------------------------------------------------------------------------------


def test_a_connection_is_kept(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        for number in range(20):
            answer = visitor.ask("POST /echo", body=b"%d" % number)
            assert (answer.body, answer["connection"], answer.version) == (b"%d" % number, "", "HTTP/1.1")


def test_pipelined_requests_are_answered_in_order(tunnel: Tunnel) -> None:
    """The first is the slowest; bodies and chunked answers lie between."""
    with tunnel.connect() as visitor:
        visitor.send(
            visitor.request("GET /slow?ms=300")
            + visitor.request("POST /echo", body=b"second")
            + visitor.request("POST /echo", "Transfer-Encoding: chunked") + b"5\r\nthird\r\n0\r\n\r\n"
            + visitor.request("GET /chunked?parts=2&size=3")
            + visitor.request("HEAD /echo")
            + visitor.request("GET /status/404")
            + visitor.request("GET /nowhere", "Host: unknown.localhost")
            + visitor.request("GET /echo", "Connection: close")
        )  # fmt: skip
        bodies = [visitor.read().body for _ in range(4)]
        assert bodies == [b"slow", b"second", b"third", b"000111"]
        assert visitor.read("HEAD").status == 200
        assert visitor.read().body == b"status 404\n"
        assert visitor.read().outcome == "no_tunnel"
        assert visitor.read()["connection"] == "close"
        assert visitor.ends() == "closed"


def test_connection_close_is_obeyed(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask("GET /echo", "Connection: close")
        assert (answer.status, answer["connection"]) == (200, "close")
        assert visitor.ends() == "closed"


def test_http_1_0_closes_unless_asked(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask("GET /chunked?parts=3&size=5", version="1.0")
        assert (answer.framing, answer.body, answer["connection"]) == ("end", b"000001111122222", "close")
        assert visitor.ends() == "closed"
    with tunnel.connect() as visitor:
        for _ in range(3):
            answer = visitor.ask("GET /echo", "Connection: Keep-Alive", version="1.0")
            assert (answer.status, answer.framing, answer["connection"].lower()) == (200, "length", "keep-alive")
        assert tunnel.service.requests[-1].version == "HTTP/1.1"


def test_http_1_0_without_host_is_told_so(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        visitor.send(b"GET / HTTP/1.0\r\n\r\n")
        assert visitor.read().outcome == "no_tunnel"


def test_the_agent_keeps_its_local_connections(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        visitor.ask("GET /echo")
        before = tunnel.service.connections
        for _ in range(10):
            visitor.ask("GET /echo")
        assert tunnel.service.connections == before


def test_a_request_is_in_the_log(tunnel: Tunnel) -> None:
    seen = tunnel.core.mark()
    with tunnel.connect() as visitor:
        answer = visitor.ask("GET /status/201", "X-Request-Id: find-me-here")
    assert answer["x-request-id"] == "find-me-here"
    record = tunnel.core.wait_for("request", after=seen, request_id="find-me-here")
    assert record["status"] == 201 and record["outcome"] == "ok", json.dumps(record)


def test_a_silent_connection_is_no_request(tunnel: Tunnel) -> None:
    seen = tunnel.core.mark()
    tunnel.connect().close()
    with tunnel.connect() as visitor:
        visitor.half_close()
        with pytest.raises(Broken, match="closed"):
            visitor.read()
    with tunnel.connect() as visitor:
        visitor.ask("GET /echo", "X-Request-Id: after-the-silence")
    tunnel.core.wait_for("request", after=seen, request_id="after-the-silence")
    assert len(tunnel.core.find("request", after=seen)) == 1
