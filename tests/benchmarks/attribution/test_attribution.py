"""What a sample counts for, and what becomes of a sampler's report."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from pathlib import Path

import pytest
from benchmarks.attribution import groups, layered, parts
from benchmarks.attribution.attribute import SAMPLER, lines, read_report
from benchmarks.attribution.groups import TABLE, Stack, group_of, owner_of, owners, shares
from benchmarks.processes import Process, poll

from observability.record import Record
from observability.usual import UsualSpans
from tunnel.handler import Visit

CASES = [
    (["h11._readers:maybe_read_from_SEND_BODY_server", "tunnel.http.heads:parse_request"], groups.PARSE),
    (["h11._writers:write_response", "tunnel.http.answers:answer"], groups.EMIT),
    (["tunnel.core.answering:Answering._write_head", "tunnel.core.exchange:Exchanger._stream"], groups.EMIT),
    (["tunnel.core.exchange:Exchanger._assign"], groups.HANDLING),
    (["tunnel.wire.session:Session.receive", "tunnel.link.link:Link.on_message"], groups.LINK),
    (["tunnel.link.workers:Workers._next"], groups.SCHEDULER),
    (["trio._core._io_epoll:EpollIOManager.get_events", "trio._core._run:unrolled_run"], groups.SCHEDULER),
    (["trio._socket:_SocketType.recv", "trio_websocket._impl:WebSocketConnection._reader_task"], groups.SOCKETS),
    (["trio_websocket._impl:WebSocketConnection._reader_task", "trio._core._run:unrolled_run"], groups.LINK),
    (["tunnel.net.sockets:Socket.send_nowait", "tunnel.link.tap:Tap._send"], groups.SOCKETS),
    (["prometheus_client.metrics:Counter.inc", "observability.core_metrics:CoreMetrics.end"], groups.OBSERVABILITY),
    (["observability.runtime:PauseMeter._callback", "tunnel.wire.session:Session.receive"], groups.COLLECTOR),
    (["random:Random.getrandbits", "mystery:f"], groups.OTHER),
    ([], groups.OTHER),
]


@pytest.mark.parametrize(("frames", "group"), CASES)
def test_the_innermost_known_frame_decides(frames: list[str], group: str) -> None:
    assert group_of(frames) == group


def test_a_name_that_only_begins_like_a_module_is_another() -> None:
    assert group_of(["tunnels:f", "tunnel.net.sockets:Socket.recv"]) == groups.SOCKETS
    assert group_of(["tunnel.network:f"]) == groups.OTHER


@pytest.mark.parametrize("key", [key for key in TABLE if key.startswith(("tunnel", "observability"))])
def test_what_the_table_names_exists(key: str) -> None:
    """Or what was renamed would silently count for its package."""
    module, _, function = key.partition(":")
    found = importlib.import_module(module)
    for name in function.split(".") if function else ():
        found = getattr(found, name)


def test_shares_and_owners_add_up() -> None:
    stacks = [
        Stack(3, 1, ["re:match", "tunnel.http.heads:parse_request"]),
        Stack(1, 2, ["tunnel.net.sockets:Socket.recv"]),
        Stack(4, 9, ["tunnel.http.heads:parse_request", "tunnel.core.exchange:Exchanger.serve"]),
    ]
    found = shares(stacks)
    assert found.keys() == set(groups.GROUPS)
    assert found[groups.PARSE] == 7 / 8 and found[groups.SOCKETS] == 1 / 8 and sum(found.values()) == 1
    assert owners(stacks) == [
        ("tunnel.http.heads:parse_request", groups.PARSE, 7 / 8),
        ("tunnel.net.sockets:Socket.recv", groups.SOCKETS, 1 / 8),
    ]
    assert owner_of(["re:match", "x:y"]) == "re:match"
    assert sum(shares([]).values()) == 0


def test_a_report_becomes_micros_a_request() -> None:
    report = {
        "main": 0.5,
        "threads": [["log-writer", 0.05], ["log-writer", 0.05], ["idle", 0.0]],
        "stacks": [[1, 10, ["tunnel.wire.frames:split"]], [3, 11, ["tunnel.net.sockets:Socket.recv"]]],
    }
    found = read_report(json.dumps(report), requests=10_000)
    assert found.groups[groups.LINK] == pytest.approx(12.5) and found.groups[groups.SOCKETS] == pytest.approx(37.5)
    assert found.threads == {"log-writer": pytest.approx(10.0)}
    assert found.total == pytest.approx(60.0) and found.samples == 4
    text = "\n".join(lines("core", found, 58.0))
    assert "60.0 µs CPU a request (58.0 without sampling), 4 samples" in text
    assert "thread log-writer" in text and "idle" not in text and groups.COLLECTOR not in text


def test_parts_on_their_own_do_what_they_are_timed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ROUNDS", 1)
    monkeypatch.setattr(parts, "SECONDS", 1e-6)
    monkeypatch.setattr(layered, "ROUNDS", 1)
    monkeypatch.setattr(layered, "REQUESTS", 100)
    exchange = parts.round_trip()
    for _ in range(100):  # its streams end, or their windows would
        exchange()
    with parts.loopback() as pass_on:
        assert pass_on() == (1024, b"x" * 1024)
    assert {part for part, _, _ in parts.measure()} == {"parse", "emit", "link", "scheduler", "layers", "sockets"}


BUSY = """
import signal
def spin():
    while not signal.sigpending():
        sum(range(1000))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print("spinning", flush=True)
spin()
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
"""


@pytest.mark.system
def test_the_sampler_sees_what_a_program_does(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    process = Process(
        sys.executable, str(SAMPLER), str(tmp_path), "busy", directory=tmp_path, env={"PYTHONPATH": str(tmp_path)}
    )
    try:
        process.wait_line("spinning")
        process.signal(signal.SIGRTMIN + 1)
        before = process.cpu()
        while process.cpu() - before < 0.2:  # of its time, however busy the machine is
            pass
        process.signal(signal.SIGRTMIN + 2)
        poll((tmp_path / "busy.json").exists, "the report", 10)
    finally:
        process.stop()
    report = json.loads((tmp_path / "busy.json").read_text())
    assert report["main"] >= 0.15
    assert sum(count for count, _, frames in report["stacks"] if "__main__:spin" in frames[:2]) >= 10


@pytest.mark.parametrize("role", ["core", "agent"])
async def test_the_layers_that_are_timed_are_at_work(role: str, caplog: pytest.LogCaptureFixture) -> None:
    """One that breaks is switched off, and would cost nothing."""
    seen: list[Visit] = []
    made = UsualSpans.encode

    def encode(self: UsualSpans, record: Record) -> bytes:
        seen.append(record[0])
        return made(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UsualSpans, "encode", encode)
        around = layered.layers(role, 1.0)
        one = layered.at_core(around) if role == "core" else layered.at_agent(around, True)
        for number in range(100):
            await one(number)
    assert len(seen) >= 100 and all(visit.trace_id and visit.outcome == "ok" for visit in seen)
    assert not caplog.records
