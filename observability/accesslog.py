"""The access log: one record per request, as section 3 of the observability contract says.

On the core each `request` visit becomes a record "request", on the agent each `local` visit a debug record
"local request"; a failed one (an error text, or a status from 500 on) has level ERROR and a field `error`. A line is
made from the visit directly, not through `logging`: 5 µs instead of 30. Whatever is unusual about it (a secret in a
path, characters that need care) goes the long way through the program's formatter.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import msgspec

from observability.logqueue import QueueHandler
from tunnel.handler import Ended, Layer, LocalVisit, Observer, RequestVisit, Visit, monotonic, path_of

MAX_PATH = 2048  # characters of a path that are logged
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_PLAIN = re.compile(r"[!#-\[\]-~]*")  # nothing that needs quotes or escapes, in either format
_MOST_KEPT, _LONGEST_KEPT = 1024, 300  # pieces of lines, and characters of what visitors choose of them
_log = logging.getLogger("observability")


class Formatter(Protocol):
    """What the program's formatter (on the root logger's handler) offers."""

    is_json: bool
    trace_ids: Callable[[], tuple[str, str] | None] | None

    def format(self, record: logging.LogRecord) -> str: ...

    def stamp(self, created: float) -> str: ...

    def redact(self, value: str) -> str: ...


def make_record(level: int, msg: str, fields: dict[str, Any]) -> logging.LogRecord:
    return _log.makeRecord(_log.name, level, "", 0, msg, (), None, extra={"fields": fields})


class Line(msgspec.Struct, omit_defaults=True):
    """An access record, its keys in the order of the contract. Empty ids, `cause` and `error` are left out.

    cause: why a request was turned away. client: the visitor's address, only of one that named no host or was not valid
    HTTP: then little else says who it was.
    """

    time: str
    level: str
    msg: str
    method: str
    host: str
    path: str
    status: int
    outcome: str
    duration: str
    bytes_in: int
    bytes_out: int
    request_id: str
    agent_id: str = ""
    account_id: str = ""
    lasted: str = ""
    client: str = ""
    cause: str = ""
    trace_id: str = ""
    span_id: str = ""
    error: str = ""


_encode = msgspec.json.Encoder().encode
_FIELDS = Line.__struct_fields__[3:]
_OPTIONAL = frozenset(Line.__struct_fields__[-8:])


_SHORT = tuple(f"{number / 100:.2f}ms" for number in range(1001))


def duration_text(seconds: float) -> str:
    """A duration that LogQL compares: "1.204s", "35ms", "0.42ms"."""
    if seconds < 0.01:
        return _SHORT[int(seconds * 1e5 + 0.5) if seconds > 0 else 0]
    if seconds >= 1:
        return f"{seconds:.3f}s"
    return f"{int(seconds * 1000)}ms"


def path_in(target: str) -> str:
    """The path of a request target, not too long."""
    path = path_of(target)
    return path if len(path) <= MAX_PATH else path[:MAX_PATH] + "..."


class AccessLog:
    """Makes access lines. handler: the queue to put them in; None: records go through `logging`."""

    def __init__(self, level: int, handler: QueueHandler | None) -> None:
        self._level = level
        self._put = handler.writer.put if handler is not None else None
        self._formatter = cast(Formatter, handler.formatter) if handler is not None else None
        self._is_json = self._formatter is not None and self._formatter.is_json
        self._stamp = self._formatter.stamp if self._formatter is not None else str
        self._frames: dict[tuple[str, str, int, str, str, str], tuple[str, ...]] = {}
        self._paths: dict[str, str] = {}

    def layer(self, kind: str) -> Layer:
        """The layer that writes a record for each visit of this kind ("request" or "local")."""
        if kind == "local":
            return Observer({}, {}, {kind: self.local}, self.locals)
        return Observer({}, {}, {kind: self.request}, self.requests if self._is_json else None)

    def requests(self, visits: Sequence[Ended]) -> None:
        """The same as `request` for each of those in a row, as JSON: the usual ones are put together of pieces."""
        put, is_quiet = self._put, self._level > logging.INFO
        assert put is not None
        lines: list[str] = []
        offset, millisecond, stamp = _wall.offset(monotonic()), 0, ""
        for visit, raised in visits:
            if visit.kind != "request":
                continue
            if raised is not None or visit.error or visit.status >= 500 or visit.cause or not visit.method:
                line = ""
            elif is_quiet:
                continue
            else:
                at = int((visit.ended + offset) * 1000 + 0.5)
                if at != millisecond:  # some in a row have the same
                    millisecond, stamp = at, self._stamp(at / 1000)
                line = self._usual(visit, stamp)
            if line:
                lines.append(line)
                continue
            if lines:
                put("".join(lines).encode())
                lines = []
            self.request(visit, raised)
        if lines:
            put("".join(lines).encode())

    def _usual(self, visit: RequestVisit, stamp: str) -> str:
        """The line of a request that went well; "" where something in it needs care."""
        marks = visit.marks
        if "upgraded" in marks or "event" in marks:
            return ""
        key = (visit.method, visit.host, visit.status, visit.outcome, visit.agent_id, visit.account_id)
        try:
            frame, path = self._frames[key], self._paths[visit.target]
        except KeyError:
            frame, path = self._frame(key), self._path(visit.target)
        request_id, trace_id, span_id = visit.request_id, visit.trace_id, visit.span_id
        # letters and digits alone need no quoting, and are no secret but for what may begin a JWT
        if not (frame and path and request_id and f"{request_id}{trace_id}{span_id}".isalnum()) or "eyJ" in request_id:
            return ""
        ids = ""
        if trace_id or span_id:
            if not (trace_id and span_id):
                return ""
            ids = f',"trace_id":"{trace_id}","span_id":"{span_id}"'
        before, between, after = frame
        seconds = visit.ended - visit.started
        duration = _SHORT[int(seconds * 1e5 + 0.5)] if 0 < seconds < 0.01 else duration_text(seconds)
        return (
            f'{{"time":"{stamp}{before}{path}{between}{duration}","bytes_in":{visit.bytes_in},'
            f'"bytes_out":{visit.bytes_out},"request_id":"{request_id}"{after}{ids}}}\n'
        )

    def _frame(self, key: tuple[str, str, int, str, str, str]) -> tuple[str, ...]:
        """What is the same in many lines: before the path, before the duration, behind the request's id."""
        method, host, status, outcome, agent_id, account_id = key
        frame: tuple[str, ...] = ()
        outside = f"{method}/{host}/{outcome}/{agent_id}/{account_id}"
        if self._is_harmless(outside):
            after = "".join(
                f',"{name}":{_quoted(value)}'
                for name, value in (("agent_id", agent_id), ("account_id", account_id))
                if value
            )
            frame = (
                f'","level":"INFO","msg":"request","method":{_quoted(method)},"host":{_quoted(host)},"path":',
                f',"status":{status},"outcome":{_quoted(outcome)},"duration":"',
                after,
            )
        if len(self._frames) >= _MOST_KEPT:
            self._frames.clear()
        if len(outside) <= _LONGEST_KEPT:
            self._frames[key] = frame
        return frame

    def _path(self, target: str) -> str:
        path = path_in(target)
        text = _quoted(path) if self._is_harmless(path) else ""
        if len(self._paths) >= _MOST_KEPT:
            self._paths.clear()
        if len(target) <= _LONGEST_KEPT:
            self._paths[target] = text
        return text

    def _is_harmless(self, outside: str) -> bool:
        """Neither a secret in it nor characters that need care."""
        return (
            outside.isascii()
            and "\x7f" not in outside
            and self._formatter is not None
            and self._formatter.redact(outside) == outside
        )

    def locals(self, visits: Sequence[Ended]) -> None:
        """The same as `local` for each of those in a row."""
        is_debug = self._level <= logging.DEBUG
        for visit, raised in visits:
            if visit.kind == "local" and (is_debug or visit.error or raised is not None or visit.status >= 500):
                self.local(visit, raised)

    def request(self, visit: RequestVisit, raised: BaseException | None) -> None:
        """The record of a visitor's request. `duration` ends as the metric's does: for an upgrade at the 101, for an
        event stream at its first byte; `lasted` then says how long it all was."""
        if not visit.method:  # nothing was read
            return
        error = _error(visit, raised) if visit.error or raised is not None or visit.status >= 500 else ""
        level = "ERROR" if error else "INFO"
        if not error and self._level > logging.INFO:
            return
        seconds = visit.ended - visit.started
        lasted = ""
        marks = visit.marks
        end = marks.get("upgraded") or marks.get("event")
        if end is not None:
            lasted, seconds = duration_text(seconds), end - visit.started
        outcome = visit.outcome or ("internal" if error else "")
        self._write(
            Line(
                "",
                level,
                "request",
                visit.method,
                visit.host,
                path_in(visit.target),
                visit.status,
                outcome,
                duration_text(seconds),
                visit.bytes_in,
                visit.bytes_out,
                visit.request_id,
                visit.agent_id,
                visit.account_id,
                lasted,
                visit.client if visit.cause and (not visit.host or visit.outcome == "bad_request") else "",
                visit.cause,
                visit.trace_id,
                visit.span_id,
                error,
            ),
            visit.ended,
        )

    def local(self, visit: LocalVisit, raised: BaseException | None) -> None:
        """The record of a request to a local service: at level debug, or ERROR when it failed."""
        if self._level > logging.DEBUG and not visit.error and raised is None and visit.status < 500:
            return  # nearly always
        error = _error(visit, raised)
        if not error and self._level > logging.DEBUG:
            return
        stream: Any = visit.parent
        self._write(
            Line(
                time="",
                level="ERROR" if error else "DEBUG",
                msg="local request",
                method=visit.method,
                host=visit.address,
                path=path_in(visit.target),
                status=visit.status,
                outcome=visit.outcome or ("internal" if error else ""),
                duration=duration_text(visit.ended - visit.started),
                bytes_in=visit.bytes_in,
                bytes_out=visit.bytes_out,
                request_id=visit.request_id,
                agent_id=getattr(stream, "agent_id", ""),
                trace_id=visit.trace_id,
                span_id=visit.span_id,
                error=error,
            ),
            visit.ended,
        )

    def _write(self, line: Line, ended: float) -> None:
        """`ended`: monotonic seconds, what the line's time is made of."""
        at = _wall(ended)
        formatter, put = self._formatter, self._put
        if formatter is None or put is None:
            self._write_slowly(line, at)
            return
        try:
            line.time = formatter.stamp(at)
            # what came from outside may hold a secret, or characters that need care
            ids = f"{line.request_id}/{line.agent_id}/{line.account_id}"
            outside = f"{line.method}/{line.host}/{line.path}/{ids}/{line.cause}/{line.error}"
            if formatter.redact(outside) == outside:
                if self._is_json:
                    if outside.isascii() and "\x7f" not in outside:
                        put(_encode(line) + b"\n")
                        return
                elif not (line.cause or line.error) and _PLAIN.fullmatch(outside):
                    put(_text(line).encode())
                    return
        except UnicodeEncodeError:  # lone surrogates
            pass
        self._write_slowly(line, at)

    def _write_slowly(self, line: Line, at: float) -> None:
        fields = {name: value for name in _FIELDS if (value := getattr(line, name)) or name not in _OPTIONAL}
        record = make_record(LEVELS[line.level.lower()], line.msg, fields)
        record.created = at
        if self._put is None or self._formatter is None:
            if _log.isEnabledFor(record.levelno):
                _log.handle(record)
            return
        self._put(f"{self._formatter.format(record)}\n".encode("utf-8", "backslashreplace"))


