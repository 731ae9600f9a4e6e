"""A link's life: heartbeats, silence, the other clock, batching, its ends, and that one link's end is its own."""

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from linking import NOTHING, Line, lines, linked

from tunnel.errors import Failure
from tunnel.link import link as module
from tunnel.link.link import MAX_CONTROL, MAX_PONGS, Link
from tunnel.link.sweeper import Sweeper
from tunnel.wire import control, frames
from tunnel.wire.frames import HTTP, MAX_MESSAGE, NO_BODY, Open
from tunnel.wire.sending import LAST_ID, SPARE_IDS


class Clocks:
    """The clocks of a link, set by hand: `now` is monotonic, each end's wall clock leads it by its own skew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.skew = 0.0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "wall_us", lambda: int((self.now + self.skew) * 1e6))


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


def kinds(messages: list[bytes]) -> list[list[str]]:
    return [[frames.NAMES[kind] for kind, *_ in frames.split(message)] for message in messages]


class Telling:
    """Stands for `Ready` while it tells sockets."""

    def __init__(self) -> None:
        self.is_telling = True
        self._after: list[Callable[[], None]] = []

    def after(self, told: Callable[[], None]) -> None:
        self._after.append(told)

    def end(self) -> None:
        self.is_telling = False
        after, self._after = self._after, []
        for told in after:
            told()


async def flushing(nursery: trio.Nursery, line: Line) -> tuple[Link, Telling]:
    """A link that runs on the line, with its writer waiting, in the middle of telling sockets."""
    telling: Any = Telling()
    link = Link(True, 5, 15, ready=telling)
    carrier: Any = line
    nursery.start_soon(link.run, carrier)
    await trio.testing.wait_all_tasks_blocked()
    line.sent.clear()
    return link, telling


# Heartbeats ----------------------------------------------------------------------------------------------------------


async def test_a_heartbeat_each_period_and_no_end_while_they_are_answered(clocks: Clocks) -> None:
    async with linked(heartbeat=5, heartbeat_timeout=15) as pair:
        for second in range(60):
            clocks.now = 1000.0 + second
            pair.core.tick(clocks.now)
            await trio.testing.wait_all_tasks_blocked()
        assert pair.core.heartbeats_sent == 12  # at 0, 5, … 55
        assert pair.core.heartbeats_failed == 0
        assert len(pair.core.round_trips) == 12
        assert not pair.core.end_reason
        assert not pair.core.is_quiet(clocks.now)


@pytest.mark.parametrize("opens", [True, False], ids=["core", "agent"])
async def test_silence_ends_the_link_within_the_time_out(clocks: Clocks, opens: bool) -> None:
    async with linked(heartbeat=5, heartbeat_timeout=15) as pair:
        one, line = (pair.core, pair.agent_line) if opens else (pair.agent, pair.core_line)
        stream, there = await pair.open()
        waiting = stream if opens else there
        line.is_cut = True
        clocks.now += 15.0
        one.tick(clocks.now)
        await trio.testing.wait_all_tasks_blocked()
        assert one.is_quiet(clocks.now)
        assert not one.ended.is_set()
        clocks.now += 0.1
        one.tick(clocks.now)
        await one.ended.wait()
        assert one.end_reason == "no heartbeat for 15 s"
        assert one.heartbeats_failed == 1
        with pytest.raises(Failure) as caught:
            await waiting.receive()
        assert caught.value.outcome == "link_lost"


async def test_any_message_counts_as_a_sign_of_life(clocks: Clocks) -> None:
    async with linked(heartbeat=1000, heartbeat_timeout=15) as pair:
        stream, there = await pair.open()
        for _ in range(5):
            clocks.now += 14
            await there_sends(pair.agent, there)
            pair.core.tick(clocks.now)
        assert not pair.core.end_reason
        assert stream.interims


async def there_sends(agent: Link, there: Any) -> None:
    agent.session.respond(there, frames.Response(102, NO_BODY, 0, 0, b"\r\n"))
    await trio.testing.wait_all_tasks_blocked()


async def test_a_link_ends_before_its_stream_numbers_do(clocks: Clocks) -> None:
    async with linked() as pair:
        pair.core.session._last_id = LAST_ID - SPARE_IDS
        pair.core.tick(clocks.now)
        assert not pair.core.end_reason
        pair.core.session._last_id += 1
        pair.agent.session._last_id = LAST_ID  # whoever opens none does not mind
        pair.agent.tick(clocks.now)
        pair.core.tick(clocks.now)
        assert pair.core.end_reason == "it has used up its stream numbers" and not pair.agent.end_reason


async def test_a_ping_without_a_pong_is_counted(clocks: Clocks) -> None:
    async with linked(heartbeat=5, heartbeat_timeout=15) as pair:
        pair.agent_line.is_cut = True  # the pongs are lost
        clocks.now += 5
        pair.core.tick(clocks.now)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(4):
            clocks.now += 5
            pair.core._last_heard = clocks.now  # something else still comes
            pair.core.tick(clocks.now)
        assert pair.core.heartbeats_failed == 1
        assert pair.core.heartbeats_sent == 5
        assert pair.core.rtt == 0.0


@pytest.mark.parametrize("skew", [5.0, -5.0, 0.0])
async def test_the_other_clocks_lead_is_measured(clocks: Clocks, skew: float) -> None:
    async with linked(heartbeat=5) as pair:
        # By hand, since both ends of this process share one clock: 20 ms there, 20 ms back.
        pair.agent_line.is_cut = True
        clocks.now += 5
        pair.core.tick(clocks.now)
        await trio.testing.wait_all_tasks_blocked()
        ((kind, _, _, ping),) = frames.split(pair.core_line.sent[-1])
        assert kind == frames.PING
        clocks.now += 0.020
        pong = control.pack_pong(ping, int((clocks.now + skew) * 1e6))
        clocks.now += 0.020
        pair.core.on_message(frames.frame(frames.PONG, 0, pong))
        assert pair.core.rtt == pytest.approx(0.040, abs=1e-6)
        assert pair.core.offset == pytest.approx(skew, abs=1e-5)
        assert list(pair.core.round_trips) == [pytest.approx(0.040, abs=1e-6)]
        pair.core.on_message(frames.frame(frames.PONG, 0, pong))  # a token that nobody waits for
        assert len(pair.core.round_trips) == 1


async def test_the_sweeper_ticks_and_survives_a_tick_that_raises(autojump_clock: trio.abc.Clock) -> None:
    ticks: list[str] = []
    problems: list[Exception] = []

    class Good:
        def tick(self, now: float) -> None:
            ticks.append("tick")

    class Bad:
        def tick(self, now: float) -> None:
            raise ValueError("broken")

    sweeper = Sweeper(problems.append, period=0.25)
    good, bad = Good(), Bad()
    sweeper.add(good)
    sweeper.add(bad)
    with trio.move_on_after(1.1):
        await sweeper.run()
    assert len(ticks) == 4
    assert [str(exc) for exc in problems] == ["broken"]
    sweeper.discard(good)
    with trio.move_on_after(1.1):
        await sweeper.run()
    assert len(ticks) == 4


# The writer ----------------------------------------------------------------------------------------------------------


async def test_what_many_tasks_queue_in_one_turn_leaves_in_one_message() -> None:
    async with linked() as pair:
        ready = trio.Event()

        async def visit() -> None:
            await ready.wait()
            stream = pair.core.session.open(Open(HTTP, 0, 0, NO_BODY, b"", b"GET / HTTP/1.1\r\n"), end=True)
            await stream.answer()  # type: ignore[attr-defined]

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(visit)
            await trio.testing.wait_all_tasks_blocked()
            ready.set()
            await trio.testing.wait_all_tasks_blocked()
            assert kinds(pair.core_line.sent) == [["OPEN"] * 50]
            for there in pair.opened:
                pair.agent.session.respond(there, NOTHING, end=True)
        assert kinds(pair.agent_line.sent) == [["RESPONSE"] * 50]


async def test_small_frames_pass_bulk_that_waits() -> None:
    async with linked() as pair:
        bulk, _ = await pair.open()
        small, there = await pair.open()
        pair.core_line.held = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bulk.send, bytes(500_000))
            await trio.testing.wait_all_tasks_blocked()
            before = len(pair.core_line.sent)
            await small.send(b"small")
            pair.core_line.held.set()
            pair.core_line.held = None
            received = await there.receive()
            behind = sum(map(len, pair.core_line.sent[before:]))
            assert received == b"small"
            assert behind < 3 * 65_536
            nursery.cancel_scope.cancel()


# Ends ----------------------------------------------------------------------------------------------------------------


async def test_everybody_who_waits_gets_link_lost_when_the_connection_goes() -> None:
    outcomes: list[str] = []
    async with linked() as pair:
        ends = [await pair.open() for _ in range(20)]
        pair.agent.session.respond(ends[0][1], frames.Response(200, -2, 0, 0, b"OK\r\n"))

        async def wait(stream: Any) -> None:
            try:
                await stream.answer()
                await stream.receive()
            except Failure as exc:
                outcomes.append(exc.outcome)

        async with trio.open_nursery() as nursery:
            for stream, _ in ends:
                nursery.start_soon(wait, stream)
            await trio.testing.wait_all_tasks_blocked()
            pair.core_line.end("the connection was lost")
        assert outcomes == ["link_lost"] * 20
        await pair.core.ended.wait()
        assert pair.core.end_reason == "the connection was lost"
        assert not pair.core.session.streams
        assert not pair.agent.end_reason
        with pytest.raises(trio.EndOfChannel):
            await pair.core.receive_control()


async def test_streams_tasks_end_with_their_link() -> None:
    async with linked() as pair:
        assert pair.agent.nursery is not None
        ended = trio.Event()

        async def serve() -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        pair.agent.nursery.start_soon(serve)
        await trio.testing.wait_all_tasks_blocked()
        pair.agent.end("enough")
        await pair.agent.ended.wait()
        assert ended.is_set()
        assert pair.agent.end_reason == "enough"
        pair.agent.end("another reason")
        assert pair.agent.end_reason == "enough"


async def test_a_polite_close_sends_what_is_queued_first() -> None:
    async with linked() as pair:
        stream, there = await pair.open()
        await stream.send(bytes(150_000))
        pair.core.session.control(frames.GOAWAY, control.pack_goaway("bye"))
        pair.core.close("shutting down")
        await pair.core.ended.wait()
        await pair.agent.ended.wait()
        assert there.inbox_bytes == 150_000
        assert await pair.agent.receive_control() == (frames.GOAWAY, b"bye")
        with pytest.raises(trio.EndOfChannel):
            await pair.agent.receive_control()
        assert pair.agent.end_reason == "closed by the other end (1000 shutting down)"


async def test_a_broken_protocol_ends_this_link_only() -> None:
    async with linked() as bad, linked() as good:
        stream, _ = await bad.open()
        bad.core.on_message(b"\x06nonsense")
        await bad.core.ended.wait()
        assert bad.core.end_reason == "the other end broke the link protocol: a frame header is cut off"
        assert bad.core.session.frames_bad == 1
        with pytest.raises(Failure):
            await stream.receive()
        assert not good.core.end_reason
        stream, there = await good.open()
        good.agent.session.respond(there, NOTHING, end=True)
        assert (await stream.answer()).status == 204


async def test_a_send_that_fails_ends_the_link() -> None:
    class Broken(Line):
        async def send(self, message: bytes) -> None:
            raise trio.BrokenResourceError("reset by peer")

    line: Any = Broken()
    link = Link(True, 5, 15)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run, line)
        link.session.control(frames.GOAWAY, b"")
        await link.ended.wait()
    assert link.end_reason == "the connection was lost"


async def test_a_run_that_is_cancelled_fails_its_streams() -> None:
    one, _ = lines()
    link = Link(True, 5, 15)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run, one)
        await trio.testing.wait_all_tasks_blocked()
        stream = link.session.open(Open(0, 0, 0, NO_BODY, b"", b""))
        nursery.cancel_scope.cancel()
    assert link.ended.is_set()
    assert link.end_reason == "cancelled"
    assert stream.failure is not None


# Hostile ends --------------------------------------------------------------------------------------------------------


async def test_control_frames_that_nobody_takes_are_bounded() -> None:
    async with linked() as pair:
        pair.core.on_message(frames.frame(frames.REPORT, 0, b"x") * MAX_CONTROL)
        assert not pair.core.end_reason
        pair.core.on_message(frames.frame(frames.REPORT, 0, b"x"))
        assert "too many control frames" in pair.core.end_reason


async def test_pings_of_an_end_that_does_not_read_are_bounded() -> None:
    async with linked() as pair:
        ping = frames.frame(frames.PING, 0, control.pack_ping(1, 1))
        for _ in range(10):
            pair.core.on_message(ping * MAX_PONGS)
            await trio.testing.wait_all_tasks_blocked()  # the answers leave
        assert not pair.core.end_reason
        pair.core_line.held = trio.Event()
        pair.core.on_message(ping)
        await trio.testing.wait_all_tasks_blocked()
        pair.core.on_message(ping * MAX_PONGS)
        assert not pair.core.end_reason
        pair.core.on_message(ping)
        assert "pings come faster" in pair.core.end_reason


async def test_a_message_that_is_too_long_ends_the_link() -> None:
    async with linked() as pair:
        pair.core.on_message(bytes(MAX_MESSAGE + 1))
        assert "the message is too long" in pair.core.end_reason


# What leaves without the writer -----------------------------------------------------------------------------------


async def test_all_that_is_queued_while_sockets_are_told_leaves_at_once(nursery: trio.Nursery) -> None:
    line, _ = lines()
    line.takes_now = True
    link, telling = await flushing(nursery, line)
    for _ in range(3):
        link.session.control(frames.GOAWAY, b"")
    assert line.sent == []
    telling.end()
    assert kinds(line.sent) == [["GOAWAY"] * 3]
    link.session.control(frames.GOAWAY, b"")  # nobody is told now: the writer's
    assert len(line.sent) == 1
    await trio.testing.wait_all_tasks_blocked()
    assert kinds(line.sent) == [["GOAWAY"] * 3, ["GOAWAY"]]


@pytest.mark.parametrize("why", ["it can't", "bulk"])
async def test_what_can_not_leave_at_once_is_left_to_the_writer(nursery: trio.Nursery, why: str) -> None:
    line, _ = lines()
    line.takes_now = why == "bulk"
    link, telling = await flushing(nursery, line)
    stream = link.session.open(Open(HTTP, 0, 0, 100_000, b"", b""))
    if why == "bulk":
        link.session.send_data(stream, b"x" * 50_000)
    telling.end()
    assert line.sent == []
    await trio.testing.wait_all_tasks_blocked()
    assert kinds(line.sent) == [["OPEN", "DATA"] if why == "bulk" else ["OPEN"]]


async def test_what_is_left_of_a_message_is_sent_by_the_writer(nursery: trio.Nursery) -> None:
    class Slow(Line):
        async def send_rest(self) -> None:
            await trio.lowlevel.checkpoint()
            self.has_rest = False
            self.sent.append(b"the rest")

        def send_now(self, message: bytes) -> None:
            self.sent.append(message)
            self.has_rest = True

    line = Slow()
    line.takes_now = True
    link, telling = await flushing(nursery, line)
    link.session.control(frames.GOAWAY, b"")
    telling.end()
    assert len(line.sent) == 1
    await trio.testing.wait_all_tasks_blocked()
    assert line.sent[1:] == [b"the rest"]


async def test_a_broken_connection_is_seen_there_too() -> None:
    class Broken(Line):
        def send_now(self, message: bytes) -> None:
            raise trio.BrokenResourceError("reset by peer")

    line = Broken()
    line.takes_now = True
    async with trio.open_nursery() as nursery:
        telling: Any = Telling()
        telling.is_telling = False
        link = Link(True, 5, 15, ready=telling)
        carrier: Any = line
        nursery.start_soon(link.run, carrier)
        await trio.testing.wait_all_tasks_blocked()
        telling.is_telling = True
        link.session.control(frames.GOAWAY, b"")
        telling.end()
        await link.ended.wait()
    assert link.end_reason == "the connection was lost"
