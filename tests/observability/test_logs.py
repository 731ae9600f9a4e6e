"""The logs plug-in: the access record, the queue under a stuck output, trace ids, and the page's LogQL queries."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import threading
import types
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from fakehost import FakeHost
from hypothesis import given, settings
from hypothesis import strategies as st
from logql import evaluate

from observability import accesslog, logqueue, logs
from observability.accesslog import AccessLog
from tunnel.handler import (
    ConnectVisit,
    Guard,
    Handler,
    LinkVisit,
    LocalVisit,
    RequestVisit,
    StreamVisit,
    Visit,
    monotonic,
    wrap,
)
from tunnel.log import SyncHandler, get_logger, setup
from tunnel.log.lines import JsonFormatter

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if isinstance(handler, SyncHandler):
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    for name in ("tunnel", "observability"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@asynccontextmanager
async def plugged(
    stream: Any, level: str = "info", as_json: bool = True, role: str = "core"
) -> AsyncIterator[tuple[Callable[[Handler], Handler], FakeHost]]:
    """The program's logging with the plug-in in place."""
    kept = sys.excepthook, threading.excepthook, sys.unraisablehook  # pytest's own
    setup(level, as_json, stream)
    sys.excepthook, threading.excepthook, sys.unraisablehook = kept
    logging.captureWarnings(False)
    host = FakeHost(role, {"log": {"level": level, "json": as_json}})
    async with logs.plugin(host) as layer:
        yield layer, host


def request(**facts: Any) -> RequestVisit:
    visit = RequestVisit("192.0.2.1", "http")
    visit.method, visit.target, visit.host, visit.status, visit.outcome = "GET", "/a?b=c", "api.localhost", 200, "ok"
    visit.request_id, visit.agent_id, visit.account_id = "r-1", "agent-1", "acme"
    for name, value in facts.items():
        setattr(visit, name, value)
    return visit


async def lines_of(*visits: Visit, level: str = "info", as_json: bool = True, role: str = "core") -> list[str]:
    """The lines written for visits that were handled."""
    stream = io.StringIO()

    async def handler(visit: Visit) -> None:
        if isinstance(visit.extra, BaseException):
            raise visit.extra

    async with plugged(stream, level, as_json, role) as (layer, _host):
        handle = wrap(handler, [layer])
        for visit in visits:
            try:
                await handle(visit)
            except Exception as exc:
                assert exc is visit.extra
    return stream.getvalue().splitlines()


async def records_of(*visits: Visit, level: str = "info", role: str = "core") -> list[dict[str, Any]]:
    return [json.loads(line) for line in await lines_of(*visits, level=level, role=role)]


# The access record ----------------------------------------------------------------------------------------------


async def test_a_request_is_one_record_with_the_keys_of_the_contract() -> None:
    visit = request(bytes_in=5, bytes_out=1024, trace_id=TRACE, span_id=SPAN)
    (record,) = await records_of(visit)
    assert list(record) == [
        "time", "level", "msg", "method", "host", "path", "status", "outcome", "duration", "bytes_in", "bytes_out",
        "request_id", "agent_id", "account_id", "trace_id", "span_id",
    ]  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert re.fullmatch(r"[\d.]+m?s", record.pop("duration"))
    assert record == {
        "level": "INFO", "msg": "request", "method": "GET", "host": "api.localhost", "path": "/a", "status": 200,
        "outcome": "ok", "bytes_in": 5, "bytes_out": 1024, "request_id": "r-1", "agent_id": "agent-1",
        "account_id": "acme", "trace_id": TRACE, "span_id": SPAN,
    }  # fmt: skip


async def test_in_text_too() -> None:
    (line,) = await lines_of(request(trace_id=TRACE), as_json=False)
    assert re.fullmatch(
        r"\S+Z INFO    request method=GET host=api.localhost path=/a status=200 outcome=ok duration=\S+ bytes_in=0 "
        rf"bytes_out=0 request_id=r-1 agent_id=agent-1 account_id=acme trace_id={TRACE}",
        line,
    )
    (line,) = await lines_of(request(error="it broke", status=502), as_json=False)
    assert " ERROR   request " in line and line.endswith('error="it broke"')


