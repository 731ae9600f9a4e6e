"""Visitors who mean no good: requests that two readers could read differently, and heads and bodies out of bounds."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from pair import Tunnel
from running import RunningAgent, RunningCore
from service import Service
from visiting import Broken, Connection

pytestmark = pytest.mark.system

HOST = b"Host: app.localhost\r\n"
HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: app.localhost\r\n\r\n"

POST = b"POST / HTTP/1.1\r\n" + HOST
SMUGGLING = {
    "length and chunked": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "two equal lengths": POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "a list of lengths": POST + b"Content-Length: 5, 5\r\n\r\nhello",
    "a signed length": POST + b"Content-Length: +5\r\n\r\nhello",
    "a negative length": POST + b"Content-Length: -5\r\n\r\nhello",
    "a hexadecimal length": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "a length with an underscore": POST + b"Content-Length: 1_0\r\n\r\nhellohello",
    "a huge length": POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
    "an empty length": POST + b"Content-Length:\r\n\r\n",
    "two encodings": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "another encoding": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": POST + b"Transfer-Encoding: identity\r\n\r\n",
    "a quoted encoding": b'POST / HTTP/1.1\r\n' + HOST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "a vertical tab in the encoding": POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked on HTTP/1.0": b"POST / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "space before the colon": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "space before the name": b"POST / HTTP/1.1\r\n" + HOST + b" Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "space before the first name": b"GET / HTTP/1.1\r\n Host: app.localhost\r\n\r\n",
    "a folded field": b"GET / HTTP/1.1\r\n" + HOST + b"X-Long: one\r\n two\r\n\r\n",
    "a folded encoding": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: app.localhost\n\n",
    "bare LF once": b"GET / HTTP/1.1\r\nHost: app.localhost\nX-A: 1\r\n\r\n",
    "bare CR": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: 1\rX-B: 2\r\n\r\n",
    "LF at the end of the head": b"GET / HTTP/1.1\r\n" + HOST + b"\n",
    "NUL in a value": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: a\0b\r\n\r\n",
    "NUL in the target": b"GET /\0 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a control byte": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: a\x08b\r\n\r\n",
    "DEL": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: a\x7fb\r\n\r\n",
    "a field without colon": b"GET / HTTP/1.1\r\n" + HOST + b"Nothing\r\n\r\n",
    "an empty name": b"GET / HTTP/1.1\r\n" + HOST + b": value\r\n\r\n",
    "a name with brackets": b"GET / HTTP/1.1\r\n" + HOST + b"X(A): 1\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "a Host with a path": b"GET / HTTP/1.1\r\nHost: app.localhost/x\r\n\r\n",
    "a Host with a user": b"GET / HTTP/1.1\r\nHost: a@app.localhost\r\n\r\n",
    "a Host with a space": b"GET / HTTP/1.1\r\nHost: app.localhost evil\r\n\r\n",
    "a list of Hosts": b"GET / HTTP/1.1\r\nHost: app.localhost, other\r\n\r\n",
    "a Host with an odd port": b"GET / HTTP/1.1\r\nHost: app.localhost:8x\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\n" + HOST + b"\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\n" + HOST + b"\r\n",
    "HTTP/0.9": b"GET / HTTP/0.9\r\n" + HOST + b"\r\n",
    "HTTP/1.10": b"GET / HTTP/1.10\r\n" + HOST + b"\r\n",
    "http in small letters": b"GET / http/1.1\r\n" + HOST + b"\r\n",
    "no version": b"GET /\r\n" + HOST + b"\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no target": b"GET  HTTP/1.1\r\n" + HOST + b"\r\n",
    "two targets": b"GET / /x HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tab in the request line": b"GET\t/\tHTTP/1.1\r\n" + HOST + b"\r\n",
    "a space at the request line's end": b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n",
    "a space at the front": b" GET / HTTP/1.1\r\n" + HOST + b"\r\n",
    "a relative target": b"GET index.html HTTP/1.1\r\n" + HOST + b"\r\n",
    "a fragment": b"GET /#top HTTP/1.1\r\n" + HOST + b"\r\n",
    "another scheme": b"GET ftp://app.localhost/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "a URL without a host": b"GET http:///x HTTP/1.1\r\n" + HOST + b"\r\n",
    "another host in the URL": b"GET http://app.localhost/ HTTP/1.1\r\nHost: other.localhost\r\n\r\n",
    "an underscored forwarding field": b"GET / HTTP/1.1\r\n" + HOST + b"X_Forwarded_For: 6.6.6.6\r\n\r\n",
    "an underscored length": POST + b"Content_Length: 5\r\n\r\n",
    "two names that an underscore makes one": POST + b"X-A: 1\r\nX_A: 2\r\n\r\n",
    "a URL with a user": b"GET http://a@app.localhost/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "a star with GET": b"GET * HTTP/1.1\r\n" + HOST + b"\r\n",
    "bytes above ASCII in the target": b"GET /\xc3\xa4 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a method with a colon": b"GE:T / HTTP/1.1\r\n" + HOST + b"\r\n",
    "TLS on the plain port": bytes.fromhex("16030100f1010000ed0303") + b"\r\n\r\n",
}  # fmt: skip
OTHER_VERSIONS = {"HTTP/2.0", "HTTP/1.2", "HTTP/0.9", "HTTP/2's preface"}


@pytest.mark.parametrize("name", SMUGGLING)
def test_ambiguous_requests_are_refused(tunnel: Tunnel, name: str) -> None:
    """400 (505 for versions), the connection ends, and what follows is not taken for a request."""
    status = 505 if name in OTHER_VERSIONS else 400
    before = len(tunnel.service.requests)
    with tunnel.connect() as visitor:
        visitor.send(SMUGGLING[name] + HIDDEN)
        answer = visitor.read()
        assert (answer.status, answer.outcome, answer["connection"]) == (status, "bad_request", "close")
        assert b"%d bad_request" % status in answer.body and answer["x-request-id"].encode() in answer.body
        assert visitor.ends() in ("closed", "reset")
    assert len(tunnel.service.requests) == before


CHUNKS = {
    "no number": b"x\r\nhello\r\n0\r\n\r\n",
    "a sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "a negative size": b"-5\r\nhello\r\n0\r\n\r\n",
    "a huge size": b"f" * 25 + b"\r\nhello\r\n0\r\n\r\n",
    "too much data": b"5\r\nhello there\r\n0\r\n\r\n",
    "bare LF": b"5\nhello\n0\n\n",
    "bare LF behind the data": b"5\r\nhello\n0\r\n\r\n",
    "a bare LF in the extension": b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "a bad trailer": b"5\r\nhello\r\n0\r\nX : y\r\n\r\n",
    "a trailer that ends with bare LF": b"5\r\nhello\r\n0\r\nX: y\n\n",
    "a trailer that ends with LF CRLF": b"5\r\nhello\r\n0\r\nX: y\n\r\n",
    "an end with bare LF": b"5\r\nhello\r\n0\r\n\n",
    "an endless extension": b"5;" + b"a" * 200_000,
}


@pytest.mark.parametrize("name", CHUNKS)
def test_malformed_chunks_are_refused(tunnel: Tunnel, name: str) -> None:
    """The service never sees such a body's end, and nothing behind it is a request."""
    before = len(tunnel.service.requests)
    with tunnel.connect() as visitor:
        visitor.send(visitor.request("POST /echo", "Transfer-Encoding: chunked") + CHUNKS[name] + HIDDEN)
        answer = visitor.read()
        assert (answer.status, answer.outcome, answer["connection"]) == (400, "bad_request", "close")
    assert len(tunnel.service.requests) == before


