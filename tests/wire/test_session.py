"""Two ends back to back: order, priority, fairness, windows, credit that stays exact whatever is reset when."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
from msgspec.structs import replace

from tunnel.errors import OUTCOMES, LocalWireError, WireError
from tunnel.wire import frames, outbox
from tunnel.wire.credit import MOST_PENDING
from tunnel.wire.frames import END, HTTP, LINK_WINDOW, MAX_DATA, STREAM_WINDOW, UNKNOWN, Open, Response
from tunnel.wire.session import ANSWERED, BODY, CONTROL, FAILED, OPENED, TOLD, Session
from tunnel.wire.stream import Stream
from tunnel.wire.windows import FLOOR

OPEN = Open(HTTP, 0, 1000, UNKNOWN, b"", b"GET / HTTP/1.1\r\n")
OK = Response(200, UNKNOWN, 0, 0, b"OK\r\n")
ABORTED = OUTCOMES["visitor_aborted"].code


class Pair:
    """A core's and an agent's session."""

    def __init__(self) -> None:
        self.core = Session(True)
        self.agent = Session(False)

    def open(self, body: bytes = b"", end: bool = False) -> tuple[Stream, Stream]:
        """A new stream, at both ends."""
        stream = self.core.open(OPEN, body, end)
        self.flow()
        return stream, self.agent.streams[stream.id]

    def flow(self) -> None:
        """Pass messages both ways until nothing waits."""
        while self.core.has_queued or self.agent.has_queued:
            pass_on(self.core, self.agent)
            pass_on(self.agent, self.core)

    def check_credit(self) -> None:
        """What one end may send and what the other would take differ by what is not given back yet, and nothing else.

        Call it when nothing is under way.
        """
        for sender, receiver in ((self.core, self.agent), (self.agent, self.core)):
            assert sender._credit == receiver._receivable
            inboxes = sum(stream.inbox_bytes for stream in receiver.streams.values())
            assert receiver._receivable + receiver._consumed + inboxes == LINK_WINDOW


def pass_on(sender: Session, receiver: Session) -> None:
    message, _ = sender.take()
    receiver.receive(message)


def fill(sender: Session, stream: Stream, size: int) -> int:
    """Queue up to so many bytes of body as the session lets us; says how many."""
    done = 0
    while done < size and (room := sender.sendable(stream)):
        part = b"x" * min(room, size - done)
        sender.send_data(stream, part)
        done += len(part)
    return done


def take_all(receiver: Session, stream: Stream) -> bytes:
    found = b""
    while part := receiver.next_part(stream):
        found += part
    return found


def kinds(message: bytes) -> Iterator[tuple[str, int]]:
    return ((frames.NAMES[kind], stream) for kind, _, stream, _ in frames.split(message))


@pytest.fixture
def pair() -> Pair:
    return Pair()


# An exchange ---------------------------------------------------------------------------------------------------------


def test_a_small_exchange_is_one_message_each_way(pair: Pair) -> None:
    stream = pair.core.open(OPEN, b"question", end=True)
    message, _ = pair.core.take()
    ((kind, there, _),) = pair.agent.receive(message)
    assert kind == OPENED
    assert there is not None
    assert (there.head, take_all(pair.agent, there), there.ended) == (OPEN, b"question", True)
    pair.agent.respond(there, OK, b"answer", end=True)
    assert there.is_over
    assert not pair.agent.streams
    message, _ = pair.agent.take()
    assert [event[0] for event in pair.core.receive(message)] == [ANSWERED]
    assert (stream.head, take_all(pair.core, stream), stream.ended) == (OK, b"answer", True)
    assert stream.is_over
    assert not pair.core.streams
    assert (pair.core.frames_out, pair.agent.frames_in, pair.agent.frames_out, pair.core.frames_in) == (1, 1, 1, 1)
    pair.check_credit()


def test_interim_heads_come_before_the_final_one_and_trailers_end_the_half(pair: Pair) -> None:
    stream, there = pair.open()
    pair.agent.respond(there, Response(103, frames.NO_BODY, 0, 0, b"\r\n"))
    pair.agent.respond(there, OK)
    pair.agent.send_data(there, b"x" * 9000)
    pair.agent.send_trailers(there, b"A: b\r\n")
    pair.flow()
    assert [one.status for one in stream.interims] == [103]
    assert (take_all(pair.core, stream), stream.trailers, stream.ended) == (b"x" * 9000, b"A: b\r\n", True)


def test_too_many_interim_heads_cost_their_stream_only(pair: Pair) -> None:
    stream, there = pair.open()
    for _ in range(frames.MAX_INTERIMS + 1):
        pair.agent.respond(there, Response(102, frames.NO_BODY, 0, 0, b"\r\n"))
    message, _ = pair.agent.take()
    pair.core.receive(message)
    assert stream.failure is not None
    assert stream.failure[0] == OUTCOMES["local_broken"].code
    assert len(stream.interims) == frames.MAX_INTERIMS
    pair.flow()
    assert there.failure == stream.failure


def test_what_an_end_must_not_do(pair: Pair) -> None:
    stream, there = pair.open(end=True)
    with pytest.raises(LocalWireError):
        pair.agent.open(OPEN)
    with pytest.raises(LocalWireError):
        pair.core.send_data(stream, b"more")
    with pytest.raises(LocalWireError):
        pair.agent.send_data(there, b"before the head")
    with pytest.raises(LocalWireError):
        pair.agent.respond(there, replace(OK, head=bytes(frames.MAX_HEAD + 1)))
    pair.agent.respond(there, OK)
    with pytest.raises(LocalWireError):
        pair.agent.send_trailers(there, bytes(frames.MAX_HEAD + 1))
    with pytest.raises(LocalWireError):
        pair.agent.respond(there, OK)
    with pytest.raises(LocalWireError):
        pair.agent.send_data(there, bytes(STREAM_WINDOW + 1))
    for opened in (
        replace(OPEN, head=bytes(frames.MAX_HEAD + 1)),
        replace(OPEN, context=bytes(frames.MAX_CONTEXT + 1)),
    ):
        with pytest.raises(LocalWireError):
            pair.core.open(opened)
    pair.core._last_id = 0xFFFFFFFF
    with pytest.raises(LocalWireError):
        pair.core.open(OPEN)


# Order, priority, fairness -------------------------------------------------------------------------------------------


def test_order_holds_within_a_stream_whatever_the_sizes(pair: Pair) -> None:
    stream, there = pair.open()
    parts = [bytes([n]) * size for n, size in enumerate((10, 60_000, 5, 60_000, 1, 3, 4096, 4097, 2))]
    for part in parts:
        pair.core.send_data(stream, part)
    pair.core.send_data(stream, b"", end=True)
    pair.flow()
    assert take_all(pair.agent, there) == b"".join(parts)
    assert there.ended


def test_small_frames_pass_the_bulk_of_other_streams(pair: Pair) -> None:
    bulk, _ = pair.open()
    small, _ = pair.open()
    fill(pair.core, bulk, 3 * MAX_DATA)
    pair.core.send_data(small, b"small")
    pair.core.control(frames.PING, bytes(16))
    message, drained = pair.core.take()
    assert list(kinds(message)) == [("DATA", small.id), ("PING", 0), ("DATA", bulk.id)]
    assert drained == [bulk]


def test_bulk_streams_take_turns(pair: Pair) -> None:
    streams = [pair.open()[0] for _ in range(4)]
    for stream in streams:
        for _ in range(6):
            pair.core.send_data(stream, bytes(20_000))
    order: list[int] = []
    while pair.core.has_queued:
        message, _ = pair.core.take()
        assert len(message) <= outbox.BULK_PER_MESSAGE + MAX_DATA + 20
        order += [stream for _, stream in kinds(message)]
        pair.agent.receive(message)
    assert order == [stream.id for stream in streams] * 6


def test_a_pile_of_urgent_frames_leaves_in_messages_that_are_not_too_long(pair: Pair) -> None:
    bulk, _ = pair.open()
    fill(pair.core, bulk, 2 * MAX_DATA)
    for number in range(100):
        pair.core.open(replace(OPEN, head=bytes(30_000), tunnel=number))
    seen: list[int] = []
    while pair.core.has_queued:
        message, _ = pair.core.take()
        assert len(message) <= frames.MAX_MESSAGE
        seen += [event[1].head.tunnel for event in pair.agent.receive(message) if event[0] == OPENED]  # type: ignore[union-attr]
    assert seen == list(range(100))
    assert pair.core.queued_bytes == 0


def test_messages_have_few_frames(pair: Pair) -> None:
    """Of urgent frames and of crumbs behind bulk, however many wait."""
    streams = [pair.open()[1] for _ in range(32)]
    for _ in range(3 * frames.MAX_FRAMES):
        pair.agent.control(frames.PONG, bytes(24))
    for there in streams:
        pair.agent.respond(there, OK)
        pair.agent.send_data(there, b"x" * MAX_DATA)  # what follows has to wait behind it
        for _ in range(MOST_PENDING - 1):
            assert pair.agent.sendable(there)
            pair.agent.send_data(there, b"x")
        assert not pair.agent.sendable(there)
    count = 0
    while pair.agent.has_queued:
        before = pair.core.frames_in
        pass_on(pair.agent, pair.core)
        assert pair.core.frames_in - before <= frames.MAX_FRAMES // 2 + 1
        count += pair.core.frames_in - before
    assert count == 3 * frames.MAX_FRAMES + 32 * (1 + MOST_PENDING)


def test_who_starves_is_looked_at_once_a_message(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be thousands of them, and thousands of frames that give credit."""
    stalled = [pair.open()[0] for _ in range(100)]
    for stream in stalled:
        fill(pair.core, stream, LINK_WINDOW)
        pair.core.take()
    pair.core._credit = 0
    pair.core._starved.update(stalled)
    looks = 0
    room = Session._room

    def count(session: Session, stream: Stream) -> int:
        nonlocal looks
        looks += 1
        return room(session, stream)

    monkeypatch.setattr(Session, "_room", count)
    events = pair.core.receive(window(0, 1) * 1000)
    assert looks == 100
    assert events == []
    events = pair.core.receive(window(0, LINK_WINDOW - 1000))
    assert {stream for _, stream, _ in events} == set(stalled) and len(events) == 100
    looks = 0
    pair.core.receive(window(1, 1) * 1000)
    assert looks == 0


