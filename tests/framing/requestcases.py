"""The table of odd requests: what a visitor sends, what it is answered, what the local service sees of it.

Another request is sent behind it unless it is not to be `followed`.
`together`: it is what it is only when its bytes come at once. A case that passes says in which form: request line, the visitor's fields behind Host, body, trailers; what the core adds
is not listed. A case that is refused says with which status; the connection ends with it, the service sees no whole
request. `partial`: the head may have gone on before the body turned out to be malformed.
"""

# ruff: noqa: E501 -- a table: a case a line

from __future__ import annotations

from dataclasses import dataclass

HOST = b"Host: app.localhost\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST
POST = b"POST / HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
NONE, COUNTED, CHUNKS = "none", "counted", "chunks"  # how the service is told of a body


@dataclass(frozen=True)
class Passed:
    """One request as the local service has it."""

    first: bytes = b"GET / HTTP/1.1"
    fields: tuple[bytes, ...] = ()
    framing: str = NONE
    body: bytes = b""
    trailers: bytes = b""
    host: bytes = b"app.localhost"


@dataclass(frozen=True)
class Case:
    """status: of the answer to the last of `passed`, or of the refusal. closes: the connection ends with it."""

    name: str
    raw: bytes
    status: int
    passed: tuple[Passed, ...] = ()
    closes: bool = True
    partial: bool = False
    followed: bool = True
    together: bool = False


CASES: list[Case] = []


def bad(name: str, raw: bytes, status: int = 400, *, partial: bool = False, together: bool = False) -> None:
    CASES.append(Case(name, raw, status, partial=partial, together=together))


def good(
    name: str,
    raw: bytes,
    *fields: bytes,
    first: bytes = b"GET / HTTP/1.1",
    body: bytes | None = None,
    chunks: bytes | None = None,
    trailers: bytes = b"",
    host: bytes = b"app.localhost",
    closes: bool = False,
    status: int = 200,
) -> None:
    framing = NONE if body is None and chunks is None else COUNTED if chunks is None else CHUNKS
    passed = Passed(first, fields, framing, body or chunks or b"", trailers, host)
    CASES.append(Case(name, raw, status, (passed,), closes))


def _lengths() -> None:
    for value, what in {
        b"": "empty", b" ": "blank", b"+5": "a sign", b"-5": "negative", b"-0": "minus zero", b"0x5": "hexadecimal",
        b"5.0": "a fraction", b"5e0": "an exponent", b"1_0": "an underscore", b"5 5": "two words", b"5,5": "a list",
        b"5, 5": "a list with a space", b"5,": "a list of one", b",5": "a list with a hole", b"5;a=b": "a parameter",
        b'"5"': "quotes", b"'5'": "single quotes", b"five": "a word", b"0o5": "octal", b"5\xa0": "a hard space",
        "\N{ARABIC-INDIC DIGIT FIVE}".encode(): "arabic digits", b"\xb5": "a superscript", b"5\x0b": "a vertical tab", b"5\x0c": "a form feed",
        b"5\0": "a NUL", b"(5)": "brackets", b"5h": "a suffix", b"9" * 400: "400 digits",
    }.items():  # fmt: skip
        bad(f"Content-Length: {what}", POST + b"Content-Length: " + value + b"\r\n\r\nhello")
    for digits in (19, 20, 21):
        bad(f"Content-Length: {digits} digits", POST + b"Content-Length: " + b"9" * digits + b"\r\n\r\n",
            413 if digits <= 20 else 400)  # fmt: skip
    for first, second in ((b"5", b"5"), (b"5", b"6"), (b"0", b"5"), (b"5", b"0"), (b"5", b"")):
        name = f"Content-Length twice: {first.decode()} and {second.decode() or 'nothing'}"
        bad(name, POST + b"Content-Length: " + first + b"\r\nContent-Length: " + second + b"\r\n\r\nhello")
    bad("Content-Length twice, in two cases", POST + b"Content-Length: 5\r\ncontent-length: 5\r\n\r\nhello")
    bad("Content-Length twice, others between", POST + b"Content-Length: 5\r\nA: b\r\nContent-Length: 5\r\n\r\nhello")
    for raw in (b"Content-Length: 5", b"content-length:5", b"CONTENT-LENGTH:\t 5\t ", b"Content-Length: 005"):
        good(f"a length as {raw!r}", POST + raw + b"\r\n\r\nhello", first=b"POST / HTTP/1.1", body=b"hello")
    good("a length of zero", POST + b"Content-Length: 0\r\n\r\n", first=b"POST / HTTP/1.1", body=b"")
    good("no length on POST", POST + b"\r\n", first=b"POST / HTTP/1.1")
    good("a body on GET", GET + b"Content-Length: 5\r\n\r\nhello", body=b"hello")
    good("a body on DELETE", b"DELETE / HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\nhi",
         first=b"DELETE / HTTP/1.1", body=b"hi")  # fmt: skip
    hidden = b"GET /x HTTP/1.1\r\nHost: app.localhost\r\n\r\n"
    good("a body that looks like a request", POST + b"Content-Length: %d\r\n\r\n" % len(hidden) + hidden,
         first=b"POST / HTTP/1.1", body=hidden)  # fmt: skip
    good("a body of line ends", POST + b"Content-Length: 4\r\n\r\n\r\n\r\n", first=b"POST / HTTP/1.1", body=b"\r\n\r\n")
    good("a chunked body's look under a length", POST + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
         first=b"POST / HTTP/1.1", body=b"0\r\n\r\n")  # fmt: skip