async def test_failures_have_level_error_and_say_why() -> None:
    records = await records_of(
        request(status=502, outcome="link_lost", error="the agent went away"),
        request(status=500),
        request(status=503, outcome="no_agent"),
        request(status=200, outcome="local_broken", error="cut off"),
        request(status=0, outcome="", extra=ValueError("a bug")),
        request(status=499, outcome="visitor_aborted"),
        request(status=404, outcome="no_tunnel"),
    )
    assert [record["level"] for record in records] == ["ERROR"] * 5 + ["INFO"] * 2
    assert [record.get("error") for record in records] == [
        "the agent went away", "answered with status 500", "answered with status 503", "cut off", "ValueError: a bug",
        None, None,
    ]  # fmt: skip
    assert records[4]["outcome"] == "internal"


async def test_levels_and_empty_visits() -> None:
    assert await lines_of(request(method="")) == []
    assert await lines_of(request(), level="warning") == []
    assert len(await lines_of(request(status=502), level="error")) == 1
    assert await lines_of(LinkVisit(ConnectVisit("192.0.2.1:1")), StreamVisit(None, "http")) == []


async def test_cancelled_requests_are_recorded_and_stay_cancelled() -> None:
    stream = io.StringIO()
    async with plugged(stream) as (layer, _host):
        visit = request(outcome="visitor_aborted", status=499)

        async def handler(visit: Visit) -> None:
            await trio.sleep_forever()

        with trio.CancelScope() as scope:
            scope.cancel()
            await wrap(handler, [layer])(visit)
        assert scope.cancelled_caught
    assert json.loads(stream.getvalue())["outcome"] == "visitor_aborted"


async def test_the_guard_is_content_with_the_layer() -> None:
    async with plugged(io.StringIO()) as (layer, _host):
        guard = Guard("logs", layer, 0, logging.getLogger("tunnel"))

        async def handler(visit: Visit) -> None:
            raise KeyError("mine")

        with pytest.raises(KeyError):
            await guard(handler)(request())
        assert not guard.is_off


async def test_duration_of_upgrades_and_event_streams() -> None:
    for mark in ("upgraded", "event"):
        visit = request()
        visit.started -= 3600
        visit.marks[mark] = visit.started + 0.0355
        (record,) = await records_of(visit)
        assert record["duration"] == "35ms"
        assert re.fullmatch(r"36\d\d\.\d{3}s", record["lasted"])


async def test_who_was_turned_away_and_why() -> None:
    """No failure, so no `error`; an address only where no host says whose it was, or the head was not valid."""
    for is_json in (True, False):
        stranger = request(method="-", host="", target="", status=400, outcome="bad_request")
        stranger.client, stranger.cause = "192.0.2.7", 'it begins with no "method"'
        known = request(status=429, outcome="quota")
        known.client, known.cause = "192.0.2.7", "100 requests a second are used up"
        plain = request()
        plain.client = "192.0.2.7"
        broken = request(status=400, outcome="bad_request")
        broken.client, broken.cause = "192.0.2.8", "a line does not end with CRLF"
        one, two, three, four = await lines_of(stranger, known, plain, broken, as_json=is_json)
        assert "192.0.2.8" in four and broken.host in four
        if is_json:
            said = json.loads(one)
            assert (said["client"], said["cause"], said["level"]) == ("192.0.2.7", stranger.cause, "INFO")
            assert json.loads(two)["cause"] == known.cause and "client" not in two
        else:
            assert 'client=192.0.2.7 cause="it begins with no \\"method\\""' in one and "method=-" in one
            assert 'cause="100 requests a second are used up"' in two and "client" not in two
        assert "client" not in three and "cause" not in three and "error" not in one + two + three


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.2041, "1.204s"), (0.0359, "35ms"), (0.9999, "999ms"), (0.00042, "0.42ms"), (61, "61.000s"), (-1, "0.00ms")],
)
def test_duration_text(seconds: float, text: str) -> None:
    assert accesslog.duration_text(seconds) == text


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/a/b?token=x", "/a/b"), ("*", "*"), ("http://u:pw@h/a?b", "/a"), ("http://h", "/"), ("/?", "/"), ("", ""),
        ("/" + "x" * 5000, "/" + "x" * 2047 + "..."),
    ],
)  # fmt: skip
def test_path_in(target: str, path: str) -> None:
    assert accesslog.path_in(target) == path


async def test_local_requests_of_the_agent() -> None:
    def local(**facts: Any) -> LocalVisit:
        stream = StreamVisit(None, "http")
        stream.method, stream.target, stream.agent_id, stream.request_id = "GET", "/x?y", "agent-1", "r-1"
        visit = LocalVisit(stream, "localhost:3000", "http")
        for name, value in {"status": 200, "outcome": "ok", **facts}.items():
            setattr(visit, name, value)
        return visit

    assert await lines_of(local(), role="agent") == []
    fine, failed = await records_of(
        local(), local(status=0, outcome="local_refused", error="refused"), role="agent", level="debug"
    )
    assert (fine["level"], fine["msg"], fine["host"], fine["path"]) == (
        "DEBUG", "local request", "localhost:3000", "/x",
    )  # fmt: skip
    assert (failed["level"], failed["error"], failed["outcome"]) == ("ERROR", "refused", "local_refused")
    assert await lines_of(request(), role="agent", level="debug") == []


