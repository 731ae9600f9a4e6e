"""Each way a request can fail at the core: the answer, the outcome on request and stream, and whose fault it was."""

import math
import socket as stdlib_socket

import h11
import pytest
import trio
from inprocess import Answer, Caller, Core, body_of, core, head, opened, respond, until, without_tls
from linking import socket_pair
from trio.testing import wait_all_tasks_blocked

from tunnel.core.quotas import Account, Limits
from tunnel.errors import OUTCOMES, Failure
from tunnel.link.stream import Stream
from tunnel.wire.frames import LINK_WINDOW, NO_BODY, STREAM_WINDOW, UNKNOWN, Response

pytestmark = pytest.mark.usefixtures("way")


async def hello(stream: Stream) -> None:
    respond(stream, b"hello")


async def silence(stream: Stream) -> None:
    await trio.sleep_forever()


async def refused(app: Core, raw: bytes, outcome: str, *, closes: bool = False) -> Answer:
    """The request is answered with the outcome; a visitor that keeps to the rules can go on unless it closes."""
    before = len(app.requests)
    visitor = app.visitor()
    await visitor.send(raw)
    answer = await visitor.answer(raw[: raw.index(b" ")].decode())
    request = await app.finished(before + 1)
    row = OUTCOMES[outcome]
    assert (answer.outcome, answer.status) == (outcome, row.status)
    assert (request.outcome, request.status, bool(request.error)) == (outcome, row.status, row.failed)
    assert answer.fields[b"x-request-id"].decode() == request.request_id
    assert (answer.fields.get(b"connection") == b"close") is closes
    if closes:
        assert await visitor.rest() == b""
    else:
        await visitor.send(head())
        await visitor.answer()
    return answer


# Before a stream is opened ----------------------------------------------------------------------------------------


async def test_names_that_nobody_serves() -> None:
    async with core() as app:
        app.names.owners = {"mine": "acme", "www.example.org": "acme"}
        assert b"other.example.net" in (await refused(app, head("GET", "/", "other.example.net:80"), "no_tunnel")).body
        for host in ("mine.example.com", "MINE.EXAMPLE.COM:8080", "mine.localhost", "www.example.org."):
            answer = await refused(app, head("GET", "/", host), "no_agent")
            assert answer.fields[b"retry-after"] == b"5"
        agent = await app.agent(hello, "gone")
        app.registry.withdraw(agent)
        await refused(app, head("GET", "/", "gone.example.com"), "no_agent")
        assert app.requests[-2].tunnel == "gone"


async def test_a_tcp_tunnel_has_no_pages() -> None:
    async with core() as app:
        agent = await app.agent(hello)
        app.registry.attach(agent, "db", "tcp", 1).port = 20000
        assert b"port 20000" in (await refused(app, head("GET", "/", "db.example.com"), "no_tunnel")).body


@pytest.mark.parametrize(
    ("raw", "outcome"),
    [
        (head("GET", "/", "app example"), "bad_request"),
        (head("GET", "/", "app.example.com", "A : b"), "bad_request"),
        (b"GET / HTTP/1.1\nHost: app.example.com\n\n", "bad_request"),
        (b"GET / HTTP/1.1\r\nHost: app.example.com\n\r\n", "bad_request"),
        (head("GET", "/" + "a" * 20_000), "uri_too_long"),
        (head("GET", "/" + "a" * 70_000), "uri_too_long"),
        (b"GET /" + b"a" * 70_000, "uri_too_long"),
        (head("GET", "/", "app.example.com", "A: " + "a" * 70_000), "head_too_large"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 70_000, "head_too_large"),
    ],
)
async def test_heads_that_are_refused_end_the_connection(raw: bytes, outcome: str) -> None:
    async with core() as app:
        await refused(app, raw, outcome, closes=True)
        assert app.requests[0].method == "GET"


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", "it is TLS, and this port speaks plain HTTP"),
        (b"\x00\x01binary\r\n\r\n", "it begins with no method"),
        (head("GET", "/", "app example"), "the Host field is malformed"),
        (head("TRACE", "/", "app.example.com"), "TRACE is not passed through the tunnel"),
    ],
)
async def test_the_visit_says_why_it_was_turned_away(raw: bytes, cause: str) -> None:
    """It is no failure of ours, but whoever reads the log wants to know."""
    async with core() as app:
        visitor = app.visitor()
        await visitor.send(raw)
        await visitor.socket.recv()
        request = await app.finished()
        assert (request.cause, request.error) == (cause, "")
        assert request.client == "192.0.2.1"


