"""Requests served without their connection's task: that they are, and what is left to the task from where.

That both ways come to the same is shown by the tests of the exchange, each of which runs both ways (fixture `way`).
"""

import socket as stdlib_socket
from collections.abc import Iterator
from typing import Any

import inprocess
import pytest
import trio
from inprocess import Caller, Core, Limits, core, head, respond, until
from linking import no_cycles
from trio.testing import wait_all_tasks_blocked

from tunnel.core.quick import Quick
from tunnel.core.quotas import Account
from tunnel.core.request import Request, RequestStream
from tunnel.link.stream import Stream


@pytest.fixture(autouse=True, params=["plain", "TLS"])
def quickly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inprocess, "is_quick", True)
    monkeypatch.setattr(inprocess, "is_secure", request.param == "TLS")


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What connections' tasks were woken for: the targets of requests, "" for anything else."""
    targets: list[str] = []
    wake = Quick._wake

    def note(self: Quick, visitor: Any) -> None:
        if visitor.task is not None:
            targets.append(visitor.request.target if visitor.request is not None else "")
        wake(self, visitor)

    monkeypatch.setattr(Quick, "_wake", note)
    yield targets


async def hello(stream: Stream) -> None:
    respond(stream, b"hello")


async def test_no_task_is_woken_for_common_requests(woken: list[str]) -> None:
    async with core() as app:
        await app.agent(hello)
        visitor = app.visitor()
        for number in range(5):
            answer = await visitor.get(f"/{number}", "app.example.com", f"X-Other: {number}")
            assert (answer.status, answer.body) == (200, b"hello")
        await visitor.send(head("POST", "/5", "app.example.com", "Content-Length: 3") + b"abc")
        assert (await visitor.answer("POST")).status == 200
        assert woken == []
        assert [(one.target, one.outcome, one.status) for one in app.requests] == [
            (f"/{n}", "ok", 200) for n in range(6)
        ]
        assert [one.outcome for one in app.streams] == ["ok"] * 6
        assert app.requests[-1].bytes_in == 3 and app.account.requests == 6
        visitor.socket.close()
        await until(lambda: not app.door.visitors)
        assert woken == [""] and app.exchanger.active == 0


async def test_frames_of_many_visitors_leave_as_one_message() -> None:
    async with core() as app:
        agent = await app.agent(hello)
        visitors = [app.visitor() for _ in range(8)]
        for visitor in visitors:
            await visitor.socket.handshake()
        await wait_all_tasks_blocked(0.01)
        line: Any = agent.link._transport
        line.sent.clear()
        for visitor in visitors:
            visitor.socket.send_nowait(head())
        for visitor in visitors:
            assert (await visitor.answer()).body == b"hello"
        assert len(line.sent) == 1


@pytest.mark.parametrize(
    "what",
    ["a large answer", "a slow answer", "no tunnel", "a reset", "a bad head", "half a head", "an upgrade", "a body"],
)
async def test_everything_else_is_left_to_the_task(what: str, woken: list[str]) -> None:
    async def agent(stream: Stream) -> None:
        if what == "a large answer":
            respond(stream, b"", end=False, length=100_000)
            await stream.send(b"x" * 100_000, end=True)
        elif what == "a slow answer":
            respond(stream, b"he", end=False, length=5)
            await wait_all_tasks_blocked()
            await stream.send(b"llo", end=True)
        elif what == "a reset":
            stream.reset("local_refused", "nobody is there")
        elif what == "a body":
            while await stream.receive():
                pass
            respond(stream, b"hello")
        else:
            respond(stream, b"hello")

    asked = {
        "no tunnel": head("GET", "/", "other.example.com"),
        "a bad head": b"GET / HTTP/1.1\r\nHost: app.example.com\r\nA B: c\r\n\r\n",
        "an upgrade": head("GET", "/", "app.example.com", "Connection: Upgrade", "Upgrade: x"),
        "a body": head("POST", "/", "app.example.com", "Content-Length: 20000") + b"x" * 20_000,
    }
    status = {"no tunnel": 404, "a reset": 502, "a bad head": 400}
    async with core() as app:
        await app.agent(agent)
        await app.agent(hello, "next")
        visitor = app.visitor()
        await visitor.get("/", "next.example.com")
        app.requests.clear()
        assert woken == []
        if what == "half a head":
            await visitor.send(head()[:20])
            await wait_all_tasks_blocked(0.01)
            await visitor.send(head()[20:])
        else:
            await visitor.send(asked.get(what, head()))
        answer = await visitor.answer("POST" if what == "a body" else "GET")
        assert answer.status == status.get(what, 200)
        if answer.status == 200:
            assert len(answer.body) == (100_000 if what == "a large answer" else 5)
        assert len(woken) == 1
        request = await app.finished()
        assert request.status == answer.status
        assert len(app.requests) == 1 and app.exchanger.active == 0
        if answer.fields.get(b"connection") != b"close":
            assert (await visitor.get("/", "next.example.com")).body == b"hello"  # on it goes
            assert len(woken) == 1


