"""Heads recognised by the one before them, against the parser: the same bytes give the same head, or go its way."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunnel.errors import Failure
from tunnel.http.heads import Head, parse_request
from tunnel.http.repeated import MAX_FIELDS, MAX_KEPT, KnownHead, know

MAX_TARGET = 200
FIRST = b"GET /a HTTP/1.1\r\nHost: app.example.com\r\nAccept: */*\r\nUser-Agent: x\r\n\r\n"


def known(raw: bytes) -> KnownHead:
    made = know(raw, parse_request(raw, MAX_TARGET))
    assert made is not None
    return made


def parsed(raw: bytes) -> Head | None:
    try:
        return parse_request(raw, MAX_TARGET)
    except Failure:
        return None


def agree(first: KnownHead, raw: bytes) -> bool:
    """Whether the head was recognised; if so it must say what the parser says."""
    target = first.recognise(raw, MAX_TARGET)
    if not target:
        return False
    assert parsed(raw) == first.head.at(target)
    return True


def test_another_address() -> None:
    first = known(FIRST)
    assert agree(first, FIRST)
    assert agree(first, FIRST.replace(b"/a", b"/another/one?with=a%20query&more"))
    assert agree(first, FIRST.replace(b"/a", b"/" + b"x" * (MAX_TARGET - 1)))


@pytest.mark.parametrize(
    "raw",
    [
        FIRST.replace(b"/a", b"/" + b"x" * MAX_TARGET),
        FIRST.replace(b"/a", b""),
        FIRST.replace(b"/a", b"a"),
        FIRST.replace(b"/a", b"http://app.example.com/a"),
        FIRST.replace(b"/a", b"*"),
        FIRST.replace(b"/a", b"/a#b"),
        FIRST.replace(b"/a", b"/a b"),
        FIRST.replace(b"/a", b"/a\tb"),
        FIRST.replace(b"/a", b"/a HTTP/1.1\r\nHost: b"),
        FIRST.replace(b"/a", "/ä".encode()),
        FIRST.replace(b"/a", b"/a\x00"),
        FIRST.replace(b"GET", b"HEAD"),
        FIRST.replace(b"GET", b"get"),
        FIRST.replace(b"1.1", b"1.0"),
        FIRST.replace(b"*/*", b"*/* "),
        FIRST.replace(b"\r\n\r\n", b"\r\nX: y\r\n\r\n"),
        b"\r\n" + FIRST,
        FIRST[:-2],
        b"GET  HTTP/1.1\r\n",
        b"",
    ],
)
def test_what_differs_elsewhere_is_the_parsers(raw: bytes) -> None:
    assert not agree(known(FIRST), raw)


@pytest.mark.parametrize(
    "raw",
    [
        FIRST.replace(b"/a", b"http://app.example.com/a"),
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        FIRST.replace(b"1.1", b"1.0"),
        FIRST.replace(b"Accept: */*", b"Connection: upgrade\r\nUpgrade: websocket"),
        FIRST.replace(b"*/*", b"x" * MAX_KEPT),
        FIRST.replace(b"Accept: */*\r\n", b"A: b\r\n" * MAX_FIELDS),
    ],
)
def test_not_kept(raw: bytes) -> None:
    assert know(raw, parse_request(raw, MAX_TARGET)) is None


def test_bodies_are_framed_as_before() -> None:
    raw = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"
    assert agree(known(raw), raw.replace(b"/a", b"/b"))
    assert not agree(known(raw), raw.replace(b": 5", b": 6"))
    assert agree(known(raw.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked")), raw) is False


FIRSTS = [
    FIRST,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
    b"PUT /x_y HTTP/1.1\r\nHost: a\r\nA_B: 1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n",
    b"DELETE /GET HTTP/1.1\r\nhost:a:80 \r\nCookie: GET / HTTP/1.1\r\n\r\n",
]
TEXTS = st.text(st.characters(max_codepoint=255), max_size=40).map(lambda text: text.encode("latin-1"))


@settings(max_examples=300)
@given(st.sampled_from(FIRSTS), TEXTS, st.integers(0, 80), st.integers(0, 6))
@example(FIRSTS[0], b" /b HTTP/1.1\r\nHost: evil\r\n\r\nGET ", 3, 1)
@example(FIRSTS[0], b"\r\n\r\n", 6, 0)
def test_changed_bytes_are_read_alike(first: bytes, put: bytes, at: int, cut: int) -> None:
    agree(known(first), first[:at] + put + first[at + cut :])


@settings(max_examples=300)
@given(
    st.sampled_from(FIRSTS), st.text(st.characters(max_codepoint=255), max_size=40).map(lambda t: t.encode("latin-1"))
)
def test_every_address_is_read_alike(first: bytes, target: bytes) -> None:
    raw = re.sub(rb"(?<= )/\w*(?= HTTP)", lambda _: b"/" + target, first, count=1)
    one = known(first)
    if not agree(one, raw) and 1 + len(target) <= MAX_TARGET:
        assert parsed(raw) is None or not re.fullmatch(rb"[!-\"$-~]*", target)