@pytest.mark.parametrize(
    ("raw", "host", "path", "version"),
    [
        (head("GET", "/a/b?key=secret", "APP.example.com:80", "A : b"), "app.example.com", "/a/b", "1.1"),
        (head("GET", "/a", "app.example.com", "X_Forwarded_For: 1"), "app.example.com", "/a", "1.1"),
        (b"GET /a?secret HTTP/1.0\nHost: app.example.com\n\n", "app.example.com", "/a", "1.0"),
        (head("GET", "/a", "app example"), "", "/a", "1.1"),
        (head("GET", "/a", "app.example.com", "Host: other.example.com"), "", "/a", "1.1"),
        (head("GET", "http://me:secret@app.example.com/a?secret"), "app.example.com", "/a", "1.1"),
        (head("GET", "me:secret"), "app.example.com", "", "1.1"),
        (head("GET", "/a\xe4b?secret"), "app.example.com", "", "1.1"),
        (head("GET", "/a#secret"), "app.example.com", "/a", "1.1"),
        (head("GET", "/a b"), "app.example.com", "", "1.1"),
        (b"GET /a HTTP/2.0\r\nHost: app.example.com\r\n\r\n", "app.example.com", "", "1.1"),
        (b"GET /a HTTP/1.1\r\nHost: app.example.com\r\nA: " + b"a" * 70_000, "app.example.com", "/a", "1.1"),
        (head("GET", "/" + "a" * 20_000), "app.example.com", "/" + "a" * 2047, "1.1"),
        (head("GET", "/a", "a" * 5000, "A : b"), "", "/a", "1.1"),
        (b"\x16\x03\x01 /a HTTP/1.1\r\nHost: app.example.com\r\n\r\n", "", "", "1.1"),
    ],
)
async def test_a_request_that_is_refused_can_be_found(raw: bytes, host: str, path: str, version: str) -> None:
    """What of it can be read is on its record; of an address no more than the path."""
    async with core() as app:
        visitor = app.visitor()
        await visitor.send(raw)
        await visitor.socket.recv()
        request = await app.finished()
        assert request.outcome in ("bad_request", "uri_too_long", "head_too_large")
        assert (request.host, request.target, request.http_version) == (host, path, version)
        assert request.tunnel == request.account_id == "" and request.method in ("GET", "-")


@pytest.mark.parametrize(
    ("name", "said"),
    [("X_Forwarded_For", "X_Forwarded_For"), ("x-forwarded-" + "a" * 80 + "_", "x-forwarded-" + "a" * 52 + "…")],
)
async def test_a_field_that_would_be_taken_for_another_is_named(name: str, said: str) -> None:
    async with core() as app:
        answer = await refused(app, head("GET", "/", "app.example.com", f"{name}: 1"), "bad_request", closes=True)
        assert f"the field {said} has an underscore and would be taken for another one" in answer.body.decode()


@pytest.mark.parametrize("raw", [head("TRACE"), head("CONNECT", "/"), head("TRACE", "/", "nobody.example.com")])
async def test_methods_that_are_refused(raw: bytes) -> None:
    async with core() as app:
        await app.agent(hello)
        answer = await refused(app, raw.replace(b"CONNECT", b"TRACE"), "method_not_allowed", closes=True)
        assert b"POST" in answer.fields[b"allow"]
        visitor = app.visitor()
        await visitor.send(b"CONNECT app.example.com:443 HTTP/1.1\r\nHost: app.example.com:443\r\n\r\n")
        assert b"X-Tunnel-Outcome: method_not_allowed" in await visitor.socket.recv()