# What comes from outside ----------------------------------------------------------------------------------------


async def test_secrets_and_controls_from_outside() -> None:
    for as_json in (True, False):
        for outside in ("tt_abcdefgh", "\n\x1b[2J", "\x85\u2028\u202e", "\ud800", 'a"b\\', "a b", "\x7f"):
            visit = request(target=f"/{outside}?tt_query", host=f"x{outside}", method=f"GET{outside}")
            failed = request(error=f"it said {outside}", status=502)
            lines = await lines_of(visit, failed, as_json=as_json)
            assert len(lines) == 2, outside
            for line in lines:
                assert "abcdefgh" not in line and "tt_query" not in line
                assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u202e\ud800-\udfff]", line)
            if as_json:
                assert json.loads(lines[0])["msg"] == "request"


@given(st.text(), st.text(), st.text(st.characters(codec="ascii")), st.sampled_from([200, 502]), st.booleans())
def test_any_request_is_one_good_line(path: str, host: str, method: str, status: int, as_json: bool) -> None:
    visit = request(target=path, host=host, method=method or "GET", status=status)
    (line,) = trio.run(lambda: lines_of(visit, as_json=as_json))
    if as_json:
        record = json.loads(line)
        assert record["status"] == status
        assert ("error" in record) == (status == 502)


async def test_the_fast_and_the_slow_way_say_the_same() -> None:
    for as_json in (True, False):
        for facts in ({}, {"trace_id": TRACE, "span_id": SPAN}, {"agent_id": "", "account_id": ""}, {"status": 502}):
            fast, slow = await lines_of(request(**facts), request(**facts, target="/\u00e9"), as_json=as_json)
            same = [
                re.sub(r"duration\W+[\d.]+ms|path=\S+|\"path\":\"[^\"]+\"|^\S+Z|\"time\":\S{26}", "", line)
                for line in (fast, slow)
            ]
            assert same[0] == same[1]


def mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([usual] * (6 * len(others)) + list(others))


LINES = st.builds(
    dict,
    method=mostly("GET", "BREW", "tt_abcdefgh", ""),
    host=mostly("api.localhost", "", 'a"b', "\x7f"),
    target=mostly("/a?b=c", "", "/", "http://u:p@h/x", "/tt_abcdefgh", "/" + "x" * 3000, "/\x1b", "/a\\b"),
    status=mostly(200, 101, 404, 502),
    outcome=mostly("ok", "", "quota"),
    request_id=mostly("0123456789abcdef", "", "r1", "eyJabcdefghijkl", "r-1", "\u00e9"),
    agent_id=mostly("agent-1", "", "tt_abcdefgh"),
    account_id=mostly("acme", ""),
    ids=mostly((TRACE, SPAN), ("", ""), (TRACE, ""), ('a"', "b")),
    marks=mostly({"first_byte": 1.0}, {}, {"upgraded": 1.0}, {"event": 1.0}),
    cause=mostly("", "why"),
    error=mostly("", "broke"),
    seconds=st.floats(0, 100),
)


def access_log(level: int = logging.INFO) -> tuple[AccessLog, list[bytes]]:
    """One that writes JSON into a list."""
    written: list[bytes] = []
    handler: Any = logging.NullHandler()
    handler.writer = types.SimpleNamespace(put=written.append)
    handler.setFormatter(JsonFormatter())
    return AccessLog(level, handler), written


@pytest.mark.parametrize(
    "facts",
    [
        {"request_id": "eyJabcdefghijkl"},
        {"request_id": "\u00e9"},
        {"trace_id": 'a"', "span_id": "b"},
        {"target": "/tt_abcdefgh"},
        {"host": "tt_abcdefgh"},
        {"cause": "why"},
        {"marks": {"upgraded": 1.0}},
    ],
)
def test_what_needs_care_says_the_same_in_a_row(facts: dict[str, Any]) -> None:
    log, written = access_log()
    visit = request(request_id="r1", ended=monotonic())
    for name, value in facts.items():
        setattr(visit, name, value)
    log.request(visit, None)
    log.requests([(visit, None)])
    assert len(written) == 2 and written[0] == written[1]