def test_fields_of_framing_are_no_trailers(tunnel: Tunnel) -> None:
    body = b"2\r\nhi\r\n0\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\nHost: evil\r\nX-Ok: 1\r\n\r\n"
    with tunnel.connect() as visitor:
        visitor.send(visitor.request("POST /echo?trailers", "Transfer-Encoding: chunked") + body)
        answer = visitor.read()
    if answer.status == 200:
        assert tunnel.service.requests[-1].trailers == [("X-Ok", "1")]
    else:
        assert answer.outcome == "bad_request"


# Bounds ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnel]:
    """A core with narrow bounds."""
    with ExitStack() as stack:
        service = Service()
        stack.callback(service.close)
        core = RunningCore(
            tmp_path_factory.mktemp("strict") / "core", "-agent-tls=false", "-max-body=1000", "-max-head=4KiB",
            "-max-target=1000", "-head-timeout=500ms", "-body-idle-timeout=500ms", "-request-timeout=1s",
            "-keepalive-timeout=500ms",
        )  # fmt: skip
        stack.callback(core.close)
        agent = RunningAgent(core, service.url, "-subdomain=app", "-request-timeout=20s")
        stack.callback(agent.close)
        yield Tunnel(core, agent, service, "app.localhost")


def refused(visitor: Connection, status: int, outcome: str) -> None:
    answer = visitor.read()
    assert (answer.status, answer.outcome, answer["connection"]) == (status, outcome, "close")
    assert visitor.ends() in ("closed", "reset")