def _encodings() -> None:
    for value in (
        b"", b"identity", b"gzip", b"gzip, chunked", b"chunked, gzip", b"chunked, identity", b"chunked, chunked",
        b"identity, chunked", b"chunked,", b",chunked", b"chunked;q=1", b"chunked ; a=b", b'"chunked"', b"'chunked'",
        b"xchunked", b"chunkedx", b"chunked x", b"chunk", b"chunked\0", b"chunked\x0b", b"\x0bchunked", b"\x0cchunked",
        b"\xa0chunked", b"chunked\xff", b"CHUNKED, x", b"cow", b"chunked\x7f", b"trailers", b"deflate", b"compress",
        b"chun\tked", b"x-chunked", b"\xef\xbb\xbfchunked",
    ):  # fmt: skip
        bad(f"Transfer-Encoding: {value!r}", POST + b"Transfer-Encoding: " + value + b"\r\n\r\n0\r\n\r\n")
    for one in (b"chunked", b"Chunked", b"CHUNKED", b"\t chunked \t"):
        good(f"Transfer-Encoding as {one!r}", POST + b"Transfer-Encoding:" + one + b"\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
             first=b"POST / HTTP/1.1", chunks=b"hi")  # fmt: skip
    te, cl = b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n"
    body = b"\r\n0\r\n\r\n"
    for name, fields in {
        "a length, then chunked": cl + te, "chunked, then a length": te + cl, "chunked twice": te + te,
        "chunked and a length of zero": te + b"Content-Length: 0\r\n", "chunked twice and a length": te + cl + te,
        "chunked and a bad length": te + b"Content-Length: x\r\n",
        "chunked and identity": te + b"Transfer-Encoding: identity\r\n",
        "identity and chunked": b"Transfer-Encoding: identity\r\n" + te,
        "nothing and chunked": b"Transfer-Encoding:\r\n" + te,
        "chunked in two cases": te + b"transfer-encoding: chunked\r\n",
        "a length and another encoding": cl + b"Transfer-Encoding: gzip\r\n",
        "space before the colon": b"Transfer-Encoding : chunked\r\n",
        "tab before the colon": b"Transfer-Encoding\t: chunked\r\n",
        "space before the colon, and a length": cl + b"Transfer-Encoding : chunked\r\n",
        "space before the name": b" Transfer-Encoding: chunked\r\n",
        "space before the name, and a length": cl + b" Transfer-Encoding: chunked\r\n",
        "folded": b"Transfer-Encoding:\r\n chunked\r\n", "folded with a tab": b"Transfer-Encoding:\r\n\tchunked\r\n",
        "behind a bare CR": b"A: b\rTransfer-Encoding: chunked\r\n", "behind CR CR LF": b"A: b\r\r\n" + te,
        "behind a bare LF": b"A: b\nTransfer-Encoding: chunked\r\n", "ended by a bare LF": te.replace(b"\r", b"") + cl,
        "no colon": b"Transfer-Encoding chunked\r\n", "two colons": b"Transfer-Encoding:: chunked\r\n",
        "a NUL in the name": b"Transfer-Encoding\0: chunked\r\n", "a hard space": b"Transfer-Encoding\xa0: chunked\r\n",
        "an underscore": b"Transfer_Encoding: chunked\r\n", "an underscored length": b"Content_Length: 5\r\n",
        "underscores and a length": cl + b"Transfer_Encoding: chunked\r\n",
    }.items():  # fmt: skip
        bad(f"framing: {name}", POST + fields + body)
    bad("chunked on HTTP/1.0", b"POST / HTTP/1.0\r\n" + HOST + te + body)
    bad("chunked on HTTP/1.0 with a length", b"POST / HTTP/1.0\r\n" + HOST + te + cl + body)
    good("a length that Connection names", POST + b"Connection: Content-Length\r\nContent-Length: 2\r\n\r\nhi",
         first=b"POST / HTTP/1.1", body=b"hi")  # fmt: skip
    good("an encoding that Connection names", POST + b"Connection: Transfer-Encoding\r\n" + te + b"\r\n2\r\nhi\r\n0\r\n\r\n",
         first=b"POST / HTTP/1.1", chunks=b"hi")  # fmt: skip
    good("TE", GET + b"TE: trailers, chunked\r\nConnection: TE\r\n\r\n")
    good("X-Transfer-Encoding", POST + b"X-Transfer-Encoding: chunked\r\n\r\n", b"X-Transfer-Encoding: chunked",
         first=b"POST / HTTP/1.1")  # fmt: skip