def test_the_queue_of_one_stream_is_bounded(pair: Pair) -> None:
    stream, _ = pair.open()
    queued = fill(pair.core, stream, STREAM_WINDOW)
    assert queued <= 4 * MAX_DATA
    assert pair.core.sendable(stream) == 0
    _, drained = pair.core.take()
    assert stream in drained
    assert pair.core.sendable(stream) > 0


# Windows -------------------------------------------------------------------------------------------------------------


def send_until_stuck(pair: Pair, stream: Stream) -> int:
    sent = 0
    while more := fill(pair.core, stream, MAX_DATA):
        sent += more
        pair.flow()
    return sent


def test_a_stream_that_nobody_reads_stops_at_its_window(pair: Pair) -> None:
    stream, there = pair.open()
    assert send_until_stuck(pair, stream) == STREAM_WINDOW == there.inbox_bytes
    assert not pair.core._starved
    quarter = STREAM_WINDOW // 4
    while there.consumed or there.inbox_bytes == STREAM_WINDOW:
        pair.agent.next_part(there)
    pair.flow()
    assert stream.credit == quarter
    assert send_until_stuck(pair, stream) == quarter


def test_consumers_who_stopped_leave_room_for_all_others(pair: Pair) -> None:
    """A thousand of them: each has something, the newest ones too, and one that reads gets on for ever."""
    stopped = [pair.open() for _ in range(999)]
    held = [send_until_stuck(pair, stream) for stream, _ in stopped]
    assert held[0] == STREAM_WINDOW
    assert min(held) == FLOOR
    assert sum(held) <= LINK_WINDOW
    stream, there = pair.open()
    assert pair.core.can_carry(None, FLOOR)
    sent = 0
    while sent < 4 * STREAM_WINDOW:
        more = send_until_stuck(pair, stream)
        assert more, "a stream that is read must not wait for those that are not"
        sent += more
        take_all(pair.agent, there)
        pair.flow()
    pair.check_credit()


