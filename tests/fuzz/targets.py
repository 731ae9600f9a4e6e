"""What is fuzzed: a parser, inputs to begin with, and a check that raises when what must hold does not."""

from __future__ import annotations

import random
import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, cast

from framing import answers, requestcases
from framing.answerreaders import h11_reads, we_read
from framing.comparing import compare

from tunnel.core.forwarding import Forwarding
from tunnel.core.hints import alpn_names, bytes_missing, worker_of
from tunnel.core.proxied import ProxyHeaderError, parse_v1, parse_v2
from tunnel.core.request import Request
from tunnel.core.visitor import Visitor
from tunnel.errors import Failure, WireError
from tunnel.http.chunks import MAX_LINE, MAX_TRAILERS, Chunks
from tunnel.http.forwarded import read_forwarded
from tunnel.http.heads import check_relayed, check_trailers, parse_request
from tunnel.http.repeated import know
from tunnel.link.tap import Tap
from tunnel.wire import control, frames
from tunnel.wire.frames import MAX_MESSAGE, NO_BODY, UNKNOWN, Open, Response
from tunnel.wire.session import Session


@dataclass(frozen=True)
class Target:
    name: str
    seeds: Sequence[bytes]
    check: Callable[[bytes], object]


# Chunked bodies ---------------------------------------------------------------------------------------------------


def _read(raw: bytes, outcome: str, cuts: Sequence[int]) -> tuple[bytes, bool, bytes, bytes, bool]:
    """(body, ended, trailers, rest, refused) of a body that comes in these pieces."""
    chunks, body, at = Chunks(outcome), b"", 0
    try:
        for cut in [*cuts, len(raw)]:
            body += b"".join(chunks.feed(raw[at:cut]))
            while chunks.is_behind:
                body += b"".join(chunks.feed(b""))
            at = cut
            assert len(chunks._held) <= max(MAX_LINE, MAX_TRAILERS) + 1
    except Failure as exc:
        assert exc.outcome == outcome
        return body, False, b"", b"", True
    return body, chunks.ended, chunks.trailers, chunks.rest, False


def check_chunks(raw: bytes) -> None:
    """The same in any cut; what is taken from visitors is taken from services; no trailer that must not be there."""
    chance = random.Random(len(raw))
    cuts = sorted(chance.randrange(len(raw) + 1) for _ in range(chance.randrange(6)))
    results = {}
    for outcome in ("bad_request", "local_broken"):
        results[outcome] = whole = _read(raw, outcome, ())
        for pieces in (cuts, range(1, len(raw))):
            again = _read(raw, outcome, list(pieces))
            # A refusal may come before or after what stands in front of it has been passed on.
            assert again[1:] == whole[1:] and (again[4] or again[0] == whole[0])
        assert check_trailers(whole[2])
    visitor, service = results["bad_request"], results["local_broken"]
    assert visitor == service or visitor[4]


# Answers ----------------------------------------------------------------------------------------------------------


def check_answer(raw: bytes) -> None:
    """We take it or say whose fault it is; what we take, the core takes, and h11 reads it the same."""
    for method in (b"GET", b"HEAD"):
        mine = we_read(raw, method, len(raw))
        assert we_read(raw, method, 7) == mine
        if mine is None or not mine.whole:
            continue
        check_relayed(mine.head)
        theirs = h11_reads(raw, method)
        assert theirs is None or theirs == mine.facts(), (mine.facts(), theirs)


# The link ---------------------------------------------------------------------------------------------------------

_HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"


def _sessions() -> tuple[Session, Session]:
    """Both ends, with streams in several states."""
    core, agent = Session(True), Session(False)
    for number in range(4):
        core.open(Open(0, 0, 0, UNKNOWN, b"", _HEAD), b"body", number % 2 == 0)
    agent.receive(core.take()[0])
    agent.respond(agent.streams[1], Response(200, UNKNOWN, 0, 0, b"OK\r\n"), b"x" * 100)
    agent.respond(agent.streams[2], Response(200, UNKNOWN, 0, 0, b"OK\r\n"), b"", True)
    agent.reset(agent.streams[3], 1)
    core.receive(agent.take()[0])
    return core, agent


def check_frames(message: bytes) -> None:
    """Events or WireError; nothing is held that no window allows, and no more is said than was asked for."""
    for session in _sessions():
        before = len(session.streams)
        try:
            session.receive(message)
        except WireError:
            continue
        count = sum(1 for _ in frames.split(message))
        assert len(session.streams) <= before + count
        for stream in session.streams.values():
            assert stream.inbox_bytes == sum(map(len, stream.inbox)) <= frames.STREAM_WINDOW
            assert 0 <= stream.credit <= frames.STREAM_WINDOW and len(stream.interims) <= frames.MAX_INTERIMS
        assert session.queued_bytes <= count * 64
        while session.has_queued:
            assert session.take()[0]


