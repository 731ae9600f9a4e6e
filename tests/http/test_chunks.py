"""Chunked bodies: what is read and what is refused, of visitors and of local services, in any cut."""

import time

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tunnel.errors import Failure
from tunnel.http.chunks import MAX_EXTENSIONS, MAX_LINE, MAX_TRAILERS, STEPS, Chunks

VISITOR, SERVICE = "bad_request", "local_broken"
BOTH = pytest.mark.parametrize("outcome", [VISITOR, SERVICE])


def read(raw: bytes, outcome: str = VISITOR, step: int = 0) -> tuple[bytes, bytes, bytes]:
    """(body, trailers, rest), read in steps of so many bytes."""
    chunks, body, step = Chunks(outcome), b"", step or len(raw)
    for at in range(0, len(raw), step):
        body += b"".join(chunks.feed(raw[at : at + step]))
        while chunks.is_behind:
            body += b"".join(chunks.feed(b""))
    assert chunks.ended, "more is wanted"
    return body, chunks.trailers, chunks.rest


def refusal(raw: bytes, outcome: str = VISITOR, step: int = 0) -> str:
    with pytest.raises(Failure) as caught:
        read(raw, outcome, step)
    assert caught.value.outcome == outcome
    return caught.value.text


GOOD = {
    "nothing": (b"0\r\n\r\n", b"", b""),
    "zeros": (b"0000\r\n\r\n", b"", b""),
    "one": (b"5\r\nhello\r\n0\r\n\r\n", b"hello", b""),
    "capitals": (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789", b""),
    "leading zeros": (b"0000005\r\nhello\r\n0\r\n\r\n", b"hello", b""),
    "line ends in the data": (b"6\r\n\r\n0\r\n\r\r\n0\r\n\r\n", b"\r\n0\r\n\r", b""),
    "extensions": (b'5;a=b;c="d"\r\nhello\r\n0;x\r\n\r\n', b"hello", b""),
    "trailers": (b"0\r\nX-Sum: 1\r\nB:\r\nC:\t2 \r\n\r\n", b"", b"X-Sum: 1\r\nB: \r\nC: 2\r\n"),
    "a trailer that is none": (b"0\r\nHost: a\r\nX-Sum: 1\r\n\r\n", b"", b"X-Sum: 1\r\n"),
    "credentials in a trailer": (b"0\r\nAuthorization: a\r\nCookie: b\r\nX_Real_IP: c\r\n\r\n", b"", b""),
}


@BOTH
@pytest.mark.parametrize("name", GOOD)
def test_good_bodies(name: str, outcome: str) -> None:
    raw, body, trailers = GOOD[name]
    for step in (0, 1, 2, 3):
        assert read(raw + b"NEXT", outcome, step) == (body, trailers, b"NEXT")


BAD = {
    "no number": b"x\r\n",
    "no size": b"\r\n",
    "a sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "an underscore": b"1_0\r\n",
    "a space in front": b" 5\r\nhello\r\n0\r\n\r\n",
    "a control byte": b"5 \x00\r\n",
    "sixteen digits": b"0000000000000005\r\nhello\r\n0\r\n\r\n",
    "a bare LF": b"5\nhello\r\n0\r\n\r\n",
    "a bare CR": b"5\rhello\r\n0\r\n\r\n",
    "CR CR LF": b"5\r\r\nhello\r\n0\r\n\r\n",
    "a bare LF in the extension": b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "a control byte in the extension": b"5;a\x00\r\nhello\r\n0\r\n\r\n",
    "words and no semicolon": b"5 a\r\nhello\r\n0\r\n\r\n",
    "a longer chunk": b"5\r\nhelloX\r\n0\r\n\r\n",
    "a bare LF behind the data": b"5\r\nhello\n0\r\n\r\n",
    "nothing behind the data": b"5\r\nhello0\r\n\r\n",
    "a bare LF at the end": b"0\r\n\n",
    "a bare LF in the trailers": b"0\r\nA: b\nC: d\r\n\r\n",
    "a bare CR in the trailers": b"0\r\nA: b\rC: d\r\n\r\n",
    "a folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "a space before the colon": b"0\r\nA : b\r\n\r\n",
    "a trailer without a colon": b"0\r\nA\r\n\r\n",
    "a trailer without a name": b"0\r\n: b\r\n\r\n",
    "a control byte in a trailer": b"0\r\nA: b\x01\r\n\r\n",
    "LF CRLF at the end": b"0\r\nA: b\n\r\n",
}


@BOTH
@pytest.mark.parametrize("name", BAD)
def test_malformed_bodies(name: str, outcome: str) -> None:
    for step in (0, 1, 2, 3):
        assert "malformed" in refusal(BAD[name] + b"GET / HTTP/1.1\r\n\r\n", outcome, step)


@pytest.mark.parametrize("line", [b"5 ", b"5\t ", b"5 ;a"])
def test_a_padded_size_is_taken_from_services_only(line: bytes) -> None:
    raw = line + b"\r\nhello\r\n0 \r\n\r\n"
    assert read(raw, SERVICE) == (b"hello", b"", b"")
    assert refusal(raw, VISITOR)


@pytest.mark.parametrize("field", [b"Content-Length: 0", b"transfer-encoding: chunked", b"TRANSFER-ENCODING:x"])
def test_framing_in_a_trailer_is_dropped_from_services_and_refused_from_visitors(field: bytes) -> None:
    raw = b"0\r\nA: b\r\n" + field + b"\r\n\r\n"
    assert read(raw, SERVICE) == (b"", b"A: b\r\n", b"")
    assert "framing" in refusal(raw, VISITOR)


@BOTH
def test_bounds(outcome: str) -> None:
    assert read(b"5;" + b"a" * (MAX_LINE - 4) + b"\r\nhello\r\n0\r\n\r\n", outcome)[0] == b"hello"
    assert refusal(b"5;" + b"a" * (MAX_LINE - 3) + b"\r\nhello\r\n0\r\n\r\n", outcome)
    one = b"1;" + b"a" * 500 + b"\r\nx\r\n"
    fit = MAX_EXTENSIONS // 501
    assert read(one * fit + b"0\r\n\r\n", outcome)[0] == b"x" * fit
    assert refusal(one * (fit + 1) + b"0\r\n\r\n", outcome)
    assert refusal(b"0\r\nA: " + b"a" * MAX_TRAILERS + b"\r\n\r\n", outcome)
    assert refusal(b"0\r\n" + b"A:\r\n" * (MAX_TRAILERS // 4 - 1) + b"\r\n", outcome)
    assert len(read(b"0\r\n" + b"A:\r\n" * (MAX_TRAILERS // 5) + b"\r\n", outcome)[1]) == MAX_TRAILERS // 5 * 5
    assert refusal(b"0\r\n" + b"A: b\r\n" * (MAX_TRAILERS // 6 + 1) + b"\r\n", outcome, 100)


@BOTH
@pytest.mark.parametrize(
    "endless",
    [
        b"5;" + b"a" * 4096, b"0" * 4096, b"5" + b" " * 4096, b"0\r\nA: " + b"a" * 32768, b"0\r\n\n", b"0\r\nA: b\n",
        b"0\r\nA\rB",
    ],
)  # fmt: skip
def test_what_never_ends_is_refused_before_it_ends(endless: bytes, outcome: str) -> None:
    assert refusal(endless, outcome, 100)


@pytest.mark.parametrize(
    "block", [b"A: b" + b" " * 16000 + b"c", b"A:" + b" \t" * 8000, b"a" * 16000, b"A:\r\n" * 4000]
)
def test_hostile_trailers_take_no_time(block: bytes) -> None:
    started = time.process_time()
    try:
        read(b"0\r\n" + block + b"\r\n\r\n")
    except Failure:
        pass
    assert time.process_time() - started < 0.1


@given(st.lists(st.binary(min_size=1, max_size=80), max_size=6), st.integers(1, 40), st.booleans())
def test_any_cut(parts: list[bytes], step: int, trailers: bool) -> None:
    raw = b"".join(b"%x;ext\r\n%b\r\n" % (len(part), part) for part in parts)
    raw += b"0\r\nX-Sum: 1\r\nX-Request-Id: t\r\n\r\n" if trailers else b"0\r\n\r\n"
    assert read(raw + b"NEXT", step=step) == (b"".join(parts), b"X-Sum: 1\r\n" if trailers else b"", b"NEXT")


async def test_many_tiny_chunks_are_read_in_turns() -> None:
    """A read of 64 KiB may hold 11,000 of them."""
    chunks, turns = Chunks(), 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        raw = b"1\r\nx\r\n" * 11_000
        assert await chunks.read(raw[:-2]) == b"x" * 11_000
        assert turns >= 3 * 11_000 // STEPS - 3
        turns = 0
        assert await chunks.read(raw[-2:] + b"ffff\r\n" + b"y" * 65_535 + b"\r\n0\r\n\r\n") == b"y" * 65_535
        assert chunks.ended and turns == 0
        nursery.cancel_scope.cancel()


def test_the_end_of_a_turn_may_be_anywhere() -> None:
    """Between chunks, within them, in trailers; what is wrong later is still found, and what follows is still there."""
    for size in range(1, 8):
        for count in range(STEPS // 3 - 1, STEPS // 3 + 2):
            raw = (b"%x\r\n" % size + b"x" * size + b"\r\n") * count
            for step in (0, len(raw) - 1, len(raw) - 4, len(raw) // 2):
                body = b"x" * size * count
                assert read(raw + b"0\r\nA: b\r\n\r\nNEXT", step=step) == (body, b"A: b\r\n", b"NEXT")
            assert refusal(raw + b"1\r\nxx\r\n")


def test_data_is_passed_on_before_its_chunk_is_whole() -> None:
    chunks = Chunks()
    assert chunks.feed(b"5\r\nhel") == [b"hel"]
    assert chunks.feed(b"lo") == [b"lo"]
    assert not chunks.ended