def _bytes() -> None:
    """Every byte that must not be where it is."""
    for byte in [*range(0x20), 0x7F]:
        one = bytes([byte])
        if one != b"\t":
            bad(f"byte {byte:#04x} in a value", GET + b"A: b" + one + b"c\r\n\r\n")
            bad(f"byte {byte:#04x} at a value's end", GET + b"A: b" + one + b"\r\n\r\n")
        bad(f"byte {byte:#04x} in a name", GET + b"A" + one + b"B: c\r\n\r\n")
        bad(f"byte {byte:#04x} in the address", b"GET /a" + one + b"b HTTP/1.1\r\n" + HOST + b"\r\n")
        bad(f"byte {byte:#04x} in the method", b"GE" + one + b"T / HTTP/1.1\r\n" + HOST + b"\r\n")
    for byte in b'"(),/;<=>?@[\\]{} ':
        bad(f"{chr(byte)!r} in a name", GET + b"A" + bytes([byte]) + b"B: c\r\n\r\n")
        if byte != 0x20:
            bad(f"{chr(byte)!r} in the method", b"GE" + bytes([byte]) + b"T / HTTP/1.1\r\n" + HOST + b"\r\n")
    for byte in (0x80, 0xA0, 0xC3, 0xFF):
        one = bytes([byte])
        bad(f"byte {byte:#04x} in a name", GET + b"A" + one + b": c\r\n\r\n")
        bad(f"byte {byte:#04x} in the address", b"GET /" + one + b" HTTP/1.1\r\n" + HOST + b"\r\n")
        bad(f"byte {byte:#04x} first", one + GET + b"\r\n")
        good(f"byte {byte:#04x} in a value", GET + b"A: b" + one + b"c\r\n\r\n", b"A: b" + one + b"c")
    good("a tab in a value", GET + b"A: b\tc\r\n\r\n", b"A: b\tc")
    good("tabs around a value", GET + b"A:\t b \t\r\n\r\n", b"A: b")
    good("no space behind the colon", GET + b"A:b\r\n\r\n", b"A: b")
    good("an empty value", GET + b"A:\r\nB: \r\n\r\n", b"A: ", b"B: ")
    good("a name of every sign", GET + b"!#$%&'*+-.^`|~09azAZ: b\r\n\r\n", b"!#$%&'*+-.^`|~09azAZ: b")
    good("colons in a value", GET + b"A:: b:c\r\n\r\n", b"A: : b:c")