def test_a_long_address_is_414(strict: Tunnel) -> None:
    with strict.connect() as visitor:
        assert visitor.ask("GET /echo?" + "a" * 980).status == 200
        visitor.send(visitor.request("GET /echo?" + "a" * 1000))
        refused(visitor, 414, "uri_too_long")
    with strict.connect() as visitor:
        visitor.send(b"GET /" + b"a" * 20_000)  # the line has no end yet
        refused(visitor, 414, "uri_too_long")


def test_a_large_head_is_431(strict: Tunnel) -> None:
    with strict.connect() as visitor:
        assert visitor.ask("GET /echo", "Cookie: " + "a" * 3000).status == 200
        visitor.send(visitor.request("GET /echo", "Cookie: " + "a" * 5000))
        refused(visitor, 431, "head_too_large")
    with strict.connect() as visitor:
        visitor.send(visitor.request("GET /echo", *[f"X-{n}: {n}" for n in range(1000)]))
        refused(visitor, 431, "head_too_large")


def test_a_large_body_is_413(strict: Tunnel) -> None:
    with strict.connect() as visitor:
        assert visitor.ask("POST /echo", body=b"x" * 1000).status == 200
        visitor.send(visitor.request("POST /echo", "Content-Length: 1001"))
        refused(visitor, 413, "body_too_large")
    with strict.connect() as visitor:
        visitor.send(visitor.request("POST /echo", "Expect: 100-continue", "Content-Length: 100000"))
        refused(visitor, 413, "body_too_large")
    with strict.connect() as visitor:
        visitor.send(visitor.request("POST /echo", "Transfer-Encoding: chunked"))
        visitor.send(b"258\r\n" + b"x" * 600 + b"\r\n" + b"258\r\n" + b"x" * 600 + b"\r\n0\r\n\r\n")
        refused(visitor, 413, "body_too_large")


@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\nHost: app.lo", b"\r\n"])
def test_a_slow_head_is_408(strict: Tunnel, start: bytes) -> None:
    with strict.connect() as visitor:
        visitor.send(start)
        refused(visitor, 408, "request_timeout")


def test_a_trickling_head_has_the_same_time(strict: Tunnel) -> None:
    """Byte by byte does not prolong it."""
    with strict.connect() as visitor:
        visitor.sock.settimeout(0.1)
        for _ in range(40):
            visitor.send(b"a")
            try:
                answer = visitor.read_head()
            except TimeoutError:
                continue
            break
        assert (answer.status, answer.outcome) == (408, "request_timeout")


@pytest.mark.parametrize("framing", ["Content-Length: 900", "Transfer-Encoding: chunked"])
def test_a_body_that_stops_is_408(strict: Tunnel, framing: str) -> None:
    with strict.connect() as visitor:
        visitor.send(visitor.request("POST /echo", framing) + b"5\r\nhel")
        refused(visitor, 408, "request_timeout")


def test_an_idle_connection_ends_without_a_word(strict: Tunnel) -> None:
    with strict.connect() as visitor:
        assert visitor.ask("GET /echo").status == 200
        assert visitor.ends() == "closed"
    with strict.connect() as visitor:
        assert visitor.ends() == "closed"


def test_a_slow_service_is_504(strict: Tunnel) -> None:
    with strict.connect() as visitor:
        answer = visitor.ask("GET /hang")
        assert (answer.status, answer.outcome) == (504, "timeout")
        assert visitor.ask("GET /echo").status == 200
    assert strict.service.wait_closed("/hang", 3)[1] in ("closed", "reset")


def test_an_answer_that_stops_is_broken_off(strict: Tunnel) -> None:
    """After its head it is too late for a 504. The service's pause is longer than -body-idle-timeout."""
    with strict.connect() as visitor:
        visitor.send(visitor.request("POST /slow?ms=1", "Connection: close", body=b"x"))
        assert visitor.read().body == b"slow"
    with strict.connect() as visitor, pytest.raises(Broken):
        visitor.ask("GET /stall")


def test_an_event_stream_may_pause(strict: Tunnel) -> None:
    with strict.connect() as visitor:
        answer = visitor.ask("GET /sse?n=2&ms=900")
    assert answer.body.count(b"data: ") == 2


def test_quota_answers_are_429(start_core: Callable[..., RunningCore], start_agent: Callable[..., RunningAgent],
                               start_service: Callable[[], Service]) -> None:  # fmt: skip
    core, service = start_core("-agent-tls=false"), start_service()
    core.command("account", "limit", "default", "-requests-per-second=1", "-requests-burst=2")
    start_agent(core, service.url, "-subdomain=app")
    with Connection(core.public, "app.localhost") as visitor:
        answers = [visitor.ask("GET /echo") for _ in range(4)]
    assert [one.status for one in answers[:2]] == [200, 200]
    assert (answers[3].status, answers[3].outcome) == (429, "quota")
    assert int(answers[3]["retry-after"]) >= 1