def _frame_seeds() -> list[bytes]:
    core, agent = Session(True), Session(False)
    seeds = []
    stream = core.open(Open(0, 0, 1000, UNKNOWN, b"request-id: r\r\n", _HEAD), b"", False)
    core.send_data(stream, b"part")
    core.send_trailers(stream, b"A: b\r\n")
    core.control(frames.PING, control.pack_ping(1, 2))
    seeds.append(core.take()[0])
    agent.receive(seeds[0])
    there = agent.streams[1]
    agent.respond(there, Response(103, NO_BODY, 0, 0, b"Hints\r\n"))
    agent.respond(there, Response(200, 5, 0, 0, b"OK\r\nA: b\r\n"), b"hello", True)
    agent.control(frames.GOAWAY, control.pack_goaway("bye"))
    seeds.append(agent.take()[0])
    seeds += [frames.frame(frames.WINDOW, number, frames.WINDOW_BODY.pack(4)) for number in (0, 1, 9)]
    seeds += [frames.frame(frames.RESET, number, b"\1gone") for number in (1, 2)]
    return seeds + [frames.frame(kind, 1, b"x" * 30) for kind in range(15)]


def check_control(payload: bytes) -> None:
    """A message, or WireError that says what is wrong with it and not what is in it."""
    for kind in (control.Hello, control.Welcome, control.RefusedMessage):
        try:
            message = control.decode(kind, payload)
        except WireError as exc:
            assert "tt_secret" not in str(exc)
            continue
        assert control.decode(kind, control.encode(message)) == message
        assert "tt_secret" not in repr(message) or kind is not control.Hello
    try:
        control.unpack_pong(payload)
    except WireError:
        pass


# PROXY protocol ---------------------------------------------------------------------------------------------------

_V2 = b"\r\n\r\n\x00\r\nQUIT\n"
_FOUR = bytes([192, 0, 2, 1, 198, 51, 100, 1]) + b"\xdc\x04\x01\xbb"
_SIX = bytes(15) + b"\1" + bytes(15) + b"\2" + b"\xdc\x04\x01\xbb"
_TLS = b"\x20\x00\x05\x01\0\0\0\0"


def check_proxy(raw: bytes) -> None:
    """An address as we would write it, or none, or ProxyHeaderError."""
    try:
        if raw.startswith(_V2) and len(raw) >= 16:
            behind = parse_v2(raw[12], raw[13], raw[16:])
        elif raw.startswith(b"PROXY "):
            behind = parse_v1(raw.partition(b"\r\n")[0])
        else:
            return
    except ProxyHeaderError as exc:
        assert str(exc).isprintable()
        return
    if behind.address:
        assert re.fullmatch(r"[0-9a-f.:]{2,45}", behind.address), behind
        assert str(ip_address(behind.address)) == behind.address


# Heads that repeat, and what trusted proxies say -------------------------------------------------------------------

_GET = b"GET /a HTTP/1.1\r\nHost: a.example\r\nAccept: */*\r\n\r\n"
_POST = b"POST /a?b HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\nX: y\r\n\r\n"
_TARGET_BYTES = 100


def check_repeated(raw: bytes) -> None:
    """Two heads: if the second is recognised by the first, it is what the parser says of it on its own."""
    first, end, second = raw.partition(b"\r\n\r\n")
    try:
        head = parse_request(first + end, _TARGET_BYTES)
    except Failure:
        return
    known = know(first + end, head)
    target = known.recognise(second, _TARGET_BYTES) if known is not None else b""
    if target:
        assert parse_request(second, _TARGET_BYTES) == head.at(target)


def check_proxied(raw: bytes) -> None:
    """Whatever a trusted proxy says, the agent takes the head, and each field of ours is in it once."""
    request = Request("127.0.0.1", "http", visitor=Visitor(cast(Any, None), "127.0.0.1", "http"))
    try:
        request.head = parse_request(raw, 1000)
    except Failure:
        return
    request.request_id = "r-1"
    forwarding = Forwarding(("127.0.0.1", "10.0.0.0/8"), 1)
    head = forwarding.head(request, upgrade=False)
    read_forwarded(head)
    names = [line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:-1]]
    for name in (b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"forwarded", b"x-request-id", b"host"):
        assert names.count(name) == 1, (name, head)
    assert not {b"connection", b"transfer-encoding", b"content-length", b"te", b"keep-alive"} & set(names)
    forwarding.leave(request.visitor)
    assert forwarding._guests.total == 0


# The link's WebSocket frames ----------------------------------------------------------------------------------------


def _tapped(client: bool, raw: bytes, cuts: Sequence[int]) -> tuple[list[bytes], bytes]:
    """(messages, what goes on to trio-websocket or waits for more) of bytes that come in these pieces."""
    tap, found, rest, at = Tap(cast(Any, None), client), list[bytes](), b"", 0
    tap.on_message = found.append
    for cut in [*cuts, len(raw)]:
        piece, at = raw[at:cut], cut
        if piece:
            rest += piece if tap._aside else tap._add(piece)
            while tap._is_behind:
                rest += tap._add(b"")
        assert sum(map(len, tap._parts)) <= len(raw) and (tap._aside or tap._need <= MAX_MESSAGE + 14)
    return found, rest + (b"" if tap._aside else b"".join(tap._parts))