async def test_bodies_that_are_too_large() -> None:
    async with core(max_body=10) as app:

        async def swallow(stream: Stream) -> None:
            await body_of(stream)
            respond(stream)

        await app.agent(swallow)
        sized = head("POST", "/", "app.example.com", "Content-Length: 11")
        await refused(app, sized + b"x" * 11, "body_too_large")  # all of it is here already: it can be skipped
        await refused(app, sized, "body_too_large", closes=True)
        chunked = head("POST", "/", "app.example.com", "Transfer-Encoding: chunked") + b"6\r\nabcdef\r\n" * 2
        await refused(app, chunked, "body_too_large", closes=True)
        huge = head("POST", "/", "app.example.com", "Content-Length: " + "9" * 20)
        assert (await refused(app, huge, "body_too_large", closes=True)).status == 413


async def test_quota() -> None:
    async with core() as app:
        await app.agent(hello, account=Account("one", "one", Limits(requests_per_second=0.01, requests_burst=1)))
        await app.visitor().get()
        assert int((await refused(app, head(), "quota")).fields[b"retry-after"]) > 50


async def test_every_agent_at_its_limit() -> None:
    async with core() as app:
        await app.agent(silence, max_streams=1)
        await app.visitor().send(head())
        await until(lambda: app.exchanger.active == 1)
        first = app.only_visitor()
        await until(lambda: first.request is not None and first.request.stream is not None)
        await refused(app, head(), "overloaded")


# The head, too slow -----------------------------------------------------------------------------------------------


async def test_a_head_that_does_not_come_in_time() -> None:
    async with core() as app:
        visitor = app.visitor()
        await visitor.send(b"GET / HT")
        await until(lambda: app.exchanger.active)
        await trio.testing.wait_all_tasks_blocked()
        app.tick(9)
        app.tick(11)
        answer = await visitor.answer()
        assert (answer.status, answer.outcome) == (408, "request_timeout")
        assert (await app.finished()).outcome == "request_timeout"


@without_tls
async def test_a_head_that_is_broken_off_and_a_connection_that_says_nothing() -> None:
    async with core() as app:
        for sent in (b"", b"GET / HT"):
            visitor = app.visitor()
            await visitor.send(sent)
            visitor.socket.shutdown()
            assert await visitor.rest() == b""
        await app.finished()
        assert [(one.outcome, one.status) for one in app.requests] == [("visitor_aborted", 499)]
        app.visitor()
        await until(lambda: app.door.visitors)
        app.tick(61)
        await until(lambda: not app.door.visitors)
        assert len(app.requests) == 1


# With a stream ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        *((one, one) for one in ("local_refused", "local_broken", "timeout", "no_tunnel", "link_lost")),
        *((one, "link_lost") for one in ("internal", "draining", "quota", "visitor_aborted", "no_agent")),
    ],
)
async def test_what_the_agent_says_went_wrong(said: str, outcome: str) -> None:
    async with core() as app:

        async def fail(stream: Stream) -> None:
            stream.reset(said, "localhost:3000: it was so")

        await app.agent(fail)
        assert b"localhost:3000: it was so" in (await refused(app, head(), outcome)).body
        assert app.streams[0].outcome == outcome


async def test_done_without_an_answer_is_the_links_fault() -> None:
    async with core() as app:

        async def odd(stream: Stream) -> None:
            stream.reset("ok")

        await app.agent(odd)
        await refused(app, head(), "link_lost")