def _lines() -> None:
    for name, raw in {
        "bare LF everywhere": GET.replace(b"\r\n", b"\n") + b"\n", "bare LF behind the request line":
        b"GET / HTTP/1.1\n" + HOST + b"\r\n", "bare LF behind a field": GET[:-2] + b"\n\r\n",
        "bare LF for the empty line": GET + b"\n", "two bare LF at the end": GET[:-2] + b"\n\n",
        "LF CRLF at the end": GET + b"A: b\n\r\n", "bare CR everywhere": GET.replace(b"\r\n", b"\r") + b"\r\r\n\r\n",
        "CR CR LF behind the request line": b"GET / HTTP/1.1\r\r\n" + HOST + b"\r\n",
        "CR CR LF behind a field": GET + b"A: b\r\r\n\r\n", "LF CR": GET + b"A: b\n\r\r\n\r\n",
        "a fold": GET + b"A: b\r\n c\r\n\r\n", "a fold with a tab": GET + b"A: b\r\n\tc\r\n\r\n",
        "a fold of spaces": GET + b"A: b\r\n  \r\n\r\n", "a fold of the first field": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
        "a fold of Host": b"GET / HTTP/1.1\r\nHost:\r\n app.localhost\r\n\r\n",
        "no colon": GET + b"A\r\n\r\n", "no name": GET + b": b\r\n\r\n", "only a colon": GET + b":\r\n\r\n",
        "a space for a name": GET + b" : b\r\n\r\n", "space before the colon": GET + b"A : b\r\n\r\n",
        "space in the name": GET + b"A B: c\r\n\r\n", "a request in the fields": GET + b"GET /x HTTP/1.1\r\n\r\n",
        "a second status line": GET + b"HTTP/1.1 200 OK\r\n\r\n", "two empty lines first": b"\r\n\r\n" + GET + b"\r\n",
        "three empty lines first": b"\r\n" * 3 + GET + b"\r\n", "a bare LF first": b"\n" + GET + b"\r\n",
        "a bare CR first": b"\r" + GET + b"\r\n", "a space first": b" " + GET + b"\r\n", "a NUL first": b"\0" + GET + b"\r\n",
        "TLS": bytes.fromhex("16030100f1010000ed0303") + b"\r\n\r\n", "SSH": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        "an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "a BOM first": b"\xef\xbb\xbf" + GET + b"\r\n",
        "PROXY protocol, unasked": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + GET + b"\r\n",
    }.items():  # fmt: skip
        bad(f"lines: {name}", raw)
    good("an empty line first", b"\r\n" + GET + b"\r\n")


