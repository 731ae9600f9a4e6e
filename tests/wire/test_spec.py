"""SPEC.md against the code: every number, the transition table, the outcome codes, the JSON and the bytes."""

import re
from pathlib import Path
from typing import Any

import pytest

import tunnel
from tunnel.agent.backoff import NETWORK_CAP, REFUSAL_CAP
from tunnel.agent.connecting import CONNECT_TIMEOUT
from tunnel.agent.farewell import SPARE
from tunnel.config import AgentSettings, CoreSettings
from tunnel.core.admission import MAX_TUNNELS
from tunnel.errors import ASKED_REFUSALS, FINAL_REFUSALS, LOAD_REFUSALS, OF_AGENTS, OUTCOMES, REFUSALS
from tunnel.http import heads, response
from tunnel.link import link, transport
from tunnel.wire import control, frames, outbox, session, states
from tunnel.wire.frames import END, HTTP, NO_BODY, UNKNOWN, Open, Response

SPEC = (Path(tunnel.__file__).parent / "SPEC.md").read_text()


def section(title: str) -> str:
    match = re.search(rf"^#+ {re.escape(title)}$\n(.*?)(?=^#+ |\Z)", SPEC, re.M | re.S)
    assert match is not None, title
    return match[1]


def rows(title: str, table: int = 0) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    tables = re.findall(r"(?:^\|.*\n)+", section(title), re.M)
    lines = tables[table].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def block(info: str) -> str:
    match = re.search(rf"^```{info}\n(.*?)^```", SPEC, re.M | re.S)
    assert match is not None, info
    return match[1]


def test_the_version() -> None:
    assert SPEC.startswith(f"# The link protocol, version {frames.VERSION}\n")


def test_the_limits() -> None:
    named = {name: int(value) for name, value, _ in rows("Limits")}
    homes = {"MAX_CONTROL": link, "MAX_CONTROL_BYTES": link, "MAX_PONGS": link, "MAX_UNSENT": link}
    assert named == {name: getattr(homes.get(name, frames), name) for name in named}
    ours = {name for name in vars(frames) if name.startswith("MAX_") or name.endswith("_WINDOW")}
    assert named.keys() == ours | {"SMALL_BODY", *homes}


def test_the_header_and_the_types() -> None:
    table = rows("Frames")
    assert [(name, kind) for name, kind, _ in table] == [
        ("type", "u8"), ("flags", "u8"), ("stream", "u32"), ("length", "u32"),
    ]  # fmt: skip
    assert frames.HEADER.format == "!BBII"
    assert frames.HEADER.size == 10
    assert f"bit 0x{END:02x}: END" in table[1][2]
    types = rows("Frames", 1)
    assert {int(row[0]): row[1] for row in types} == frames.NAMES
    assert all(getattr(frames, row[1]) == int(row[0]) for row in types)
    sizes = {row[1]: int(found[0]) for row in types if (found := re.findall(r"(\d+) bytes", row[5]))}
    assert sizes == {
        "OPEN": frames.OPEN_HEAD.size,
        "RESPONSE": frames.RESPONSE_HEAD.size,
        "PING": frames.PING_BODY.size,
        "PONG": frames.PONG_BODY.size,
        "WAITING": frames.WAITING_BODY.size,
    }