async def test_the_link_is_lost_before_the_answer() -> None:
    async with core() as app:
        agent = await app.agent(silence)
        visitor = app.visitor()
        await visitor.send(head())
        await until(lambda: agent.link.session.streams)
        agent.link.end("pulled out")
        answer = await visitor.answer()
        assert (answer.status, answer.outcome) == (502, "link_lost")
        assert b"pulled out" in answer.body


@pytest.mark.parametrize("length", [UNKNOWN, 100])
@pytest.mark.parametrize("way", ["link", "reset", "short", "long"])
async def test_an_answer_that_breaks_half_way_is_never_taken_for_complete(length: int, way: str) -> None:
    async with core() as app:
        seen = trio.Event()

        async def half(stream: Stream) -> None:
            respond(stream, b"half", end=False, length=length)
            await seen.wait()
            if way == "reset":
                stream.reset("local_broken", "it broke")
            elif way == "short":
                stream.finish()
            elif way == "long":
                await stream.send(b"x" * 97, end=True)
            else:
                agent.link.end("pulled out")

        agent = await app.agent(half)
        visitor = app.visitor()
        await visitor.send(head())
        visitor.buffer = await visitor.socket.recv()
        seen.set()
        if length == UNKNOWN and way in ("short", "long"):
            assert (await visitor.answer()).status == 200
            return
        with pytest.raises((h11.RemoteProtocolError, trio.BrokenResourceError)):
            await visitor.answer()
        request = await app.finished()
        assert request.outcome == ("link_lost" if way == "link" else "local_broken")
        assert request.status == 200


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (Response(200, 5, 0, 0, b"OK\r\nContent-Length: 5\r\n"), b"hello"),
        (Response(200, 5, 0, 0, b"OK\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\n"), b"hello"),
        (Response(200, 5, 0, 0, b"OK"), b"hello"),
        (Response(200, 4, 0, 0, b"OK\r\n"), b"hello"),
        (Response(200, 6, 0, 0, b"OK\r\n"), b"hello"),
        (Response(200, NO_BODY, 0, 0, b"OK\r\n"), b"hello"),
        (Response(101, NO_BODY, 0, 0, b"OK\r\n"), b""),
    ],
)
async def test_answers_that_an_agent_must_not_send(answer: Response, body: bytes) -> None:
    async with core() as app:

        async def wrong(stream: Stream) -> None:
            stream.link.session.respond(stream, answer, body, True)

        await app.agent(wrong)
        await refused(app, head(), "local_broken")


async def test_trailers_that_an_agent_must_not_send() -> None:
    async with core() as app:

        async def split(stream: Stream) -> None:
            respond(stream, b"x", end=False, length=UNKNOWN)
            stream.finish(b"A: b\r\n\r\nHTTP/1.1 200 OK\r\n")

        await app.agent(split)
        visitor = app.visitor()
        await visitor.send(head())
        with pytest.raises((h11.RemoteProtocolError, trio.BrokenResourceError)):
            await visitor.answer()
        assert (await app.finished()).outcome == "local_broken"


# Time-outs: who is waited for is to blame -------------------------------------------------------------------------


async def test_no_answer_in_time_is_the_services_fault() -> None:
    async with core() as app:
        agent = await app.agent(silence)
        visitor = app.visitor()
        await visitor.send(head())
        await until(lambda: agent.link.session.streams)
        app.tick(29)
        app.tick(31)
        answer = await visitor.answer()
        assert (answer.status, answer.outcome) == (504, "timeout")
        assert b"no answer from the local service within 30 s (the core's -request-timeout)" in answer.body
        await visitor.send(head())  # the connection is still good
        await until(lambda: len(app.streams) == 1 and agent.link.session.streams)


