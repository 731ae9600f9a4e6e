"""The way out for spans: built on the run loop, a bounded queue, and one thread that hands them to the SDK's exporter.

Spans are built, and for OTLP/HTTP encoded, on the run loop, a few dozen in a row, some 4 µs each. A thread would need
the same interpreter lock for it: measured with everything traced, that cost 130 µs a request in place of 60, and held
the run loop up for 5 ms at a time. One by one, each would find the processor's caches cold: three times the cost. On
the thread is what waits (importing OpenTelemetry, sending, a slow collector), and the spans of quiet times. A full
queue drops the newest and counts it. The thread is a daemon because a collector that never answers must not keep the
process alive; `stop` waits for it at most two seconds.

Own queue and not the SDK's BatchSpanProcessor, because that one logs each dropped span, can't be told to stop within a
deadline, and wants finished spans where we have visits.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from observability.exporters import HTTP, Limits, Target, make_exporter, make_resource
from observability.pairs import Pair, Pairs
from observability.record import Enter, Record
from observability.spans import Facts, SpanBuilder
from observability.usual import UsualSpans

if TYPE_CHECKING:
    from observability.sinks import Sink

log = logging.getLogger("observability")

STOP_SECONDS = 1.7  # for all of `stop`: the contract grants two, a busy machine takes its share
_BREAK_OFF_SECONDS = 1.1  # after which a running export is broken off
_PORTION = 16  # spans made ready on the thread before the interpreter lock is offered to the run loop
_GATHERED = 32  # records that are built into spans in a row

Span = Facts | bytes  #: encoded already, or for the sink to make ready


def _no_pair(inner: Record, outer: Record) -> None:
    """Each span is made by itself."""


class SpanQueue:
    """From the run loop to the thread. `put` never waits; what finds no room is counted in `dropped`."""

    __slots__ = ("_batch", "_limit", "_spans", "dropped", "wake")

    def __init__(self, limits: Limits) -> None:
        self._spans: list[Any] = []
        self._limit = limits.queue
        self._batch = limits.batch
        self.dropped = 0
        self.wake = threading.Event()

    def __len__(self) -> int:
        return len(self._spans)

    def room(self) -> int:
        return self._limit - len(self._spans)

    def put(self, span: Any) -> None:
        self.put_all((span,))

    def put_all(self, spans: Sequence[Any]) -> None:
        fitting = spans[: self.room()]
        self.dropped += len(spans) - len(fitting)
        self._spans.extend(fitting)
        if len(self._spans) >= self._batch:
            self.wake.set()

    def take(self) -> list[Any]:
        """Up to a batch, oldest first."""
        taken = self._spans[: self._batch]
        del self._spans[: len(taken)]
        return taken

    def drop_all(self) -> None:
        self.dropped += len(self._spans)
        self._spans.clear()


class Exporter:
    """Owns the thread. `start` returns at once; `stop` returns within STOP_SECONDS, whatever the collector does."""

    def __init__(self, target: Target, limits: Limits, role: str, version: str) -> None:
        self.queue = SpanQueue(limits)
        self.target = target
        self.exported = 0
        self.failed = 0  # given to the collector in vain, or impossible to build
        self.on_ready: Callable[[Enter], None] | None = None  # called on the thread once OpenTelemetry is imported
        self._limits = limits
        self._role = role
        self._version = version
        self._sink: Sink | None = None
        self._records: list[Record] = []
        self._building = threading.Lock()
        self._builder = SpanBuilder(role)
        self._make: Callable[[Record], Span | None] = self._builder.build  # bytes once the sink takes them
        self._make_pair: Callable[[Record, Record], Pair | None] = _no_pair
        self._is_lost = False  # the sink could not be made
        self._is_stopping = False
        self._lost_before = 0
        self._is_down = False
        self._thread = threading.Thread(target=self._run, name="trace-export", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put_all(self, records: Sequence[Record]) -> None:
        """Queue the spans of finished visits; on the run loop."""
        self._records.extend(records)
        gathered = len(self._records)
        if gathered >= _GATHERED or gathered + len(self.queue) >= self._limits.batch or self._is_lost:
            self._build()

    def _build(self) -> None:
        """Make spans of what was gathered; on either thread."""
        with self._building:
            records, self._records = self._records, []
            if self._is_lost:
                self.failed += len(records)
                return
            queue = self.queue
            room = queue.room()
            queue.put_all(self._make_all(records[:room]))
            queue.dropped += max(0, len(records) - room)

    def _make_all(self, records: Sequence[Record]) -> list[Span]:
        make, make_pair = self._make, self._make_pair
        spans: list[Span] = []
        rest = iter(zip(records, (*records[1:], None), strict=False))
        for record, following in rest:
            try:
                pair = make_pair(record, following) if following is not None else None
            except Exception:  # then each by itself
                pair = None
            if pair is not None:
                spans += pair
                next(rest)
                continue
            try:
                if span := make(record):
                    spans.append(span)
            except Exception as exc:  # a visit with impossible facts must not cost the others theirs
                self._spoil(record[0].kind, exc)
        return spans

    def stop(self) -> None:
        """Send what is queued, within STOP_SECONDS. Blocks: call it in a thread."""
        deadline = time.monotonic() + STOP_SECONDS
        self._is_stopping = True
        self.queue.wake.set()
        self._thread.join(0.1 if self._is_down else _BREAK_OFF_SECONDS)
        if self._thread.is_alive():
            breaker = threading.Thread(target=self._break_off, name="trace-export-stop", daemon=True)
            breaker.start()  # closing may block as well
            self._thread.join(max(0.0, deadline - time.monotonic()))
        self._build()
        self.queue.drop_all()

    def statistics(self) -> dict[str, Any]:
        """Counts of spans since the start, for /health/detailed."""
        return {
            "exporting": True,
            "protocol": self.target.protocol,
            "endpoint": self.target.shown,
            "exported": self.exported,
            "failed": self.failed,
            "dropped": self.queue.dropped,
            "queued": len(self._records) + len(self.queue),
            "collector_up": not self._is_down,
        }

    def _break_off(self) -> None:
        """Make an export that waits to try again give up."""
        if self._sink is not None:
            try:
                self._sink.close()
            except Exception as exc:
                log.debug("closing the trace exporter", extra={"fields": {"reason": type(exc).__name__}})

    # On the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            _LastWords.install()
            self._sink, enter = self._open()
        except Exception as exc:  # e.g. an unreadable certificate named in OTEL_EXPORTER_OTLP_CERTIFICATE
            self._report_down(f"{type(exc).__name__}: {exc}")
            self._is_lost = True
            self._build()
            while taken := self.queue.take():
                self.failed += len(taken)
            return
        if self.on_ready is not None:
            self.on_ready(enter)
        if self._sink.takes_bytes:
            self._make = UsualSpans(self._builder, self._role).encode
            self._make_pair = Pairs(self._builder.clock, self._role).encode
        queue = self.queue
        while not self._is_stopping:
            if len(queue) < self._limits.batch:
                queue.wake.wait(self._limits.delay)
            queue.wake.clear()
            try:
                self._builder.clock.refresh()
                self._export_all()
            except Exception as exc:  # whatever it is, the next batch may fare better than none ever again
                self._report_down(f"{type(exc).__name__}: {exc}")
        stop_at = time.monotonic() + STOP_SECONDS
        while (
            (len(queue) or self._records) and time.monotonic() < stop_at and not (self._is_down and self._is_stopping)
        ):
            self._export_all()
        self._break_off()

    def _open(self) -> tuple[Sink, Enter]:
        """Import OpenTelemetry and make the exporter; a third of a second."""
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        from observability.readable import enter
        from observability.sinks import make_sink

        exporter = make_exporter(self.target, self._limits, os.environ)
        resource = make_resource(self._role, self._version)
        scope = InstrumentationScope("trio-tunnel", self._version)
        return make_sink(exporter, self.target.protocol == HTTP, resource, scope), enter

    def _export_all(self) -> None:
        """What is queued now; what comes in meanwhile waits for its batch, or the next turn."""
        self._build()
        left = len(self.queue)
        while left > 0:
            taken = self.queue.take()
            left -= len(taken)
            if spans := self._ready(taken):
                self._send(spans)
            if not taken or (self._is_stopping and self._is_down):
                return

    def _ready(self, taken: list[Span]) -> list[Any]:
        """Spans as the sink sends them."""
        assert self._sink is not None
        if set(map(type, taken)) == {bytes}:
            return taken
        spans: list[Any] = []
        for count, span in enumerate(taken):
            if isinstance(span, bytes):
                spans.append(span)
                continue
            if count % _PORTION == 0:
                time.sleep(0)
            try:
                spans.append(self._sink.add(span))
            except Exception as exc:
                self._spoil(span.name, exc)
        return spans

    def _spoil(self, name: str, exc: Exception) -> None:
        self.failed += 1
        log.debug("span not built", extra={"fields": {"kind": name, "reason": repr(exc)}})

    def _send(self, spans: Sequence[Any]) -> None:
        assert self._sink is not None
        _LastWords.forget()
        reason = ""
        try:
            is_sent = self._sink.send(spans)
        except Exception as exc:
            is_sent, reason = False, f"{type(exc).__name__}: {exc}"
        if is_sent:
            self.exported += len(spans)
            self._report_up()
        else:
            self.failed += len(spans)
            self._report_down(reason or _LastWords.heard())

    def _report_down(self, reason: str) -> None:
        if not self._is_down:
            self._is_down = True
            self._lost_before = self.failed + self.queue.dropped
            reason = reason[:300].replace("error", "failure")  # that word is kept for records of level ERROR
            fields = {"endpoint": self.target.shown, "protocol": self.target.protocol, "reason": reason}
            log.warning("traces cannot be exported", extra={"fields": fields})

    def _report_up(self) -> None:
        if self._is_down:
            self._is_down = False
            lost = self.failed + self.queue.dropped - self._lost_before
            log.info("traces are exported again", extra={"fields": {"endpoint": self.target.shown, "lost": lost}})


class _LastWords(logging.Handler):
    """Takes the SDK's own log records off the log: it repeats itself with tracebacks at every try.

    The first line of each failed export is kept, per thread (`tunnel up` has two), as the reason in ours.
    """

    _said: dict[int, str] = {}  # noqa: RUF012 - shared by the process on purpose, as loggers are
    _is_installed = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self._said.setdefault(record.thread or 0, record.getMessage())

    @classmethod
    def install(cls) -> None:
        if not cls._is_installed:
            cls._is_installed = True
            exporters = logging.getLogger("opentelemetry.exporter")
            exporters.addHandler(cls())
            exporters.propagate = False
            logging.getLogger("urllib3").setLevel(logging.WARNING)

    @classmethod
    def forget(cls) -> None:
        cls._said.pop(threading.get_ident(), None)

    @classmethod
    def heard(cls) -> str:
        return cls._said.pop(threading.get_ident(), "the collector did not take them")
