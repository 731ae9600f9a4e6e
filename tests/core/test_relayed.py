"""An answer relayed from an agent, against h11: what is let through leaves byte for byte as h11 would write it."""

import re
from typing import Any, cast

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunnel.core.answering import Answerer
from tunnel.core.request import Request
from tunnel.core.visitor import Visitor
from tunnel.errors import Failure
from tunnel.http.heads import TOKEN, check_relayed
from tunnel.http.response import has_no_body
from tunnel.wire.frames import NO_BODY, UNKNOWN, Response

Fields = list[tuple[bytes, bytes]]


ANSWERER = Answerer(idle_timeout=30, server_timing=False)


def asked(method: str, version: str, keep_alive: bool) -> Request:
    request = Request("192.0.2.1", "http", visitor=Visitor(cast(Any, None), "192.0.2.1", "http"))
    request.method, request.http_version, request.request_id = method, version, "r-1"
    request.keep_alive, request.body_over = keep_alive, True
    return request


def h11_server(method: str) -> h11.Connection:
    server = h11.Connection(h11.SERVER)
    server.receive_data(b"%b / HTTP/1.1\r\nHost: a\r\n\r\n" % method.encode())
    assert isinstance(server.next_event(), h11.Request)
    return server


def h11_client(method: str) -> h11.Connection:
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    return client


def split(head: bytes) -> tuple[bytes, Fields]:
    reason, *lines = head.split(b"\r\n")
    return reason, [(line.partition(b": ")[0], line.partition(b": ")[2]) for line in lines[:-1]]


def composed(method: str, status: int, length: int, head: bytes, version: str, keep_alive: bool) -> bytes:
    request = asked(method, version, keep_alive)
    bodiless = has_no_body(method.encode(), status)
    return ANSWERER._compose(request, Response(status, length, 0, 0, head), bodiless=bodiless)


def compare(method: str, status: int, length: int, head: bytes, keep_alive: bool = True) -> None:
    """An accepted head leaves as h11 would write the same fields, and an h11 client reads those back.

    h11 moves two fields: Host to the front, Transfer-Encoding to the end; else it is the same byte for byte.
    """
    ours = composed(method, status, length, head, "1.1", keep_alive)
    reason, fields = split(ours[len(b"HTTP/1.1 200 ") : -2])
    theirs = h11_server(method).send(h11.Response(status_code=status, headers=fields, reason=reason))
    assert theirs is not None
    if method == "HEAD" and length == NO_BODY:  # h11 says how a GET would be framed; RFC 9110, 9.3.2: need not be
        theirs = theirs.replace(b"Transfer-Encoding: chunked\r\n", b"")
    if any(name.lower() in (b"host", b"transfer-encoding") for name, _ in fields):
        assert sorted(theirs.split(b"\r\n")) == sorted(ours.split(b"\r\n"))
    else:
        assert theirs == ours
    client = h11_client(method)
    client.receive_data(ours)
    event = client.next_event()
    assert isinstance(event, h11.Response)
    assert (event.status_code, event.reason) == (status, reason)
    assert list(event.headers.raw_items()) == fields
    sent_reason, sent = split(head)
    assert reason == sent_reason
    assert fields[: len(sent)] == sent
    assert {name.lower() for name, _ in fields[len(sent) :]} <= {
        b"content-length", b"transfer-encoding", b"connection", b"x-request-id"
    }  # fmt: skip
    if has_no_body(method.encode(), status):
        assert isinstance(client.next_event(), h11.EndOfMessage)


def is_accepted(head: bytes) -> bool:
    try:
        check_relayed(head)
    except Failure as exc:
        assert exc.outcome == "local_broken"
        return False
    return True


names = st.one_of(
    st.sampled_from([b"Set-Cookie", b"X-A", b"x-a", b"Content-Type", b"ETag", b"Trailer", b"Vary", b"Via", b"Date"]),
    st.from_regex(re.compile(TOKEN.decode()), fullmatch=True).map(str.encode),
)
values = st.from_regex(re.compile(r"([!-~\x80-\xff]+([\t ]+[!-~\x80-\xff]+)*)?"), fullmatch=True).map(
    lambda text: text.encode("latin-1")
)
reasons = st.from_regex(re.compile(r"[\t -~\x80-\xff]*"), fullmatch=True).map(lambda text: text.encode("latin-1"))
statuses = st.one_of(st.sampled_from([200, 204, 206, 301, 304, 404, 426, 500, 599]), st.integers(200, 999))
lengths = st.sampled_from([NO_BODY, UNKNOWN, 0, 5, 1 << 40])


@given(
    st.sampled_from(["GET", "HEAD", "POST"]),
    statuses,
    lengths,
    reasons,
    st.lists(st.tuples(names, values), max_size=8),
    st.booleans(),
)
@settings(max_examples=150)
@example("GET", 200, 5, b"OK", [(b"Set-Cookie", b"a=b"), (b"set-cookie", b"c=d"), (b"X-Empty", b"")], True)
@example("HEAD", 200, 5, b"OK", [], False)
@example("GET", 204, 0, b"No Content", [], True)
@example("GET", 304, 5, b"", [(b"ETag", b'"x"')], True)
@example("GET", 200, 5, b"OK", [(b"A", b"b"), (b"Host", b"c")], True)
def test_accepted_heads_leave_as_h11_would_write_them(
    method: str, status: int, length: int, reason: bytes, fields: Fields, keep_alive: bool
) -> None:
    head = reason + b"\r\n" + b"".join(name + b": " + value + b"\r\n" for name, value in fields)
    if is_accepted(head) and (length != UNKNOWN or not has_no_body(method.encode(), status)):
        compare(method, status, length, head, keep_alive=keep_alive)