def check_tap(raw: bytes) -> None:
    """The same in any cut, at either end."""
    chance = random.Random(len(raw))
    cuts = sorted(chance.randrange(len(raw) + 1) for _ in range(chance.randrange(6)))
    for client in (True, False):
        whole = _tapped(client, raw, ())
        assert _tapped(client, raw, cuts) == whole == _tapped(client, raw, range(1, len(raw)))


def _frames(key: bytes) -> bytes:
    bit = 0x80 if key else 0
    words = (b"first", b"", b"x" * 130)
    bodies = [bytes(byte ^ key[at % 4] for at, byte in enumerate(word)) if key else word for word in words]
    return (
        bytes((0x82, bit | 5)) + key + bodies[0]
        + bytes((0x89, bit)) + key
        + bytes((0x82, bit | 126, 0, 130)) + key + bodies[2]
        + bytes((0x88, bit)) + key
    )  # fmt: skip


_HELLO = control.Hello([1], "0.1", "agent", "tt_secret", [control.TunnelRequest("app", "http", "x")])
_WELCOME = control.Welcome(1, "0.1", "c-1", "acme", "agent", [control.TunnelGrant("app", "http", "http://a")])

_ANSWERS = [b"".join(step for step in case.steps if isinstance(step, bytes)) for case in answers.CASES]
_BODIES = [case.raw.partition(b"\r\n\r\n")[2] for case in requestcases.CASES if case.name.startswith("chunks")]

# Hints ------------------------------------------------------------------------------------------------------------


def _hellos() -> list[bytes]:
    """ClientHellos as OpenSSL writes them."""
    found = []
    for protocols in ([], ["http/1.1", "x-tunnel-worker/2"], ["h2", "x-tunnel-worker/17", "x" * 200]):
        context = ssl.create_default_context()
        if protocols:
            context.set_alpn_protocols(protocols)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        connection = context.wrap_bio(incoming, outgoing, server_hostname="core.example.com")
        try:
            connection.do_handshake()
        except ssl.SSLWantReadError:
            found.append(outgoing.read())
    return found


def check_hint(raw: bytes) -> None:
    """Whatever a stranger sends first names a worker or none; how much more is needed ends."""
    worker = worker_of(raw)
    assert worker is None or 0 <= worker < 10_000
    assert sum(map(len, alpn_names(raw))) <= len(raw)
    if raw:
        missing = bytes_missing(raw)
        assert 0 <= missing <= 65535 + 5
        if raw[0] == 22:  # first what says how long it is, then that; never more
            whole = raw + bytes(missing)
            whole += bytes(bytes_missing(whole))
            assert not bytes_missing(whole)


TARGETS = {
    target.name: target
    for target in (
        Target("request", [case.raw for case in requestcases.CASES if len(case.raw) < 2000], compare),
        Target("chunks", [body for body in _BODIES if len(body) < 2000], check_chunks),
        Target("answer", [raw for raw in _ANSWERS if len(raw) < 2000], check_answer),
        Target("frames", _frame_seeds(), check_frames),
        Target(
            "proxy",
            [
                b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n",
                b"PROXY TCP6 2001:db8::1 ::ffff:192.0.2.2 1 65535\r\n",
                b"PROXY UNKNOWN\r\n",
                _V2 + b"\x21\x11\x00\x0c" + _FOUR,
                _V2 + b"\x21\x21\x00\x2c" + _SIX + _TLS,
                _V2 + b"\x20\x00\x00\x00",
                _V2 + b"\x21\x31\x00\xd8" + bytes(216),
            ],
            check_proxy,
        ),
        Target("repeated", [_GET * 2, _POST * 2, _GET + _GET.replace(b"/a", b"/b?c"), _GET + _POST], check_repeated),
        Target(
            "proxied",
            [
                _GET.replace(b"Accept: */*", b"X-Forwarded-For: 203.0.113.1, 10.0.0.1\r\nX-Forwarded-Proto: https"),
                _GET.replace(b"Accept: */*", b'Forwarded: for="[2001:db8::1]:80";proto=https\r\nX-Forwarded-Host: b'),
                _POST.replace(
                    b"X: y", b"X-Forwarded-For: [2001:db8::1]:80\r\nX-Real-IP: 10.0.0.2\r\nConnection: x-real-ip"
                ),
            ],
            check_proxied,
        ),
        Target("tap", [_frames(b""), _frames(b"\1\2\3\4"), b"\x82\x7f" + bytes(5) + b"\x10\0\0xx"], check_tap),
        Target("hint", [*_hellos(), b"GET /link?a=b&worker=3 HTTP/1.1\r\nHost: a\r\n\r\n"], check_hint),
        Target("control", [control.encode(one) for one in (_HELLO, _WELCOME)] + [bytes(24)], check_control),
    )
}
