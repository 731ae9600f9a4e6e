"""The table of broken local services: what a service does, and what the visitor may be told.

Steps are bytes to send or one of the words below; a service that has done all of them waits for the next request on the
same connection. `dirty`: the agent must not use that connection again.
"""

# ruff: noqa: E501 -- a table: a case a line

from __future__ import annotations

from dataclasses import dataclass

CLOSE, RESET, SILENCE, LATE = "close", "reset", "silence", "late"  # LATE: wait until the visitor has its answer
FLOOD = "flood"  # send the step before again and again, until nobody takes it
Step = bytes | str

BAD_GATEWAY = "502 local_broken"
TIMEOUT = "504 timeout"
BROKEN = "broken off"  # after its head, so that nobody takes it for complete
EITHER = "502 or broken off"  # whichever comes first


@dataclass(frozen=True)
class Case:
    """expected: one of the words above, or the whole answer's status and body."""

    name: str
    steps: tuple[Step, ...]
    expected: str | tuple[int, bytes]
    line: str = "GET"
    fields: tuple[str, ...] = ()
    body: bytes | None = None
    dirty: bool = True


CASES: list[Case] = []
OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
EVIL = OK + b"Content-Length: 4\r\n\r\nevil"
WEBSOCKET = ("Connection: Upgrade", "Upgrade: websocket")
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"


def case(name: str, expected: str | tuple[int, bytes], *steps: Step, **more: object) -> None:
    CASES.append(Case(name, steps, expected, **more))  # type: ignore[arg-type]


def _status_lines() -> None:
    for line in (
        b"", b"hello", b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 OK", b"HTTP/1.1 99 X", b"HTTP/1.1 1000 X", b"HTTP/1.1 20x X", b"HTTP/1.1 2 0",
        b"HTTP/1.1 -200 X", b"HTTP/1.1 +20 X", b"HTTP/1.1 0200 X", b"HTTP/1.1  200 OK", b"HTTP/1.1\t200\tOK", b"HTTP/2 200 OK", b"HTTP/1.2 200 OK",
        b"HTTP/0.9 200 OK", b"HTTP/3.0 200 OK", b"http/1.1 200 OK", b"ICY 200 OK", b"RTSP/1.0 200 OK", b" HTTP/1.1 200 OK", b"GET / HTTP/1.1",
        b"SSH-2.0-OpenSSH_9.6", b"220 mail ESMTP", b"-ERR unknown command", b"<!doctype html>", b"\x15\x03\x01\x00\x02\x02\x46", b"\0" * 8,
        b"HTTP/1.1 200 O\0K", b"HTTP/1.1 200 O\rK", b"HTTP/1.1 200 O\x7fK", b"\xef\xbb\xbfHTTP/1.1 200 OK",
    ):  # fmt: skip
        case(f"status line {line!r}", BAD_GATEWAY, line + b"\r\nContent-Length: 5\r\n\r\nhello")


