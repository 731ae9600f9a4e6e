"""An end that is out for harm: bytes in crumbs, never a pause, unread answers, and random frames in random states."""

import random
import time

import pytest
import trio
from linking import linked, socket_pair

from tunnel.errors import LocalWireError, WireError
from tunnel.link.link import MAX_UNSENT, Link
from tunnel.link.tap import Tap
from tunnel.link.websocket import TURN
from tunnel.net import EAGER
from tunnel.ready import make_ready
from tunnel.wire import control, frames
from tunnel.wire.credit import MOST_PENDING
from tunnel.wire.frames import MAX_DATA, MAX_HEAD, STREAM_WINDOW, Open, Response
from tunnel.wire.held import Held
from tunnel.wire.outbox import MOST_IN_FRONT
from tunnel.wire.session import CRUMB, Session
from tunnel.wire.stream import Stream

OPEN = Open(frames.HTTP, 0, 0, frames.UNKNOWN, b"", b"GET / HTTP/1.1\r\nHost: a\r\n")
OK = Response(200, frames.UNKNOWN, 0, 0, b"OK\r\n")
OVERLOADED = 15


def pair(held: Held | None = None) -> tuple[Session, Session, Stream, Stream]:
    """A core's and an agent's session with one stream between them, answered."""
    core, agent = Session(True, held=held), Session(False)
    stream = core.open(OPEN, b"", True)
    agent.receive(core.take()[0])
    (there,) = agent.streams.values()
    agent.respond(there, OK)
    core.receive(agent.take()[0])
    return core, agent, stream, there


# What is held --------------------------------------------------------------------------------------------------------


def test_crumbs_of_a_body_are_joined() -> None:
    """A window in frames of one byte must not become a million objects."""
    core, _, stream, _ = pair()
    crumb = frames.frame(frames.DATA, stream.id, b"x")
    for _ in range(100):
        core.receive(crumb * 2000)
    assert stream.inbox_bytes == 200_000
    assert len(stream.inbox) < 100
    assert max(map(len, stream.inbox)) < 8192
    assert b"".join(core.next_part(stream) for _ in range(len(stream.inbox))) == b"x" * 200_000


def test_joined_crumbs_keep_their_order() -> None:
    core, _, stream, _ = pair()
    rng = random.Random(7)
    sizes = [rng.choice((1, 10, CRUMB - 1, CRUMB, 5000)) for _ in range(200)]
    parts = [bytes((number % 251,)) * size for number, size in enumerate(sizes)]
    for part in parts:
        core.receive(frames.frame(frames.DATA, stream.id, part))
    assert b"".join(core.next_part(stream) for _ in range(len(stream.inbox))) == b"".join(parts)


def test_interim_answers_hold_little() -> None:
    core, _, _, _ = pair()
    stream = core.open(OPEN, b"", True)
    head = frames.pack_response(Response(103, 0, 0, 0, b"Early Hints\r\nLink: " + b"x" * (MAX_HEAD - 100) + b"\r\n"))
    for _ in range(4):
        core.receive(frames.frame(frames.RESPONSE, stream.id, head))
    assert stream.failure is not None and stream.failure[1] == "too many interim responses"
    assert len(stream.interims) == 1  # MAX_HEAD of them all together


def test_the_stream_that_would_hold_too_much_is_given_up_and_others_are_not() -> None:
    held = Held(4 * MAX_DATA)
    core, _, greedy, _ = pair(held)
    modest = core.open(OPEN, b"", True)
    core.take()
    core.receive(frames.frame(frames.RESPONSE, modest.id, frames.pack_response(OK, b"x" * 100)))
    for _ in range(3):
        core.receive(frames.frame(frames.DATA, greedy.id, bytes(MAX_DATA)))
    core.receive(frames.frame(frames.DATA, modest.id, bytes(MAX_DATA)))
    assert greedy.failure == (OVERLOADED, "there is no memory for more unread bytes")
    assert held.refused == 1 and not held.is_full
    assert modest.failure is None and core.next_part(modest) == b"x" * 100
    assert core.next_part(modest) == bytes(MAX_DATA)
    assert (greedy.inbox_bytes, len(greedy.inbox)) == (0, 0)
    core.take()
    assert held.bytes == 0


