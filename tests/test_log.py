"""Log records as lines: the contract's keys, one line whatever comes, no secrets, the word rule, never raising."""

from __future__ import annotations

import io
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.log import JsonFormatter, SyncHandler, TextFormatter, get_logger, one_line, redact, setup
from tunnel.log.sink import Sink

ROOT = pathlib.Path(__file__).parent.parent
TOKEN = "tt_Zm9vYmFyYmF6cXV4"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJhZ2VudF9pZCI6ImEifQ.c2lnbmF0dXJl"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Whatever a test sets up on the root logger and the interpreter's hooks is undone."""
    root = logging.getLogger()
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    for handler in root.handlers[:]:
        if isinstance(handler, SyncHandler):
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("tunnel", "observability"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def logged(do: Callable[[], object], level: str = "debug", as_json: bool = True) -> list[Any]:
    """The records (JSON) or lines (text) that `do` writes."""
    stream = io.StringIO()
    logging.getLogger().handlers.clear()  # pytest's own would raise
    setup(level, as_json, stream)
    do()
    lines = stream.getvalue().split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines] if as_json else lines


def render(formatter: logging.Formatter, msg: str, level: int = logging.INFO, **fields: object) -> str:
    record = logging.LogRecord("tunnel.x", level, "", 0, msg, (), None)
    record.fields = fields
    return formatter.format(record)


# The contract ---------------------------------------------------------------------------------------------------


def test_keys_and_order() -> None:
    stream = io.StringIO()
    setup("info", True, stream)
    get_logger("tunnel.agent").info("connecting to server", server="localhost:8443", attempt=2, is_first=True)
    line = stream.getvalue()
    assert re.fullmatch(
        r'\{"time":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z","level":"INFO","msg":"connecting to server",'
        r'"server":"localhost:8443","attempt":2,"is_first":true\}\n',
        line,
    )


def test_the_time_is_utc_to_the_millisecond() -> None:
    formatter = JsonFormatter()
    assert formatter.stamp(1770627600.123) == "2026-02-09T09:00:00.123Z"
    assert formatter.stamp(1770627600.9999) == "2026-02-09T09:00:01.000Z"
    assert formatter.stamp(1770627601.0) == "2026-02-09T09:00:01.000Z"


def test_text() -> None:
    def do() -> None:
        get_logger("tunnel.x").info("link up", agent_id="a-1", path="/a b", said='"', streams=3, ratio=0.5, none=None)

    (line,) = logged(do, as_json=False)
    assert line[24:] == ' INFO    link up agent_id=a-1 path="/a b" said="\\"" streams=3 ratio=0.5 none=null'


def test_lists_as_text() -> None:
    """Names are read by people; what could be taken for two stays as JSON has it."""

    def do() -> None:
        get_logger("tunnel.x").info(
            "link up", tunnels=["app", "www.example.org"], odd=["a,b", "c"], none=[], numbers=[1]
        )

    (line,) = logged(do, as_json=False)
    assert line[24:] == r' INFO    link up tunnels=app,www.example.org odd="[\"a,b\",\"c\"]" none=[] numbers=[1]'


def test_levels() -> None:
    def do() -> None:
        log = get_logger("tunnel.x")
        log.debug("d")
        log.info("i")
        log.warning("w")
        log.error("e", error="why")
        assert log.stdlib.name == "tunnel.x"

    assert [record["level"] for record in logged(do, "warning")] == ["WARNING", "ERROR"]


def test_where_it_goes() -> None:
    for as_json, where in ((True, "stdout"), (False, "stderr")):
        code = f"from tunnel.log import *\nsetup('info', {as_json})\nget_logger('tunnel').info('here')"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "here" in getattr(done, where)
        assert done.stdout + done.stderr == getattr(done, where)


def test_with_json_nothing_else_reaches_either_stream() -> None:
    code = (
        "import sys, threading, warnings\n"
        "from tunnel.log import setup\n"
        "setup('info', True)\n"
        "warnings.warn('an error\\nis near')\n"
        "class Odd:\n"
        "    def __del__(self): raise ValueError('in a finaliser')\n"
        "Odd()\n"
        "thread = threading.Thread(target=lambda: 1 / 0)\n"
        "thread.start()\n"
        "thread.join()\n"
        "raise OSError('the end')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == ""
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(record["level"], record["msg"]) for record in records[1:]] == [
        ("ERROR", "unraisable exception"), ("ERROR", "crashed"), ("ERROR", "crashed"),
    ]  # fmt: skip
    assert [record["error"] for record in records[1:]] == [
        "ValueError: in a finaliser", "ZeroDivisionError: division by zero", "OSError: the end",
    ]  # fmt: skip
    assert records[0]["logger"] == "py.warnings" and "error" not in done.stdout.splitlines()[0]
    assert "line 11" in records[-1]["traceback"]


