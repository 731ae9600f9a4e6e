"""A record as one line, JSON or text: without secrets, without control characters, never raising."""

from __future__ import annotations

import logging
import re
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import msgspec

OURS = ("tunnel", "observability")  #: loggers that follow -log-level; all others are heard from WARNING on
MASK = "***"
MAX_TEXT = 8192  # characters of one value; a traceback fits
MAX_ITEMS = 50  # of a list or table in a field

_SECRET_NAMES = frozenset(
    {"token", "authorization", "proxy_authorization", "cookie", "set_cookie"}
    | {"password", "secret", "jwt", "jwt_secret", "api_key"}
)
_RESERVED = frozenset({"time", "level", "msg"})
_REDACTIONS = (
    # a header and its value, also as it looks in the repr of a list of headers
    (re.compile(r"(?i)((?:proxy[-_])?authorization|(?:set[-_])?cookie2?)(['\"]?\s*[:=,]\s*)[^\r\n]+"), rf"\1\2{MASK}"),
    (re.compile(r"(?i)\b(bearer)[\s:=]+[\w.~+/=-]+"), rf"\1 {MASK}"),
    (re.compile(r"\b([Bb]asic)\s+(?=\S*[0-9A-Z=])[A-Za-z0-9+/=]{8,}"), rf"\1 {MASK}"),
    (re.compile(r"tt_[A-Za-z0-9_.~+=-]+"), f"tt_{MASK}"),
    (re.compile(r"eyJ[\w-]{8,}(?:\.[\w-]*)*"), f"eyJ{MASK}"),
    (re.compile(r"(://[^/\s:@]*):[^/\s@]+@"), rf"\1:{MASK}@"),
)
# C0, DEL, C1, line and paragraph separators, direction overrides: nothing that moves a cursor or hides text
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN = re.compile(r"[!#-\[\]-~]+")  # text values that need no quotes
_WORD = re.compile(r"[\w.*:/@+-]+", re.ASCII)  # a list of such needs none either
_NAME = re.compile(r"[^A-Za-z0-9_]")
_MILLISECONDS = tuple(f".{number:03d}Z" for number in range(1000))
_encode = msgspec.json.Encoder().encode


def redact(value: str) -> str:
    """The text without secrets; the same object if there is nothing to hide."""
    low = value.lower()
    if (
        "tt_" in low
        or "eyj" in low
        or "authorization" in low
        or "cookie" in low
        or "bearer" in low
        or "basic" in low
        or "://" in low
    ):
        for pattern, replacement in _REDACTIONS:
            value = pattern.sub(replacement, value)
    return value


def _escape(match: re.Match[str]) -> str:
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(match[0]) or f"\\u{ord(match[0]):04x}"


def one_line(value: object) -> str:
    """An exception (or anything) as one safe line: "TypeName: text"."""
    try:
        text = str(value)
    except Exception:
        text = "(its text cannot be had)"
    if isinstance(value, BaseException):
        text = f"{type(value).__name__}: {text}" if text else type(value).__name__
    return redact(" ".join(text[:MAX_TEXT].split()))


