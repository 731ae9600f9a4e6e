"""Whose time it was when no answer came, as far as the core can know: from what the agent told of its waiting."""

from __future__ import annotations

from contextlib import suppress
from time import monotonic

import pytest
import trio
from inprocess import Core, core, head, respond, until

from tunnel.handler import RequestVisit
from tunnel.link.stream import Stream
from tunnel.wire.frames import STREAM_WINDOW

pytestmark = pytest.mark.usefixtures("way")


async def waits(stream: Stream) -> None:
    stream.link.session.tell_waiting(stream, 300_000, 250_000)
    await trio.sleep_forever()


async def silent(stream: Stream) -> None:
    await trio.sleep_forever()


async def told(app: Core) -> Stream:
    """The stream of the only request, once the agent has told of it."""
    await until(lambda: [one for one in app.door.visitors if one.request and one.request.stream])
    request = app.only_visitor().request
    assert request is not None and request.stream is not None
    stream = request.stream
    await until(lambda: stream.told is not None)
    return stream


def backdate(stream: Stream, seconds: float) -> None:
    """As if it had been told so long ago."""
    assert stream.told is not None
    stream.told = (stream.told[0] - seconds, *stream.told[1:])


def check(request: RequestVisit, agent_us: int, local_us: int) -> None:
    """Somewhat more than that: the test itself takes its time."""
    assert agent_us <= request.agent_us < agent_us + 1_000_000
    assert local_us <= request.local_us < local_us + 1_000_000
    assert request.agent_us - request.local_us == agent_us - local_us


async def test_the_cores_clock_runs_out() -> None:
    async with core(server_timing=True) as app:
        await app.agent(waits)
        caller = app.visitor()
        await caller.send(head())
        backdate(await told(app), 29.5)
        app.tick(31)
        answer = await caller.answer()
        assert answer.status == 504
        assert b"local;dur=" in answer.fields[b"server-timing"]
        check(await app.finished(), 29_800_000, 29_750_000)


async def test_the_visitor_leaves() -> None:
    async with core() as app:
        await app.agent(waits)
        caller = app.visitor()
        await caller.send(head())
        backdate(await told(app), 2)
        caller.socket.abort()
        await until(lambda: app.tick(1) or app.requests)
        check(await app.finished(), 2_300_000, 2_250_000)


async def test_the_agent_gives_up() -> None:
    async def gives_up(stream: Stream) -> None:
        stream.link.session.tell_waiting(stream, 600_000, 590_000)
        stream.reset("timeout", "too slow")

    async with core() as app:
        await app.agent(gives_up)
        assert (await app.visitor().get()).status == 504
        check(await app.finished(), 600_000, 590_000)


async def test_an_agent_that_has_fallen_silent_waits_for_nobody() -> None:
    async with core() as app:
        agent = await app.agent(waits)
        caller = app.visitor()
        await caller.send(head())
        backdate(await told(app), 20)
        agent.link._last_heard = monotonic() - 15
        app.tick(31)
        assert (await caller.answer()).status == 504
        check(await app.finished(), 5_300_000, 5_250_000)


async def test_nothing_is_known_of_a_silent_agent() -> None:
    async with core(server_timing=True) as app:
        await app.agent(silent)
        caller = app.visitor()
        await caller.send(head())
        await until(lambda: any(one.phase == "answer" for one in app.door.visitors))
        app.tick(31)
        fields = (await caller.answer()).fields
        assert [part.partition(b";")[0] for part in fields[b"server-timing"].split(b", ")] == [b"core", b"remote"]
        request = await app.finished()
        assert (request.agent_us, request.local_us) == (-1, -1)


async def test_an_answer_stalls_in_its_body() -> None:
    is_taken = trio.Event()

    async def half(stream: Stream) -> None:
        respond(stream, b"hello", end=False, length=10)
        await is_taken.wait()
        stream.link.session.tell_waiting(stream, 1_100_000, 1_100_000)
        await trio.sleep_forever()

    async with core() as app:
        await app.agent(half)
        caller = app.visitor()
        await caller.send(head())
        assert (await caller.socket.recv()).startswith(b"HTTP/1.1 200 ")
        is_taken.set()
        await told(app)
        app.tick(31)
        request = await app.finished()
        assert request.outcome == "timeout"
        assert 1_100_000 <= request.stalled_us < 2_100_000
        assert (request.agent_us, request.local_us) == (900, 500)


