"""Streams served from a local service that does everything a service can do wrong, and some things right."""

from typing import Any

import pytest
import scripted
import trio
from scripted import NO_BODY, UNKNOWN, Peer, answer_of, rig

from tunnel.agent.forward import Forwarder
from tunnel.errors import Failure
from tunnel.handler import Handler, LocalVisit
from tunnel.http import client
from tunnel.http.client import Service
from tunnel.link.stream import RawStream
from tunnel.wire.frames import HTTP, MAX_INTERIMS, PROBE, TCP, UPGRADE, Open


@pytest.fixture(params=["by a task", "quickly"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are served by tasks, or without them where that can be."""
    monkeypatch.setattr(scripted, "is_quick", request.param == "quickly")


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


async def polite(peer: Peer) -> None:
    """One answer after another on one connection."""
    while True:
        await peer.head()
        await peer.send(HELLO)


async def fails(asking: Any) -> Failure:
    with pytest.raises(Failure) as caught:
        await asking
    return caught.value


# What works -------------------------------------------------------------------------------------------------------


async def test_connections_are_kept_and_visits_are_filled_in() -> None:
    async with rig(polite) as app:
        for count in range(1, 4):
            response, body = await app.ask(b"GET /x?y")
            assert (response.status, response.length, response.head, body) == (200, 5, b"OK\r\n", b"hello")
            assert 0 <= response.local_us <= response.agent_us
            await app.done(count)
        assert app.connections == 1
        stream, local = app.streams[0], app.locals[0]
        assert (stream.outcome, stream.status, stream.bytes_in, stream.bytes_out) == ("ok", 200, 0, 5)
        assert (local.outcome, local.status, local.bytes_in, local.bytes_out) == ("ok", 200, 0, 5)
        assert (stream.method, stream.target, stream.request_id, stream.agent_id) == ("GET", "/x?y", "r-1", "agent-1")
        assert (local.method, local.target, local.request_id, local.parent) == ("GET", "/x?y", "r-1", stream)
        assert local.address == app.service.address
        assert {"connected", "first_byte"} <= local.marks.keys()
        assert "connected" not in app.locals[1].marks
        assert app.forwarder.active == 0
        await app.forwarder.wait_idle()


async def test_the_head_as_the_service_gets_it() -> None:
    heads: list[bytes] = []

    async def look(peer: Peer) -> None:
        while True:
            heads.append(await peer.head())
            await peer.send(HELLO)

    def stamp(handler: Handler) -> Handler:
        async def layered(visit: Any) -> None:
            if isinstance(visit, LocalVisit):
                visit.headers["traceparent"] = "mine"
            await handler(visit)

        return layered

    async with rig(look, layers=[stamp]) as app:
        context = b"request-id: r-1\r\ntraceparent: cores\r\ntracestate: a=b\r\n"
        await app.ask(b"POST /", b"TraceParent: visitors", b"X-Case: Kept", body=b"", context=context)
        assert heads[0] == (
            b"POST / HTTP/1.1\r\nHost: a.localhost\r\nX-Case: Kept\r\ntraceparent: mine\r\ntracestate: a=b\r\n"
            b"Content-Length: 0\r\n\r\n"
        )
        await app.ask(context=b"")
        assert heads[1] == b"GET / HTTP/1.1\r\nHost: a.localhost\r\ntraceparent: mine\r\n\r\n"


async def test_what_a_hostile_core_says_of_a_request_brings_nothing_into_it() -> None:
    heads: list[bytes] = []

    async def look(peer: Peer) -> None:
        while True:
            heads.append(await peer.head())
            await peer.send(HELLO)

    async with rig(look) as app:
        for bad in (
            b"b3: 1\nX-Injected: yes", b"b3: 1\rX-Injected: yes", b"b3: 1\n\nGET /smuggled HTTP/1.1\nHost: admin\n\nx",
            b"transfer-encoding: chunked", b"content-length: 5", b"host: other", b"cookie: a", b"x y:z: 1", b"b3: a\0b",
            b"request-id: a\nb", b": a", b"b3", b"b3:1", b"b3:  1", b"B3: 1",
        ):  # fmt: skip
            await app.ask(context=b"request-id: r-1\r\n" + bad + b"\r\ntracestate: \r\nx-b3-traceid: a b\r\n")
            assert heads.pop() == b"GET / HTTP/1.1\r\nHost: a.localhost\r\ntracestate: \r\nx-b3-traceid: a b\r\n\r\n"
            visit, _ = await app.done()
            assert visit.request_id == "r-1"
            app.streams.clear()
            app.locals.clear()


@pytest.mark.parametrize("setting", ["local", "app.test:3000"])
async def test_the_host_that_the_service_wants(setting: str) -> None:
    """In place of the visitor's, in every kind of request; the other fields still say what the visitor typed."""
    heads: list[bytes] = []

    async def look(peer: Peer) -> None:
        while True:
            heads.append(await peer.head())
            if b"chunked" in heads[-1]:
                await peer.until(b"0\r\n\r\n")
            await peer.send(HELLO)

    async with rig(look) as app:
        wanted = Service("127.0.0.1", app.service.port, False, setting)
        app.service, port = wanted, app.service.port
        seen = b"X-Forwarded-Host: a.localhost"
        await app.ask(b"GET /1", seen)
        await app.ask(b"GET /2", seen)  # on the kept connection
        stream = app.open(b"POST /3", seen, length=UNKNOWN)
        await stream.send(b"hello", end=True)
        await answer_of(stream)
        await app.ask(b"GET /4", seen, b"Connection: Upgrade", b"Upgrade: echo", protocol=UPGRADE)
        if scripted.is_quick:
            assert app.served_quickly
    host = b"127.0.0.1:%d" % port if setting == "local" else b"app.test:3000"
    assert [head.split(b" ")[1] for head in heads] == [b"/1", b"/2", b"/3", b"/4"]
    for head in heads:
        lines = head.split(b"\r\n")
        assert [line for line in lines if line.lower().startswith(b"host:")] == [b"Host: " + host]
        assert seen in lines


@pytest.mark.parametrize("setting", ["local", "app.test:3000", ""])
async def test_redirects_to_the_host_that_the_service_was_given(setting: str) -> None:
    """They lead the visitor to where it came from, in answers of any length; no other status is looked at."""

    async def redirect(peer: Peer) -> None:
        while True:
            status = (await peer.head()).split(b" ")[1].removeprefix(b"/")
            to = b"127.0.0.1:%d" % app.service.port if setting == "local" else b"app.test:3000"
            length, body = (b"5", b"moved") if status != b"302" else (b"100000", b"x" * 100_000)
            await peer.send(
                b"HTTP/1.1 %b Found\r\nLocation: http://%b/in?a#b\r\nX: 1\r\nContent-Length: %b\r\n\r\n"
                % (status, to, length) + body
            )  # fmt: skip

    async with rig(redirect) as app:
        app.service = Service("127.0.0.1", app.service.port, False, setting)
        own = b"http://127.0.0.1:%d" % app.service.port if setting == "local" else b"http://app.test:3000"
        public = b"https://a.example" if setting else own
        for status, to in ((200, own), (201, public), (301, public), (302, public), (308, public), (404, own)):
            asked = (b"X-Forwarded-Proto: https", b"X-Forwarded-Host: a.example")
            response, body = await app.ask(b"GET /%d" % status, *asked)
            assert (response.status, response.head) == (status, b"Found\r\nLocation: %b/in?a#b\r\nX: 1\r\n" % to)
            assert len(body) == (5 if status != 302 else 100_000)
        if scripted.is_quick:
            assert app.served_quickly


@pytest.mark.parametrize(
    ("host", "port", "secure", "own"),
    [
        ("localhost", 3000, False, "localhost:3000"), ("localhost", 80, False, "localhost"),
        ("localhost", 443, True, "localhost"), ("localhost", 443, False, "localhost:443"), ("::1", 80, False, "[::1]"),
    ],
)  # fmt: skip
def test_a_services_own_host_is_written_as_a_browser_would(host: str, port: int, secure: bool, own: str) -> None:
    assert Service(host, port, secure, "local").host_header == own
    assert Service(host, port, secure).host_header == ""


@pytest.mark.parametrize(
    ("raw", "length", "body"),
    [
        (HELLO, 5, b"hello"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n",
            UNKNOWN,
            b"hello",
        ),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", UNKNOWN, b"hello"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", NO_BODY, b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 5, b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000, 100_000, b"x" * 100_000),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello and more", 5, b"hello"),
    ],
)
@pytest.mark.parametrize("dribble", [False, True])
async def test_answers(raw: bytes, length: int, body: bytes, dribble: bool) -> None:
    async def say(peer: Peer) -> None:
        await peer.head()
        for at in range(0, len(raw), 1 if dribble and len(raw) < 1000 else len(raw)):
            await peer.send(raw[at : at + (1 if dribble and len(raw) < 1000 else len(raw))])
            await trio.lowlevel.checkpoint()

    async with rig(say) as app:
        stream = app.open()
        response, got = await answer_of(stream)
        assert (response.length, got) == (length, body)
        assert stream.trailers == (b"X-Sum: 1\r\n" if b"X-Sum" in raw else b"")
        assert (await app.done())[1].outcome == "ok"


@pytest.mark.parametrize("chunked", [False, True])
async def test_uploads_are_streamed(chunked: bool) -> None:
    got: list[bytes] = []

    async def take(peer: Peer) -> None:
        head = await peer.head()
        assert (b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: 10\r\n") in head
        got.append(await peer.until(b"0\r\nX-Sum: 1\r\n\r\n" if chunked else b"world"))
        await peer.send(HELLO)

    async with rig(take) as app:
        stream = app.open(b"POST /", length=UNKNOWN if chunked else 10)
        await stream.send(b"hello")
        await stream.send(b"world", end=not chunked)
        if chunked:
            stream.finish(b"X-Sum: 1\r\n")
        assert (await answer_of(stream))[1] == b"hello"
        body = b"5\r\nhello\r\n5\r\nworld\r\n0\r\nX-Sum: 1\r\n\r\n" if chunked else b"helloworld"
        assert b"".join(got) in (body, b"a\r\nhelloworld\r\n0\r\nX-Sum: 1\r\n\r\n")
        stream_visit, local = await app.done()
        assert (stream_visit.bytes_in, local.bytes_in, local.bytes_out) == (10, 10, 5)


async def test_interim_answers_go_on() -> None:
    async def hint(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + HELLO)

    async with rig(hint) as app:
        stream = app.open()
        seen = [(await stream.answer()) for _ in range(3)]
        assert [(one.status, one.head) for one in seen] == [
            (103, b"Early Hints\r\nLink: </a>\r\n"), (100, b"Continue\r\n"), (200, b"OK\r\n")
        ]  # fmt: skip


@pytest.mark.parametrize(("count", "fits"), [(MAX_INTERIMS, True), (MAX_INTERIMS + 1, False)])
async def test_interim_answers_have_an_end(count: int, fits: bool) -> None:
    async def flood(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 102 Processing\r\n\r\n" * count + HELLO)

    async with rig(flood) as app:
        stream = app.open()
        if fits:
            assert [(await stream.answer()).status for _ in range(count + 1)] == [102] * count + [200]
        else:
            await app.done()
            assert app.streams[0].outcome == "local_broken" and "interim" in app.streams[0].error


@pytest.mark.parametrize("fields", [b"", b"Upgrade: h2c\r\n", b"Upgrade: websocket\r\nUpgrade: h2c\r\n"])
@pytest.mark.parametrize("protocol", [HTTP, UPGRADE])
async def test_a_101_to_what_was_not_asked_for(protocol: int, fields: bytes) -> None:
    async def switch(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\n" + fields + b"\r\n")
        await peer.wait_gone()

    async with rig(switch) as app:
        asked = (b"Connection: Upgrade", b"Upgrade: websocket")
        stream = app.open(b"GET /", *asked, protocol=protocol, length=NO_BODY)
        failure = await fails(answer_of(stream))
        assert failure.outcome == "local_broken" and "unasked" in failure.text


@pytest.mark.parametrize(
    "answer",
    [CHUNKED.replace(b"/1.1", b"/1.0"), CHUNKED.replace(b"/1.1 200 OK", b"/1.0 200 OK\r\nConnection: keep-alive")],
)
async def test_a_chunked_answer_of_http_1_0_ends_its_connection(answer: bytes) -> None:
    async def talk(peer: Peer) -> None:
        await peer.head()
        await peer.send(answer)
        await peer.wait_gone()

    async with rig(talk) as app:
        for number in (1, 2):
            assert (await app.ask())[1] == b"hello"
            assert app.connections == number


async def test_an_early_answer_ends_the_upload() -> None:
    gone = trio.Event()

    async def refuse(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await peer.wait_gone()
        gone.set()

    async with rig(refuse) as app:
        stream = app.open(b"POST /", length=1_000_000)
        await stream.send(b"x" * 1000)
        response, body = await answer_of(stream)
        assert (response.status, body) == (413, b"no")
        with trio.fail_after(10):
            await gone.wait()
        visit, local = await app.done()
        assert (visit.outcome, local.outcome, local.status) == ("ok", "ok", 413)


# Kept connections that have died ----------------------------------------------------------------------------------


async def one_answer(peer: Peer) -> None:
    """Closes at the second request, as a server does whose idle time is up."""
    await peer.head()
    await peer.send(HELLO)
    await peer.head()


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"])
async def test_a_stale_connection_costs_an_idempotent_request_nothing(method: bytes) -> None:
    closed = trio.Event()

    async def closes(peer: Peer) -> None:
        await peer.head()
        await peer.send(HELLO)
        await peer.stream.aclose()
        closed.set()

    async with rig(closes, polite) as app:
        await app.ask()
        await closed.wait()
        response, _ = await app.ask(method + b" /", body=b"x" if method == b"PUT" else None)
        assert response.status == 200
        assert app.connections == 2


@pytest.mark.parametrize("method", [b"GET", b"PUT", b"POST", b"PATCH", b"LOCK"])
async def test_what_the_service_may_have_seen_is_never_sent_twice(method: bytes) -> None:
    async with rig(one_answer) as app:
        await app.ask()
        failure = await fails(app.ask(method + b" /", body=b"x"))
        assert failure.outcome == "local_broken"
        assert app.connections == 1


async def test_a_second_break_is_the_services_fault() -> None:
    closed = trio.Event()

    async def closes(peer: Peer) -> None:
        await peer.head()
        await peer.send(HELLO)
        await peer.stream.aclose()
        closed.set()

    async def none(peer: Peer) -> None:
        await peer.head()

    async with rig(closes, none) as app:
        await app.ask()
        await closed.wait()
        assert "without an answer" in str(await fails(app.ask()))
        assert app.connections == 2


async def test_half_an_answer_is_not_asked_for_again() -> None:
    async def half(peer: Peer) -> None:
        await peer.head()
        await peer.send(HELLO)
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\nA: ")

    async with rig(half) as app:
        await app.ask()
        assert "within the answer's head" in str(await fails(app.ask()))
        assert app.connections == 1


# What a service does wrong ----------------------------------------------------------------------------------------

BROKEN = [
    b"", b"HTTP/1.1 200", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nhello", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200 OK\r\nA: " + b"a" * 70_000,
]  # fmt: skip


@pytest.mark.parametrize("raw", BROKEN)
@pytest.mark.parametrize("upload", [False, True])
async def test_broken_answers(raw: bytes, upload: bool) -> None:
    async def say(peer: Peer) -> None:
        await peer.head()
        await peer.send(raw)
        await peer.stream.send_eof()

    async with rig(say) as app:
        stream = app.open(b"POST /", length=UNKNOWN) if upload else app.open()
        assert (await fails(answer_of(stream))).outcome == "local_broken"
        visit, local = await app.done()
        assert (visit.outcome, local.outcome) == ("local_broken", "local_broken")
        assert app.service.address in local.error or "local service" in local.error
        assert not app.agent.session.streams and not app.core.session.streams


@pytest.mark.parametrize("upload", [False, True])
async def test_a_service_that_answers_with_an_alert_of_tls(upload: bool) -> None:
    async def alert(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"\x15\x03\x01\x00\x02\x02\x46")  # fatal, protocol_version

    async with rig(alert) as app:
        failure = await fails(answer_of(app.open(b"POST /", length=UNKNOWN) if upload else app.open()))
        assert failure.outcome == "local_broken"
        assert failure.text == f"{app.service.address} speaks TLS; give it as https://{app.service.address}"


@pytest.mark.parametrize("upload", [False, True])
async def test_a_service_with_tls_that_says_nothing_is_found_out(upload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Node's: it closes the connection, but shakes hands with who asks."""
    monkeypatch.setattr(scripted, "is_secure", True)
    now = [1000.0]
    monkeypatch.setattr(client, "monotonic", lambda: now[0])

    async def silently(peer: Peer) -> None:
        if not (await peer.stream.receive_some()):
            return
        await peer.send(HELLO)

    async with rig(silently) as app:
        address, port = app.service.address, app.service.port
        app.service = Service("127.0.0.1", port, False)
        for _ in range(3):
            failure = await fails(answer_of(app.open(b"POST /", length=UNKNOWN) if upload else app.open()))
            assert (failure.outcome, failure.text) == (
                "local_broken",
                f"{address} speaks TLS; give it as https://{address}",
            )
        assert app.connections == 4  # one look is enough
        now[0] += client.LOOK_AGAIN
        await fails(app.ask())
        assert app.connections == 6


@pytest.mark.parametrize("has_tls", [True, False])
async def test_a_service_with_tls_that_answers_400_is_said(
    has_tls: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As nginx does; the answer is passed on, whatever it is."""
    looks = 0

    async def look(service: Service, context: object) -> bool:
        nonlocal looks
        looks += 1
        return has_tls

    async def refuse(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\nConnection: close\r\n\r\nno\n")

    monkeypatch.setattr(Service, "_can_shake_hands", look)
    async with rig(refuse, polite) as app:
        response, body = await app.ask()
        assert (response.status, body) == (400, b"no\n")
        assert (await app.done())[1].outcome == "ok"
        said = [vars(one)["fields"]["reason"] for one in caplog.records if one.levelname == "WARNING"]
        address = app.service.address
        assert said == ([f"{address} speaks TLS; give it as https://{address}"] if has_tls else [])
        await app.ask()
        assert app.service.has_answered and looks == 1


async def test_a_plain_service_that_says_nothing_is_not_taken_for_one_with_tls() -> None:
    async def quiet(peer: Peer) -> None:
        await peer.stream.receive_some()

    async with rig(quiet) as app:
        assert "without an answer" in (await fails(app.ask())).text
        assert app.connections == 2

    async def one(peer: Peer) -> None:
        await peer.head()
        await peer.send(HELLO)

    async with rig(one, quiet) as app:
        assert (await app.ask())[1] == b"hello"
        await fails(app.ask(b"POST /"))
        assert app.connections == 2, "it has answered before: nothing to look at"


async def test_a_service_that_is_not_there() -> None:
    async with rig(polite) as app:
        with trio.socket.socket() as taken:
            await taken.bind(("127.0.0.1", 0))
            app.service = Service("127.0.0.1", taken.getsockname()[1], False)
            for options in ({}, {"length": 5}, {"protocol": TCP, "length": UNKNOWN}, {"protocol": PROBE}):
                failure = await fails(answer_of(app.open(**options)))  # type: ignore[arg-type]
                assert failure.outcome == "local_refused"
                assert app.service.address in failure.text and "refused" in failure.text
        assert {one.outcome for one in app.streams} == {"local_refused"}


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1", b"GET / HTTP/1.1\r\nA:b\r\n", b"GET / HTTP/1.1\r\n\r\n"])
async def test_a_head_that_no_core_sends(head: bytes) -> None:
    async with rig(polite) as app:
        stream = app.core.session.open(Open(HTTP, 0, 0, NO_BODY, b"", head), b"", True)
        assert (await fails(answer_of(stream))).outcome == "bad_request"  # type: ignore[arg-type]


async def test_a_tunnel_that_is_not_served() -> None:
    async with rig(polite) as app:
        assert (await fails(app.ask(tunnel=3))).outcome == "no_tunnel"


async def test_a_bug_costs_one_stream(caplog: pytest.LogCaptureFixture) -> None:
    def faulty(handler: Handler) -> Handler:
        async def layered(visit: Any) -> None:
            if visit.kind == "stream" and visit.request_id == "r-bug":
                raise ZeroDivisionError
            await handler(visit)

        return layered

    async with rig(polite, layers=[faulty]) as app:
        assert (await fails(app.ask(context=b"request-id: r-bug\r\n"))).outcome == "link_lost"
        assert (await app.ask())[1] == b"hello"
    assert "stream broke" in caplog.text


# Time-outs, and visitors who leave --------------------------------------------------------------------------------


async def silent(peer: Peer) -> None:
    await peer.head()
    await peer.wait_gone()


async def test_no_answer_in_time() -> None:
    async with rig(silent) as app:
        stream = app.open()
        while not app.connections:
            await trio.lowlevel.checkpoint()
        app.tick(29)
        assert stream.failure is None
        app.tick(31)
        assert (await fails(answer_of(stream))).outcome == "timeout"
        visit, local = await app.done()
        assert (visit.outcome, local.outcome) == ("timeout", "timeout")
        assert local.error == visit.error
        assert "did not answer within 30 s (the core's and the agent's -request-timeout)" in local.error


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        (10.0, 30_000, "within 10 s (the agent's -request-timeout)"),
        (30.0, 2_500, "within 2.5 s (the core's -request-timeout)"),
        (30.0, 0, "within 30 s (the agent's -request-timeout)"),
    ],
)
async def test_a_timeout_says_whose_it_was(mine: float, theirs: int, said: str) -> None:
    async with rig(silent, request_timeout=mine) as app:
        stream = app.open(deadline_ms=theirs)
        while not app.connections:
            await trio.lowlevel.checkpoint()
        app.tick(31)
        failure = await fails(answer_of(stream))
        assert failure.outcome == "timeout" and said in failure.text


async def test_while_the_visitor_is_waited_for_the_service_is_not_late() -> None:
    async def take(peer: Peer) -> None:
        await peer.until(b"hello")
        await peer.until(b"world")
        await peer.send(HELLO)

    async with rig(take) as app:
        stream = app.open(b"POST /", length=10)
        await stream.send(b"hello")
        while not app.connections:
            await trio.lowlevel.checkpoint()
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        app.tick(3600)  # the core watches its visitor, and would have reset the stream
        await stream.send(b"world", end=True)
        assert (await answer_of(stream))[1] == b"hello"


@pytest.mark.parametrize("upload", [False, True])
async def test_a_visitor_who_leaves_ends_the_work_at_the_service(upload: bool) -> None:
    seen, gone = trio.Event(), trio.Event()

    async def wait(peer: Peer) -> None:
        await peer.head()
        seen.set()
        await peer.wait_gone()
        gone.set()

    async with rig(wait) as app:
        stream = app.open(b"POST /", length=100) if upload else app.open()
        with trio.fail_after(10):
            await seen.wait()
            stream.reset("visitor_aborted", "the visitor closed the connection")
            await gone.wait()
        visit, local = await app.done()
        assert (visit.outcome, local.outcome) == ("visitor_aborted", "visitor_aborted")
        assert not visit.error


async def test_the_link_ends() -> None:
    async with rig(silent) as app:
        app.open()
        while not app.connections:
            await trio.lowlevel.checkpoint()
        app.agent.end("pulled out")
        visit, local = await app.done()
        assert (visit.outcome, local.outcome) == ("link_lost", "link_lost")
        assert "pulled out" in visit.error


# Raw bytes --------------------------------------------------------------------------------------------------------


async def shout(peer: Peer) -> None:
    async for data in peer.stream:
        await peer.send(bytes(data).upper())
    await peer.stream.send_eof()


async def test_tcp_both_ways_with_half_close() -> None:
    async with rig(shout) as app:
        stream = app.open(protocol=TCP, length=UNKNOWN)
        assert (await stream.answer()).status == 200
        raw = RawStream(stream)
        await raw.send_all(b"hello")
        await raw.send_eof()
        got = b""
        while data := await raw.receive_some():
            got += data
        assert got == b"HELLO"
        with trio.fail_after(10):
            while not app.streams:
                await trio.lowlevel.checkpoint()
        assert (app.streams[0].outcome, app.streams[0].bytes_in, app.streams[0].bytes_out) == ("ok", 5, 5)
        assert not app.locals


async def test_tcp_that_the_service_resets() -> None:
    async def reset(peer: Peer) -> None:
        await peer.until(b"x")
        peer.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.stream.socket.close()

    async with rig(reset) as app:
        stream = app.open(protocol=TCP, length=UNKNOWN)
        await stream.answer()
        await stream.send(b"x")
        assert (await fails(answer_of(stream))).outcome == "local_broken"


async def test_upgrade() -> None:
    async def switch(peer: Peer) -> None:
        assert b"\r\nConnection: Upgrade\r\n" in await peer.head()
        await peer.send(b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nFIRST ")
        await shout(peer)

    async with rig(switch) as app:
        fields = (b"Connection: Upgrade", b"Upgrade: websocket")
        stream = app.open(b"GET /", *fields, protocol=UPGRADE, length=NO_BODY)
        response = await stream.answer()
        assert (response.status, response.head) == (101, b"Switching\r\nUpgrade: websocket\r\n")
        await stream.send(b"hello", end=True)
        assert (await answer_of(stream))[1] == b"FIRST HELLO"
        visit, local = await app.done()
        assert (local.outcome, local.status, local.bytes_in, local.bytes_out) == ("ok", 101, 5, 11)
        assert visit.status == 101


async def test_an_upgrade_that_is_declined() -> None:
    async with rig(polite) as app:
        stream = app.open(b"GET /", b"Connection: Upgrade", b"Upgrade: x", protocol=UPGRADE, length=NO_BODY)
        assert (await answer_of(stream))[1] == b"hello"
        assert (await app.done())[0].outcome == "ok"


async def test_a_probe_connects_and_sends_nothing() -> None:
    got: list[bytes] = []

    async def listen(peer: Peer) -> None:
        got.append(await peer.stream.receive_some())

    async with rig(listen) as app:
        response, body = await answer_of(app.open(protocol=PROBE))
        assert (response.status, body) == (204, b"")
        with trio.fail_after(10):
            while not got:
                await trio.lowlevel.checkpoint()
        assert got == [b""]
        assert [one.protocol for one in app.streams] == ["probe"]
        assert not app.locals


async def test_the_credit_of_uploads_that_nobody_took_comes_back() -> None:
    async def refuse(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await peer.wait_gone()

    async with rig(refuse) as app:
        for count in range(1, 80):
            stream = app.open(b"POST /", length=10_000_000)
            with trio.fail_after(10), pytest.raises(Failure):
                while True:
                    await stream.send(b"x" * 1_000_000)
            await app.done(count)
        assert isinstance(app.forwarder, Forwarder)