def _quoted(text: str) -> str:
    return _encode(text).decode()


class _Wall:
    """Monotonic seconds to seconds since 1970; the clocks are compared once a second."""

    def __init__(self) -> None:
        self._until = self._offset = 0.0

    def __call__(self, ended: float) -> float:
        return ended + self.offset(ended)

    def offset(self, ended: float) -> float:
        if ended >= self._until:
            now = monotonic()
            self._offset = time.time() - now
            self._until = now + 1
        return self._offset


_wall = _Wall()


def _error(visit: Visit, raised: BaseException | None) -> str:
    """Why the visit failed, or ""."""
    if visit.error:
        return visit.error
    if visit.status >= 500:
        return f"answered with status {visit.status}"
    if isinstance(raised, Exception) and visit.outcome != "visitor_aborted":
        return f"{type(raised).__name__}: {raised}"
    return ""


def _text(line: Line) -> str:
    text = (
        f"{line.time} {line.level:<7} {line.msg} method={line.method} host={line.host} path={line.path} "
        f"status={line.status} outcome={line.outcome} duration={line.duration} bytes_in={line.bytes_in} "
        f"bytes_out={line.bytes_out} request_id={line.request_id}"
    )
    for name in ("agent_id", "account_id", "lasted", "client", "trace_id", "span_id"):
        if value := getattr(line, name):
            text += f" {name}={value}"
    return text + "\n"
