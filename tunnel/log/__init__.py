"""Logs: one line per record, JSON or text, without secrets, never raising, never waiting long.

The contract is section 3 of the observability page: keys `time`, `level`, `msg`, then snake_case fields. Two promises
are kept here for every record, ours or a library's, so that nobody has to remember them at the call:

- the word "error" (lower case) stands in ERROR records only, as the field `error`, which each of them has; elsewhere
  a field of that name becomes `cause` and a library's message says "fault". Values from outside stay as they are;
- tokens, JWTs, passwords in URLs, Authorization and Cookie values become `***` (`redact`).

JSON goes to standard output and then nothing else may: warnings, crashes and unraisable exceptions become records.
Text goes to standard error, so that standard output stays free for the URL. The handler here writes at once; the logs
plug-in replaces it by one that does not wait, and re-uses its `sink` and `formatter`.
"""

from __future__ import annotations

import logging
import sys
import threading
from functools import cache
from types import TracebackType
from typing import Any, TextIO

from tunnel.log.lines import (
    CONTROL,
    OURS,
    JsonFormatter,
    LineFormatter,
    TextFormatter,
    one_line,
    redact,
    show_traceback,
)
from tunnel.log.sink import Sink, SyncHandler

__all__ = [
    "CONTROL",
    "LEVELS",
    "JsonFormatter",
    "LineFormatter",
    "Logger",
    "Sink",
    "SyncHandler",
    "TextFormatter",
    "complain",
    "get_logger",
    "one_line",
    "redact",
    "setup",
]

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Logger:
    """Our call style over a stdlib logger: a constant message and fields by name. Never raises."""

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    @property
    def stdlib(self) -> logging.Logger:
        """The logger underneath, for code that knows only stdlib logging."""
        return self._logger

    def debug(self, msg: str, **fields: object) -> None:
        self._log(logging.DEBUG, msg, fields)

    def info(self, msg: str, **fields: object) -> None:
        self._log(logging.INFO, msg, fields)

    def warning(self, msg: str, **fields: object) -> None:
        self._log(logging.WARNING, msg, fields)

    def error(self, msg: str, *, error: object, **fields: object) -> None:
        """A failure. error: an exception or one line; an exception's traceback is shown at level debug."""
        self._log(logging.ERROR, msg, {"error": error, **fields}, error if isinstance(error, BaseException) else None)

    def _log(self, level: int, msg: str, fields: dict[str, object], exc: BaseException | None = None) -> None:
        logger = self._logger
        if not logger.isEnabledFor(level):
            return
        try:
            info = (type(exc), exc, exc.__traceback__) if exc is not None else None
            logger.handle(logger.makeRecord(logger.name, level, "", 0, msg, (), info, extra={"fields": fields}))
        except Exception:  # a foreign handler or filter; ours do not raise
            pass


@cache
def get_logger(name: str) -> Logger:
    """The logger of a room: "tunnel.core", "tunnel.agent", …"""
    return Logger(logging.getLogger(name))


def setup(level: str = "info", json: bool = False, stream: TextIO | None = None) -> SyncHandler:
    """Log from now on to `stream` (JSON: standard output, text: standard error). Replaces an earlier set-up of ours.

    level: "debug", "info", "warning" or "error"; libraries are heard from WARNING on.
    """
    number = LEVELS[level]
    formatter: LineFormatter = (JsonFormatter if json else TextFormatter)(tracebacks=number <= logging.DEBUG)
    handler = SyncHandler(Sink(stream or (sys.stdout if json else sys.stderr)), formatter)
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, SyncHandler):
            root.removeHandler(old)
            old.close()
    root.addHandler(handler)
    root.setLevel(max(logging.WARNING, number))
    for name in OURS:
        logging.getLogger(name).setLevel(number)
    _take_over_streams(json)
    return handler


def complain(program: str, exc: Exception, as_json: bool) -> None:
    """Say why a program ("tunnel core") can't start whose settings, how it is to log among them, can't be used."""
    if as_json:
        setup(json=True)
        get_logger(program.replace(" ", ".")).error("can't start", error=str(exc))
    else:
        print(f"{program}: {exc}", file=sys.stderr)


def _take_over_streams(yes: bool) -> None:
    """With JSON on, nothing but records reaches the streams: what Python itself would print becomes one."""
    logging.captureWarnings(yes)
    sys.excepthook = _crashed if yes else sys.__excepthook__
    threading.excepthook = _thread_crashed if yes else threading.__excepthook__
    sys.unraisablehook = _unraisable if yes else sys.__unraisablehook__


def _crashed(kind: type[BaseException], exc: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        get_logger("tunnel").error("crashed", error=one_line(exc), traceback=show_traceback(kind, exc, trace))


def _thread_crashed(args: Any) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        _crashed(args.exc_type, args.exc_value, args.exc_traceback)


def _unraisable(args: Any) -> None:
    trace = show_traceback(args.exc_type, args.exc_value, args.exc_traceback)
    get_logger("tunnel").error("unraisable exception", error=one_line(args.exc_value), traceback=trace)