@given(st.binary(max_size=60), st.integers(0, 60), st.sampled_from([b"", b"\r", b"\n", b"\r\n", b"\0", b" ", b": "]))
@settings(max_examples=200)
def test_any_bytes_that_are_accepted_leave_as_h11_would_write_them(noise: bytes, at: int, insert: bytes) -> None:
    whole = b"OK\r\nContent-Type: text/html\r\nSet-Cookie: a=b; Path=/\r\n"
    for head in (noise, b"OK\r\n" + noise + b"\r\n", whole[:at] + insert + whole[at:], whole[:at] + noise + whole[at:]):
        if is_accepted(head):
            compare("GET", 200, 5, head)


REFUSED = {
    "nothing": b"",
    "no end of line": b"OK",
    "bare lf": b"OK\n",
    "second head": b"OK\r\n\r\nHTTP/1.1 200 OK\r\n",
    "empty line": b"OK\r\n\r\n",
    "space before colon": b"OK\r\nA : b\r\n",
    "no space after colon": b"OK\r\nA:b\r\n",
    "two spaces after colon": b"OK\r\nA:  b\r\n",
    "space at the end": b"OK\r\nA: b \r\n",
    "fold": b"OK\r\nA: b\r\n c\r\n",
    "no name": b"OK\r\n: b\r\n",
    "null": b"OK\r\nA: b\0c\r\n",
    "control": b"OK\r\nA: b\x01\r\n",
    "null in the reason": b"O\0K\r\n",
    "bare cr in the reason": b"O\rK\r\n",
    "bare cr": b"OK\r\nA: b\rC: d\r\n",
    "bare lf inside": b"OK\r\nA: b\nC: d\r\n",
    "connection": b"OK\r\nConnection: keep-alive\r\n",
    "length": b"OK\r\ncontent-length: 5\r\n",
    "second is length": b"OK\r\nA: b\r\nCONTENT-LENGTH: 5\r\n",
    "encoding": b"OK\r\nTransfer-Encoding: chunked\r\n",
    "keep-alive": b"OK\r\nKeep-Alive: timeout=5\r\n",
    "our outcome": b"OK\r\nx-tunnel-outcome: ok\r\n",
    "our id": b"OK\r\nX-Request-Id: theirs\r\n",
}


#: h11 would send these, control characters and all; we don't
LENIENT = {"control", "null in the reason", "bare cr in the reason"}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_heads_are_refused_or_different_in_h11(name: str) -> None:
    """What is refused is no loss: h11 would refuse it, write other bytes, or it is not the agent's to set."""
    head = REFUSED[name]
    assert not is_accepted(head)
    reason, fields = split(head)
    ours = {b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"x-tunnel-outcome", b"x-request-id"}
    if any(field.lower() in ours for field, _ in fields):
        return
    try:
        raw = h11_server("GET").send(h11.Response(status_code=200, headers=fields, reason=reason))
    except h11.LocalProtocolError:
        return
    written = (raw or b"").removeprefix(b"HTTP/1.1 200 ").removesuffix(b"\r\n")
    assert written.replace(b"Transfer-Encoding: chunked\r\n", b"") != head or name in LENIENT


@pytest.mark.parametrize("length", [NO_BODY, UNKNOWN, 0, 5])
@pytest.mark.parametrize("status", [200, 204, 304, 404])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("version", "keep_alive"), [("1.1", True), ("1.1", False), ("1.0", False)])
def test_framing(method: str, status: int, length: int, version: str, keep_alive: bool) -> None:
    """RFC 9112, 6.3: the visitor reads the body's end where we put it."""
    bodiless = has_no_body(method.encode(), status)
    raw = composed(method, status, length, b"OK\r\n", version, keep_alive)
    client = h11_client(method)
    client.receive_data(raw)
    event = client.next_event()
    assert isinstance(event, h11.Response)
    fields = dict(event.headers)
    assert not {b"content-length", b"transfer-encoding"} <= fields.keys()
    if status == 204:
        assert b"content-length" not in fields
    if bodiless:
        assert isinstance(client.next_event(), h11.EndOfMessage)
        assert b"transfer-encoding" not in fields
    elif length == UNKNOWN:
        assert (b"transfer-encoding" in fields) is (version == "1.1")
        assert version == "1.1" or fields[b"connection"] == b"close"
    else:
        assert fields[b"content-length"] == b"%d" % max(length, 0)
    assert (fields.get(b"connection") == b"close") is (not keep_alive)


def test_keep_alive_is_said_to_1_0_and_not_where_the_body_ends_with_the_connection() -> None:
    assert b"\r\nConnection: keep-alive\r\n" in composed("GET", 200, 5, b"OK\r\n", "1.0", True)
    assert b"\r\nConnection: close\r\n" in composed("GET", 200, UNKNOWN, b"OK\r\n", "1.0", True)
    assert b"onnection" not in composed("GET", 200, 5, b"OK\r\n", "1.1", True)