# Failures and the word rule -------------------------------------------------------------------------------------


def test_an_error_has_a_field_of_that_name() -> None:
    def do() -> None:
        log = get_logger("tunnel.x")
        log.error("could not listen", error=OSError(98, "Address\nin use"))
        log.error("odd", error="")
        logging.getLogger("tunnel.y").error("bare")
        logging.getLogger("trio-websocket").error("%s failed", "it")
        logging.getLogger("alembic").critical("boom", extra={"fields": {"error": "why"}})

    records = logged(do, "info")
    assert [record["level"] for record in records] == ["ERROR"] * 5
    assert [record["error"] for record in records] == [
        "OSError: [Errno 98] Address in use", "odd", "bare", "it failed", "why",
    ]  # fmt: skip
    assert records[3]["logger"] == "trio-websocket"


def test_the_traceback_is_shown_at_debug_only() -> None:
    def do() -> None:
        try:
            raise ValueError("why")
        except ValueError as exc:
            get_logger("tunnel.x").error("failed", error=exc)
            logging.getLogger("tunnel.x").exception("failed too")
            logging.getLogger("tunnel.x").warning("only this", exc_info=True)

    for as_json in (True, False):
        assert all("Traceback" not in str(record) for record in logged(do, "info", as_json))
    records = logged(do, "debug")
    assert ["Traceback" in record.get("traceback", "") for record in records] == [True, True, False]
    assert [record.get("error") for record in records] == ["ValueError: why"] * 2 + [None]
    assert records[2]["cause"] == "ValueError: why"
    assert len(logged(do, "debug", as_json=False)) == 3


def test_the_word_stands_in_error_records_only() -> None:
    def do() -> None:
        get_logger("tunnel.x").info("no error here", error="x", last_error=1)
        logging.getLogger("trio-websocket").warning("protocol error: %s", "x")
        logging.getLogger("errors.everywhere").warning("hm")
        logging.getLogger("asyncio").info("not heard: info")

    for as_json in (True, False):
        lines = [json.dumps(line) for line in logged(do, "debug", as_json)]
        assert len(lines) == 3
        assert not any("error" in line for line in lines)


# Safety ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        TOKEN, JWT, f"/login/{TOKEN}/x", f"%3D{TOKEN}", f"Bearer {TOKEN}", f"authorization: Bearer {JWT}",
        f"Token={TOKEN}",
        "Authorization: Basic c2VjcmV0OnNlY3JldA==", "basic c2VjcmV0OnNlY3JldA==", "bearer c2VjcmV0OnNlY3JldA==",
        "Cookie: a=1; session=c2VjcmV0", "Set-Cookie: session=c2VjcmV0", "{'cookie': 'c2VjcmV0'}",
        "[(b'Authorization', b'Digest c2VjcmV0')]", "COOKIE=c2VjcmV0", "postgresql://me:c2VjcmV0@db/x",
    ],
)  # fmt: skip
def test_redact(text: str) -> None:
    for secret in (TOKEN, JWT, TOKEN[3:], "c2VjcmV0"):
        assert secret not in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    ["", "/cookies", "authorization failed", "a basic thing", "http://localhost:3000/@x", "a@b", "the bearer", "token"],
)
def test_redact_leaves_the_rest(text: str) -> None:
    assert redact(text) == text


@given(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.text("abcXYZ019_-", min_size=6, max_size=43),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.sampled_from([JsonFormatter(), TextFormatter()]),
)
def test_no_token_is_ever_written(before: str, rest: str, after: str, formatter: logging.Formatter) -> None:
    text = f"{before}tt_{rest}{after}"
    nested = {"list": [text, {text: text.encode()}], "exception": ValueError(text)}
    line = render(formatter, text, value=text, token=text, nested=nested)
    assert f"tt_{rest}" not in line


def test_secret_fields_by_name() -> None:
    line = render(JsonFormatter(), "x", token="abc", cookie="abc", headers={"Set-Cookie": "abc"}, password=b"abc")
    assert "abc" not in line
    assert '"token":""' in render(JsonFormatter(), "x", token="")


_value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.text("\ud800\x85\u2028\n\x1b"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner) | st.builds(ValueError, inner),
    max_leaves=8,
)