async def test_no_cycles_are_left() -> None:
    """They would wait for the garbage collector, and each request would find its memory cold."""
    async with core() as app:
        await app.agent(hello)
        visitor = app.visitor()
        with no_cycles(Request, RequestStream):
            for _ in range(10):
                assert (await visitor.get()).status == 200
                assert (await visitor.get("/", "nobody.example.com")).status == 404
            app.requests.clear()
            app.streams.clear()


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with core() as app:
        await app.agent(hello)
        visitor = app.visitor()
        await visitor.send(b"".join(head(target=f"/{number}") for number in range(20)))
        for _ in range(20):
            assert (await visitor.answer()).body == b"hello"
        assert [one.target for one in app.requests] == [f"/{number}" for number in range(20)]


async def test_what_comes_while_an_answer_is_waited_for_is_read_after_it(woken: list[str]) -> None:
    go = trio.Event()

    async def later(stream: Stream) -> None:
        await go.wait()
        respond(stream, b"hello")

    async with core() as app:
        await app.agent(later)
        visitor = app.visitor()
        for number in range(2):
            await visitor.send(head(target=f"/{number}"))
            await wait_all_tasks_blocked(0.01)
        assert len(app.streams) == 0 and app.exchanger.active == 1
        go.set()
        for _ in range(2):
            assert (await visitor.answer()).body == b"hello"
        assert [one.target for one in app.requests] == ["/0", "/1"]
        assert woken == []


async def test_a_visitor_who_ends_its_direction_with_the_request_gets_the_answer_and_the_end() -> None:
    async with core() as app:
        await app.agent(hello)
        visitor = app.visitor()
        await visitor.send(head())
        visitor.socket.shutdown()
        assert (await visitor.rest()).endswith(b"hello")
        await until(lambda: not app.door.visitors)


async def test_an_end_that_comes_while_an_answer_is_waited_for_is_not_forgotten() -> None:
    """It is told once: with the second request, while the first one is served."""
    may_answer = trio.Event()

    async def agent(stream: Stream) -> None:
        await may_answer.wait()
        respond(stream, b"hello")

    async with core() as app:
        await app.agent(agent)
        visitor = app.visitor()
        await visitor.send(head())
        await until(lambda: app.door.visitors and app.only_visitor().request)
        app.only_visitor().is_ready = False
        await visitor.send(head())
        visitor.socket.shutdown()
        await until(lambda: app.only_visitor().is_ready)
        await wait_all_tasks_blocked(0.01)
        may_answer.set()
        assert (await visitor.rest()).count(b"hello") == 2
        await until(lambda: not app.door.visitors)


async def test_an_answer_that_the_visitor_does_not_take_at_once() -> None:
    body = b"x" * 16_000

    async def large(stream: Stream) -> None:
        respond(stream, body)

    async with core() as app:
        await app.agent(large)
        visitor = app.visitor()
        await visitor.socket.handshake()
        await wait_all_tasks_blocked(0.01)
        app.only_visitor().socket.sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF, 4096)
        for number in range(4):
            visitor.socket.send_nowait(head(target=f"/{number}"))
            await wait_all_tasks_blocked(0.01)
        for _ in range(4):
            assert (await visitor.answer()).body == body
        assert [one.outcome for one in app.requests] == ["ok"] * 4