def test_exactly_as_much_as_there_may_be_is_too_much() -> None:
    """Nothing new begins then, so it must not stay like that: two readers that stop may fill their windows to it."""
    held = Held(2 * MAX_DATA)
    pairs = [pair(held) for _ in range(2)]
    for core, *_ in pairs:
        core.take()
    for core, _, stream, _ in pairs:
        pour(core, stream, MAX_DATA - held.bytes % MAX_DATA)
    assert held.refused == 1 and not held.is_full


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def pour(core: Session, stream: Stream, size: int, end: bool = False) -> None:
    """So much of an answer, unread."""
    flags = 0
    while size:
        part, size = min(size, MAX_DATA), max(size - MAX_DATA, 0)
        if end and not size:
            flags = frames.END
        core.receive(frames.frame(frames.DATA, stream.id, bytes(part), flags))


@pytest.mark.parametrize("is_whole", [False, True])
def test_readers_that_have_stopped_are_given_up_on_whatever_link_they_are(is_whole: bool) -> None:
    """Not who holds more at this moment because he reads, nor who is on the link on which the next part comes. Also
    when the answers that nobody reads are all here, so that their streams are over."""
    clock = Clock()
    held = Held(32 * MAX_DATA, clock)
    stopped = [pair(held) for _ in range(5)]
    good, _, reader, _ = pair(held)
    for core, _, stream, _ in stopped:
        pour(core, stream, 5 * MAX_DATA, is_whole)
        assert stream.is_over == is_whole
    for _ in range(6):
        clock.now += 0.7
        pour(good, reader, 3 * MAX_DATA)
        for _ in range(3):
            good.next_part(reader)
    pour(good, reader, 6 * MAX_DATA)
    assert held.refused == 0 and reader.inbox_bytes > stopped[0][2].inbox_bytes
    pour(good, reader, 2 * MAX_DATA)
    assert reader.failure is None and held.refused == 1 and held.bytes < held.most
    given_up = [stream for _, _, stream, _ in stopped if stream.failure is not None]
    assert [stream.failure for stream in given_up] == [(OVERLOADED, "there is no memory for more unread bytes")]
    assert not given_up[0].ended and not given_up[0].inbox


def test_who_has_stopped_is_not_asked_while_little_is_held() -> None:
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return 0

    held = Held(32 * MAX_DATA, clock)
    core, _, stream, _ = pair(held)
    pour(core, stream, 15 * MAX_DATA)
    assert looks == 0


def test_links_that_have_ended_hold_nothing() -> None:
    held = Held(MAX_DATA)
    core, _, stream, _ = pair(held)
    assert list(held.holders) == [core]
    core.fail_all(10, "")
    core.close()
    assert list(held.holders) == [] and stream.failure == (10, "")


def test_what_is_held_is_given_back_however_a_link_ends() -> None:
    held = Held(10 * STREAM_WINDOW)
    core, _, stream, _ = pair(held)
    core.receive(frames.frame(frames.DATA, stream.id, bytes(1000)))
    for _ in range(10):
        core.open(OPEN, b"body")
    assert held.bytes == 1000 + core.queued_bytes > 1100
    core.close()
    assert held.bytes == 1000
    core.control(frames.GOAWAY, b"nobody gets this")
    core.open(OPEN, b"nor this")
    core.fail(stream, 10, "the link is lost")
    core.forget(stream)
    assert held.bytes == 0 and core.take() == (b"", [])


