"""What the agent tells the core of its waiting: that it is the service which says nothing, and for how long."""

from __future__ import annotations

import pytest
import scripted
import trio
from scripted import Peer, Rig, answer_of, rig

from tunnel.agent import served
from tunnel.errors import Failure
from tunnel.link.stream import Stream

HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"


@pytest.fixture(params=["by a task", "quickly"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted, "is_quick", request.param == "quickly")


async def silent(peer: Peer) -> None:
    await peer.head()
    await peer.wait_gone()


async def half(peer: Peer) -> None:
    await peer.head()
    await peer.send(HALF)
    await peer.wait_gone()


async def reached(app: Rig) -> None:
    with trio.fail_after(10):
        while not app.connections:
            await trio.lowlevel.checkpoint()


async def settle() -> None:
    for _ in range(50):
        await trio.lowlevel.checkpoint()


async def fails(stream: Stream) -> str:
    with pytest.raises(Failure) as caught:
        await answer_of(stream)
    return caught.value.outcome


async def test_a_long_wait_for_the_head_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "LONG_TO_HEAD", 2.0)  # a machine that is busy may take its usual value by itself
    async with rig(silent) as app:
        stream = app.open()
        await reached(app)
        app.tick(0.1)
        await settle()
        assert stream.told is None
        app.tick(2.0)
        await settle()
        assert stream.told is not None
        at, agent_us, local_us = stream.told
        assert 1_900_000 < local_us <= agent_us < 12_000_000
        app.tick(5.0)
        await settle()
        assert stream.told == (at, agent_us, local_us)


async def test_a_time_out_says_how_long_it_was_waited() -> None:
    async with rig(silent) as app:
        stream = app.open()
        await reached(app)
        app.tick(31)
        assert await fails(stream) == "timeout"
        assert stream.told is not None  # right before the reset; the clock itself has not moved on
        assert 0 <= stream.told[2] <= stream.told[1]


async def test_an_answer_that_stalls_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "LONG_IN_BODY", 5.0)
    async with rig(half) as app:
        stream = app.open()
        await stream.answer()
        assert await stream.receive() == b"hello"
        app.tick(0.5)
        await settle()
        assert stream.told is None
        app.tick(5.5)
        await settle()
        assert stream.told is not None
        assert 5_000_000 < stream.told[1] == stream.told[2]


async def test_one_that_breaks_off_is_told_of_with_its_reset() -> None:
    async def breaks(peer: Peer) -> None:
        await peer.head()
        await peer.send(HALF)
        await peer.stream.aclose()

    async with rig(breaks) as app:
        stream = app.open()
        assert await fails(stream) == "local_broken"
        assert stream.told is not None
        assert stream.told[1] == stream.told[2]


async def test_silence_within_an_event_stream_is_nothing_to_tell() -> None:
    async def events(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await peer.wait_gone()

    async with rig(events) as app:
        stream = app.open()
        await stream.answer()
        assert await stream.receive() == b"data: 1\n\n"
        await settle()
        app.tick(60)
        await settle()
        assert stream.told is None


async def test_who_waits_for_the_visitors_body_does_not_wait_for_the_service() -> None:
    async with rig(silent) as app:
        stream = app.open(b"POST /", length=10)
        await stream.send(b"hello")
        await reached(app)
        await settle()
        app.tick(60)
        await settle()
        assert stream.told is None
        await stream.send(b"world", end=True)
        await settle()
        app.tick(1)
        await settle()
        assert stream.told is not None
        assert stream.told[1] - stream.told[2] < 1_000_000


async def test_a_request_that_is_not_valid_was_not_waited_for() -> None:
    async with rig(silent) as app:
        stream = app.open(b"GET /a b")
        assert await fails(stream) == "bad_request"
        assert stream.told is None
