"""Random operations on both ends, and random bytes: nothing is lost, mixed up or miscounted; only WireError comes."""

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from tunnel.errors import OUTCOMES, WireError
from tunnel.wire import frames, states
from tunnel.wire.frames import LINK_WINDOW, UNKNOWN, Open, Response
from tunnel.wire.session import OPENED, Session
from tunnel.wire.stream import Stream

PATTERN = bytes(range(251)) * 600
sizes = st.sampled_from([0, 1, 100, 4096, 4097, 16_384, 65_536, 200_000])
codes = st.sampled_from([row.code for row in OUTCOMES.values()])


@dataclass(eq=False)
class Half:
    """One direction of one stream: what was sent, and what was taken at the other end."""

    sender: Session
    receiver: Session
    out: Stream
    sent: int = 0
    taken: int = 0
    ended: bool = False
    inn: Stream | None = None


@dataclass(eq=False)
class Wire:
    """Messages on their way from one end to the other."""

    sender: Session
    receiver: Session
    messages: deque[bytes] = field(default_factory=deque)


class TwoEnds(RuleBasedStateMachine):
    halves = Bundle("halves")

    def __init__(self) -> None:
        super().__init__()
        self.core, self.agent = Session(True), Session(False)
        self.wires = (Wire(self.core, self.agent), Wire(self.agent, self.core))
        self.unopened: dict[int, Half] = {}
        self.all: list[Half] = []
        self.given_up: set[int] = set()

    # What the two ends do

    @rule(size=sizes, end=st.booleans())
    def open(self, size: int, end: bool) -> None:
        body = PATTERN[:size] if self.core.can_carry(None, size) else b""
        stream = self.core.open(Open(0, 0, 0, UNKNOWN, b"", b"G"), body, end)
        self.unopened[stream.id] = half = Half(self.core, self.agent, stream, len(body), ended=end)
        self.all.append(half)

    @rule(target=halves, wire=st.integers(0, 1), whole=st.booleans())
    def deliver(self, wire: int, whole: bool) -> object:
        """The next message, as it is or cut into messages of one frame."""
        one = self.wires[wire]
        if one.sender.has_queued:
            one.messages.append(one.sender.take()[0])
        found: list[Half] = []
        if one.messages:
            message = one.messages.popleft()
            cut = [frames.frame(k, s, p, f) for k, f, s, p in frames.split(message)]
            assert b"".join(cut) == message
            for part in [message] if whole else cut:
                for kind, stream, _ in one.receiver.receive(part):
                    if kind == OPENED and stream is not None:
                        up = self.unopened.pop(stream.id)
                        up.inn = stream
                        down = Half(self.agent, self.core, stream, inn=up.out)
                        self.all.append(down)
                        found += [up, down]
        return multiple(*found)

    @rule(half=halves, status=st.sampled_from([100, 103, 200, 404]), size=sizes, end=st.booleans())
    def respond(self, half: Half, status: int, size: int, end: bool) -> None:
        stream = half.out
        if half.sender is self.agent and stream.out == states.IDLE and not half.ended:
            final = not frames.is_interim(status)
            body = PATTERN[:size] if final and self.agent.can_carry(stream, size) else b""
            self.agent.respond(stream, Response(status, UNKNOWN, 0, 0, b"OK\r\n"), body, end and final)
            half.sent += len(body)
            half.ended = end and final

    @rule(half=halves, size=sizes, end=st.sampled_from(["", "", "flag", "empty", "trailers"]))
    def send(self, half: Half, size: int, end: str) -> None:
        stream, session = half.out, half.sender
        if stream.out != states.BODY:
            return
        room = session.sendable(stream)
        part = PATTERN[half.sent % 251 :][: min(size, room)]
        if part or end == "flag":
            session.send_data(stream, part, end == "flag")
        if end == "empty":
            session.send_data(stream, b"", True)
        elif end == "trailers":
            session.send_trailers(stream, b"A: b\r\n")
        half.sent += len(part)
        half.ended = half.ended or bool(end)

    @rule(half=halves, parts=st.integers(1, 40))
    def read(self, half: Half, parts: int) -> None:
        assert half.inn is not None
        for _ in range(parts):
            part = half.receiver.next_part(half.inn)
            assert part == PATTERN[half.taken % 251 :][: len(part)]
            half.taken += len(part)
        assert half.taken <= half.sent
        if half.inn.ended and not half.inn.inbox and half.receiver.streams.get(half.inn.id) is half.inn:
            assert half.ended
            assert half.taken == half.sent

    @rule(half=consumes(halves), code=codes, by_sender=st.booleans())
    def reset(self, half: Half, code: int, by_sender: bool) -> None:
        assert half.inn is not None
        self.given_up.add(half.out.id)  # what is unread of it is forgotten
        if by_sender:
            half.sender.reset(half.out, code, "enough")
            half.receiver.forget(half.inn)
        else:
            half.receiver.reset(half.inn, code, "enough")

    # What holds at every moment

    @invariant()
    def link_credit_is_exact(self) -> None:
        for there, back in (self.wires, self.wires[::-1]):
            body = sum(body_of(one) for one in under_way(there))
            credit = sum(link_credit_of(one) for one in under_way(back))
            assert there.sender._credit + body + credit == there.receiver._receivable <= LINK_WINDOW
            assert there.sender._credit >= 0
            assert there.sender.queued_bytes == sum(len(one) for one in queued(there.sender))

    @invariant()
    def streams_hold_no_more_than_a_window(self) -> None:
        for half in self.all:
            assert 0 <= half.out.credit <= frames.STREAM_WINDOW
            if half.inn is not None:
                assert half.inn.inbox_bytes == sum(map(len, half.inn.inbox)) <= frames.STREAM_WINDOW

    def teardown(self) -> None:
        """Let all arrive and be read: each half that ended is complete, and no credit is missing."""
        for _ in range(200):
            for number in (0, 1):
                self.deliver_all(number)
            for half in self.all:
                if half.inn is not None:
                    self.read_rest(half)
        for half in self.all:
            if half.ended and half.inn is not None and half.out.id not in self.given_up and not half.inn.failure:
                assert (half.inn.ended, half.taken) == (True, half.sent)
        self.link_credit_is_exact()
        for session in (self.core, self.agent):
            assert session._receivable + session._consumed == LINK_WINDOW
            assert session.queued_bytes == 0

    def deliver_all(self, number: int) -> None:
        wire = self.wires[number]
        while wire.messages or wire.sender.has_queued:
            self.deliver(number, True)

    def read_rest(self, half: Half) -> None:
        assert half.inn is not None
        while part := half.receiver.next_part(half.inn):
            half.taken += len(part)