def test_body_in_random_frames_is_always_accounted_for() -> None:
    rng = random.Random(11)
    for _ in range(50):
        held = Held()
        core = Session(True, held=held)
        agent = Session(False)
        for _ in range(8):
            core.open(OPEN, b"x" * rng.randrange(100))
        streams = list(core.streams.values())
        agent.receive(core.take()[0])
        for there in list(agent.streams.values()):
            agent.respond(there, OK)
        core.receive(agent.take()[0])
        for _ in range(100):
            stream = rng.choice(streams)
            there = agent.streams.get(stream.id)
            move = rng.randrange(6)
            if move < 3 and there is not None:
                size = min(rng.randrange(1, 30_000), agent.sendable(there))
                if size > 0:
                    agent.send_data(there, bytes(size))
            elif move == 3:
                core.next_part(stream)
            elif move == 4 and rng.random() < 0.1:
                core.reset(stream, rng.choice((0, 1)))
            elif there is not None and rng.random() < 0.1:
                agent.reset(there, 12)
            _swap(core, agent)
            inbox = sum(one.inbox_bytes for one in streams)
            assert held.bytes == inbox + core.queued_bytes
        for stream in streams:
            core.forget(stream)
        core.close()
        assert held.bytes == 0


def _swap(core: Session, agent: Session) -> None:
    for one, other in ((core, agent), (agent, core)):
        while one.has_queued:
            other.receive(one.take()[0])


# Random frames -------------------------------------------------------------------------------------------------------


def test_random_frames_never_break_the_session_itself() -> None:
    """Whatever comes, in whatever state: WireError or nothing, never another error, and nothing beyond the windows."""
    rng = random.Random(4711)
    kinds = [*frames.NAMES, 0, 14, 200, 255]
    refused = 0
    for _ in range(400):
        held = Held()
        core = Session(rng.random() < 0.8, held=held)
        made: list[Stream] = []
        try:
            for _ in range(rng.randrange(60)):
                if core._opens and rng.random() < 0.2:
                    made.append(core.open(OPEN, b"", rng.random() < 0.5))
                if made and rng.random() < 0.1:
                    core.reset(rng.choice(made), rng.randrange(18))
                core.receive(_random_frames(rng, kinds, len(made)))
                if rng.random() < 0.3:
                    core.take()
                assert len(core.streams) <= 300
                assert sum(one.inbox_bytes for one in core.streams.values()) <= frames.LINK_WINDOW
        except WireError:
            refused += 1
        except LocalWireError:
            pass  # the second end of a stream that the other closed
        for stream in [*made, *core.streams.values()]:
            core.fail(stream, 10, "")
            core.forget(stream)
        core.close()
        assert held.bytes == 0
    assert refused > 100


def _random_frames(rng: random.Random, kinds: list[int], streams: int) -> bytes:
    message = b""
    for _ in range(rng.randrange(1, 5)):
        kind = rng.choice(kinds)
        number = rng.choice((0, rng.randrange(1, streams + 2), rng.randrange(2**32)))
        payload = rng.choice(
            (
                b"",
                rng.randbytes(rng.randrange(64)),
                bytes(rng.randrange(70_000)),
                frames.WINDOW_BODY.pack(rng.choice((0, 1, 2**20, 2**32 - 1))),
                frames.pack_response(Response(rng.choice((100, 101, 200, 999)), rng.choice((-2, -1, 0, 5)), 0, 0, b"")),
                frames.pack_open(OPEN, b"x"),
            )
        )
        message += frames.frame(kind, number, payload, rng.choice((0, 0, 1, 255)))
    return message if rng.random() < 0.9 else message[: rng.randrange(len(message))]


# The connection ------------------------------------------------------------------------------------------------------


async def test_a_long_message_in_tiny_pieces_is_joined_once() -> None:
    """Each byte on its own: copying what is there for each would take minutes."""
    near, far = socket_pair()
    tap = Tap(near, client=False)
    found: list[bytes] = []
    tap.on_message = found.append
    data = b"\x82\xff" + (400_000).to_bytes(8, "big") + bytes(4) + bytes(400_000)
    began = time.process_time()
    for at in range(len(data)):
        tap._add(data[at : at + 1])
    assert time.process_time() - began < 5
    assert found == [bytes(400_000)]
    near.close()
    far.close()