async def test_an_account_that_must_wait_for_its_bandwidth(autojump_clock: trio.abc.Clock) -> None:
    async with core() as app:
        account = Account("slow", "slow")
        account.set_limits(Limits(bandwidth_bytes_per_second=1000))
        await app.agent(hello, account=account)
        visitor = app.visitor()
        began = trio.current_time()
        for _ in range(100):
            assert (await visitor.get()).body == b"hello"
        assert trio.current_time() - began > 0.2
        assert [one.outcome for one in app.requests] == ["ok"] * 100


async def test_a_connection_that_its_answer_ends(woken: list[str]) -> None:
    async with core() as app:
        await app.agent(hello)
        visitor = app.visitor()
        await visitor.send(head("GET", "/", "app.example.com", "Connection: close"))
        raw = await visitor.rest()
        assert raw.endswith(b"hello") and b"Connection: close" in raw
        visitor.socket.close()
        await until(lambda: not app.door.visitors)
        assert woken == [""]


async def never(stream: Stream) -> None:
    await trio.sleep_forever()


async def asking(app: Core) -> Caller:
    """A visitor whose request is under way without its task."""
    visitor = app.visitor()
    await visitor.send(head())
    await until(lambda: app.door.visitors and app.only_visitor().request is not None)
    await wait_all_tasks_blocked(0.01)
    return visitor


async def test_the_deadline_passes() -> None:
    async with core() as app:
        await app.agent(never)
        visitor = await asking(app)
        app.tick(31)
        answer = await visitor.answer()
        assert (answer.status, answer.outcome) == (504, "timeout")
        assert (await app.finished()).outcome == "timeout"


async def test_the_link_is_lost() -> None:
    async with core() as app:
        agent = await app.agent(never)
        visitor = await asking(app)
        agent.link.end("pulled out")
        answer = await visitor.answer()
        assert (answer.status, answer.outcome) == (502, "link_lost")
        assert [one.outcome for one in app.streams] == ["link_lost"]


async def test_the_visitor_leaves() -> None:
    async with core() as app:
        await app.agent(never)
        visitor = await asking(app)
        visitor.socket.abort()
        await wait_all_tasks_blocked(0.01)
        app.tick(1)
        assert (await app.finished()).outcome == "visitor_aborted"
        await until(lambda: not app.door.visitors)
        assert [one.outcome for one in app.streams] == ["visitor_aborted"]


async def test_the_drain_has_no_more_time() -> None:
    """The connection's task is cancelled while it waits for nothing: its request is ended for it."""
    async with core() as app:
        await app.agent(never)
        async with trio.open_nursery() as handlers:
            visitor = app.visitor(nursery=handlers)
            await visitor.send(head())
            await until(lambda: app.door.visitors and app.only_visitor().request is not None)
            await wait_all_tasks_blocked(0.01)
            handlers.cancel_scope.cancel()
        answer = await visitor.answer()
        assert (answer.status, answer.outcome) == (503, "draining")
        assert [(one.outcome, one.status) for one in app.requests] == [("draining", 503)]
        assert [one.outcome for one in app.streams] == ["draining"]
        assert app.exchanger.active == 0 and not app.door.visitors


async def test_idle_connections_are_closed_and_busy_ones_are_not() -> None:
    async with core() as app:
        await app.agent(hello)
        await app.agent(never, "never")
        idle, busy = app.visitor(), app.visitor()
        assert (await idle.get()).status == 200
        await busy.send(head("GET", "/", "never.example.com"))
        await wait_all_tasks_blocked(0.01)
        app.door.close_idle()
        assert await idle.rest() == b""
        await until(lambda: len(app.door.visitors) == 1)


async def test_a_layer_that_breaks_is_out_of_the_way() -> None:
    async with core() as app:
        await app.agent(hello)
        observers = app.exchanger.observers
        assert observers is not None
        (guard,) = observers._guards
        visitor = app.visitor()
        assert (await visitor.get()).status == 200
        app.requests = None  # type: ignore[assignment]  # so that appending to it raises
        assert (await visitor.get()).status == 200
        assert guard.is_off
        assert (await visitor.get()).status == 200