async def upload(app: Core, *fields: str, sent: bytes = b"") -> tuple[Caller, trio.Event]:
    """A request that says it has 10 bytes; the event is set when the agent has seen its head."""
    seen = trio.Event()

    async def wait(stream: Stream) -> None:
        seen.set()
        await body_of(stream)

    await app.agent(wait)
    visitor = app.visitor()
    await visitor.send(head("POST", "/", "app.example.com", "Content-Length: 10", *fields) + sent)
    with trio.fail_after(10):
        await seen.wait()
    await until(lambda: app.only_visitor().request.reading)  # type: ignore[union-attr]
    return visitor, seen


async def test_a_body_that_does_not_come_in_time_is_the_visitors_fault() -> None:
    async with core() as app:
        visitor, _ = await upload(app, sent=b"12345")
        app.tick(31)
        answer = await visitor.answer()
        assert (answer.status, answer.outcome, answer.fields[b"connection"]) == (408, "request_timeout", b"close")


async def test_a_body_that_nobody_asks_for_is_the_services_fault() -> None:
    async with core() as app:
        visitor, _ = await upload(app, "Expect: 100-continue")
        app.tick(31)
        assert (await visitor.answer()).outcome == "timeout"


async def test_nobody_is_asked_for_a_body_in_the_middle_of_another_answer() -> None:
    async with core() as app:
        caller, _ = await upload(app, "Expect: 100-continue")
        visitor = app.only_visitor()
        request = visitor.request
        assert request is not None
        request.writing = True  # an interim answer that the visitor does not take
        app.tick(2)
        assert not request.continued
        request.writing = False
        app.tick(2)
        assert request.continued
        assert await caller.socket.recv() == b"HTTP/1.1 100 Continue\r\n\r\n"


async def test_a_connection_that_is_taken_over_with_its_request_is_not_idle() -> None:
    """Neither to the sweeper, which may come by before its task runs again, nor to a drain."""
    async with core() as app:
        await app.agent(hello)
        for number in range(16):
            near, far = socket_pair()
            app.sockets += near, far
            app.nursery.start_soon(app.door.adopt, near, "192.0.2.1", "http", head(), 1)
            while not app.door.visitors:
                await trio.lowlevel.checkpoint()
            app.tick()
            if number % 2:
                app.door.close_idle()
            caller = Caller(far)
            assert (await caller.answer()).body == b"hello"
            far.close()
            await until(lambda: not app.door.visitors)


async def test_a_silent_body_is_broken_off() -> None:
    async with core(body_idle_timeout=20.0) as app:

        async def stall(stream: Stream) -> None:
            respond(stream, b"half", end=False, length=100)
            await trio.sleep_forever()

        await app.agent(stall)
        visitor = app.visitor()
        await visitor.send(head())
        await visitor.socket.recv()
        app.tick(21)
        with pytest.raises((h11.RemoteProtocolError, trio.BrokenResourceError)):
            await visitor.answer()
        request = await app.finished()
        assert (request.outcome, request.status) == ("timeout", 200)
        assert request.error == "the answer stalled in its body for 20 s (the core's -body-idle-timeout)"


async def test_a_visitor_who_takes_nothing_is_cut_off() -> None:
    async with core() as app:

        async def flood(stream: Stream) -> None:
            respond(stream, end=False, length=100_000_000)
            for _ in range(1000):
                await stream.send(b"x" * 100_000)

        agent = await app.agent(flood)
        await app.visitor().send(head())
        await until(lambda: app.door.visitors and app.only_visitor().request)
        await until(lambda: app.only_visitor().request.writing)  # type: ignore[union-attr]
        app.tick(31)
        request = await app.finished()
        assert (request.outcome, request.status) == ("visitor_aborted", 499)
        assert not agent.link.session.streams