async def test_a_peer_that_never_pauses_starves_nobody() -> None:
    near, far = socket_pair()
    turns = received = 0
    near.sock.setsockopt(1, 7, 4 * EAGER)  # SO_SNDBUF: so much waits there that no read finds nothing

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async def send() -> None:
        await near.send(bytes(20 * EAGER))
        near.shutdown()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        nursery.start_soon(send)
        while data := await far.recv():
            received += len(data)
        assert received == 20 * EAGER
        assert turns >= 15
        nursery.cancel_scope.cancel()
    near.close()
    far.close()


async def test_messages_full_of_tiny_frames_and_tiny_messages_are_taken_in_turns() -> None:
    """A read brings up to 256 KiB: others run before all the frames in it have been looked at."""
    near, far = socket_pair()
    tap = Tap(near, client=False)
    link = Link(True, 5, 15)
    tap.on_message = link.on_message
    tiny = frames.frame(99, 0)
    for message, count in ((tiny, 10_000), (tiny * 4000, 6)):
        head = (
            bytes((0x82, 0x80 | len(message))) if len(message) < 126 else b"\x82\xfe" + len(message).to_bytes(2, "big")
        )
        data = (head + bytes(4) + message) * count
        before = link.session.frames_in
        most, at = 0, before
        assert tap._add(data) == b""
        while True:
            most, at = max(most, link.session.frames_in - at), link.session.frames_in
            if not tap._is_behind:
                break
            assert tap._add(b"") == b""
        assert at - before == count * len(message) // 10
        assert most <= TURN + frames.MAX_FRAMES
        assert not tap._parts
    near.close()
    far.close()


@pytest.mark.parametrize("is_joined", [False, True])
async def test_others_have_their_turn_between_them(is_joined: bool) -> None:
    near, far = socket_pair()
    tap = Tap(near, client=False)
    found: list[bytes] = []
    tap.on_message = found.append
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async def read() -> None:
        assert await tap.receive_some() == b"\x88\x80" + bytes(4)  # a close, which is not ours, and in its place
        assert len(found) == 5000

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            if is_joined and (ready := make_ready(pytest.fail)) is not None:
                tap.join(ready)
                nursery.start_soon(ready.run)
            async with trio.open_nursery() as reading:
                reading.start_soon(read)
                await far.send((b"\x82\x80" + bytes(4)) * 5000 + b"\x88\x80" + bytes(4))
            assert turns >= 4
            nursery.cancel_scope.cancel()
    near.close()
    far.close()


async def test_a_peer_that_pings_and_does_not_read_is_cut_off() -> None:
    async with linked() as one:
        one.core_line.held = trio.Event()  # it takes nothing
        for _ in range(3):
            one.core.on_message(frames.frame(frames.PING, 0, bytes(16)) * 30)
        with trio.fail_after(5):
            await one.core.ended.wait()
        assert one.core.end_reason.endswith("pings come faster than their answers are taken")
        assert one.core.session.frames_bad == 1
        assert one.core.session.queued_bytes == 0


@pytest.mark.parametrize("count", [65, 5])
async def test_control_frames_that_nobody_takes_are_few_and_small(count: int) -> None:
    async with linked() as one:
        size = 260 * 1024 // count
        for _ in range(count):
            one.core.on_message(frames.frame(frames.REPORT, 0, bytes(min(size, frames.MAX_TALK))))
        with trio.fail_after(5):
            await one.core.ended.wait()
        assert one.core.end_reason.endswith("too many control frames")
        assert one.core.session.frames_bad == 1