async def test_an_answer_that_went_on_had_not_stalled() -> None:
    async def goes_on(stream: Stream) -> None:
        respond(stream, b"hello", end=False, length=10)
        stream.link.session.tell_waiting(stream, 1_100_000, 1_100_000)
        await stream.send(b"more")
        await trio.sleep_forever()

    async with core() as app:
        await app.agent(goes_on)
        caller = app.visitor()
        await caller.send(head())
        await told(app)
        got = b""
        while b"more" not in got:
            got += await caller.socket.recv()
        app.tick(31)
        assert (await app.finished()).stalled_us == 0


async def test_a_service_that_takes_none_of_a_long_body() -> None:
    """The agent has all of the body that the window lets it have: nobody but the service holds it up."""
    async with core(server_timing=True) as app:
        await app.agent(waits)
        caller = app.visitor()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                caller.send, head("POST", "/", "app.example.com", "Content-Length: 3000000") + bytes(3_000_000)
            )
            stream = await told(app)
            await until(lambda: stream.credit == 0 and not stream.pending_bytes)
            backdate(stream, 29.5)
            app.tick(31)
            request = await app.finished()
            nursery.cancel_scope.cancel()
        assert request.outcome == "timeout"
        check(request, 29_800_000, 29_750_000)


async def test_a_body_that_the_agent_may_have_taken_is_nobodys() -> None:
    """So little of it is out there that the agent may wait for more, and the service for nothing."""
    async with core() as app:
        await app.agent(waits)
        caller = app.visitor()
        await caller.send(head("POST", "/", "app.example.com", "Content-Length: 3000000") + bytes(100_000))
        stream = await told(app)
        await until(lambda: any(one.request and one.request.reading for one in app.door.visitors))
        backdate(stream, 20)
        caller.socket.abort()
        await until(lambda: app.tick(1) or app.requests)
        request = await app.finished()
        assert (request.agent_us, request.local_us) == (-1, -1)


async def test_a_visitor_whose_body_does_not_come_was_waited_for() -> None:
    async with core(server_timing=True) as app:
        await app.agent(waits)
        caller = app.visitor()
        await caller.send(head("POST", "/", "app.example.com", "Content-Length: 10") + b"x")
        await told(app)
        await until(lambda: any(one.request and one.request.reading for one in app.door.visitors))
        app.tick(31)
        answer = await caller.answer()
        assert answer.status == 408
        assert b"upload;dur=" in answer.fields[b"server-timing"]
        assert (await app.finished()).agent_us == -1


async def stuck(app: Core) -> None:
    """A visitor whose body the agent does not take: what the window has no room for stays at the core."""
    caller = app.visitor()
    size = 8 * STREAM_WINDOW

    async def upload() -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # it is never taken to its end
            await caller.send(bytes(size))

    await caller.send(head("POST", "/", "app.example.com", f"Content-Length: {size}"))
    app.nursery.start_soon(upload)
    stream = await told(app)
    await until(lambda: stream.credit == 0)


async def test_what_came_before_the_last_wait_of_a_body_that_got_stuck_was_its_way() -> None:
    is_late = trio.Event()

    async def gives_up(stream: Stream) -> None:
        stream.link.session.tell_waiting(stream, 200_000, 200_000)
        await is_late.wait()
        stream.link.session.tell_waiting(stream, 3_000_000, 2_900_000)
        stream.reset("timeout", "too slow")

    async with core() as app:
        await app.agent(gives_up)
        await stuck(app)
        request = app.only_visitor().request
        assert request is not None
        request.started -= 60
        request.marks["opened"] = opened = request.marks["opened"] - 60
        is_late.set()
        ended = await app.finished()
        assert ended.outcome == "timeout"
        check(ended, 3_000_000, 2_900_000)
        assert 57 <= ended.marks["uploaded"] - opened < 60
