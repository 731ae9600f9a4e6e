"""Request heads that get in, those that don't, and what is made of them on the way to the local service."""

import re
import traceback

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunnel.errors import Failure
from tunnel.http.forwarded import read_forwarded
from tunnel.http.heads import CHUNKED, TOKEN, check_trailers, forwarded_head, parse_request
from tunnel.http.misread import meaning_of

MAX_TARGET = 16384
OWN = b"X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: http\r\nX-Request-Id: r-1\r\n"


def head(first: bytes = b"GET / HTTP/1.1", *fields: bytes, host: bytes = b"Host: a.localhost") -> bytes:
    return b"".join(line + b"\r\n" for line in (first, *([host] if host else []), *fields)) + b"\r\n"


def refusal(raw: bytes) -> str:
    with pytest.raises(Failure) as caught:
        parse_request(raw, MAX_TARGET)
    return caught.value.outcome


@pytest.mark.parametrize(
    "fields",
    [
        (b"Cookie: hunter2", b"Host: b"), (b"Cookie: hunter2\x01",), (b"Content-Length: hunter2",), (b"hunter2",),
        (b"Transfer-Encoding: hunter2",), (b"Content-Length: 1", b"Content-Length: 2", b"Cookie: hunter2"),
    ],
)  # fmt: skip
def test_a_refusal_shows_nothing_of_the_head(fields: tuple[bytes, ...]) -> None:
    """It goes into the log, and what a visitor sent may be a secret."""
    with pytest.raises(Failure) as caught:
        parse_request(head(b"GET / HTTP/1.1", *fields), MAX_TARGET)
    shown = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in shown and "bytearray" not in shown


def test_fields_are_counted_before_anything_looks_into_them() -> None:
    """The head is malformed too, and longer to parse than it is worth."""
    raw = b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 15_000 + b"a b\r\n\r\n"
    with pytest.raises(Failure, match="the head has 15001 fields; 200 are accepted") as caught:
        parse_request(raw, MAX_TARGET, 200)
    assert (caught.value.outcome, caught.value.limit) == ("head_too_large", "header_count")
    assert len(parse_request(head(b"GET / HTTP/1.1", b"a: b"), MAX_TARGET, 2).fields) == 2
    assert refusal(raw) == "bad_request"


@pytest.mark.parametrize("said", ["illegal header line: bytearray(b'hunter2')", "something new: b'hunter2'"])
def test_nothing_that_h11_quotes_is_passed_on(said: str) -> None:
    assert "hunter2" not in meaning_of(h11.RemoteProtocolError(said))


# What gets in -----------------------------------------------------------------------------------------------------