@pytest.mark.parametrize(
    ("title", "formats"),
    [
        ("OPEN", [frames.OPEN_HEAD.format]),
        ("RESPONSE", [frames.RESPONSE_HEAD.format]),
        ("WAITING", [frames.WAITING_BODY.format]),
        ("PING and PONG", [frames.PONG_BODY.format, frames.PING_BODY.format + "q"]),
    ],
)
def test_the_fields(title: str, formats: list[str]) -> None:
    letters = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i64": "q"}
    told = ""
    for name, kind, _ in rows(title):
        if kind != "bytes":
            told += letters[kind] if name != "(reserved)" else "x" * (int(kind[1:]) // 8)
    assert all(told == form.removeprefix("!") for form in formats)


def test_the_protocols_and_the_body_lengths() -> None:
    (cell,) = (row[2] for row in rows("OPEN") if row[0] == "protocol")
    assert cell == ", ".join(f"{number} {name}" for number, name in enumerate(frames.PROTOCOLS))
    told = {name: int(value) for value, name, _ in rows("Body lengths")[1:]}
    assert told == {"NO_BODY": frames.NO_BODY, "UNKNOWN": frames.UNKNOWN}
    assert (response.NO_BODY, response.UNKNOWN, heads.CHUNKED) == (frames.NO_BODY, frames.UNKNOWN, frames.UNKNOWN)


def test_the_transition_table() -> None:
    told = {
        (states.STATES.index(state), states.MOVES.index(move)): states.STATES.index(after)
        for state, move, after, _ in rows("Streams")
    }
    assert told == states.TABLE


def test_the_outcome_codes() -> None:
    told: dict[str, int] = {}
    for row in rows("Outcomes in RESET"):
        told |= {name: int(code) for code, name in zip(row[::2], row[1::2], strict=True)}
    assert told == {name: row.code for name, row in OUTCOMES.items()}


def test_the_outcomes_that_an_agent_can_know() -> None:
    said = SPEC.partition("From an agent a core believes")[2].partition("which an agent can know")[0]
    assert set(said.split("`")[1::2]) == OF_AGENTS


def test_the_refusals() -> None:
    told = dict(rows("The control exchange"))
    assert tuple(told) == REFUSALS
    assert {name for name, kind in told.items() if kind == "final"} == FINAL_REFUSALS
    assert {name for name, kind in told.items() if kind == "load"} == LOAD_REFUSALS
    assert {name for name, kind in told.items() if kind == "asked"} == ASKED_REFUSALS
    text = " ".join(section("The control exchange").split())
    waits = f"up to {REFUSAL_CAP:g} seconds; after *retry*, and after network errors, up to {NETWORK_CAP:g}."
    assert waits in text
    assert f"`tunnels` (1 to {MAX_TUNNELS} of" in text
    assert f"within {CONNECT_TIMEOUT:g} seconds" in text
    assert CoreSettings().auth_timeout == CONNECT_TIMEOUT


def test_the_transport() -> None:
    assert f"`GET {transport.PATH} HTTP/1.1`" in section("Transport")


def test_the_heartbeat() -> None:
    text = " ".join(section("Heartbeats").split())
    for settings in (CoreSettings(), AgentSettings()):
        assert f"PING every {settings.heartbeat:g} seconds" in text
        assert f"came for {settings.heartbeat_timeout:g} seconds" in text


def test_the_priorities() -> None:
    text = " ".join(section("Order and priority").split())
    assert f"(up to {outbox.SMALL_FRAME} bytes)" in text
    assert f"about {outbox.BULK_PER_MESSAGE} bytes a message" in text


@pytest.mark.parametrize(
    ("name", "kind"),
    [("HELLO", control.Hello), ("WELCOME", control.Welcome), ("REFUSED", control.RefusedMessage)],
)
def test_the_json(name: str, kind: Any) -> None:
    message = control.decode(kind, block(f"json {name}").encode())
    assert control.decode(kind, control.encode(message)) == message
    intro = re.search(rf"^{name}: (.*?)^```", SPEC, re.M | re.S)
    assert intro is not None
    nested = control.TunnelRequest if name == "HELLO" else control.TunnelGrant
    known = set(kind.__struct_fields__) | (set(nested.__struct_fields__) if name != "REFUSED" else set())
    assert set(re.findall(r"`(\w+)`", intro[1])) - {"http", "tcp"} == known
    optional = set(kind.__struct_fields__[-len(kind.__struct_defaults__) :])
    assert optional == {f for f in re.findall(r"`(\w+)`\*", intro[1]) if f in kind.__struct_fields__}


def test_the_fields_an_answer_must_not_have() -> None:
    match = re.search(r"MUST NOT be in an answer's head: `([^`]*)`", SPEC)
    assert match is not None
    for name in match[1].split():
        with pytest.raises(Exception, match="not valid"):
            heads.check_relayed(b"OK\r\n" + name.encode() + b": x\r\n")
    heads.check_relayed(b"\r\nServer: x\r\nX-Empty: \r\n")
    match = re.search(r"Trailers MUST NOT have `([^`]*)`", SPEC)
    assert match is not None
    assert not any(heads.check_trailers(name.encode() + b": x\r\n") for name in match[1].split())
    assert heads.check_trailers(b"Server-Timing: a;dur=1\r\nDigest: x\r\n")


def test_the_example() -> None:
    def told(name: str) -> bytes:
        return bytes.fromhex(block(f"hex {name}"))

    opened = Open(HTTP, 0, 30_000, NO_BODY, b"request-id: 5f1e\r\n", b"GET /hi HTTP/1.1\r\nHost: a.example\r\n")
    core = session.Session(True)
    core.open(opened, end=True)
    assert core.take()[0] == told("OPEN")
    assert len(told("OPEN")) == 0x55

    agent = session.Session(False)
    ((kind, stream, _),) = agent.receive(told("OPEN"))
    assert (kind, stream and stream.head) == (session.OPENED, opened)
    assert stream is not None
    agent.respond(stream, Response(200, UNKNOWN, 1500, 1200, b"OK\r\nContent-Type: text/plain\r\n"))
    agent.send_data(stream, b"hi\n")
    agent.send_data(stream, b"", end=True)
    assert agent.take()[0] == told("RESPONSE")

    pinged = control.pack_ping(7, 1_700_000_000_000_000)
    others = [
        frames.frame(frames.WINDOW, 0, frames.WINDOW_BODY.pack(8 << 20)),
        frames.frame(frames.RESET, 2, frames.RESET_HEAD.pack(OUTCOMES["local_refused"].code) + b"nobody listens"),
        frames.frame(frames.PING, 0, pinged),
        frames.frame(frames.PONG, 0, control.pack_pong(pinged, 1_700_000_000_000_250)),
        frames.frame(frames.GOAWAY, 0, control.pack_goaway("bye")),
    ]
    assert b"".join(others) == told("OTHERS")


def test_the_farewell() -> None:
    text = " ".join(section("The control exchange").split())
    assert f"wait {SPARE:g} seconds longer" in text
    assert "need not wait for more than an hour" in text and control.LONGEST_DRAIN == 3600
