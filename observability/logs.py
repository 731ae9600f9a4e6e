"""The logs plug-in: log lines that never hold up the run loop, and one access record per request.

It takes the place of the program's synchronous handler (any root handler with a `sink`), re-using its sink and
formatter, and gives the place back at the end.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import trio

from observability.accesslog import LEVELS, AccessLog, Formatter, make_record
from observability.logqueue import QueueHandler, Sink, Writer
from tunnel.handler import Host, Layer

_newest: list[QueueHandler] = []  # the handler in use, or the last one used


def dropped() -> int:
    """Log records lost since start, because the output did not take them."""
    return _newest[0].writer.dropped if _newest else 0


@asynccontextmanager
async def plugin(host: Host) -> AsyncIterator[Layer]:
    """Replace the synchronous handler for as long as this runs, and yield the access log."""
    level = LEVELS.get(str(host.options.get("log", {}).get("level", "info")), logging.INFO)
    with_queue = _take_over()
    host.set_details("logs", lambda: {"dropped": dropped()})
    handler = with_queue or next((old for old in logging.getLogger().handlers if isinstance(old, QueueHandler)), None)
    access = AccessLog(level, handler)
    try:
        yield access.layer("request" if host.role == "core" else "local")
    finally:
        if with_queue is not None:
            with trio.CancelScope(shield=True):  # bounded: the writer gives up after a second
                await trio.to_thread.run_sync(_give_back, with_queue)


@asynccontextmanager
async def supervise(host: Host) -> AsyncIterator[None]:
    """The same for a supervisor, whose handler takes its workers' lines too. The access log is theirs."""
    with_queue = _take_over()
    host.set_details("logs", lambda: {"dropped": dropped()})
    try:
        yield
    finally:
        if with_queue is not None:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_give_back, with_queue)


def _take_over() -> QueueHandler | None:
    """Swap the program's handler for a queue. None where there is no such handler, or another has done it."""
    root = logging.getLogger()
    for old in root.handlers:
        sink, formatter = getattr(old, "sink", None), old.formatter
        if sink is None or formatter is None:
            continue
        writer = Writer(cast(Sink, sink), _after(old), _notice(formatter))
        handler = QueueHandler(writer, formatter)
        cast(Formatter, formatter).trace_ids = current_span_ids
        handler.replaced = old
        root.handlers[root.handlers.index(old)] = handler  # one step: no record is lost or written twice
        _newest[:] = [handler]
        return handler
    return None


def _give_back(handler: QueueHandler) -> None:
    """Flush, and put the old handler in its place again."""
    handler.writer.close()
    cast(Formatter, handler.formatter).trace_ids = None
    root = logging.getLogger()
    if handler in root.handlers and handler.replaced is not None:
        root.handlers[root.handlers.index(handler)] = handler.replaced


def _after(old: logging.Handler) -> Callable[[bytes], None]:
    """Lines that come when the queue is closed are written at once."""

    def write(line: bytes) -> None:
        sink = cast(Sink, getattr(old, "sink"))  # noqa: B009  # Handler has no such attribute for mypy
        sink.abandon(line, sink.write(line, 0.05))

    return write


def _notice(formatter: logging.Formatter) -> Callable[[int], bytes]:
    def render(lost: int) -> bytes:
        record = make_record(logging.WARNING, "log records dropped", {"dropped": lost})
        return f"{formatter.format(record)}\n".encode("utf-8", "backslashreplace")

    return render


def current_span_ids() -> tuple[str, str] | None:
    """Trace and span id of the current OpenTelemetry span; costs nothing where OpenTelemetry was never imported."""
    trace = sys.modules.get("opentelemetry.trace")
    get_current_span = getattr(trace, "get_current_span", None)
    if get_current_span is None:  # not imported, or the export thread is just about it
        return None
    context = get_current_span().get_span_context()
    return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None
