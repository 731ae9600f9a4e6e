"""Every limit on visitors, reached: what the visitor sees, and what is counted."""

from contextlib import suppress
from typing import Any

import pytest
import trio
from inprocess import Caller, Core, core, head, opened, respond, until, without_tls
from trio.testing import wait_all_tasks_blocked

from tunnel.core import door
from tunnel.core.crowds import Crowds
from tunnel.core.inherited import Inherited
from tunnel.core.ports import OwnPorts
from tunnel.core.proxied import ProxyHeaders
from tunnel.core.tcp import Ports
from tunnel.handler import Handler, StreamVisit
from tunnel.link.stream import Stream
from tunnel.wire.held import Held

pytestmark = [pytest.mark.usefixtures("way"), without_tls]


async def answer(stream: Stream) -> None:
    respond(stream, b"hello")


async def silence(stream: Stream) -> None:
    await trio.sleep_forever()


async def half_an_answer(stream: Stream) -> None:
    respond(stream, b"x", end=False, length=10)
    await trio.sleep_forever()


def counted(app: Core) -> dict[str, int]:
    return {limit: count for limit, count in app.exchanger.refusals.items() if count}


@pytest.mark.parametrize(
    ("request_head", "options", "status", "limit"),
    [
        (head("GET", "/", "app.example.com", "X: " + "y" * 3000), {"max_head": 2000}, 431, "header_bytes"),
        (head("GET", "/", "app.example.com", *["X: y"] * 20), {"max_fields": 20}, 431, "header_count"),
        (head("GET", "/" + "y" * 400), {"max_target": 300}, 414, "target_length"),
        (head("POST", "/", "app.example.com", "Content-Length: 11"), {"max_body": 10}, 413, "body_bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_heads_and_bodies(request_head: bytes, options: dict[str, Any], status: int, limit: str) -> None:
    async with core(**options) as app:
        await app.agent(answer)
        caller = app.visitor()
        await caller.send(request_head)
        assert (await caller.answer()).status == status
        assert counted(app) == {limit: 1}


async def test_a_body_in_chunks_is_counted_as_it_comes() -> None:
    async with core(max_body=10) as app:
        await app.agent(silence)
        caller = app.visitor()
        await caller.send(head("POST", "/", "app.example.com", "Transfer-Encoding: chunked") + b"b\r\nhello world\r\n")
        assert (await caller.answer()).status == 413
        assert counted(app) == {"body_bytes": 1}


async def test_as_many_fields_as_are_accepted() -> None:
    async with core(max_fields=20) as app:
        await app.agent(answer)
        assert (await app.visitor().get("/", "app.example.com", *["X: y"] * 19)).status == 200
        assert counted(app) == {}


async def test_head_time() -> None:
    async with core() as app:
        caller = app.visitor()
        await caller.send(b"GET / HTTP/1.1\r\nHost:")
        await until(lambda: any(one.request for one in app.door.visitors))
        await wait_all_tasks_blocked()
        app.tick(11)
        assert (await caller.answer()).status == 408
        assert counted(app) == {"head_time": 1}


async def test_idle_time() -> None:
    async with core() as app:
        await app.agent(answer)
        caller = app.visitor()
        assert (await caller.get()).status == 200
        await until(lambda: any(one.phase == "idle" for one in app.door.visitors))
        app.tick(61)
        assert await caller.rest() == b""
        assert counted(app) == {"idle_time": 1}


async def test_time_to_the_first_byte() -> None:
    async with core() as app:
        await app.agent(silence)
        caller = app.visitor()
        await caller.send(head())
        await until(lambda: any(one.phase == "answer" for one in app.door.visitors))
        app.tick(31)
        assert (await caller.answer()).status == 504
        assert counted(app) == {"first_byte_time": 1}


async def test_time_to_the_first_byte_by_the_agents_clock() -> None:
    async def late(stream: Stream) -> None:
        stream.reset("timeout", "127.0.0.1:80 did not answer within 10 s (the agent's -request-timeout)")

    async with core() as app:
        await app.agent(late)
        assert (await app.visitor().get()).status == 504
        assert counted(app) == {"first_byte_time": 1}


async def test_body_idle_time_of_the_request() -> None:
    async with core() as app:
        await app.agent(silence)
        caller = app.visitor()
        await caller.send(head("POST", "/", "app.example.com", "Content-Length: 10") + b"x")
        await until(lambda: any(one.request and one.request.reading for one in app.door.visitors))
        app.tick(31)
        assert (await caller.answer()).status == 408
        assert counted(app) == {"body_idle_time": 1}


async def test_body_idle_time_of_the_answer() -> None:
    async with core() as app:
        await app.agent(half_an_answer)
        caller = app.visitor()
        await caller.send(head())
        await until(lambda: any(one.phase == "body" for one in app.door.visitors))
        assert (await caller.socket.recv()).startswith(b"HTTP/1.1 200 ")
        app.tick(31)
        with pytest.raises(trio.BrokenResourceError):
            await caller.rest()
        assert counted(app) == {"body_idle_time": 1}


async def test_requests_of_a_connection() -> None:
    async with core(max_requests=3) as app:
        await app.agent(answer)
        caller = app.visitor()
        answers = [await caller.get() for _ in range(3)]
        assert [one.fields.get(b"connection") for one in answers] == [None, None, b"close"]
        assert await caller.rest() == b""
        assert counted(app) == {"connection_requests": 1}
        assert (await app.visitor().get()).status == 200


async def _refused(caller: Caller, says: bytes = b"The server has as many connections as it may.") -> None:
    answer = await caller.answer()
    assert (answer.status, answer.outcome) == (503, "overloaded")
    assert answer.fields[b"connection"] == b"close" and b"retry-after" in answer.fields
    assert says in answer.body and b"agent" not in answer.body
    assert await caller.rest() == b""


async def test_connections_in_all_and_of_one_address() -> None:
    async with core() as app:
        app.door._shares._most, app.door._shares._most_each = 3, 2
        await app.agent(answer)
        callers = [app.visitor("192.0.2.1") for _ in range(2)]
        for caller in callers:
            assert (await caller.get()).status == 200
        await _refused(app.visitor("192.0.2.1"), b"Side: visitor (all who come from this address together)")
        other = app.visitor("192.0.2.2")
        assert (await other.get()).status == 200
        await _refused(app.visitor("192.0.2.3"))
        assert counted(app) == {"connections_per_address": 1, "connections": 1}
        callers[0].socket.close()
        await until(lambda: app.door._shares.total == 2)
        assert (await app.visitor("192.0.2.1").get()).status == 200
        assert not app.requests[-1].error


async def test_the_log_says_that_visitors_are_turned_away_and_not_for_each(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines() -> list[str]:
        return [one.getMessage() for one in caplog.records if "turned away" in one.getMessage()]

    async with core() as app:
        app.door._shares._most_each = 1
        await app.agent(answer)
        assert (await app.visitor().get()).status == 200
        for _ in range(5):
            await _refused(app.visitor(), b"This address")
        assert len(lines()) == 1
        monkeypatch.setattr(door, "TOLD_EVERY", 0.0)
        await _refused(app.visitor(), b"This address")
        assert len(lines()) == 2
        assert app.door._untold == {}


async def test_when_all_places_are_taken_a_waiting_connection_of_a_crowd_gives_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "CROWD", 1)
    async with core() as app:
        app.shares._most = 6
        await app.agent(answer)
        crowd = [app.visitor("192.0.2.1") for _ in range(5)]
        for caller in crowd[:3]:
            assert (await caller.get()).status == 200  # kept alive
        await crowd[3].send(b"GET / HTTP/1.1\r\nHost:")  # a head that does not end
        other = app.visitor("192.0.2.2")
        assert (await other.get()).status == 200
        await until(lambda: len(app.door.visitors) == 6)
        newcomers = [app.visitor(f"192.0.2.{n}") for n in (3, 4, 5)]
        for caller in newcomers:
            assert (await caller.get()).status == 200
        await until(lambda: app.shares.total == 6)
        assert app.shares.count("192.0.2.1") == 2
        assert (await other.get()).status == 200  # who has no more than others is left alone
        await _refused(app.visitor("192.0.2.1"))  # nor does a crowd make room for itself
        assert counted(app) == {"connections": 4}
        for caller in (*crowd, *newcomers, other):
            caller.socket.close()
        await until(lambda: app.shares.total == 0 and not app.shares._each)


async def test_who_is_being_answered_gives_way_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "CROWD", 0)
    async with core() as app:
        app.shares._most = 2
        await app.agent(silence)
        for caller in (app.visitor("192.0.2.1"), app.visitor("192.0.2.1")):
            await caller.send(head())
        await until(lambda: [one.phase for one in app.door.visitors] == ["answer"] * 2)
        await _refused(app.visitor("192.0.2.2"))
        assert counted(app) == {"connections": 1}


async def test_a_proxy_comes_for_many() -> None:
    async with core(trusted=("192.0.2.0/24",)) as app:
        app.door._shares._most_each = 1
        await app.agent(answer)
        for _ in range(3):
            assert (await app.visitor("192.0.2.1").get()).status == 200
        assert counted(app) == {}


def announced(address: str) -> bytes:
    return f"PROXY TCP4 {address} 198.51.100.1 1234 80\r\n".encode()


async def test_a_balancer_comes_for_many_and_each_of_them_has_the_limit() -> None:
    async with core(proxies=("192.0.2.9",), most_each=2) as app:
        await app.agent(answer)
        callers = [app.visitor("192.0.2.9") for _ in range(9)]
        for number, caller in enumerate(callers[:6]):  # three visitors, two connections each
            await caller.send(announced(f"203.0.113.{number // 2}"))
            assert (await caller.get()).status == 200
        await callers[6].send(announced("203.0.113.1"))
        await _refused(callers[6], b"This address has as many connections")
        await callers[7].send(b"PROXY UNKNOWN\r\n")  # the balancer asks for itself
        await callers[8].send(announced("192.0.2.9"))
        for caller in callers[7:]:
            assert (await caller.get()).status == 200
        assert counted(app) == {"connections_per_address": 1}
        assert app.shares._each == {**{f"203.0.113.{n}": 2 for n in range(3)}, "192.0.2.9": 2}
        for caller in callers:
            caller.socket.close()
        await until(lambda: app.shares.total == 0 and not app.shares._each)


async def test_a_balancers_connection_that_announces_nobody_is_given_back() -> None:
    async with core(proxies=("192.0.2.9",), most_each=1) as app:
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"PROXY TCP4 nonsense\r\n", b""):
            caller = app.visitor("192.0.2.9")
            await caller.send(data) if data else caller.socket.shutdown()
            with suppress(trio.BrokenResourceError):
                assert await caller.rest() == b""
        await until(lambda: app.shares.total == 0 and not app.shares._each)


async def test_requests_at_a_time_of_one_address_behind_a_proxy() -> None:
    """A proxy that speaks HTTP has the visitors' connections; what one visitor can hold here are requests."""
    async with core(trusted=("192.0.2.9",), most_each=2) as app:
        agent = await app.agent(silence)
        held = [app.visitor("192.0.2.9") for _ in range(2)]
        for caller in held:
            await caller.send(head("GET", "/", "app.example.com", "X-Forwarded-For: 203.0.113.1"))
        await until(lambda: len(agent.link.session.streams) == 2)
        proxy = app.visitor("192.0.2.9")
        refused = await proxy.get("/", "app.example.com", "X-Forwarded-For: 6.6.6.6, 203.0.113.1")
        assert (refused.status, refused.outcome) == (503, "overloaded")
        await proxy.send(head("GET", "/", "app.example.com", "X-Forwarded-For: 203.0.113.2"))  # the same connection
        await until(lambda: len(agent.link.session.streams) == 3)
        assert counted(app) == {"connections_per_address": 1}
        held[0].socket.abort()
        await until(lambda: len(app.requests) == 1 or app.tick(1))
        again = app.visitor("192.0.2.9")
        await again.send(head("GET", "/", "app.example.com", "X-Forwarded-For: 203.0.113.1"))
        await until(lambda: len(agent.link.session.streams) == 3)
        for caller in (*held, proxy, again):
            caller.socket.abort()
        await until(lambda: not app.door.visitors or app.tick(1))
        assert app.exchanger.forwarding._guests.total == 0


async def test_a_proxys_requests_are_given_back_one_by_one() -> None:
    async with core(trusted=("192.0.2.9",), most_each=1) as app:
        await app.agent(answer)
        proxy = app.visitor("192.0.2.9")
        for _ in range(3):
            assert (await proxy.get("/", "app.example.com", "X-Forwarded-For: 203.0.113.1")).status == 200
        await until(lambda: app.exchanger.forwarding._guests.total == 0)
        assert counted(app) == {}


async def test_connections_beyond_a_limit_cost_little() -> None:
    async with core() as app:
        app.door._shares._most = 1
        held = app.visitor()
        await until(lambda: app.door.visitors)
        refused = [app.visitor() for _ in range(150)]
        await until(lambda: app.exchanger.refusals["connections"] == 150)
        assert app.door._refused <= 100 and len(app.door.visitors) == 1
        for caller in refused:
            caller.socket.close()
        await until(lambda: app.door._refused == 0)
        held.socket.close()


async def test_streams_of_a_link() -> None:
    async with core() as app:
        await app.agent(silence, max_streams=1)
        await app.visitor().send(head())
        await until(lambda: any(one.phase == "answer" for one in app.door.visitors))
        answer = await app.visitor().get()
        assert (answer.status, answer.outcome) == (503, "overloaded")
        assert counted(app) == {"link_streams": 1}


async def slow_upload(caller: Caller, *fields: str) -> None:
    await caller.send(head("POST", "/", "app.example.com", "Content-Length: 1000000", *fields) + b"x")


async def test_slow_uploads_of_one_address_leave_places_for_others() -> None:
    async with core() as app:
        agent = await app.agent(answer_gets, max_streams=40)
        uploads = [app.visitor("192.0.2.1") for _ in range(20)]
        for caller in uploads:
            await slow_upload(caller)
        await until(lambda: len(agent.link.session.streams) == 20)
        one_more = app.visitor("192.0.2.1")
        refused = await one_more.get()
        assert (refused.status, refused.outcome) == (503, "overloaded")
        assert b"Side: visitor (all who come from this address together)" in refused.body
        assert refused.fields[b"retry-after"] == b"1"
        title = "This address has as many of the tunnel's open requests as it may: others need room, too."
        assert (await app.finished()).error == title  # as in the log and on the span
        (noted,) = app.exchanger.recent.say().failures
        assert (noted.outcome, noted.side, noted.limit, noted.error) == (
            "overloaded", "visitor", "streams_per_address", title,
        )  # fmt: skip
        assert (await app.visitor("192.0.2.2").get()).status == 200
        assert counted(app) == {"streams_per_address": 1}
        uploads.pop().socket.abort()
        await until(lambda: len(agent.link.session.streams) == 19 or app.tick(1))
        assert (await one_more.get()).status == 200  # the same connection
        for caller in uploads:
            caller.socket.abort()
        await until(lambda: not agent.link.session.streams or app.tick(1))
        await until(lambda: agent.crowds.held == {})


async def test_each_address_has_its_share_of_what_others_leave() -> None:
    async with core() as app:
        agent = await app.agent(silence, max_streams=90)

        async def fill(address: str) -> int:
            """How many it gets."""
            before = len(agent.link.session.streams)
            while not (refusals := app.exchanger.refusals["streams_per_address"]):
                had = len(agent.link.session.streams)
                await app.visitor(address).send(head())
                await until(lambda had=had: len(agent.link.session.streams) > had  # type: ignore[misc]
                            or app.exchanger.refusals["streams_per_address"])  # fmt: skip
            app.exchanger.refusals["streams_per_address"] -= refusals
            return len(agent.link.session.streams) - before

        assert [await fill("192.0.2.1"), await fill("192.0.2.2"), await fill("2001:db8::1")] == [45, 23, 11]
        assert await fill("2001:db8::2") == 0  # one customer's, as they count everywhere
        assert await fill("192.0.2.3") == 8  # a few may be had as long as there are any
        assert await fill("192.0.2.1") == 0


async def answer_gets(stream: Stream) -> None:
    if opened(stream).head.startswith(b"GET"):
        respond(stream, b"hello")
    else:
        await trio.sleep_forever()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.0.1", "::1", "192.0.2.9", "192.0.2.8"])
async def test_who_comes_for_many_may_have_all_of_a_link(address: str) -> None:
    """Programs of this machine, load balancers and proxies that do not say for whom they ask."""
    async with core(trusted=("192.0.2.9",), proxies=("192.0.2.8",)) as app:
        agent = await app.agent(silence, max_streams=40)
        for count in range(40):
            caller = app.visitor(address)
            await caller.send((b"PROXY UNKNOWN\r\n" if address == "192.0.2.8" else b"") + head())
            await until(lambda count=count: len(agent.link.session.streams) == count + 1)  # type: ignore[misc]
        assert counted(app) == {} and agent.crowds.held == {}


async def test_behind_a_proxy_the_address_that_it_tells_has_the_share() -> None:
    async with core(trusted=("192.0.2.9",)) as app:
        agent = await app.agent(answer_gets, max_streams=40)
        for _ in range(20):
            await slow_upload(app.visitor("192.0.2.9"), "X-Forwarded-For: 203.0.113.1")
        await until(lambda: len(agent.link.session.streams) == 20)
        proxy = app.visitor("192.0.2.9")
        assert (await proxy.get("/", "app.example.com", "X-Forwarded-For: 203.0.113.1")).status == 503
        assert (await proxy.get("/", "app.example.com", "X-Forwarded-For: 203.0.113.2")).status == 200
        assert counted(app) == {"streams_per_address": 1}
        assert agent.crowds.held == {"203.0.113.1": 20}


async def test_another_link_of_the_tunnel_has_room_for_the_address() -> None:
    async with core() as app:
        for others in (0, 10):
            agent = await app.agent(silence, max_streams=20)
            for count in range(10):
                await app.visitor().send(head())
                await until(lambda agent=agent, count=count: len(agent.link.session.streams) > count)  # type: ignore[misc]
            assert sum(len(one.link.session.streams) for one in app.registry.links.values()) == others + 10
        assert (await app.visitor().get()).status == 503
        assert counted(app) == {"streams_per_address": 1}


async def test_a_share_of_all_is_no_limit() -> None:
    async with core() as app:
        agent = await app.agent(silence, max_streams=20)
        agent.crowds = Crowds(100)
        for count in range(20):
            await app.visitor().send(head())
            await until(lambda count=count: len(agent.link.session.streams) == count + 1)  # type: ignore[misc]
        assert counted(app) == {}


async def test_what_waits_to_be_sent_to_a_link() -> None:
    async with core() as app:
        agent = await app.agent(silence)
        agent.max_queue = 0
        answer = await app.visitor().get()
        assert (answer.status, answer.outcome) == (503, "overloaded")
        assert counted(app) == {"link_buffer": 1}


async def test_bytes_held_in_all() -> None:
    held = Held(1000)
    async with core(held=held) as app:
        await app.agent(answer)
        held.bytes = 1000
        caller = app.visitor()
        answered = await caller.get()
        assert (answered.status, answered.outcome) == (503, "overloaded")
        assert counted(app) == {"buffer": 1}
        held.bytes = 0
        assert (await caller.get()).status == 200


async def test_pipelined_refusals_let_others_run() -> None:
    async with core() as app:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        caller = app.visitor()
        app.nursery.start_soon(count)
        await caller.send(head("GET", "/", "nobody.example.com") * 200)
        for _ in range(200):
            assert (await caller.answer()).status == 404
        assert turns > 200


@pytest.mark.parametrize(
    "fields", [("POST", "Content-Length: 100000"), ("GET", "Connection: upgrade", "Upgrade: websocket")], ids=str
)
async def test_what_comes_at_once_stays_within_the_limit(fields: tuple[str, ...]) -> None:
    """A link is chosen when the head is here, and the stream is opened by a task that runs later."""
    async with core() as app:
        agent = await app.agent(silence, max_streams=5)
        callers = [app.visitor("127.0.0.1") for _ in range(20)]
        for caller in callers:  # each has its task, which waits for the next request
            await caller.send(head("OPTIONS", "/", "nobody.example.com"))
            assert (await caller.answer()).status == 404
        await wait_all_tasks_blocked()
        for caller in callers:
            await caller.send(head(fields[0], "/", "app.example.com", *fields[1:]))
        await until(lambda: len(app.requests) == 20 + 15)
        await wait_all_tasks_blocked()
        assert len(agent.link.session.streams) == 5
        assert {request.outcome for request in app.requests[20:]} == {"overloaded"}
        assert counted(app) == {"link_streams": 15}


async def test_what_comes_at_once_goes_to_all_links_with_room() -> None:
    """Nothing of an upload has left before its stream is open: another link may have it, whatever its method."""
    async with core() as app:
        agents = [await app.agent(silence, max_streams=most) for most in (1, 9, 2)]
        callers = [app.visitor("127.0.0.1") for _ in range(15)]
        for caller in callers:
            await caller.send(head("OPTIONS", "/", "nobody.example.com"))
            await caller.answer()
        await wait_all_tasks_blocked()
        for caller in callers:
            await slow_upload(caller)
        await until(lambda: len(app.requests) == 15 + 3)
        await wait_all_tasks_blocked()
        assert [len(one.link.session.streams) for one in agents] == [1, 9, 2]
        assert counted(app) == {"link_streams": 3}


async def test_tcp_connections_that_a_layer_held_up_stay_within_the_limit() -> None:
    waiting: list[StreamVisit] = []
    go = trio.Event()

    def layer(handler: Handler) -> Handler:
        async def held_up(visit: Any) -> None:
            waiting.append(visit)
            await go.wait()
            await handler(visit)

        return held_up

    async with core() as app:
        agent = await app.agent(silence, max_streams=2)
        tunnel = app.registry.attach(agent, "raw", "tcp", 1)
        source = OwnPorts("127.0.0.1", range(1), Inherited({}))
        ports = Ports(source, app.registry, app.exchanger, [layer], app.nursery, 30.0, ProxyHeaders(()), app.shares)
        await ports.open(tunnel)
        callers = [await trio.open_tcp_stream("127.0.0.1", tunnel.port) for _ in range(5)]
        await until(lambda: len(waiting) == 5)
        go.set()
        await until(lambda: app.exchanger.refusals["link_streams"] == 3)
        assert len(agent.link.session.streams) == 2
        assert sorted(visit.outcome for visit in waiting) == ["", "", *["overloaded"] * 3]
        ports.close(tunnel)
        for caller in callers:
            await caller.aclose()


@pytest.mark.parametrize("sent", ["a request", "an upload", "an upgrade"])
@pytest.mark.parametrize(
    "end", ["the visitor leaves", "the link is lost", "the agent gives up", "its time is up", "the drain's time is up"]
)
async def test_however_a_stream_ends_its_address_has_its_place_again(sent: str, end: str) -> None:
    async with core() as app, trio.open_nursery() as nursery:
        streams: list[Stream] = []

        async def take(stream: Stream) -> None:
            streams.append(stream)
            if sent == "an upgrade":
                respond(
                    stream, end=False, status=101, length=-1, fields=b"Connection: upgrade\r\nUpgrade: websocket\r\n"
                )
            await trio.sleep_forever()

        agent = await app.agent(take)
        callers = [app.visitor(nursery=nursery) for _ in range(3)]
        fields = {"an upload": ("Content-Length: 9999",), "an upgrade": ("Connection: upgrade", "Upgrade: websocket")}
        for caller in callers:
            await caller.send(
                head("POST" if sent == "an upload" else "GET", "/", "app.example.com", *fields.get(sent, ()))
            )
        await until(lambda: len(streams) == 3 and agent.crowds.held == {"192.0.2.1": 3})
        await wait_all_tasks_blocked()
        if end == "the visitor leaves":
            for caller in callers:
                caller.socket.abort()
        elif end == "the link is lost":
            agent.link.end("it was cut")
        elif end == "the agent gives up":
            for stream in streams:
                stream.reset("local_broken", "as the test says")
        elif end == "its time is up" and sent != "an upgrade":
            app.tick(31)
        else:
            nursery.cancel_scope.cancel()
        await until(lambda: not agent.link.session.streams or app.tick(1))
        await until(lambda: agent.crowds.held == {})
        nursery.cancel_scope.cancel()
