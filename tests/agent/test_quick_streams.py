"""Streams served without a task: that they are, and what is left to a task from where.

That both ways come to the same is shown by test_forward.py, all of which runs both ways.
"""

import socket
from typing import Any

import pytest
import scripted
import trio
from linking import no_cycles
from scripted import Peer, Rig, rig
from trio.testing import wait_all_tasks_blocked

from tunnel.agent.served import LocalRequest, ServedStream
from tunnel.errors import Failure

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@pytest.fixture(autouse=True, params=["plain", "TLS"])
def quickly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted, "is_quick", True)
    monkeypatch.setattr(scripted, "is_secure", request.param == "TLS")


def answers(*rows: bytes | float) -> Any:
    """What a service says on its connection: one after another, each to a request; 0 ends it."""

    async def talk(peer: Peer) -> None:
        for row in rows:
            await peer.head()
            if isinstance(row, bytes):
                await peer.send(row)
            else:
                await peer.stream.aclose()
                return
        await peer.wait_gone()

    return talk


async def polite(peer: Peer) -> None:
    while True:
        await peer.head()
        await peer.send(HELLO)


async def failing(app: Rig, first: bytes = b"GET /") -> str:
    with pytest.raises(Failure) as caught:
        await app.ask(first)
    return caught.value.outcome


async def test_the_second_request_on_a_connection_needs_no_task() -> None:
    async with rig(polite) as app:
        for _ in range(5):
            response, body = await app.ask(b"GET /x")
            assert (response.status, body) == (200, b"hello")
        assert (app.served_quickly, app.handed_over, app.connections) == (4, 0, 1)
        stream, local = await app.done(5)
        assert (stream.outcome, stream.status, stream.bytes_out, stream.target) == ("ok", 200, 5, "/x")
        assert (local.outcome, local.status, list(local.marks)) == ("ok", 200, ["first_byte", "last_byte"])
        assert local.scheme == ("https" if scripted.is_secure else "http")
        assert app.forwarder.active == 0 and not app.sweeper._items and not app.agent.session.streams
        _, body = await app.ask(b"POST /x", body=b"abc")
        assert body == b"hello" and app.served_quickly == 5
        assert (await app.done(6))[0].bytes_in == 3


async def test_a_connection_that_another_link_has_kept() -> None:
    """Kept connections are the service's, whichever link made them: who is told must not be the one of before."""
    async with rig(answers(*[HELLO] * 6)) as app:
        for _ in range(3):  # each time another link's
            await app.ask()
            first = app.quick
            app.quick = None
            assert (await app.ask())[1] == b"hello"
            assert app.quick is not None and app.quick is not first
        assert (app.served_quickly, app.handed_over, app.connections) == (5, 0, 1)
        assert not app.under_way


async def test_no_cycles_are_left() -> None:
    """They would wait for the garbage collector, and each request would find its memory cold."""
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    async with rig(answers(*[HELLO, HELLO, chunked] * 4)) as app:
        with no_cycles(ServedStream, LocalRequest):
            for _ in range(12):
                await app.ask()
            await app.done(12)
            app.streams.clear()
            app.locals.clear()
        assert app.served_quickly == 11 and app.handed_over == 4


@pytest.mark.parametrize(
    ("second", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000, b"x" * 100_000),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", b"hi"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + HELLO, b"hello"),
    ],
    ids=["large", "chunked", "interim"],
)
async def test_other_answers_are_left_to_a_task(second: bytes, body: bytes) -> None:
    async with rig(answers(HELLO, second, HELLO)) as app:
        await app.ask()
        stream = app.open()
        response = await stream.answer()
        if response.status == 103:
            response = await stream.answer()
        got = b""
        while part := await stream.receive():
            got += part
        assert (response.status, got) == (200, body)
        assert (await app.done(2))[0].outcome == "ok"
        assert (app.served_quickly, app.handed_over) == (1, 1)
        assert (await app.ask())[1] == b"hello"
        assert (app.served_quickly, app.connections) == (2, 1)


async def test_an_answer_in_pieces_is_left_to_a_task() -> None:
    async def talk(peer: Peer) -> None:
        await peer.head()
        await peer.send(HELLO)
        await peer.head()
        await peer.send(HELLO[:20])
        await wait_all_tasks_blocked(0.01)
        await peer.send(HELLO[20:])
        await peer.wait_gone()

    async with rig(talk) as app:
        await app.ask()
        assert (await app.ask())[1] == b"hello"
        assert (app.served_quickly, app.handed_over) == (1, 1)