def test_credit_that_was_not_due_comes_back_when_the_window_gets_short(pair: Pair) -> None:
    """Else its stream, which nobody holds up, would look to its sender like one that nobody reads."""
    stream, there = pair.open()
    assert fill(pair.core, stream, 2 * MAX_DATA) == 2 * MAX_DATA
    pair.flow()
    take_all(pair.agent, there)
    pair.flow()
    assert stream.credit < STREAM_WINDOW
    for other, _ in [pair.open() for _ in range(100)]:
        send_until_stuck(pair, other)
    assert stream.credit == STREAM_WINDOW
    assert pair.core.sendable(stream) >= FLOOR


def test_those_that_starve_are_woken_when_they_have_a_share_again(pair: Pair) -> None:
    full = [pair.open() for _ in range(LINK_WINDOW // STREAM_WINDOW)]
    for stream, _ in full:
        send_until_stuck(pair, stream)
    starved, there = pair.open()
    before = send_until_stuck(pair, starved)
    assert pair.core.sendable(starved) == 0
    for _, reader in full:
        take_all(pair.agent, reader)
    message, _ = pair.agent.take()
    assert (BODY, starved, None) in pair.core.receive(message)
    assert before + send_until_stuck(pair, starved) == STREAM_WINDOW == there.inbox_bytes
    pair.check_credit()


def test_a_reset_gives_its_queued_credit_to_those_that_starve(pair: Pair) -> None:
    woken: list[int] = []

    class Waking(Stream):
        def wake(self) -> None:
            woken.append(self.id)

    pair.core = Session(True, Waking)
    a, _ = pair.open()
    b, _ = pair.open()
    pair.core._credit = FLOOR
    assert fill(pair.core, a, MAX_DATA) == FLOOR
    assert pair.core.sendable(b) == 0
    pair.core.reset(a, ABORTED)
    assert woken == [b.id]
    assert pair.core.sendable(b) == FLOOR


@pytest.mark.parametrize("answers", [False, True])
def test_credit_comes_back_over_many_windows(pair: Pair, answers: bool) -> None:
    stream, there = pair.open()
    sender, out, receiver, inn = pair.core, stream, pair.agent, there
    if answers:
        pair.agent.respond(there, OK)
        pair.flow()
        sender, out, receiver, inn = pair.agent, there, pair.core, stream
    total, size = 0, LINK_WINDOW + 3 * STREAM_WINDOW
    while total < size:
        total += fill(sender, out, 100_000)
        pair.flow()
        take_all(receiver, inn)
        pair.flow()
        assert 0 <= out.credit <= STREAM_WINDOW
        assert 0 <= sender._credit <= LINK_WINDOW
    pair.check_credit()


# Resets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, ABORTED])
@pytest.mark.parametrize("resetter", ["sender", "receiver"])
@pytest.mark.parametrize("moment", ["queued", "under way", "in the inbox", "partly read"])
def test_a_reset_at_any_moment_leaves_the_link_credit_exact(pair: Pair, resetter: str, moment: str, code: int) -> None:
    stream, there = pair.open()
    fill(pair.core, stream, 3 * MAX_DATA)
    message = b""
    if moment == "under way":
        message, _ = pair.core.take()
    elif moment != "queued":
        pair.flow()
    if moment == "partly read":
        assert pair.agent.next_part(there)
    if resetter == "sender":
        pair.core.reset(stream, code)
    else:
        pair.agent.reset(there, code)
    pair.agent.receive(message)
    pair.flow()
    pair.agent.forget(there)  # what its owner does at the end
    pair.flow()
    assert not pair.core.streams
    assert not pair.agent.streams
    assert pair.core.queued_bytes == pair.agent.queued_bytes == 0
    pair.check_credit()


def test_hundreds_of_broken_downloads_cost_no_credit(pair: Pair) -> None:
    for number in range(300):
        stream, there = pair.open(end=True)
        pair.agent.respond(there, OK)
        fill(pair.agent, there, 2 * MAX_DATA)
        if number % 2:
            pair.flow()
        pair.core.reset(stream, ABORTED)
        pair.flow()
        pair.agent.forget(there)
    pair.check_credit()
    assert pair.agent._credit > LINK_WINDOW * 3 // 4


def test_an_unread_body_of_a_stream_that_is_over_can_be_given_up(pair: Pair) -> None:
    stream, there = pair.open(b"x" * 1000, end=True)
    pair.agent.respond(there, OK, end=True)
    pair.flow()
    assert stream.is_over
    assert there.inbox_bytes == 1000
    pair.agent.reset(there, ABORTED)
    assert not pair.agent.has_queued
    assert (there.ended, there.failure) == (False, (ABORTED, ""))  # who still reads must not take it for whole
    pair.check_credit()


def test_what_came_before_a_reset_stays_readable(pair: Pair) -> None:
    stream, there = pair.open(b"beginning")
    pair.core.reset(stream, ABORTED, "gone")
    message, _ = pair.core.take()
    assert pair.agent.receive(message) == [(FAILED, there, None)]
    assert take_all(pair.agent, there) == b"beginning"
    assert there.failure == (ABORTED, "gone")
    pair.check_credit()


def test_a_reset_overtakes_and_drops_what_is_queued_but_ok_follows_it(pair: Pair) -> None:
    for code, arrived in ((ABORTED, 0), (0, 2 * MAX_DATA)):
        stream, there = pair.open()
        fill(pair.core, stream, 2 * MAX_DATA)
        pair.core.send_data(stream, b"", end=True)
        pair.core.reset(stream, code)
        pair.flow()
        assert len(take_all(pair.agent, there)) == arrived
        assert there.failure == (code, "")
        assert there.ended == (code == 0)
    pair.check_credit()


@pytest.mark.parametrize("code", range(20))
def test_what_an_agent_can_know_is_believed(pair: Pair, code: int) -> None:
    """And nothing else, or it could blame the visitor, or the core, for what it does itself."""
    stream, there = pair.open()
    pair.agent.reset(there, code, "why")
    pair.flow()
    known = ("ok", "bad_request", "no_tunnel", "link_lost", "local_refused", "local_broken", "timeout", "overloaded")
    is_known = code in {OUTCOMES[name].code for name in known}
    assert stream.failure == (code if is_known else OUTCOMES["link_lost"].code, "why")
    stream, there = pair.open()
    pair.core.reset(stream, code, "why")
    pair.flow()
    assert there.failure == (code, "why")


def test_late_frames_of_a_stream_that_is_over_are_dropped(pair: Pair) -> None:
    stream, there = pair.open()
    pair.agent.respond(there, OK, b"late body")
    pair.agent.send_data(there, b"more")
    pair.agent.send_trailers(there, b"A: b\r\n")
    pair.agent.control(frames.RESET, b"")  # stream 0
    late = b"".join(
        frames.frame(kind, 1, payload)
        for kind, payload in (
            (frames.WINDOW, frames.WINDOW_BODY.pack(1)),
            (frames.RESET, b"\x01gone"),
            (frames.TRAILERS, b""),
        )
    )
    pair.core.reset(stream, ABORTED)
    pair.agent._urgent.pop()
    message, _ = pair.agent.take()
    assert pair.core.receive(message + late) == []
    pair.flow()
    pair.check_credit()


# Hostile ends --------------------------------------------------------------------------------------------------------


def test_what_the_acceptor_waits_for_is_told(pair: Pair) -> None:
    stream, there = pair.open(end=True)
    pair.agent.tell_waiting(there, 1500, 1200)
    pair.agent.tell_waiting(there, 2**40, 2**40)
    most = frames.MOST_US
    assert pair.core.receive(pair.agent.take()[0]) == [(TOLD, stream, (1500, 1200)), (TOLD, stream, (most, most))]
    pair.agent.tell_waiting(there, 1, 1)
    late = pair.agent.take()[0]
    pair.core.reset(stream, ABORTED)
    assert pair.core.receive(late) == []
    pair.flow()
    pair.agent.tell_waiting(there, 1, 1)  # of a stream that is over
    assert not pair.agent.has_queued


@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_wait_of_another_size_is_refused(pair: Pair, size: int) -> None:
    stream, _ = pair.open()
    with pytest.raises(WireError):
        pair.core.receive(frames.frame(frames.WAITING, stream.id, bytes(size)))


def test_the_opener_does_not_tell_of_waiting(pair: Pair) -> None:
    stream, _ = pair.open()
    with pytest.raises(WireError):
        pair.agent.receive(frames.frame(frames.WAITING, stream.id, bytes(8)))


def test_nobody_waits_on_a_stream_that_was_never_opened(pair: Pair) -> None:
    with pytest.raises(WireError):
        pair.core.receive(frames.frame(frames.WAITING, 999, bytes(8)))


def test_unknown_types_are_skipped_whatever_their_stream(pair: Pair) -> None:
    _, there = pair.open()
    message = frames.frame(15, 999, b"?") + frames.frame(6, there.id, b"x") + frames.frame(255, there.id, b"??", 0xFF)
    assert pair.agent.receive(message) == [(BODY, there, None)]
    assert pair.agent.frames_in == 4
    assert pair.agent.frames_bad == 0


def test_unknown_flags_and_padding_are_ignored(pair: Pair) -> None:
    _, there = pair.open()
    pair.agent.receive(frames.frame(frames.DATA, there.id, b"x", 0xFE))
    assert not there.ended
    padded = bytearray(frames.pack_open(OPEN))
    padded[1] = 0xFF
    ((kind, stream, _),) = pair.agent.receive(frames.frame(frames.OPEN, 7, bytes(padded)))
    assert (kind, stream and stream.head) == (OPENED, OPEN)


def test_control_frames_are_handed_out(pair: Pair) -> None:
    events = pair.agent.receive(frames.frame(frames.GOAWAY, 0, b"bye") + frames.frame(frames.PING, 5, b""))
    assert events == [(CONTROL, None, (frames.GOAWAY, b"bye")), (CONTROL, None, (frames.PING, b""))]


def window(stream: int, credit: int) -> bytes:
    return frames.frame(frames.WINDOW, stream, frames.WINDOW_BODY.pack(credit))


INTERIM = frames.pack_response(Response(100, 0, 0, 0, b""))
TO_AGENT = {
    "message too long": bytes(frames.MAX_MESSAGE + 1),
    "cut header": b"\x06\x00",
    "never opened": frames.frame(frames.DATA, 2, b"x"),
    "stream 0": frames.frame(frames.DATA, 0, b"x"),
    "trailers of stream 0": frames.frame(frames.TRAILERS, 0),
    "opened twice": frames.frame(frames.OPEN, 1, frames.pack_open(OPEN)),
    "open of stream 0": frames.frame(frames.OPEN, 0, frames.pack_open(OPEN)),
    "cut open": frames.frame(frames.OPEN, 2, b"x"),
    "response to the acceptor": frames.frame(frames.RESPONSE, 1, frames.pack_response(OK)),
    "long data": frames.frame(frames.DATA, 1, bytes(MAX_DATA + 1)),
    "long trailers": frames.frame(frames.TRAILERS, 1, bytes(frames.MAX_TRAILERS + 1)),
    "data after the end": frames.frame(frames.DATA, 1, b"", END) + frames.frame(frames.DATA, 1, b"x"),
    "end after the end": frames.frame(frames.DATA, 1, b"", END) + frames.frame(frames.TRAILERS, 1),
    "empty reset": frames.frame(frames.RESET, 1),
    "short window": frames.frame(frames.WINDOW, 1, b"123"),
    "long window": frames.frame(frames.WINDOW, 0, b"12345"),
    "no credit": window(1, 0),
    "no credit for the link": window(0, 0),
    "no credit for a stream that is over": window(7, 0),
    "too many frames": frames.frame(99, 0) * (frames.MAX_FRAMES + 1),
    "stream credit from nowhere": window(1, 1),
    "link credit from nowhere": window(0, 1),
    "much credit": window(0, 0xFFFFFFFF),
    "more than the window": frames.frame(frames.DATA, 1, bytes(MAX_DATA)) * 16 + frames.frame(frames.DATA, 1, b"x"),
}
TO_CORE = {
    "open by the acceptor": frames.frame(frames.OPEN, 2, frames.pack_open(OPEN)),
    "data before the head": frames.frame(frames.DATA, 1, b"x"),
    "end before the head": frames.frame(frames.DATA, 1, b"", END),
    "two heads": frames.frame(frames.RESPONSE, 1, frames.pack_response(OK)) * 2,
    "interim with end": frames.frame(frames.RESPONSE, 1, INTERIM, END),
    "interim with body": frames.frame(frames.RESPONSE, 1, INTERIM + b"x"),
    "interim after the head": frames.frame(frames.RESPONSE, 1, frames.pack_response(OK))
    + frames.frame(frames.RESPONSE, 1, INTERIM),
    "response never asked for": frames.frame(frames.RESPONSE, 2, frames.pack_response(OK)),
}


@pytest.mark.parametrize(
    ("to_core", "message"),
    [
        *(pytest.param(False, message, id=name) for name, message in TO_AGENT.items()),
        *(pytest.param(True, message, id=name) for name, message in TO_CORE.items()),
    ],
)
def test_what_breaks_the_protocol(pair: Pair, to_core: bool, message: bytes) -> None:
    pair.open()
    end = pair.core if to_core else pair.agent
    # In as many messages as it takes: a limit of the message must not hide the frame's.
    whole = [message]
    if len(message) > frames.MAX_MESSAGE and message[0]:
        cut = 10 + MAX_DATA
        whole = [message[at : at + cut] for at in range(0, len(message), cut)]
    with pytest.raises(WireError):
        for one in whole:
            end.receive(one)
    assert end.frames_bad == 1


def test_late_body_beyond_the_link_window_is_refused(pair: Pair) -> None:
    stream, _ = pair.open()
    pair.core.reset(stream, ABORTED)
    pair.core.take()
    pair.core._receivable = MAX_DATA - 1
    with pytest.raises(WireError):
        pair.core.receive(frames.frame(frames.DATA, stream.id, bytes(MAX_DATA)))


def test_numbers_grow_with_gaps_allowed(pair: Pair) -> None:
    for number in (3, 4, 1000, 0xFFFFFFFF):
        pair.agent.receive(frames.frame(frames.OPEN, number, frames.pack_open(OPEN)))
    numbers = list(pair.agent.streams)
    assert all(before < after for before, after in pairwise(numbers))
    with pytest.raises(WireError):
        pair.agent.receive(frames.frame(frames.OPEN, 999, frames.pack_open(OPEN)))


@pytest.mark.parametrize(
    ("stream_window", "link_window"),
    [(2**20, 2**25), (2**20, 2**22), (2**20, 2**21), (2**20, 2**20), (2**22, 2**23), (2**17, 2**17), (2**16, 2**16)],
)
@pytest.mark.parametrize("stopped", [0, 1, 3])
def test_large_bodies_arrive_whatever_the_windows(
    pair: Pair, stream_window: int, link_window: int, stopped: int
) -> None:
    """Also past others whose consumers have stopped."""
    for end in (pair.core, pair.agent):
        end.set_windows(stream_window, link_window)
    pairs = [pair.open() for _ in range(stopped + 1)]
    for _, there in pairs:
        pair.agent.respond(there, OK)
    for _, there in pairs[:stopped]:
        pair.agent.send_data(there, b"x" * min(FLOOR // 2, pair.agent.sendable(there)))
    stream, there = pairs[-1]
    sent = taken = 0
    while taken < 3 * link_window:
        sent += fill(pair.agent, there, 3 * link_window - sent)
        pair.flow()
        part = pair.core.next_part(stream)
        assert part, f"{taken} of {3 * link_window} bytes, then both wait"
        taken += len(part)
        pair.flow()