@given(st.text(), st.dictionaries(st.text(), _value, max_size=4), st.sampled_from([10, 20, 30, 40, 50]))
def test_one_line_whatever_comes(msg: str, fields: dict[str, object], level: int) -> None:
    for formatter in (JsonFormatter(), TextFormatter()):
        record = logging.LogRecord("tunnel.x", level, "", 0, msg, (), None)
        record.fields = fields
        line = formatter.format(record)
        assert len(line.splitlines()) == 1
        assert not re.search("[\x00-\x1f\x7f-\x9f\u202e\ud800-\udfff]", line)
        line.encode()
        assert formatter.broken == 0
        if formatter.is_json:
            found = json.loads(line)
            assert list(found)[:3] == ["time", "level", "msg"]
            assert ("error" in found) == (level >= 40)


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


class BrokenError(Exception):
    __str__ = Broken.__str__


def test_a_broken_value_becomes_a_placeholder() -> None:
    loop: list[Any] = []
    loop.append(loop)
    (record,) = logged(
        lambda: get_logger("tunnel.x").error(
            "x", error=BrokenError(), a=Broken(), b=loop, c=10**5000, d=1 << 70, time=1, huge="x" * 100_000, e={1: {2}}
        )
    )
    assert record["error"] == "BrokenError: (its text cannot be had)"
    assert record["a"] == "(its text cannot be had)"
    assert record["c"] == "(huge)" and record["d"] == str(1 << 70)
    assert record["time_"] == 1 and len(record["huge"]) < 10_000 and record["e"] == {"1": [2]}
    assert one_line(ValueError("a\n b")) == "ValueError: a b"


def test_bad_arguments_and_foreign_extras_do_not_raise() -> None:
    def do() -> None:
        logging.getLogger("tunnel.x").warning("%d of %d", "one")
        logging.getLogger("tunnel.x").warning("odd", extra={"fields": 5})
        logging.getLogger("tunnel.x").warning(Broken())

    first, second, third = logged(do)
    assert first["msg"] == "%d of %d" and second["msg"] == "odd"
    assert third["msg"] == "a record could not be rendered" and third["cause"] == "RuntimeError"


def test_a_broken_stream_counts_what_is_lost() -> None:
    stream = io.StringIO()
    handler = setup("info", True, stream)
    stream.close()
    get_logger("tunnel.x").info("lost")
    assert handler.dropped == 1


# Sinks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[int, io.TextIOWrapper]]:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        yield reader, stream
    os.close(reader)


@pytest.mark.parametrize("may_reopen", [True, False])
def test_a_full_pipe_drops_and_comes_back(
    pipe: tuple[int, io.TextIOWrapper], may_reopen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not may_reopen:
        monkeypatch.setattr(Sink, "_reopen", lambda self: None)
    reader, stream = pipe
    handler = setup("info", True, stream)
    log = get_logger("tunnel.x")
    written = 0
    while not handler.dropped:
        log.info("fill", n=written, pad="x" * 3000)
        written += 1
    for _ in range(50):  # does not wait again
        log.info("more")
    lost = handler.dropped
    assert lost == 51
    os.set_blocking(reader, False)
    data = b""
    while True:
        try:
            data += os.read(reader, 1 << 20)
        except BlockingIOError:
            break
    log.info("back")
    data += os.read(reader, 1 << 20)
    *lines, end = data.split(b"\n")
    assert end == b""
    assert json.loads(lines[-1])["msg"] == "back"
    whole = [line for line in lines if line.endswith(b"}")]
    assert len(whole) + lost == written + 50 + 1
    assert len(lines) - len(whole) <= 1  # at most one line was cut, and ends its own line
    assert os.get_blocking(stream.fileno())  # the shared descriptor is as it was


def test_a_reader_that_left(pipe: tuple[int, io.TextIOWrapper]) -> None:
    reader, stream = pipe
    handler = setup("info", True, stream)
    spare = os.open(os.devnull, os.O_RDONLY)
    os.dup2(spare, reader)
    os.close(spare)
    get_logger("tunnel.x").info("lost")
    assert handler.dropped == 1
    assert handler.sink.is_broken


def test_a_file(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        stream.write("before\n")
        setup("info", False, stream)
        get_logger("tunnel.x").info("hello", big="x" * 8000)
    assert (tmp_path / "log").read_text().count("\n") == 2


def test_setup_again_replaces() -> None:
    first, second = io.StringIO(), io.StringIO()
    setup("info", True, first)
    setup("error", False, second)
    log = get_logger("tunnel.x")
    log.info("not")
    log.error("yes", error="why")
    logging.getLogger("foreign").warning("not")
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("still a warning", stacklevel=1)
    assert len(caught) == 1