@pytest.mark.parametrize(("second", "outcome"), [(0, "local_broken"), (b"no HTTP\r\n\r\n", "local_broken")])
async def test_a_service_that_breaks_off_or_talks_nonsense(second: Any, outcome: str) -> None:
    async with rig(answers(HELLO, second), polite) as app:
        await app.ask()
        assert await failing(app, b"POST /") == outcome
        stream, local = await app.done(2)
        assert (stream.outcome, local.outcome) == (outcome, outcome)
        assert (app.served_quickly, app.handed_over, app.forwarder.active) == (1, 1, 0)
        assert (await app.ask())[1] == b"hello"


async def test_a_connection_that_ends_with_its_answer() -> None:
    closing = HELLO.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    async with rig(answers(HELLO, closing), polite) as app:
        for _ in range(3):
            assert (await app.ask())[1] == b"hello"
        assert (app.served_quickly, app.handed_over, app.connections) == (1, 0, 2)


over_tls = pytest.mark.parametrize("quickly", ["TLS"], indirect=True)


def hold_back(peer: Peer, is_on: bool) -> None:
    """Let what is sent meanwhile arrive at once."""
    assert isinstance(peer.stream, trio.SSLStream)
    peer.stream.transport_stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, is_on)


async def end_tls(peer: Peer) -> None:
    """Send its end, and wait for the other one, which closes without."""
    assert isinstance(peer.stream, trio.SSLStream)
    with pytest.raises(trio.BrokenResourceError):
        await peer.stream.unwrap()


@over_tls
async def test_an_answer_in_two_records_needs_no_task() -> None:
    """Many services send the head and the body by a write each, which under TLS is a record each."""

    async def talk(peer: Peer) -> None:
        while True:
            await peer.head()
            hold_back(peer, True)
            await peer.send(HELLO[:-5])
            await peer.send(HELLO[-5:])
            hold_back(peer, False)

    async with rig(talk) as app:
        for _ in range(4):
            assert (await app.ask())[1] == b"hello"
        assert (app.served_quickly, app.handed_over, app.connections) == (3, 0, 1)


@over_tls
async def test_a_service_that_ends_tls_behind_its_answer() -> None:
    """The end has been read with the answer: nobody tells of it again, and the connection must not be used again."""

    async def talk(peer: Peer) -> None:
        await peer.head()
        await peer.send(HELLO)
        await peer.head()
        hold_back(peer, True)
        await peer.send(HELLO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_tls, peer)
            await wait_all_tasks_blocked()
            hold_back(peer, False)

    async with rig(talk, polite) as app:
        for _ in range(3):
            assert (await app.ask(b"POST /", body=b"once"))[1] == b"hello"
        assert (app.served_quickly, app.handed_over, app.connections) == (1, 0, 2)


async def waiting(app: Rig) -> Any:
    """A stream under way without a task."""
    await app.ask()
    stream = app.open()
    await wait_all_tasks_blocked(0.01)
    assert app.served_quickly == 1 and app.handed_over == 0 and app.forwarder.active == 1
    return stream


async def mute(peer: Peer) -> None:
    await peer.head()
    await peer.send(HELLO)
    await peer.wait_gone()


async def test_the_deadline_passes() -> None:
    async with rig(mute) as app:
        stream = await waiting(app)
        app.tick(31)
        with pytest.raises(Failure) as caught:
            await stream.answer()
        assert caught.value.outcome == "timeout"
        assert [one.outcome for one in await app.done(2)] == ["timeout", "timeout"]
        assert app.forwarder.active == 0


async def test_the_visitor_leaves() -> None:
    async with rig(mute) as app:
        stream = await waiting(app)
        stream.reset("visitor_aborted", "gone")
        assert [one.outcome for one in await app.done(2)] == ["visitor_aborted", "visitor_aborted"]
        assert app.forwarder.active == 0


@pytest.mark.parametrize("how", ["ended", "cancelled"])
async def test_the_link_ends(how: str) -> None:
    async with rig(mute) as app:
        await waiting(app)
        if how == "ended":
            app.agent.end("pulled out")
        else:
            assert app.agent.nursery is not None
            app.agent.nursery.cancel_scope.cancel()
        stream, local = await app.done(2)
        assert (stream.outcome, local.outcome) == ("link_lost" if how == "ended" else "draining", "link_lost")
        assert app.forwarder.active == 0 and not app.sweeper._items
        assert app.quick is not None and not app.under_way


async def test_many_at_once_on_many_connections() -> None:
    async with rig(polite) as app:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(app.ask)
        before = app.connections
        streams = [app.open() for _ in range(20)]
        for stream in streams:
            assert (await stream.answer()).status == 200
        assert app.connections == before and app.handed_over == 0
        assert app.served_quickly >= 20
        await app.done(40)
        assert app.forwarder.active == 0