def queued(session: Session) -> list[bytes]:
    return [*session._urgent, *(part for stream in session._ring for part in stream.pending)]


def under_way(wire: Wire) -> list[bytes]:
    return [*wire.messages, *queued(wire.sender)]


def body_of(message: bytes) -> int:
    size = 0
    for kind, _, _, payload in frames.split(message):
        if kind == frames.DATA:
            size += len(payload)
        elif kind == frames.OPEN:
            size += len(frames.unpack_open(payload)[1])
        elif kind == frames.RESPONSE:
            size += len(frames.unpack_response(payload)[1])
    return size


def link_credit_of(message: bytes) -> int:
    split = frames.split(message)
    return sum(int.from_bytes(payload) for kind, _, stream, payload in split if kind == frames.WINDOW and stream == 0)


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


# Random bytes --------------------------------------------------------------------------------------------------------


def ready(opens: bool) -> Session:
    """A session with streams in several states."""
    core, agent = Session(True), Session(False)
    for number in range(4):
        core.open(Open(0, 0, 0, UNKNOWN, b"", b"G"), b"body", number % 2 == 0)
    agent.receive(core.take()[0])
    agent.respond(agent.streams[1], Response(200, UNKNOWN, 0, 0, b"OK\r\n"), b"x" * 100)
    agent.respond(agent.streams[2], Response(200, UNKNOWN, 0, 0, b"OK\r\n"), b"", True)
    agent.reset(agent.streams[3], 1)
    core.receive(agent.take()[0])
    return core if opens else agent


def receive(session: Session, message: bytes) -> None:
    """Take a message in; what may come of it is events, or WireError."""
    try:
        for _, stream, _ in session.receive(message):
            if stream is not None:
                session.next_part(stream)
    except WireError:
        pass
    while session.has_queued:
        assert session.take()[0]


loose_frame = st.builds(
    lambda kind, flags, stream, payload: frames.frame(kind, stream, payload, flags),
    st.integers(0, 15),
    st.integers(0, 3),
    st.integers(0, 6),
    st.binary(max_size=60) | st.binary(min_size=4, max_size=4),
)


@given(st.booleans(), st.binary(max_size=300))
def test_random_bytes(opens: bool, message: bytes) -> None:
    receive(ready(opens), message)


@settings(max_examples=300)
@given(st.booleans(), st.lists(loose_frame, max_size=12), st.booleans())
def test_random_frames(opens: bool, parts: list[bytes], together: bool) -> None:
    session = ready(opens)
    for message in [b"".join(parts)] if together else parts:
        receive(session, message)


@settings(max_examples=300)
@given(st.booleans(), st.data())
def test_valid_messages_with_some_bytes_changed(opens: bool, data: st.DataObject) -> None:
    sender, receiver = ready(not opens), ready(opens)
    if opens:
        sender.respond(sender.streams[4], Response(200, 9, 1, 2, b"OK\r\n"), b"some body", True)
        sender.send_data(sender.streams[1], b"y" * 50, True)
    else:
        sender.open(Open(0, 1, 9, UNKNOWN, b"a: b\r\n", b"GET / HTTP/1.1\r\n"), b"some body", True)
        sender.send_data(sender.streams[4], b"y" * 50)
        sender.reset(sender.streams[4], 1, "gone")
    message = bytearray(sender.take()[0])
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    receive(receiver, bytes(message))