def _safe(value: Any, depth: int = 0) -> Any:
    """What the encoder can take, without secrets; anything odd becomes text, anything broken a placeholder."""
    if isinstance(value, str):
        text = value if type(value) is str else str.__str__(value)
        return redact(text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "...")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(1 << 63) <= value < 1 << 63 else str(value) if value.bit_length() < 4096 else "(huge)"
    if isinstance(value, float):
        return float(value) if value - value == 0 else str(float(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return redact(bytes(value[:MAX_TEXT]).decode("utf-8", "backslashreplace"))
    if depth < 4 and isinstance(value, dict):
        return {
            redact(str(key)[:200]): _field(str(key), item, depth + 1) for key, item in list(value.items())[:MAX_ITEMS]
        }
    if depth < 4 and isinstance(value, (list, tuple, set, frozenset)):
        return [_safe(item, depth + 1) for item in list(value)[:MAX_ITEMS]]
    return one_line(value)


def _field(name: str, value: Any, depth: int = 0) -> Any:
    if value and not isinstance(value, bool) and name.lower().replace("-", "_") in _SECRET_NAMES:
        return MASK
    try:
        return _safe(value, depth)
    except Exception:
        return f"(unprintable {type(value).__name__})"


# Formatters -----------------------------------------------------------------------------------------------------


def level_name(level: int) -> str:
    return "ERROR" if level >= 40 else "WARNING" if level >= 30 else "INFO" if level >= 20 else "DEBUG"


class LineFormatter(logging.Formatter):
    """What both formats share. `trace_ids` (set by the logs plug-in) gives the current span's ids, or None."""

    is_json = False

    def __init__(self, tracebacks: bool = False) -> None:
        super().__init__()
        self.tracebacks = tracebacks
        self.broken = 0  # records that could not be rendered in full
        self.trace_ids: Callable[[], tuple[str, str] | None] | None = None
        self._second = (-1, "")
        self.redact = redact

    def stamp(self, created: float) -> str:
        """RFC 3339 in UTC with milliseconds, of seconds since the epoch."""
        second, millisecond = divmod(int(created * 1000 + 0.5), 1000)
        known, text = self._second
        if known != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = (second, text)
        return text + _MILLISECONDS[millisecond]

    def facts(self, record: logging.LogRecord) -> dict[str, Any]:
        """All keys and safe values of the record's line, in order."""
        is_error = record.levelno >= logging.ERROR
        try:
            message = record.getMessage()
        except Exception:
            message = str(record.msg)
        if not is_error:
            message = message.replace("error", "fault")
        line: dict[str, Any] = {
            "time": self.stamp(record.created),
            "level": level_name(record.levelno),
            "msg": _safe(message),
        }
        if not record.name.startswith(OURS):
            line["logger"] = record.name.replace("error", "fault")
        fields = getattr(record, "fields", None)
        for name, value in fields.items() if isinstance(fields, dict) else ():
            line[self._key(str(name), is_error)] = _field(str(name), value)
        self._add_failure(line, record, is_error)
        if self.trace_ids is not None and "trace_id" not in line and (ids := self.trace_ids()) is not None:
            line["trace_id"], line["span_id"] = ids
        return line

    def _key(self, name: str, is_error: bool) -> str:
        name = _NAME.sub("_", name)[:100]
        if not is_error:
            name = name.replace("error", "cause")
        return f"{name}_" if name in _RESERVED else name

    def _add_failure(self, line: dict[str, Any], record: logging.LogRecord, is_error: bool) -> None:
        exc = record.exc_info[1] if record.exc_info else None
        key = "error" if is_error else "cause"
        if exc is not None:
            line.setdefault(key, one_line(exc))
            if self.tracebacks and is_error and record.exc_info:
                line.setdefault("traceback", _safe(show_traceback(*record.exc_info)))
        if is_error and not line.get("error"):
            line["error"] = line["msg"]

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its line break. Never raises."""
        try:
            return self.render(self.facts(record))
        except Exception as exc:
            self.broken += 1
            level = level_name(record.levelno)
            line = {"time": self.stamp(time.time()), "level": level, "msg": "a record could not be rendered"}
            line["error" if level == "ERROR" else "cause"] = type(exc).__name__
            return self.render(line)

    def render(self, line: dict[str, Any]) -> str:
        raise NotImplementedError


class JsonFormatter(LineFormatter):
    is_json = True

    def render(self, line: dict[str, Any]) -> str:
        try:
            text = _encode(line).decode()
        except UnicodeEncodeError:  # lone surrogates, from undecodable names of files
            text = _encode(_without_surrogates(line)).decode()
        return text if text.isascii() and "\x7f" not in text else CONTROL.sub(_escape, text)


class TextFormatter(LineFormatter):
    def render(self, line: dict[str, Any]) -> str:
        parts = [f"{line['time']} {line['level']:<7} {CONTROL.sub(_escape, line['msg'])}"]
        for name, value in line.items():
            if name not in _RESERVED:
                parts.append(f"{name}={_text_value(value)}")
        return " ".join(parts)


def _text_value(value: Any) -> str:
    if isinstance(value, str):
        if _PLAIN.fullmatch(value):
            return value
    else:
        if isinstance(value, list) and value and all(isinstance(one, str) and _WORD.fullmatch(one) for one in value):
            return ",".join(value)
        value = _encode(_without_surrogates(value)).decode()
        if _PLAIN.fullmatch(value):
            return str(value)
    return '"' + CONTROL.sub(_escape, value.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value


def show_traceback(kind: Any, exc: BaseException | None, trace: TracebackType | None) -> str:
    try:
        return "".join(traceback.format_exception(kind, exc, trace, limit=-20))
    except Exception:
        return "(it cannot be shown)"