@settings(max_examples=300)
@given(st.lists(LINES, min_size=1, max_size=4), st.sampled_from([logging.INFO, logging.WARNING]))
def test_many_lines_in_a_row_are_those_of_each(many: list[dict[str, Any]], level: int) -> None:
    log, written = access_log(level)
    visits: list[tuple[RequestVisit, None]] = []
    for facts in many:
        visit = request(**{name: value for name, value in facts.items() if name not in ("ids", "seconds")})
        visit.trace_id, visit.span_id = facts["ids"]
        visit.started, visit.ended = 1000.0, 1000.0 + facts["seconds"]
        visits.append((visit, None))
    log.requests(visits)
    together = b"".join(written)
    written.clear()
    for visit, raised in visits:
        log.request(visit, raised)
    assert together == b"".join(written)


def test_usual_lines_are_handed_over_in_one_piece() -> None:
    log, written = access_log()
    visits = [request(request_id="r1", ended=monotonic()) for _ in range(3)]
    log.requests([(visit, None) for visit in visits])
    (piece,) = written
    assert [json.loads(line)["path"] for line in piece.splitlines()] == ["/a"] * 3


# The queue ------------------------------------------------------------------------------------------------------


async def test_the_old_handler_comes_back_and_nothing_is_lost() -> None:
    stream = io.StringIO()
    log = get_logger("tunnel.x")
    async with plugged(stream) as (_layer, host):
        root = logging.getLogger()
        assert not any(isinstance(handler, SyncHandler) for handler in root.handlers)
        for number in range(1000):
            log.info("numbered", n=number)
    assert any(isinstance(handler, SyncHandler) for handler in logging.getLogger().handlers)
    log.info("after")
    numbers = [json.loads(line).get("n") for line in stream.getvalue().splitlines()]
    assert numbers == [*range(1000), None]
    assert host.details() == {"logs": {"dropped": 0}}
    assert not any(thread.name == "log-writer" for thread in threading.enumerate())


async def test_two_programs_in_one_process_share_the_queue() -> None:
    stream = io.StringIO()
    async with plugged(stream) as (core_layer, _host):
        agent = FakeHost("agent", {"log": {"level": "info", "json": True}})
        async with logs.plugin(agent) as agent_layer:

            async def handler(visit: Visit) -> None:
                pass

            await wrap(handler, [core_layer])(request())
            stream_visit = StreamVisit(None, "http")
            local = LocalVisit(stream_visit, "localhost:1", "http")
            local.error = "refused"
            await wrap(handler, [agent_layer])(local)
    assert [json.loads(line)["msg"] for line in stream.getvalue().splitlines()] == ["request", "local request"]


async def test_without_a_handler_of_ours_records_go_through_logging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "observability")

    async def handler(visit: Visit) -> None:
        pass

    async with logs.plugin(FakeHost("core")) as layer:
        await wrap(handler, [layer])(request())
        await wrap(handler, [layer])(request(status=502))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "request"), ("ERROR", "request"),
    ]  # fmt: skip


class StuckSink:
    """Takes nothing until it is opened; `asked` is set when the writer has come to it."""

    is_broken = False

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.opened = threading.Event()
        self.taken = b""

    def write(self, data: bytes, wait: float) -> int:
        self.asked.set()
        if not self.opened.wait(wait):
            return 0
        self.taken += data
        return len(data)

    def abandon(self, data: bytes, taken: int) -> int:
        return data.count(b"\n", taken)


def writer_to(sink: Any, after: list[bytes]) -> logqueue.Writer:
    return logqueue.Writer(sink, after.append, lambda lost: b"lost %d\n" % lost)


def test_a_stuck_output_drops_counts_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logqueue, "MAX_BYTES", 100)
    sink, after = StuckSink(), list[bytes]()
    writer = writer_to(sink, after)
    writer.put(b"first\n")
    assert sink.asked.wait(10)
    for _ in range(30):
        writer.put(b"123456789\n")
    assert writer.dropped == 20
    sink.opened.set()
    writer.close()
    assert sink.taken == b"first\nlost 20\n" + b"123456789\n" * 10
    writer.put(b"late\n")
    assert after == [b"late\n"]


def test_closing_with_a_stuck_output_takes_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logqueue, "FLUSH", 0.05)
    sink = StuckSink()
    writer = writer_to(sink, [])
    for _ in range(3):
        writer.put(b"x\n")
    writer.close()
    assert writer.dropped == 3
    assert writer.is_closed