def _first_lines() -> None:
    for name, line in {
        "no version": b"GET /", "no address": b"GET HTTP/1.1", "only a method": b"GET", "two addresses": b"GET / /x HTTP/1.1",
        "two spaces": b"GET  / HTTP/1.1", "two spaces before the version": b"GET /  HTTP/1.1", "tabs": b"GET\t/\tHTTP/1.1",
        "a space at the end": b"GET / HTTP/1.1 ", "a tab at the end": b"GET / HTTP/1.1\t", "small letters": b"GET / http/1.1",
        "another protocol": b"GET / ICY/1.1", "a comma in the version": b"GET / HTTP/1,1", "one number": b"GET / HTTP/1",
        "a version of three digits": b"GET / HTTP/1.10", "a leading zero": b"GET / HTTP/01.1", "a trailing dot": b"GET / HTTP/1.1.",
        "a version of letters": b"GET / HTTP/1.x", "no slash": b"GET / HTTP1.1", "a space in the version": b"GET / HTTP /1.1",
        "a negative version": b"GET / HTTP/-1.1", "HTTPS": b"GET / HTTPS/1.1", "two versions": b"GET / HTTP/1.1 HTTP/1.1",
        "a version of full-width digits": "GET / HTTP/1.\N{FULLWIDTH DIGIT ONE}".encode(), "HTTP/2 without a minor": b"GET / HTTP/2",
    }.items():  # fmt: skip
        bad(f"request line: {name}", line + b"\r\n" + HOST + b"\r\n")
    for version in (b"0.0", b"0.9", b"1.2", b"1.9", b"2.0", b"3.0", b"9.9"):
        bad(f"HTTP/{version.decode()}", b"GET / HTTP/" + version + b"\r\n" + HOST + b"\r\n", 505)
    bad("a preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505)
    bad("PRI on HTTP/1.1", b"PRI * HTTP/1.1\r\n" + HOST + b"\r\n")
    for name, target in {
        "relative": b"index.html", "empty host": b"http://", "empty host and path": b"http:///x", "ftp": b"ftp://app.localhost/",
        "ws": b"ws://app.localhost/", "no scheme": b"://app.localhost/", "one slash": b"http:/app.localhost/",
        "a user": b"http://a@app.localhost/", "a user and password": b"http://a:b@app.localhost/", "a fragment": b"/#x",
        "only a fragment": b"#", "a fragment in a URL": b"http://app.localhost/#x", "another host": b"http://other.localhost/",
        "another port": b"http://app.localhost:81/", "a backslash for the host": b"http:\\\\app.localhost/",
        "star": b"*", "star and more": b"*x", "authority": b"app.localhost:80", "a backslash": b"\\x", "a query only": b"?x",
        "javascript": b"javascript:x", "two schemes": b"http://http://app.localhost/", "a dot": b".", "a semicolon": b";x",
    }.items():  # fmt: skip
        bad(f"address: {name}", b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    for target in (
        b"//x", b"/.", b"/..", b"/../../etc/passwd", b"/a//b", b"/%00", b"/%0d%0aX:%20y", b"/%2e%2e/", b"/a?b=c&d", b"/?",
        b"/a:b", b"/a;b=c", b'/{}|^`"<>', b"/\\x", b"/@", b"/http://other.localhost/", b"/%zz", b"/%", b"/*",
    ):  # fmt: skip
        line = b"GET " + target + b" HTTP/1.1"
        good(f"address {target.decode()}", line + b"\r\n" + HOST + b"\r\n", first=line)
    for url, path in {
        b"http://app.localhost/x": b"/x", b"http://app.localhost": b"/", b"HTTP://app.localhost/": b"/",
        b"https://app.localhost/x?y": b"/x?y", b"http://app.localhost?y": b"/?y", b"http://app.localhost//x": b"//x",
    }.items():  # fmt: skip
        good(
            f"URL {url.decode()}",
            b"GET " + url + b" HTTP/1.1\r\n" + HOST + b"\r\n",
            first=b"GET " + path + b" HTTP/1.1",
        )
    good(
        "a URL in another case than Host",
        b"GET http://APP.localhost/ HTTP/1.1\r\n" + HOST + b"\r\n",
        host=b"APP.localhost",
    )
    good("OPTIONS *", b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", first=b"OPTIONS * HTTP/1.1")


def _methods() -> None:
    for method in ("CONNECT", "TRACE", "connect", "Trace", "tRaCe"):
        bad(f"method {method}", f"{method} / HTTP/1.1\r\n".encode() + HOST + b"\r\n", 405)
    bad("CONNECT to an authority", b"CONNECT app.localhost:80 HTTP/1.1\r\nHost: app.localhost:80\r\n\r\n", 405)
    bad("CONNECT to a URL", b"CONNECT http://app.localhost/ HTTP/1.1\r\n" + HOST + b"\r\n", 405)
    for method in ("head", "Head"):
        bad(f"method {method}", f"{method} / HTTP/1.1\r\n".encode() + HOST + b"\r\n")
    for method in (
        "HEAD",
        "PUT",
        "PATCH",
        "DELETE",
        "OPTIONS",
        "get",
        "M-SEARCH",
        "PROPFIND",
        "QUERY",
        "FOO",
        "X" * 300,
    ):
        line = f"{method} / HTTP/1.1".encode()
        good(f"method {method[:10]}", line + b"\r\n" + HOST + b"\r\n", first=line)


def _hosts() -> None:
    for value in (
        b"", b" ", b"app.localhost, app.localhost", b"app.localhost other", b"app.localhost/x", b"/app.localhost",
        b"app.localhost?x", b"app.localhost#x", b"a@app.localhost", b"a:b@app.localhost", b"app.localhost:", b"app.localhost:x",
        b"app.localhost:80x", b"app.localhost:-1", b"app.localhost:+80", b"app.localhost:999999", b"app.localhost:80:80",
        b"app.localhost\\x", b"http://app.localhost", b"[::1", b"::1]", b"[app.localhost]", b".app.localhost", b"app..localhost",
        b"app.localhost..", b"*", b"*.localhost", b"app%2elocalhost", b"app.localhost\xff", b"app.localhost;x", b'"app.localhost"',
        b"<app.localhost>", b"-app.localhost", b"a" * 64 + b".localhost", b"app.localhost\tx",
    ):  # fmt: skip
        if value != b"app.localhost:":
            bad(f"Host: {value[:30]!r}", b"GET / HTTP/1.1\r\nHost: " + value + b"\r\n\r\n")
    for name, raw in {
        "none": b"GET / HTTP/1.1\r\n\r\n", "two": GET + HOST + b"\r\n", "two, the second another": GET + b"Host: b.localhost\r\n\r\n",
        "two in two cases": GET + b"HOST: app.localhost\r\n\r\n", "two, one empty": GET + b"Host:\r\n\r\n",
        "two on HTTP/1.0": b"GET / HTTP/1.0\r\n" + HOST + HOST + b"\r\n",
        "space before the colon": b"GET / HTTP/1.1\r\nHost : app.localhost\r\n\r\n",
        "none, but a URL": b"GET http://app.localhost/ HTTP/1.1\r\n\r\n",
        "empty, and a URL": b"GET http://app.localhost/ HTTP/1.1\r\nHost:\r\n\r\n",
    }.items():  # fmt: skip
        bad(f"Host: {name}", raw)
    for value in (b"APP.localhost", b"app.localhost:8080", b"app.localhost.", b"app.localhost:80"):
        good(f"Host: {value.decode()}", b"GET / HTTP/1.1\r\nHost: " + value + b"\r\n\r\n", host=value)
    good("HOST:app.localhost", b"GET / HTTP/1.1\r\nHOST:app.localhost\r\n\r\n")


def _chunks() -> None:
    for name, body in {
        "no size": b"\r\nhello\r\n0\r\n\r\n", "no number": b"x\r\nhello\r\n0\r\n\r\n", "a sign": b"+5\r\nhello\r\n0\r\n\r\n",
        "negative": b"-5\r\nhello\r\n0\r\n\r\n", "0x": b"0x5\r\nhello\r\n0\r\n\r\n", "an underscore": b"0_5\r\nhello\r\n0\r\n\r\n",
        "16 digits": b"0000000000000005\r\nhello\r\n0\r\n\r\n", "25 digits": b"f" * 25 + b"\r\nhello\r\n0\r\n\r\n",
        "overflow of 64 bits": b"10000000000000005\r\nhello\r\n0\r\n\r\n", "overflow of 32 bits":
        b"100000005\r\nhello\r\n0\r\n\r\n" + b"x" * 100, "a space in front": b" 5\r\nhello\r\n0\r\n\r\n",
        "a space behind": b"5 \r\nhello\r\n0\r\n\r\n", "a tab behind": b"5\t\r\nhello\r\n0\r\n\r\n",
        "a space before the semicolon": b"5 ;a\r\nhello\r\n0\r\n\r\n", "a bare LF": b"5\nhello\r\n0\r\n\r\n",
        "bare LF everywhere": b"5\nhello\n0\n\n", "a bare CR": b"5\rhello\r\n0\r\n\r\n", "CR CR LF": b"5\r\r\nhello\r\n0\r\n\r\n",
        "a bare LF in the extension": b"5;a\nb\r\nhello\r\n0\r\n\r\n", "a bare CR in the extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
        "a NUL in the extension": b"5;a\0\r\nhello\r\n0\r\n\r\n", "an endless extension": b"5;" + b"a" * 5000,
        "many extensions": (b"1;" + b"a" * 900 + b"\r\nx\r\n") * 40 + b"0\r\n\r\n", "more data": b"5\r\nhello there\r\n0\r\n\r\n",
        "less data": b"7\r\nhello\r\n0\r\n\r\nxx", "a bare LF behind the data": b"5\r\nhello\n0\r\n\r\n",
        "a bare CR behind the data": b"5\r\nhello\r0\r\n\r\n", "LF CR behind the data": b"5\r\nhello\n\r0\r\n\r\n",
        "nothing behind the data": b"5\r\nhello0\r\n\r\n", "a space behind the data": b"5\r\nhello \r\n0\r\n\r\n",
        "two line ends behind the data": b"5\r\nhello\r\n\r\n0\r\n\r\n", "a bare LF at the end": b"0\r\n\n", "LF at the last size": b"0\n\r\n",
        "bare LF twice at the end": b"0\n\n", "a minus zero": b"-0\r\n\r\n", "a bare LF in the trailers": b"0\r\nA: b\nC: d\r\n\r\n",
        "a bare LF behind the trailers": b"0\r\nA: b\r\n\n", "LF CRLF behind the trailers": b"0\r\nA: b\n\r\n",
        "a bare CR in the trailers": b"0\r\nA: b\rC: d\r\n\r\n", "a folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
        "a trailer with a space before its colon": b"0\r\nA : b\r\n\r\n", "a trailer without colon": b"0\r\nA\r\n\r\n",
        "a trailer without name": b"0\r\n: b\r\n\r\n", "a NUL in a trailer": b"0\r\nA: b\0\r\n\r\n",
        "too many trailers": b"0\r\n" + b"A: b\r\n" * 4000 + b"\r\n", "a length for a trailer": b"0\r\nContent-Length: 5\r\nA: b\r\n\r\n",
        "an encoding for a trailer": b"0\r\nA: b\r\ntransfer-encoding: chunked\r\n\r\n", "a request for a trailer": b"0\r\nGET /x HTTP/1.1\r\n\r\n",
    }.items():  # fmt: skip
        if name not in ("overflow of 32 bits",):
            bad(f"chunks: {name}", CHUNKED + body, partial=True)
    for name, body, text, trailers in (
        ("none", b"0\r\n\r\n", b"", b""), ("zeros", b"00000\r\n\r\n", b"", b""), ("one", b"5\r\nhello\r\n0\r\n\r\n", b"hello", b""),
        ("two", b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", b"hello", b""), ("capitals", b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789", b""),
        ("leading zeros", b"00005\r\nhello\r\n0\r\n\r\n", b"hello", b""), ("an extension", b"5;a\r\nhello\r\n0\r\n\r\n", b"hello", b""),
        ("extensions", b'5;a=b;c="d e"\r\nhello\r\n0;z\r\n\r\n', b"hello", b""), ("data like an end", b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n", b""),
        ("a trailer", b"0\r\nX-Sum: 1\r\n\r\n", b"", b"X-Sum: 1\r\n"), ("two trailers", b"0\r\nA:1\r\nB: \t2 \r\n\r\n", b"", b"A: 1\r\nB: 2\r\n"),
        ("Host for a trailer", b"0\r\nHost: evil\r\n\r\n", b"", b""),
        ("credentials for a trailer", b"0\r\nAuthorization: a\r\nCookie: b\r\n\r\n", b"", b""),
        ("our fields for trailers", b"0\r\nX-Forwarded-For: 6.6.6.6\r\nX_Real_IP: 6.6.6.6\r\nForwarded: for=6\r\n\r\n", b"", b""),
    ):  # fmt: skip
        good(f"chunks: {name}", CHUNKED + body, first=b"POST / HTTP/1.1", chunks=text, trailers=trailers)


def _fields() -> None:
    own = (b"X-Forwarded-For", b"X-Forwarded-Proto", b"X-Forwarded-Host", b"Forwarded", b"X-Forwarded-Port", b"X-Forwarded-Prefix",
           b"X-Forwarded-Ssl", b"X-Forwarded-Scheme", b"X-Real-IP")  # fmt: skip
    for name in own:
        good(f"{name.decode()} claimed", GET + name + b": 6.6.6.6\r\nA: b\r\n\r\n", b"A: b")
        if b"-" in name:
            bad(f"{name.decode()} claimed with underscores", GET + name.replace(b"-", b"_") + b": 6.6.6.6\r\n\r\n")
    for name in (b"Keep-Alive", b"Proxy-Connection", b"TE", b"Proxy-Authorization", b"HTTP2-Settings", b"Upgrade"):
        good(f"{name.decode()} is hop by hop", GET + name + b": x\r\nA: b\r\n\r\n", b"A: b")
    good("a field that Connection names", GET + b"Connection: A, keep-alive\r\nA: b\r\nC: d\r\n\r\n", b"C: d")
    good("Host that Connection names", GET + b"Connection: Host\r\nC: d\r\n\r\n", b"C: d")
    good("Connection: close", GET + b"Connection: close\r\n\r\n", closes=True)
    good("Connection: CLOSE in a list", GET + b"Connection: x , CLOSE\r\n\r\n", closes=True)
    good("Connection twice", GET + b"Connection: keep-alive\r\nConnection: close\r\n\r\n", closes=True)
    good("HTTP/1.0", b"GET / HTTP/1.0\r\n" + HOST + b"\r\n", closes=True)
    good("HTTP/1.0, kept", b"GET / HTTP/1.0\r\n" + HOST + b"Connection: keep-alive\r\n\r\n")
    bad("two names that an underscore makes one", GET + b"A-B: 1\r\nA_B: 2\r\n\r\n")
    bad("an underscored name of tracing", GET + b"X_B3_TraceId: 1\r\n\r\n")
    good("an underscore alone", GET + b"A_B: 1\r\n\r\n", b"A_B: 1")
    good("equal fields", GET + b"A: 1\r\na: 2\r\nA: 1\r\n\r\n", b"A: 1", b"a: 2", b"A: 1")
    for value in (b"cake", b"100-continue, cake", b"", b"100", b"100-continue;q=1"):
        bad(f"Expect: {value.decode()}", POST + b"Expect: " + value + b"\r\nContent-Length: 5\r\n\r\nhello", 417)
    bad("Expect twice", POST + b"Expect: 100-continue\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello", 417)
    websocket = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    declined = Passed(fields=(b"Connection: Upgrade", b"Upgrade: websocket"))
    CASES.append(Case("an upgrade that is declined", GET + websocket + b"\r\n", 200, (declined,), followed=False))
    good("an upgrade to nothing", GET + b"Connection: Upgrade\r\n\r\n", closes=True)
    bad("data behind an upgrade", GET + websocket + b"\r\n\x81\x05hello", together=True)
    bad("a request behind an upgrade", GET + websocket + b"\r\n" + GET + b"\r\n", together=True)
    h2c = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
    good("an upgrade to h2c", GET + h2c + b"\r\n", closes=True)
    good("an upgrade to H2C among others", GET + b"Connection: Upgrade\r\nUpgrade: websocket, H2C\r\n\r\n", closes=True)
    good("an upgrade to TLS", GET + b"Connection: Upgrade\r\nUpgrade: TLS/1.2\r\n\r\n", closes=True)
    good(
        "an upgrade with a body",
        POST + websocket + b"Content-Length: 2\r\n\r\nhi",
        first=b"POST / HTTP/1.1",
        body=b"hi",
        closes=True,
    )
    good("an upgrade that Connection does not name", GET + b"Upgrade: websocket\r\n\r\n")
    good("an upgrade on HTTP/1.0", b"GET / HTTP/1.0\r\n" + HOST + websocket + b"\r\n", closes=True)
    bad("too long an address", b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414)
    bad("too large a head", GET + b"A: " + b"a" * 66_000 + b"\r\n\r\n", 431)


def _several() -> None:
    one = Passed()
    two = Passed(b"POST / HTTP/1.1", (), COUNTED, b"hello")
    post = POST + b"Content-Length: 5\r\n\r\nhello"
    CASES.append(Case("two requests at once", (GET + b"\r\n") * 2, 200, (one, one), False))
    CASES.append(Case("an empty line between", GET + b"\r\n" + b"\r\n" + GET + b"\r\n", 200, (one, one), False))
    CASES.append(Case("a body, a line end, a request", post + b"\r\n" + GET + b"\r\n", 200, (two, one), False))
    CASES.append(Case("a chunked body, a request", CHUNKED + b"0\r\n\r\n" + GET + b"\r\n", 200,
                      (Passed(b"POST / HTTP/1.1", (), CHUNKS), one), False))  # fmt: skip
    CASES.append(Case("close, then a request", GET + b"Connection: close\r\n\r\n" + GET + b"\r\n", 200, (one,)))
    CASES.append(Case("1.0, then a request", b"GET / HTTP/1.0\r\n" + HOST + b"\r\n" + GET + b"\r\n", 200, (one,)))
    CASES.append(Case("a body that is longer than it said", post + b" there", 400, (two,)))
    CASES.append(Case("two line ends behind a body", post + b"\r\n\r\n" + GET + b"\r\n", 400, (two,)))
    CASES.append(Case("a good and a bad one", GET + b"\r\n" + GET + b"A : b\r\n\r\n", 400, (one,)))


for _family in (_lengths, _encodings, _bytes, _lines, _first_lines, _methods, _hosts, _chunks, _fields, _several):
    _family()