def _fields() -> None:
    for name, field in {
        "no colon": b"A", "no name": b": b", "a space before the colon": b"A : b", "a space in the name": b"A B: c", "a NUL": b"A: b\0c",
        "a control byte": b"A: \x01", "DEL": b"A: \x7f", "an escape sequence": b"A: \x1b[2J", "a bare CR": b"Set-Cookie: a=b\rX-Injected: 1",
        "brackets in the name": b"A[0]: b", "a name in UTF-8": b"\xc3\xa9: b", "a status line": b"HTTP/1.1 200 OK", "a quoted name": b'"A": b',
        "CR CR LF": b"A: b\r", "a fold that starts with a control byte": b"A: b\r\n \x01",
    }.items():  # fmt: skip
        case(f"a field with {name}", BAD_GATEWAY, OK + field + b"\r\nContent-Length: 5\r\n\r\nhello")
    case("a fold before all fields", BAD_GATEWAY, OK + b" A: b\r\nContent-Length: 5\r\n\r\nhello")
    for value in (
        b"",
        b" ",
        b"-5",
        b"+5",
        b"0x5",
        b"5.0",
        b"5 5",
        b"five",
        b"5, 6",
        b"1_0",
        b"9" * 19,
        b"9" * 5000,
        b"5;",
        b"\xb5",
        b'"5"',
    ):
        case(f"Content-Length {value[:20]!r}", BAD_GATEWAY, OK + b"Content-Length: " + value + b"\r\n\r\nhello")
    case("two lengths", BAD_GATEWAY, OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello")
    for value in (
        b"",
        b"identity",
        b"gzip",
        b"gzip, chunked",
        b"chunked, chunked",
        b"xchunked",
        b"chunked;a=b",
        b'"chunked"',
        b"chunked\x0b",
    ):
        case(f"Transfer-Encoding {value!r}", BAD_GATEWAY, OK + b"Transfer-Encoding: " + value + b"\r\n\r\n0\r\n\r\n")
    case("chunked twice", BAD_GATEWAY, OK + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n")
    case("a head of more than 64 KiB", BAD_GATEWAY, OK + b"A: " + b"a" * 66_000 + b"\r\n\r\n")
    case(
        "a head that is too large once it is written properly", BAD_GATEWAY, OK[:-2] + b"\n" + b"A:\n" * 21_000 + b"\n"
    )
    case("a line that never ends", BAD_GATEWAY, OK + b"A: ", b"a" * 4096, FLOOD)
    case("fields that never end", BAD_GATEWAY, OK, b"A: b\r\n" * 500, FLOOD)
    case("bytes that never end and are no HTTP", BAD_GATEWAY, b"\0" * 4096, FLOOD)


def _lengths() -> None:
    case("more than its length", (200, b"hello"), HELLO + b" there")
    case("a second answer behind it", (200, b"hello"), HELLO + EVIL)
    case("a second answer a little later", (200, b"hello"), HELLO, LATE, EVIL)
    case("a line end a little later", (200, b"hello"), HELLO, LATE, b"\r\n")
    case("a closed connection a little later", (200, b"hello"), HELLO, LATE, CLOSE)
    case("a reset a little later", (200, b"hello"), HELLO, LATE, RESET)
    case("an interim answer behind it", (200, b"hello"), HELLO + b"HTTP/1.1 100 Continue\r\n\r\n")
    case("a body to a length of zero", (200, b""), OK + b"Content-Length: 0\r\n\r\nhello")
    case("a body to 204", (204, b""), b"HTTP/1.1 204 No Content\r\n\r\nhello")
    case("a length and a body to 204", (204, b""), b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello")
    case(
        "chunks to 204",
        (204, b""),
        b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    )
    case("a body to 304", (304, b""), b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\nhello")
    case(
        "a body to 204, a little later",
        (204, b""),
        b"HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\n",
        LATE,
        b"evil",
    )
    case("a body to HEAD", (200, b""), HELLO, line="HEAD")
    case("a body to HEAD, a little later", (200, b""), OK + b"Content-Length: 69\r\n\r\n", LATE, EVIL, line="HEAD")
    case("chunks to HEAD", (200, b""), CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", line="HEAD")
    case("more behind the last chunk", (200, b"hello"), CHUNKED + b"5\r\nhello\r\n0\r\n\r\n" + EVIL)
    case(
        "more behind the last chunk, a little later", (200, b"hello"), CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", LATE, EVIL
    )
    case(
        "more than its length, and close",
        (200, b"hello"),
        OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello" + EVIL,
    )
    case(
        "chunked and a length",
        (200, b"hello"),
        OK + b"Content-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    )
    case(
        "a length and chunked",
        (200, b"hello"),
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    )
    case(
        "chunked on HTTP/1.0",
        (200, b"hello"),
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    )
    case("no length, and close", (200, b"hello"), OK + b"\r\nhello", CLOSE)
    case(
        "keep-alive without a length", (200, b"hello" + EVIL), OK + b"Connection: keep-alive\r\n\r\nhello" + EVIL, CLOSE
    )
    case("an answer before the body came", (413, b"no"), b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno", line="POST",
         fields=("Content-Length: 1000000",))  # fmt: skip


def _chunks() -> None:
    for name, body in {
        "no number": b"x\r\nhello\r\n0\r\n\r\n", "no size": b"\r\nhello", "a sign": b"+5\r\nhello\r\n0\r\n\r\n", "negative": b"-5\r\nhello\r\n0\r\n\r\n",
        "0x": b"0x5\r\nhello\r\n0\r\n\r\n", "16 digits": b"f" * 16 + b"\r\nhello", "more data": b"5\r\nhello there\r\n0\r\n\r\n",
        "less data": b"7\r\nhello\r\n0\r\n\r\nxx", "a bare LF": b"5\nhello\n0\n\n", "a bare LF behind the data": b"5\r\nhello\n0\r\n\r\n",
        "nothing behind the data": b"5\r\nhello0\r\n\r\n", "a bare LF at the end": b"0\r\n\n", "a bad trailer": b"0\r\nA : b\r\n\r\n",
        "a control byte in a trailer": b"0\r\nA: b\x01\r\n\r\n", "a folded trailer": b"0\r\nA: b\r\n c\r\n\r\n", "a body that is not chunked": b"hello",
        "an answer in place of a trailer": b"0\r\n" + EVIL,
    }.items():  # fmt: skip
        case(f"chunks: {name}", EITHER, CHUNKED + body)
    case("chunks: an extension that never ends", EITHER, CHUNKED + b"5;", b"a" * 4096, FLOOD)
    case("chunks: extensions that never end", EITHER, CHUNKED, b"1;" + b"a" * 500 + b"\r\nx\r\n", FLOOD)
    case("chunks: trailers that never end", EITHER, CHUNKED + b"0\r\n", b"A: b\r\n" * 500, FLOOD)
    case("chunks: digits that never end", EITHER, CHUNKED, b"0" * 4096, FLOOD)


def _interims() -> None:
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    case("33 interim answers", BAD_GATEWAY, b"HTTP/1.1 100 Continue\r\n\r\n" * 33 + HELLO)
    case("interim answers without end", BAD_GATEWAY, b"HTTP/1.1 102 Processing\r\n\r\n" * 100, FLOOD)
    case("an interim answer, then nothing", BAD_GATEWAY, hint, CLOSE)
    case("an interim answer, then a reset", BAD_GATEWAY, hint, RESET)
    case("an interim answer, then no HTTP", BAD_GATEWAY, hint + b"hello\r\n\r\n")
    case("an interim answer with a body", BAD_GATEWAY, b"HTTP/1.1 103 X\r\nContent-Length: 5\r\n\r\nhello" + HELLO)
    case(
        "an interim answer with chunks",
        BAD_GATEWAY,
        b"HTTP/1.1 103 X\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HELLO,
    )
    case("an interim answer with a control byte", BAD_GATEWAY, b"HTTP/1.1 103 X\r\nA: \x01\r\n\r\n" + HELLO)
    case("an unasked 101", BAD_GATEWAY, SWITCH + b"Upgrade: websocket\r\n\r\n")
    case("an unasked 101 to h2c", BAD_GATEWAY, SWITCH + b"Upgrade: h2c\r\n\r\n")
    case("an unasked 101 and an answer", BAD_GATEWAY, SWITCH + b"Upgrade: h2c\r\n\r\n" + HELLO)
    case("an unasked 101 to POST", BAD_GATEWAY, SWITCH + b"Upgrade: x\r\n\r\n", line="POST", body=b"hello")
    case("a 101 to something else", BAD_GATEWAY, SWITCH + b"Upgrade: h2c\r\n\r\n", fields=WEBSOCKET)
    case("a 101 to something more", BAD_GATEWAY, SWITCH + b"Upgrade: websocket, h2c\r\n\r\n", fields=WEBSOCKET)
    case("a 101 to nothing", BAD_GATEWAY, SWITCH + b"\r\n", fields=WEBSOCKET)
    case("a 101 that is malformed", BAD_GATEWAY, SWITCH + b"A : b\r\nUpgrade: websocket\r\n\r\n", fields=WEBSOCKET)
    case("100 for an answer", BAD_GATEWAY, b"HTTP/1.1 100 Continue\r\nContent-Length: 0\r\n\r\n", CLOSE)


STAGES: dict[str, tuple[bytes, str]] = {
    "before a byte": (b"", BAD_GATEWAY),
    "within the version": (b"HTTP/1", BAD_GATEWAY),
    "within the status line": (b"HTTP/1.1 200", BAD_GATEWAY),
    "behind the status line": (OK, BAD_GATEWAY),
    "within a field": (OK + b"Content-Le", BAD_GATEWAY),
    "within the empty line": (OK + b"Content-Length: 5\r\n\r", BAD_GATEWAY),
    "behind the head": (OK + b"Content-Length: 5\r\n\r\n", EITHER),
    "within the body": (OK + b"Content-Length: 100000\r\n\r\nhello", EITHER),
    "before the body's last byte": (OK + b"Content-Length: 6\r\n\r\nhello", EITHER),
    "before the first chunk": (CHUNKED, EITHER),
    "within a size": (CHUNKED + b"5", EITHER),
    "within a size's line end": (CHUNKED + b"5\r", EITHER),
    "within a chunk": (CHUNKED + b"5\r\nhel", EITHER),
    "behind a chunk's data": (CHUNKED + b"5\r\nhello", EITHER),
    "behind a chunk": (CHUNKED + b"5\r\nhello\r\n", EITHER),
    "behind the last size": (CHUNKED + b"5\r\nhello\r\n0\r\n", EITHER),
    "within a trailer": (CHUNKED + b"5\r\nhello\r\n0\r\nX-Su", EITHER),
    "before the last byte of chunks": (CHUNKED + b"5\r\nhello\r\n0\r\n\r", EITHER),
}


def _ends() -> None:
    for where, (sent, expected) in STAGES.items():
        sends = (sent,) if sent else ()
        case(f"closed {where}", expected, *sends, CLOSE)
        case(f"reset {where}", expected, *sends, RESET)
        case(f"silent {where}", TIMEOUT if expected == BAD_GATEWAY else BROKEN, *sends, SILENCE)
    case("reset within a body without length", EITHER, OK + b"\r\nhello", RESET)
    case("silent within a body without length", BROKEN, OK + b"\r\nhello", SILENCE)
    case("silent behind an interim answer", TIMEOUT, b"HTTP/1.1 103 X\r\n\r\n", SILENCE)
    case("closed before the body came", BAD_GATEWAY, CLOSE, line="POST", body=b"x" * 100_000)
    case("reset before the body came", BAD_GATEWAY, RESET, line="POST", body=b"x" * 100_000)


def _fine() -> None:
    """Not as it should be, and clear all the same: it passes in one form."""
    for name, raw, expected in (
        ("bare LF", b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", (200, b"hello")), ("no reason", b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello", (200, b"hello")),
        ("a folded field", OK + b"A: b\r\n c\r\nContent-Length: 5\r\n\r\nhello", (200, b"hello")), ("one length twice", OK + b"Content-Length: 5\r\n" * 2 + b"\r\nhello", (200, b"hello")),
        ("padded chunk sizes", CHUNKED + b"5  \r\nhello\r\n0  \r\n\r\n", (200, b"hello")), ("chunk extensions", CHUNKED + b"5;a=b\r\nhello\r\n0;c\r\n\r\n", (200, b"hello")),
        ("an unknown status", b"HTTP/1.1 799 Odd\r\nContent-Length: 2\r\n\r\nhi", (799, b"hi")), ("our own fields", OK + b"X-Tunnel-Outcome: internal\r\nX-Request-Id: forged\r\nContent-Length: 2\r\n\r\nhi", (200, b"hi")),
        ("framing fields for trailers", CHUNKED + b"0\r\nContent-Length: 9\r\nTransfer-Encoding: x\r\nX-Tunnel-Outcome: ok\r\n\r\n", (200, b"")),
        ("32 interim answers", b"HTTP/1.1 102 Processing\r\n\r\n" * 32 + HELLO, (200, b"hello")),
    ):  # fmt: skip
        case(f"fine: {name}", expected, raw, dirty=False)


for _family in (_status_lines, _fields, _lengths, _chunks, _interims, _ends, _fine):
    _family()