@without_tls
@pytest.mark.parametrize("is_half_closed", [False, True])
async def test_a_visitor_who_reads_slowly_is_not_cut_off(is_half_closed: bool) -> None:
    """The kernel takes nothing more of us until much of what it holds is gone."""

    async def flood(stream: Stream) -> None:
        respond(stream, end=False, length=100_000_000)
        for _ in range(1000):
            await stream.send(b"x" * 100_000)

    async with core() as app:
        await app.agent(flood)
        caller = app.visitor()
        app.sockets[-1].sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVBUF, 65_536)
        await caller.send(head())
        await until(lambda: app.door.visitors and (request := app.only_visitor().request) and request.writing)
        if is_half_closed:
            caller.socket.shutdown()
        await wait_all_tasks_blocked(0.01)
        for seconds in (1, 2.5, 8):
            app.tick(seconds)
        taken = 0
        while taken < 300_000:
            taken += len(await caller.socket.recv())
        await wait_all_tasks_blocked(0.01)
        for seconds in (32, 45, 60):
            app.tick(seconds)
        assert not app.requests and not app.only_visitor().request.aborted  # type: ignore[union-attr]
        app.tick(63)
        assert (await app.finished()).outcome == "visitor_aborted"


# The visitor leaves -----------------------------------------------------------------------------------------------


async def test_a_visitor_who_resets_ends_the_work() -> None:
    async with core() as app:
        failures: list[tuple[int, str] | None] = []
        started = trio.Event()

        async def work(stream: Stream) -> None:
            started.set()
            with pytest.raises(Failure):
                await stream.receive()
                await stream.wait_change()
                stream.raise_failure()
            failures.append(stream.failure)

        await app.agent(work)
        visitor = app.visitor()
        await visitor.send(head())
        await started.wait()
        app.tick(0)
        assert not app.requests
        visitor.socket.abort()
        app.tick(1)
        request = await app.finished()
        assert (request.outcome, request.status, app.streams[0].outcome) == ("visitor_aborted", 499, "visitor_aborted")
        await until(lambda: failures)
        assert failures[0] is not None and failures[0][0] == OUTCOMES["visitor_aborted"].code


@without_tls
async def test_a_visitor_who_half_closes_still_gets_the_answer() -> None:
    async with core() as app:
        go = trio.Event()

        async def slow(stream: Stream) -> None:
            await go.wait()
            respond(stream, b"hello")

        agent = await app.agent(slow)
        visitor = app.visitor()
        await visitor.send(head())
        visitor.socket.shutdown()
        await until(lambda: agent.link.session.streams)
        for seconds in (1, 1.5, 2.5, 5):  # seen, left in peace, asked once with an interim answer, still there
            app.tick(seconds)
        go.set()
        raw = await visitor.rest()
        assert raw.count(b"HTTP/1.1 100 Continue\r\n\r\n") == 1
        assert raw.endswith(b"\r\n\r\nhello")
        assert (await app.finished()).outcome == "ok"


async def test_a_visitor_who_closed_is_found_by_asking() -> None:
    async with core() as app:
        agent = await app.agent(silence)
        visitor = app.visitor()
        await visitor.send(head())
        await until(lambda: agent.link.session.streams)
        visitor.socket.close()
        for seconds in (1, 2.5, 3, 3.5):
            app.tick(seconds)
            await trio.lowlevel.checkpoint()
        assert (await app.finished()).outcome == "visitor_aborted"
        assert not agent.link.session.streams


@without_tls
async def test_silence_decides_within_a_body() -> None:
    async with core() as app:

        async def stall(stream: Stream) -> None:
            respond(stream, b"half", end=False, length=100)
            await trio.sleep_forever()

        await app.agent(stall)
        visitor = app.visitor()
        await visitor.send(head())
        visitor.socket.shutdown()
        await visitor.socket.recv()
        app.tick(1)
        app.tick(5)
        assert not app.requests
        app.tick(7)
        assert (await app.finished()).outcome == "visitor_aborted"


async def test_a_visitor_who_leaves_within_its_body() -> None:
    async with core() as app:
        visitor, _ = await upload(app, sent=b"12345")
        visitor.socket.shutdown()
        request = await app.finished()
        assert (request.outcome, request.status, request.bytes_in) == ("visitor_aborted", 499, 5)