# An end that does not read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 500, 4000])
def test_small_parts_for_an_end_that_does_not_read_wait_in_their_stream(size: int) -> None:
    """They pass bulk of others, but only so many: each costs more than its bytes, and a window has millions of them."""
    core, agent, _, there = pair()
    agent.set_windows(2**24, 2**25)
    modest = core.open(OPEN, b"", True)
    agent.receive(core.take()[0])
    other = agent.streams[modest.id]
    agent.respond(other, OK)
    sent = 0
    while agent.sendable(there) >= size and sent < 2**18:
        agent.send_data(there, bytes((sent % 251,)) * size)
        sent += 1
    assert sent <= MOST_IN_FRONT + MOST_PENDING
    assert agent.queued_bytes < (MOST_IN_FRONT + MOST_PENDING) * (size + 30)
    # Who reads again gets them in their order.
    got = b""
    while agent.has_queued:
        message, _ = agent.take()
        for kind, _, stream, payload in frames.split(message):
            got += payload if (kind, stream) == (frames.DATA, there.id) else b""
    assert got == b"".join(bytes((number % 251,)) * size for number in range(sent))
    assert agent.queued_bytes == 0 and len(there.pending) == 0


@pytest.mark.parametrize("opens", [True, False])
async def test_an_end_that_never_reads_loses_its_link(opens: bool) -> None:
    """Answers, resets and credit wait for it, and it may cause more and more of them while it sends on."""
    async with linked() as one:
        end, line = (one.core, one.core_line) if opens else (one.agent, one.agent_line)
        line.held = trio.Event()  # never set
        for _ in range(MAX_UNSENT):
            end.session.control(frames.WINDOW, frames.WINDOW_BODY.pack(1))
        end.tick(time.monotonic())
        assert not end.end_reason
        for _ in range(10):
            end.session.control(frames.WINDOW, frames.WINDOW_BODY.pack(1))
        end.tick(time.monotonic())
        assert end.end_reason == "the other end does not read what it is sent"
        await end.ended.wait()
        assert end.session.queued_bytes == end.session.held.bytes == 0


# Windows that the core chooses ---------------------------------------------------------------------------------------


def test_smaller_windows_bind_both_ends() -> None:
    core, agent = Session(True), Session(False)
    core.set_windows(frames.LEAST_WINDOW, 2 * frames.LEAST_WINDOW)
    stream = core.open(OPEN, b"", True)
    agent.receive(core.take()[0])  # before the agent has read the welcome in the same message
    agent.set_windows(frames.LEAST_WINDOW, 2 * frames.LEAST_WINDOW)
    (there,) = agent.streams.values()
    agent.respond(there, OK)
    sent = 0
    while room := agent.sendable(there):
        agent.send_data(there, bytes(room))
        sent += room
        _swap(core, agent)
    assert 0 < sent <= frames.LEAST_WINDOW == there.credit + sent
    assert stream.inbox_bytes == sent
    while core.next_part(stream):
        _swap(core, agent)
    assert agent.sendable(there) > 0
    with pytest.raises(WireError):
        core.receive(frames.frame(frames.DATA, stream.id, bytes(frames.MAX_DATA)) * 2)


@pytest.mark.parametrize("windows", [(0, 2**20), (2**20, 2**20 - 1), (2**20, 2**31), (-1, -1)])
def test_impossible_windows_are_an_error(windows: tuple[int, int]) -> None:
    with pytest.raises(WireError):
        Session(False).set_windows(*windows)


@pytest.mark.parametrize("opens", [True, False])
async def test_control_frames_of_the_wrong_end_break_the_protocol(opens: bool) -> None:
    for kind in (frames.WELCOME, frames.REFUSED) if opens else (frames.HELLO, frames.REPORT):
        async with linked() as one:
            end = one.core if opens else one.agent
            end.on_message(frames.frame(kind, 0, b"{}"))
            assert end.breach is not None and "must not send" in end.end_reason and not end.is_welcomed


async def test_a_welcome_sets_the_windows_of_a_link() -> None:
    async with linked() as one:
        said = control.Welcome(1, "0", "conn-1", "acme", "a", [], [], 2**17, 2**20)
        one.agent.on_message(frames.frame(frames.WELCOME, 0, control.encode(said)))
        assert not one.agent.end_reason
        _, there = await one.open()
        assert (there.credit, there.receivable) == (2**17, 2**17)
        one.agent.on_message(frames.frame(frames.WELCOME, 0, control.encode(said)))  # only the first counts
        assert there.credit == 2**17