def test_a_broken_sink_does_not_end_the_thread() -> None:
    class Bad(StuckSink):
        def write(self, data: bytes, wait: float) -> int:
            self.asked.set()
            raise RuntimeError

    sink = Bad()
    writer = writer_to(sink, [])
    writer.put(b"x\n")
    assert sink.asked.wait(10)
    writer.put(b"y\n")
    writer.close()
    assert writer.dropped == 2


def test_put_from_many_threads() -> None:
    sink = StuckSink()
    sink.opened.set()
    writer = writer_to(sink, [])

    def many(name: bytes) -> None:
        for number in range(500):
            writer.put(b"%s %d\n" % (name, number))

    threads = [threading.Thread(target=many, args=(name,)) for name in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    found = sink.taken.split(b"\n")
    assert len(found) == 1501
    for name in (b"a", b"b", b"c"):
        assert [line for line in found if line.startswith(name)] == [b"%s %d" % (name, n) for n in range(500)]


async def test_a_full_pipe_does_not_hold_up_requests() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        async with plugged(stream) as (layer, host):

            async def handler(visit: Visit) -> None:
                pass

            handle = wrap(handler, [layer])
            visit = request(target="/" + "x" * 2000)
            for _ in range(4000):  # 9 MB: more than pipe and queue hold
                await handle(visit)
            assert logs.dropped() > 0
            assert host.details()["logs"]["dropped"] == logs.dropped()
            data = await trio.to_thread.run_sync(os.read, reader, 1 << 20)
            assert data.startswith(b'{"time":')
    os.close(reader)


# Trace ids ------------------------------------------------------------------------------------------------------


async def test_records_carry_the_current_spans_ids() -> None:
    from opentelemetry import trace

    context = trace.SpanContext(int(TRACE, 16), int(SPAN, 16), is_remote=False)
    stream = io.StringIO()
    log = get_logger("tunnel.x")
    async with plugged(stream):
        log.info("outside")
        with trace.use_span(trace.NonRecordingSpan(context)):
            log.info("inside")
            log.info("own", trace_id="t", span_id="s")
    outside, inside, own = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert "trace_id" not in outside
    assert (inside["trace_id"], inside["span_id"]) == (TRACE, SPAN)
    assert (own["trace_id"], own["span_id"]) == ("t", "s")


def test_while_opentelemetry_is_being_imported_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", types.ModuleType("opentelemetry.trace"))
    assert logs.current_span_ids() is None


def test_without_opentelemetry_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    assert logs.current_span_ids() is None


# The page's queries ---------------------------------------------------------------------------------------------


async def test_the_three_queries_of_the_page() -> None:
    slow, slow_failure, fast, upgrade = request(request_id="slow"), request(request_id="dead"), request(), request()
    slow.started -= 2.5
    slow_failure.started -= 30
    slow_failure.status, slow_failure.error, slow_failure.outcome = 504, "no answer in 30 s", "timeout"
    fast.started -= 0.9
    upgrade.started -= 7200
    upgrade.marks["upgraded"] = upgrade.started + 0.01
    upgrade.status = 101
    stream = io.StringIO()
    log = get_logger("tunnel.core")

    async def handler(visit: Visit) -> None:
        pass

    async with plugged(stream, "debug") as (layer, _host):
        handle = wrap(handler, [layer])
        for visit in (slow, slow_failure, fast, upgrade, request(status=404, outcome="no_tunnel")):
            await handle(visit)
        log.info("authenticated", agent_id="agent-1")
        log.warning("authentication failed", reason="bad_token", remote="192.0.2.1:5")
        log.error("could not flush usage", error=OSError("disk full"))
        logging.getLogger("trio-websocket").warning("protocol error from the peer")
        logging.getLogger("trio-websocket").error("unexpected")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    failures = evaluate('{container="tunnel-core"} |= "error" | json', lines)
    assert {record["msg"] for record in failures} == {"request", "could not flush usage", "unexpected"}
    assert all(record["level"] == "ERROR" and record["error"] for record in failures)
    assert len(failures) == sum(json.loads(line)["level"] == "ERROR" for line in lines) == 3
    assert [record["request_id"] for record in evaluate("{} | json | duration > 1s", lines)] == ["slow", "dead"]
    assert not any("__error__" in record for record in evaluate("{} | json | duration > 0s", lines))
    refused = evaluate('{container="tunnel-core"} |= "authentication failed" | json', lines)
    assert [record["reason"] for record in refused] == ["bad_token"]
