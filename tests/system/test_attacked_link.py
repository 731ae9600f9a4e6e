"""A core whose links are attacked: each attack ends its own link, with a reason, and nobody else notices."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from rogue import Rogue, masked
from running import RunningAgent, RunningCore, poll
from service import Service
from visiting import Connection
from watching import Asking, ask, sample

from tunnel.wire import frames
from tunnel.wire.frames import NO_BODY, UNKNOWN, Open, Response

pytestmark = pytest.mark.system

MIB = 1024 * 1024
ANSWER = Response(200, UNKNOWN, 0, 0, b"OK\r\n")
HANDSHAKES = 3  #: rogues that only shake hands, below


class Field:
    """A core with a good agent (app), and an account for those that are not."""

    def __init__(self, directory: Path, ending: ExitStack) -> None:
        flags = ("-agent-tls=false", "-heartbeat=0.5s", "-heartbeat-timeout=2s", "-auth-timeout=3s")
        self.core = RunningCore(directory, *flags)
        ending.callback(self.core.close)
        self.service = Service()
        ending.callback(self.service.close)
        self.agent = RunningAgent(self.core, self.service.url, "-subdomain=app")
        ending.callback(self.agent.close)
        self.token = self.core.new_token("mallory")

    def rogue(self, *names: str) -> Rogue:
        return Rogue(self.core, self.token, *(names or ("evil",)))

    def check_others(self) -> None:
        """A visitor of the other agent is served within a second."""
        began = time.monotonic()
        assert ask(self.core, "GET /echo").status == 200
        assert time.monotonic() - began < 1

    def counts(self) -> dict[str, float]:
        names = ("tunnel_streams_active", "tunnel_held_bytes", "tunnel_connections_active", "trio_tasks_living")
        return {name: sample(self.core.metrics, name) for name in names}

    def wait_calm(self, before: dict[str, float]) -> None:
        """Until everything is as it was; a task or two more are idle ones (kept connections, the scrape's own)."""

        def is_calm() -> bool:
            now = self.counts()
            tasks = now.pop("trio_tasks_living") - before["trio_tasks_living"]
            return tasks <= 3 and all(value == before[name] for name, value in now.items())

        poll(is_calm, f"as calm as before: {before}, now {self.counts()}", timeout=15)


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    with ExitStack() as ending:
        yield Field(tmp_path_factory.mktemp("attacked"), ending)


def frame(kind: int, stream: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    return frames.frame(kind, stream, payload, flags)


def response(stream: int, answer: Response = ANSWER, body: bytes = b"") -> bytes:
    return frame(frames.RESPONSE, stream, frames.pack_response(answer, body))


#: messages that break the protocol at once, whatever went before
BREACHES = {
    "random bytes": random.Random(1).randbytes(5000),
    "a header that is cut off": b"\x06\x00\x00",
    "a huge length": frames.HEADER.pack(frames.DATA, 0, 1, 0xFFFFFFFF),
    "a payload that is too long": frame(frames.DATA, 1, bytes(frames.MAX_PAYLOAD + 1)),
    "a stream that was never opened": frame(frames.DATA, 4711, b"x"),
    "a reset of one": frame(frames.RESET, 4711, b"\x00"),
    "credit for one": frame(frames.WINDOW, 4711, b"\x00\x00\x00\x01"),
    "an OPEN by the agent": frame(frames.OPEN, 1, frames.pack_open(Open(0, 0, 0, NO_BODY, b"", b"GET / HTTP/1.1\r\n"))),
    "a flood of OPENs": frame(frames.OPEN, 1, frames.pack_open(Open(0, 0, 0, NO_BODY, b"", b""))) * 10_000,
    "a flood of resets": b"".join(frame(frames.RESET, number, b"\x01") for number in range(1, 20_000)),
    "a flood of pings": frame(frames.PING, 0, bytes(16)) * 20_000,
    "a flood of reports": frame(frames.REPORT, 0, b"up 1\n") * 10_000,
    "credit beyond the link's window": frame(frames.WINDOW, 0, b"\xff\xff\xff\xff"),
    "a short ping": frame(frames.PING, 0, b"x"),
    "stream number 0": frame(frames.DATA, 0, b"x"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_ends_its_own_link(field: Field, name: str) -> None:
    before, errors, mark = field.counts(), sample(field.core.metrics, "tunnel_protocol_errors_total"), field.core.mark()
    rogue = field.rogue()
    message = BREACHES[name]
    for at in range(0, len(message), frames.MAX_MESSAGE):
        rogue.send(message[at : at + frames.MAX_MESSAGE])
    field.check_others()
    code, reason = rogue.end()
    assert (code, reason[:42]) == (1002, "the other end broke the link protocol: " + reason[39:42])
    told = field.core.wait_for("agent disconnected", after=mark, agent_id="rogue")
    assert told["reason"].startswith("the other end broke the link protocol: ")
    assert sample(field.core.metrics, "tunnel_protocol_errors_total") == errors + 1
    field.wait_calm(before)


def break_in_body(rogue: Rogue, stream: int) -> None:
    rogue.send(response(stream, body=b"x"), response(stream))


def overflow(rogue: Rogue, stream: int) -> None:
    rogue.send(response(stream))
    for _ in range(400):  # more than the kernel takes for a visitor who reads nothing
        rogue.send(frame(frames.DATA, stream, bytes(frames.MAX_DATA)))


def body_before_head(rogue: Rogue, stream: int) -> None:
    rogue.send(frame(frames.DATA, stream, b"x"))


def trailers_twice(rogue: Rogue, stream: int) -> None:
    rogue.send(response(stream), frame(frames.TRAILERS, stream), frame(frames.WINDOW, stream + 1, b"\0\0\0\1"))


def too_much_credit(rogue: Rogue, stream: int) -> None:
    rogue.send(frame(frames.WINDOW, stream, b"\x7f\xff\xff\xff"))


def lengths_that_do_not_fit(rogue: Rogue, stream: int) -> None:
    rogue.send(frame(frames.RESPONSE, stream, frames.RESPONSE_HEAD.pack(200, 0, 0, 0, 5000)))


def an_interim_with_a_body(rogue: Rogue, stream: int) -> None:
    rogue.send(response(stream, Response(103, NO_BODY, 0, 0, b"Early Hints\r\n"), b"x"))


@pytest.mark.parametrize(
    "attack",
    [
        break_in_body, overflow, body_before_head, trailers_twice, too_much_credit, lengths_that_do_not_fit,
        an_interim_with_a_body,
    ],
)  # fmt: skip
def test_a_breach_on_a_stream_of_its_own(field: Field, attack: Callable[[Rogue, int], None]) -> None:
    """Wrong states and windows: the visitor of that stream gets a broken answer or 502, others theirs."""
    before = field.counts()
    rogue = field.rogue()
    visitor = Connection(field.core.public, "evil.localhost")
    visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    visitor.send(visitor.request("GET /"))
    stream = rogue.wait_open()
    attack(rogue, stream)
    field.check_others()
    code, reason = rogue.end()
    assert code == 1002, reason
    visitor.close()
    field.wait_calm(before)


def test_an_agent_cannot_answer_for_another(field: Field) -> None:
    """Streams have the same numbers on every link: an answer goes to the visitor of the link that it came over."""
    before = field.counts()
    hanging = Asking(field.core, "GET /hold")
    field.service.wait_request("/hold")
    for number in (1, 2, 3, 500):
        rogue = field.rogue()
        rogue.send(response(number, Response(200, 4, 0, 0, b"OK\r\n"), b"evil"))
        assert rogue.end()[0] == 1002
    assert hanging.is_alive()
    field.service.release.set()
    answer = hanging.result()
    field.service.release.clear()
    assert answer.status == 200 and b"evil" not in answer.body
    field.wait_calm(before)


def test_an_agent_cannot_claim_what_another_account_serves(field: Field) -> None:
    for names in (("app",), ("free", "app"), ("app.localhost",), ("APP",)):
        rogue = Rogue(field.core)
        rogue.send(Rogue.hello(field.token, *names))
        kind, _, _, payload = rogue.frames()[0]
        assert kind == frames.REFUSED and b'"name_taken"' in payload
        rogue.end()
    assert ask(field.core, "GET /", host="free.localhost").status in (404, 503)
    field.check_others()


def test_late_frames_and_unknown_types_are_no_breach(field: Field) -> None:
    before = field.counts()
    rogue = field.rogue()
    visitor = Connection(field.core.public, "evil.localhost")
    visitor.send(visitor.request("GET /"))
    stream = rogue.wait_open()
    rogue.send(frame(77, stream, b"from the future"), frame(255), response(stream, Response(200, 2, 0, 0, b"OK\r\n")))
    rogue.send(frame(frames.DATA, stream, b"hi", frames.END))
    answer = visitor.read()
    assert (answer.status, answer.body) == (200, b"hi")
    rogue.send(*[frame(frames.RESET, stream, b"\x01")] * 1000, *[frame(frames.DATA, stream, b"late")] * 1000)
    visitor.send(visitor.request("GET /"))
    stream = rogue.wait_open()
    rogue.send(
        frame(frames.RESPONSE, stream, frames.pack_response(Response(204, NO_BODY, 0, 0, b"OK\r\n")), frames.END)
    )
    assert visitor.read().status == 204
    visitor.close()
    rogue.sock.close()
    field.wait_calm(before)


def test_silence_after_the_handshake_and_after_the_welcome(field: Field) -> None:
    before = field.counts()
    silent = [Rogue(field.core) for _ in range(HANDSHAKES)]
    mute = field.rogue()
    began = time.monotonic()
    field.check_others()
    poll(lambda: sample(field.core.metrics, "tunnel_connections_active") == 1, "the mute one is found out", timeout=6)
    assert time.monotonic() - began < 6
    for rogue in silent:
        assert rogue.end()[0] in (0, 1000)
    mute.sock.close()
    field.wait_calm(before)


def test_a_mutated_conversation_never_hurts_the_core(field: Field) -> None:
    """Valid messages with bytes changed, cut, doubled and in another order, on many links one after the other."""
    rng = random.Random(20_261_124)
    before, rss = field.counts(), field.core.rss()
    valid = [
        frame(frames.PING, 0, bytes(16)),
        frame(frames.REPORT, 0, b"up 1\n"),
        frame(frames.WINDOW, 0, b"\0\0\0\0"),
        response(1),
        response(1, body=bytes(1000)),
        frame(frames.DATA, 1, bytes(5000)),
        frame(frames.TRAILERS, 1, b"A: b\r\n"),
        frame(frames.RESET, 1, b"\x0ctext"),
        frame(99, 5, b"new"),
    ]
    for number in range(40):
        rogue = field.rogue()
        with Connection(field.core.public, "evil.localhost") as visitor:
            if number % 2:
                visitor.send(visitor.request("GET /"))
                rogue.wait_open()
            for _ in range(20):
                message = bytearray(b"".join(rng.choices(valid, k=rng.randrange(1, 6))))
                for _ in range(rng.randrange(3)):
                    message[rng.randrange(len(message))] = rng.randrange(256)
                data = masked(bytes(message))
                if rng.random() < 0.1:
                    data = data[: rng.randrange(len(data))] + rng.randbytes(rng.randrange(40))
                rogue.write(data)
            rogue.sock.close()
        if number % 10 == 0:
            field.check_others()
    field.check_others()
    field.wait_calm(before)
    assert field.core.rss() - rss < 48 * MIB
    assert not field.core.find("agent connection broke") and not field.core.find("connection broke")