@pytest.mark.parametrize("body", [b"x\r\n", b"5\r\nhelloX\r\n", b"-1\r\n\r\n"])
async def test_a_malformed_chunk(body: bytes) -> None:
    async with core() as app:

        async def wait(stream: Stream) -> None:
            await body_of(stream)

        await app.agent(wait)
        raw = head("POST", "/", "app.example.com", "Transfer-Encoding: chunked") + body
        await refused(app, raw, "bad_request", closes=True)


# Drain, and what is left behind -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_end_of_the_drain_answers_who_still_waits(method: str) -> None:
    async with core() as app:
        agent = await app.agent(silence)
        async with trio.open_nursery() as nursery:
            app.nursery, links = nursery, app.nursery
            visitor = app.visitor()
            await visitor.send(head(method))
            await until(lambda: agent.link.session.streams)
            nursery.cancel_scope.cancel()
        app.nursery = links
        answer = await visitor.answer(method)
        assert (answer.status, answer.outcome) == (503, "draining")
        assert await visitor.rest() == b""
        assert (app.requests[0].outcome, app.streams[0].outcome) == ("draining", "draining")


@without_tls
@pytest.mark.parametrize("length", [UNKNOWN, 900_000])
async def test_the_end_of_the_drain_never_makes_half_an_answer_look_whole(length: int) -> None:
    """All of it is here, its end included, and the visitor is slow to take it."""

    async def agent(stream: Stream) -> None:
        respond(stream, b"", False, length=length)
        await stream.send(b"x" * 900_000, end=True)

    async with core() as app:
        await app.agent(agent)
        visitor = app.visitor()
        for socket in app.sockets:
            socket.sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF, 65_536)
            socket.sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVBUF, 65_536)
        await visitor.send(head())
        await until(lambda: app.door.visitors and (request := app.only_visitor().request) and request.writing)
        request = app.only_visitor().request
        assert request is not None and request.stream is not None
        stream = request.stream
        await until(lambda: stream.ended)
        app.door.cut_off()
        with pytest.raises((trio.BrokenResourceError, h11.RemoteProtocolError)):
            await visitor.answer()
        assert ((await app.finished()).outcome, app.streams[0].outcome) == ("draining", "draining")


@without_tls
async def test_draining_closes_connections_after_their_answer() -> None:
    async with core() as app:
        go = trio.Event()

        async def slow(stream: Stream) -> None:
            await go.wait()
            respond(stream, b"hello")

        agent = await app.agent(slow)
        idle, busy = app.visitor(), app.visitor()
        await busy.send(head())
        await until(lambda: agent.link.session.streams and len(app.door.visitors) == 2)
        app.exchanger.is_draining = True
        app.door.close_idle()
        go.set()
        answer = await busy.answer()
        assert (answer.body, answer.fields[b"connection"]) == (b"hello", b"close")
        assert await idle.rest() == b""


async def test_the_links_credit_comes_back_however_a_stream_ends() -> None:
    """More windows than the link has, each left full by a visitor who went away."""
    async with core() as app:

        async def flood(stream: Stream) -> None:
            if opened(stream).head.startswith(b"GET /small"):
                respond(stream, b"hello")
                return
            respond(stream, end=False, length=UNKNOWN)
            while True:
                await stream.send(b"x" * 65536)

        agent = await app.agent(flood)
        for count in range(1, math.ceil(LINK_WINDOW / STREAM_WINDOW) * 2):
            visitor = app.visitor()
            await visitor.send(head())
            await until(lambda: any(one.request and one.request.writing for one in app.door.visitors))
            await until(
                lambda: any(one.inbox_bytes > STREAM_WINDOW // 2 for one in agent.link.session.streams.values())
            )
            visitor.socket.abort()
            app.tick(1)
            await app.finished(count)
        assert (await app.visitor().get("/small")).body == b"hello"
        assert not agent.link.session.streams