GOOD = [
    (head(), b"GET", b"/", None),
    (head(b"POST /a?b=c HTTP/1.1", b"Content-Length: 5"), b"POST", b"/a?b=c", 5),
    (head(b"POST / HTTP/1.1", b"Content-Length: 0"), b"POST", b"/", 0),
    (head(b"POST / HTTP/1.1", b"content-length:5"), b"POST", b"/", 5),
    (head(b"POST / HTTP/1.1", b"Content-Length: \t 5 \t"), b"POST", b"/", 5),
    (head(b"POST / HTTP/1.1", b"Content-Length: 007"), b"POST", b"/", 7),
    (head(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked"), b"POST", b"/", CHUNKED),
    (head(b"POST / HTTP/1.1", b"Transfer-Encoding: Chunked"), b"POST", b"/", CHUNKED),
    (head(b"OPTIONS * HTTP/1.1"), b"OPTIONS", b"*", None),
    (head(b"GET http://a.localhost/x?y HTTP/1.1"), b"GET", b"/x?y", None),
    (head(b"GET HTTP://a.localhost HTTP/1.1"), b"GET", b"/", None),
    (head(b"GET https://a.localhost?q HTTP/1.1"), b"GET", b"/?q", None),
    (head(b"GET / HTTP/1.0"), b"GET", b"/", None),
    (head(b"GET / HTTP/1.0", host=b""), b"GET", b"/", None),
    (head(b"M-SEARCH //double//slash HTTP/1.1"), b"M-SEARCH", b"//double//slash", None),
    (head(b"get /lower HTTP/1.1"), b"get", b"/lower", None),
    (head(b"GET /%00%0d%0a HTTP/1.1"), b"GET", b"/%00%0d%0a", None),
    (head(b'GET /{}|^`"<> HTTP/1.1'), b"GET", b'/{}|^`"<>', None),
    (head(b"GET /../../etc/passwd HTTP/1.1"), b"GET", b"/../../etc/passwd", None),
    (head(b"GET / HTTP/1.1", b"X-Text: caf\xc3\xa9 \xff"), b"GET", b"/", None),
    (head(b"GET / HTTP/1.1", b"X-Empty:", b"X-Blank: \t "), b"GET", b"/", None),
    (head(b"GET / HTTP/1.1", b"!#$%&'*+-.^_`|~09azAZ: odd name"), b"GET", b"/", None),
    (head(b"POST / HTTP/1.1", b"Expect: 100-Continue", b"Content-Length: 1"), b"POST", b"/", 1),
]


@pytest.mark.parametrize(("raw", "method", "target", "length"), GOOD)
def test_good_heads(raw: bytes, method: bytes, target: bytes, length: int | None) -> None:
    parsed = parse_request(raw, MAX_TARGET)
    assert (parsed.method, parsed.target, parsed.length) == (method, target, length)


def test_the_authority_of_an_absolute_target_is_the_host() -> None:
    raw = head(b"GET http://B.localhost:81/ HTTP/1.1", host=b"Host: b.localhost:81")
    assert parse_request(raw, MAX_TARGET).host == b"B.localhost:81"
    assert refusal(head(b"GET http://b.localhost/ HTTP/1.1")) == "bad_request"
    assert parse_request(head(b"GET / HTTP/1.1"), MAX_TARGET).host == b"a.localhost"


# What does not ----------------------------------------------------------------------------------------------------

CL, TE = b"Content-Length: 5", b"Transfer-Encoding: chunked"
POST = b"POST / HTTP/1.1"
BAD = {
    # two ways to say how long the body is (RFC 9112, 6.1 and 6.3), and ways to hide one of them
    "cl and te": head(POST, CL, TE),
    "te and cl": head(POST, TE, CL),
    "te and cl 0": head(POST, b"Content-Length: 0", TE),
    "cl twice": head(POST, CL, CL),
    "cl differs": head(POST, CL, b"Content-Length: 6"),
    "cl list": head(POST, b"Content-Length: 5, 6"),
    "cl plus": head(POST, b"Content-Length: +5"),
    "cl minus": head(POST, b"Content-Length: -5"),
    "cl hex": head(POST, b"Content-Length: 0x5"),
    "cl underscore": head(POST, b"Content-Length: 1_0"),
    "cl empty": head(POST, b"Content-Length:"),
    "cl words": head(POST, b"Content-Length: 5 5"),
    "cl decimal": head(POST, b"Content-Length: 5.0"),
    "cl arabic digits": head(POST, "Content-Length: \N{ARABIC-INDIC DIGIT FIVE}".encode()),
    "cl space before colon": head(POST, b"Content-Length : 5"),
    "cl tab before colon": head(POST, b"Content-Length\t: 5"),
    "te space before colon": head(POST, b"Transfer-Encoding : chunked"),
    "te twice": head(POST, TE, TE),
    "te list": head(POST, b"Transfer-Encoding: chunked, chunked"),
    "te gzip": head(POST, b"Transfer-Encoding: gzip, chunked"),
    "te identity": head(POST, b"Transfer-Encoding: identity"),
    "te chunked first": head(POST, b"Transfer-Encoding: chunked, identity"),
    "te quoted": head(POST, b'Transfer-Encoding: "chunked"'),
    "te x": head(POST, b"Transfer-Encoding: xchunked"),
    "te parameter": head(POST, b"Transfer-Encoding: chunked;a=b"),
    "te vertical tab": head(POST, b"Transfer-Encoding: \x0bchunked"),
    "te form feed": head(POST, b"Transfer-Encoding:\x0cchunked"),
    "te null": head(POST, b"Transfer-Encoding: chunked\x00"),
    "te nbsp": head(POST, b"Transfer-Encoding: \xa0chunked"),
    "te bare cr": head(POST, b"X: y\rTransfer-Encoding: chunked"),
    "te bare lf": head(POST, b"X: y\nTransfer-Encoding: chunked"),
    "te folded": head(POST, b"Transfer-Encoding:\r\n chunked"),
    "te in the fold of another": head(POST, b"X: y", b" Transfer-Encoding: chunked"),
    "te on 1.0": head(b"POST / HTTP/1.0", TE),
    "te empty": head(POST, b"Transfer-Encoding:"),
    # lines
    "bare lf": head().replace(b"\r\n", b"\n"),
    "bare lf at the end": head()[:-2] + b"\n",
    "bare lf inside": head(b"GET / HTTP/1.1", b"A: b\nC: d"),
    "bare cr inside": head(b"GET / HTTP/1.1", b"A: b\rC: d"),
    "cr cr lf": head(b"GET / HTTP/1.1", b"A: b\r"),
    "fold": head(b"GET / HTTP/1.1", b"A: b", b"\tc"),
    "fold of the first": head(b"GET / HTTP/1.1", host=b" Host: a"),
    "no colon": head(b"GET / HTTP/1.1", b"A"),
    "no name": head(b"GET / HTTP/1.1", b": b"),
    "space in name": head(b"GET / HTTP/1.1", b"A B: c"),
    "non-ASCII name": head(b"GET / HTTP/1.1", b"\xc3\xa9: c"),
    "bracket in name": head(b"GET / HTTP/1.1", b"A[0]: c"),
    "null in value": head(b"GET / HTTP/1.1", b"A: b\x00c"),
    "control in value": head(b"GET / HTTP/1.1", b"A: b\x01c"),
    "delete in value": head(b"GET / HTTP/1.1", b"A: b\x7fc"),
    "escape in value": head(b"GET / HTTP/1.1", b"A: \x1b[31m"),
    "null in name": head(b"GET / HTTP/1.1", b"A\x00: b"),
    "nothing": b"\r\n",
    "half": b"GET / HTTP/1.1\r\nHost: a\r\n",
    "two heads": head() + head(),
    # the request line
    "no version": head(b"GET /"),
    "0.9": b"GET /\r\n\r\n",
    "version 2": head(b"GET / HTTP/2.0"),
    "preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\n",
    "version 1.2": head(b"GET / HTTP/1.2"),
    "version 0.9": head(b"GET / HTTP/0.9"),
    "version 1.10": head(b"GET / HTTP/1.10"),
    "version 11": head(b"GET / HTTP/11"),
    "version of letters": head(b"GET / HTTP/1.x"),
    "lower-case http": head(b"GET / http/1.1"),
    "another protocol": head(b"GET / ICY/1.1"),
    "space after version": head(b"GET / HTTP/1.1 "),
    "two spaces": head(b"GET  / HTTP/1.1"),
    "tab": head(b"GET\t/ HTTP/1.1"),
    "space in target": head(b"GET /a b HTTP/1.1"),
    "space before method": head(b" GET / HTTP/1.1"),
    "no target": head(b"GET HTTP/1.1"),
    "method with brackets": head(b"G(T / HTTP/1.1"),
    "null in target": head(b"GET /\x00 HTTP/1.1"),
    "non-ASCII target": head("GET /é HTTP/1.1".encode()),
    "fragment": head(b"GET /a#b HTTP/1.1"),
    "fragment of an absolute target": head(b"GET http://a.localhost/#b HTTP/1.1"),
    "relative": head(b"GET a/b HTTP/1.1"),
    "star with GET": head(b"GET * HTTP/1.1"),
    "authority with GET": head(b"GET a.localhost:80 HTTP/1.1"),
    "ftp": head(b"GET ftp://a.localhost/ HTTP/1.1"),
    "file": head(b"GET file:///etc/passwd HTTP/1.1"),
    "user information": head(b"GET http://a@b.localhost/ HTTP/1.1"),
    "no authority": head(b"GET http:///x HTTP/1.1"),
    "script": head(b"GET javascript:alert(1) HTTP/1.1"),
    # Host
    "no host": head(host=b""),
    "two hosts": head(b"GET / HTTP/1.1", b"Host: b.localhost"),
    "same host twice": head(b"GET / HTTP/1.1", b"host: a.localhost"),
    "two hosts on 1.0": head(b"GET / HTTP/1.0", b"Host: b.localhost"),
    "absolute without host": head(b"GET http://a.localhost/ HTTP/1.1", host=b""),
    # Expect
    "expect": head(POST, b"Expect: 200-ok"),
    "expect list": head(POST, b"Expect: 100-continue, x"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_heads(name: str) -> None:
    assert refusal(BAD[name]) == "bad_request"


def test_too_long_and_too_large() -> None:
    assert refusal(head(b"GET /" + b"a" * MAX_TARGET + b" HTTP/1.1")) == "uri_too_long"
    assert parse_request(head(b"GET /" + b"a" * (MAX_TARGET - 1) + b" HTTP/1.1"), MAX_TARGET).method == b"GET"


@pytest.mark.parametrize("digits", [19, 20, 21, 5000])
def test_a_length_that_no_body_has(digits: int) -> None:
    assert refusal(head(POST, b"Content-Length: " + b"9" * digits)) in ("body_too_large", "bad_request")


@pytest.mark.parametrize(
    "fields",
    [(b"X_Forwarded_For: 6",), (b"Transfer_Encoding: chunked",), (b"X-A: 1", b"x_a: 2"), (b"X_B3-TraceId: 1",)],
)
def test_names_that_an_underscore_makes_another(fields: tuple[bytes, ...]) -> None:
    assert refusal(head(b"GET / HTTP/1.1", *fields)) == "bad_request"


def test_an_underscore_alone_is_fine() -> None:
    assert forwarded(b"X_Own: a_b")[2:] == [b"X_Own: a_b"]


def test_connect_is_named_for_what_it_is() -> None:
    assert refusal(head(b"CONNECT a.localhost:443 HTTP/1.1")) == "method_not_allowed"


@given(st.binary(max_size=300))
@example(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
def test_any_bytes_are_parsed_or_refused(raw: bytes) -> None:
    for data in (raw, b"GET / HTTP/1.1\r\nHost: a\r\n" + raw + b"\r\n\r\n"):
        try:
            parse_request(data, MAX_TARGET)
        except Failure as exc:
            assert exc.outcome in ("bad_request", "uri_too_long", "body_too_large", "method_not_allowed")


# What goes on -----------------------------------------------------------------------------------------------------


def forwarded(*fields: bytes, first: bytes = b"GET / HTTP/1.1", upgrade: bool = False) -> list[bytes]:
    made = forwarded_head(parse_request(head(first, *fields), MAX_TARGET), OWN, upgrade=upgrade)
    assert made.endswith(OWN)
    read_forwarded(made)
    return made.removesuffix(OWN).split(b"\r\n")[:-1]


def test_order_case_and_duplicates_are_kept() -> None:
    fields = (b"X-b: 1", b"x-A: 2", b"X-B: 3", b"COOKIE: a=b", b"cookie: c=d", b"Accept-Encoding: gzip")
    assert forwarded(*fields) == [b"GET / HTTP/1.1", b"Host: a.localhost", *fields]


def test_hop_by_hop_fields_go() -> None:
    assert forwarded(
        b"Connection: keep-alive, X-Hop", b"Keep-Alive: timeout=5", b"Proxy-Connection: x", b"TE: trailers",
        b"Proxy-Authorization: secret", b"Proxy-Authenticate: x", b"Upgrade: h2c", b"HTTP2-Settings: AA",
        b"x-hop: gone", b"X-Hop-2: stays", b"Trailer: X-End",
    )[2:] == [b"X-Hop-2: stays", b"Trailer: X-End"]  # fmt: skip


def test_what_we_set_cannot_come_from_outside() -> None:
    sent = [b"X-Forwarded-For: 6.6.6.6", b"x-forwarded-proto: https", b"X-FORWARDED-HOST: evil", b"Forwarded: for=6"]
    assert forwarded(*sent, b"X-Request-Id: theirs") == [b"GET / HTTP/1.1", b"Host: a.localhost"]


@pytest.mark.parametrize(
    "word", [b"Host", b"X-Forwarded-For", b"X-Forwarded-Proto", b"X-Request-Id", b"Content-Length", b"Connection"]
)
def test_naming_a_field_in_connection_removes_nothing_of_ours(word: bytes) -> None:
    parsed = parse_request(head(POST, b"Content-Length: 5", b"Connection: close, " + word), MAX_TARGET)
    made = forwarded_head(parsed, OWN, upgrade=False)
    assert made == b"POST / HTTP/1.1\r\nHost: a.localhost\r\n" + OWN
    assert parsed.length == 5  # travels beside the head


def test_host_is_the_authority_of_an_absolute_target_in_its_old_place() -> None:
    made = forwarded(b"A: b", first=b"GET http://A.localhost/x HTTP/1.1")
    assert made == [b"GET /x HTTP/1.1", b"Host: A.localhost", b"A: b"]
    raw = b"GET http://b.localhost/x HTTP/1.0\r\nA: b\r\n\r\n"
    made_1_0 = forwarded_head(parse_request(raw, MAX_TARGET), OWN, upgrade=False)
    assert made_1_0 == b"GET /x HTTP/1.1\r\nA: b\r\nHost: b.localhost\r\n" + OWN


def test_an_upgrade_keeps_its_two_fields() -> None:
    made = forwarded(b"Connection: keep-alive, Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: x", upgrade=True)
    assert made[2:] == [b"Sec-WebSocket-Key: x", b"Connection: Upgrade", b"Upgrade: websocket"]


names = st.from_regex(re.compile(TOKEN.decode()), fullmatch=True).map(str.encode)
values = st.from_regex(re.compile(r"[ \t]*([!-~\x80-\xff]([\t ]*[!-~\x80-\xff]+)*)?[ \t]*"), fullmatch=True).map(
    lambda text: text.encode("latin-1")
)
targets = st.from_regex(re.compile(r"/[!-\"$-~]*"), fullmatch=True).map(str.encode)


@given(names, targets, st.lists(st.tuples(names, values), max_size=8), st.booleans())
@example(b"GET", b"/", [(b"Connection", b"a,b, ,,x")], False)
@example(b"GET", b"/", [(b"Connection", b"\x80, (")], False)
def test_whatever_gets_in_is_accepted_at_the_other_end(
    method: bytes, target: bytes, fields: list[tuple[bytes, bytes]], upgrade: bool
) -> None:
    raw = head(b"%b %b HTTP/1.1" % (method, target), *(name + b":" + value for name, value in fields))
    try:
        parsed = parse_request(raw, MAX_TARGET)
    except Failure:
        return
    made = forwarded_head(parsed, OWN, upgrade=upgrade and bool(parsed.upgrade))
    read = read_forwarded(made)
    assert (read.method, read.target) == (method, target)
    connection = {word for name, value in fields if name.lower() == b"connection" for word in value.lower().split(b",")}
    kept = [(n, v.strip(b" \t")) for n, v in fields if n.lower() == b"x-kept" and b"x-kept" not in connection]
    for name, value in kept:
        assert name + b": " + value in made.split(b"\r\n")


@pytest.mark.parametrize(
    "made",
    [
        b"", b"GET / HTTP/1.1", b"GET / HTTP/1.0\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nA:b\r\n",
        b"GET / HTTP/1.1\r\nA: b \r\n", b"GET / HTTP/1.1\r\nA:  b\r\n", b"GET / HTTP/1.1\r\nA: b\n",
        b"GET / HTTP/1.1\r\nA : b\r\n", b"GET / HTTP/1.1\r\n A: b\r\n", b"GET / HTTP/1.1\r\nA: b\x00\r\n",
        b"GET /a b HTTP/1.1\r\n", b"GET /\xff HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nA: b\r\n\r\nGET / HTTP/1.1\r\n",
    ],
)  # fmt: skip
def test_the_agent_refuses_what_the_core_would_never_send(made: bytes) -> None:
    with pytest.raises(Failure):
        read_forwarded(made)


#: what the agent takes, in one piece; it judges the lines apart, to remember most of them
TRAVELS = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([!-~]+) HTTP/1\.1\r\n"
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+: (?:[!-~\x80-\xff]+(?:[\t ]+[!-~\x80-\xff]+)*)?\r\n)*"
)
PIECES = [
    b"GET / HTTP/1.1",
    b"\r\n",
    b"\r",
    b"\n",
    b"A: b",
    b"a: c",
    b"B:",
    b": ",
    b" ",
    b"X",
    b"\xff",
    b"\0",
    b"Host: a",
]


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.booleans())
@example([], True)
@example([b"A: b", b"\r\n", b"\r\n"], True)
@example([b"A: b", b"\r\n", b"\n"], True)
@example([b"A: b", b"\r\n", b"B: ", b"\r\n"], True)
def test_lines_judged_apart_are_judged_as_together(pieces: list[bytes], whole: bool) -> None:
    made = b"GET / HTTP/1.1\r\n" * whole + b"".join(pieces)
    try:
        read = read_forwarded(made)
    except Failure:
        assert TRAVELS.fullmatch(made) is None
        return
    match = TRAVELS.fullmatch(made)
    assert match is not None
    assert (read.method, read.target, read.line + read.fields) == (match[1], match[2], made)
    names = [line.partition(b":")[0].lower() for line in made.split(b"\r\n")[1:-1]]
    assert (read.names, read.last) == (frozenset(names[:-1]), names[-1] if names else b"")


@pytest.mark.parametrize(
    ("fields", "good"),
    [
        (b"", True), (b"A: b\r\nX-Sum: 1\r\n", True), (b"A:b\r\n", False), (b"A: b", False), (b"\r\n", False),
        (b"A: b\r\n\r\nHTTP/1.1 200 OK\r\n", False), (b"Content-Length: 5\r\n", False), (b"A: b\n", False),
        (b"A: b\r\ntransfer-encoding: chunked\r\n", False), (b"X-Tunnel-Outcome: ok\r\n", False),
    ],
)  # fmt: skip
def test_trailers_that_came_over_the_link(fields: bytes, good: bool) -> None:
    assert check_trailers(fields) is good
