"""The agent's metrics: what its visits say, counted in plain integers, and what its link counts, read at a scrape.

Failed means: the local service could not be reached, broke off or answered 5xx, or the link broke under the stream.
A visitor who goes away is no failure of the local service: such a stream counts as completed, such a request as a
success. Totals count at the start, the rest at the end, and what is in flight is their difference, so that

    agent_streams_completed + agent_streams_failed + agent_streams_active = agent_streams_total     at any moment
    agent_requests_success + agent_requests_failed = agent_requests_total                           when idle

Durations of answers that stay open end where the answer begins: an upgrade's at the local service's 101, an event
stream's at its first event (marks "upgraded" and "event"), a TCP connection's when it is made. Their lives would
drown every average. Probes count nowhere.

What begins is only noted in that moment, and counted before anybody looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import Metric

from observability import buckets
from observability.buckets import Histogram
from observability.exposition import Family, families, label_value
from observability.runtime import spans_sent
from tunnel.handler import AgentStatistics, Ended, Host, LocalVisit, Observer, StreamVisit, Visit

FAMILIES = families(
    Family("agent_connection_active", "gauge", "1 while the agent's link to the core is up.", ("agent_id",), "max"),
    Family("agent_reconnections_total", "counter", "Attempts to get a lost link back."),
    Family("agent_reconnection_errors_total", "counter", "Attempts to get a lost link back that failed."),
    Family("agent_consecutive_errors", "gauge", "Failed attempts since the link was last up.", merge="max"),
    Family("agent_streams_total", "counter", "Streams accepted."),
    Family("agent_streams_active", "gauge", "Streams open now."),
    Family("agent_streams_completed", "counter", "Streams that ended well."),
    Family("agent_streams_failed", "counter", "Streams that failed."),
    Family("agent_requests_total", "counter", "Requests accepted."),
    Family("agent_requests_success", "counter", "Requests answered below 500, or left by the visitor."),
    Family("agent_requests_failed", "counter", "Requests that failed or were answered with 5xx."),
    Family("agent_request_duration_microseconds", "histogram", "Request accepted to answer complete."),
    Family("agent_frames_received", "counter", "Frames received from the core."),
    Family("agent_frames_sent", "counter", "Frames sent to the core."),
    Family("agent_frames_error", "counter", "Frames that broke the link protocol."),
    Family("agent_heartbeats_sent", "counter", "Heartbeats sent to the core."),
    Family("agent_heartbeats_failed", "counter", "Heartbeats without an answer in time."),
    Family("agent_heartbeat_rtt_seconds", "histogram", "Round trips of heartbeats."),
    Family("agent_local_requests_total", "counter", "Requests sent to local services."),
    Family("agent_local_requests_error", "counter", "Requests that a local service did not answer, or with 5xx."),
    Family("agent_local_request_duration_microseconds", "histogram", "Request to a local service to its answer's end."),
    Family("agent_spans_exported_total", "counter", "Spans that the collector took."),
    Family("agent_spans_dropped_total", "counter", "Spans dropped because the collector did not take them."),
    Family("agent_logs_dropped_total", "counter", "Log records dropped because the output did not take them."),
)

#: of an agent with several workers, in addition
WORKER_FAMILIES = families(
    Family("agent_workers", "gauge", "Worker processes that should be there."),
    Family("agent_workers_active", "gauge", "Worker processes that serve."),
    Family("agent_worker_restarts_total", "counter", "Worker processes that ended and were replaced."),
)

_NO_FAILURE = frozenset({"ok", "visitor_aborted"})


def is_failed(visit: Visit) -> bool:
    """Whether a visit that has ended failed; no outcome means that the link was torn down around it."""
    return visit.outcome not in _NO_FAILURE or visit.status >= 500


def connection(statistics: AgentStatistics) -> Metric:
    return FAMILIES["agent_connection_active"].metric(((label_value(statistics.agent_id),), int(statistics.connected)))


def _is_usual(visit: Visit) -> bool:
    """It went well, and took as long as it says."""
    if visit.outcome != "ok" or visit.status >= 500:
        return False
    marks = visit.marks
    return "event" not in marks and "upgraded" not in marks


def _taken(visits: Sequence[Visit]) -> tuple[list[float], list[str]]:
    """Microseconds, and the ids of exported traces."""
    return (
        [(visit.ended - visit.started) * 1e6 for visit in visits],
        [visit.trace_id if visit.sampled else "" for visit in visits],
    )


class AgentMetrics:
    """A layer that counts, and a collector that is read at each scrape. Both run on the run loop's thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._begun: list[StreamVisit] = []  # not counted yet
        self._local_begun: list[LocalVisit] = []
        self._streams = self._streams_completed = self._streams_failed = 0
        self._requests = self._requests_success = self._requests_failed = 0
        self._local = self._local_error = 0
        self._request_us = Histogram(buckets.REQUEST_MICROSECONDS)
        self._local_us = Histogram(buckets.REQUEST_MICROSECONDS)
        self._round_trips = Histogram(buckets.ROUND_TRIP_SECONDS)
        self._answered: dict[Visit, float] = {}  # streams that stay open: when their answer began
        self.layer = Observer(
            {"stream": self._begun.append, "local": self._local_begun.append},
            {},
            {"stream": self._stream_ended, "local": self._local_ended},
            self._all_ended,
        )

    # Counting ----------------------------------------------------------------------------------------------------

    def _all_ended(self, visits: Sequence[Ended]) -> None:
        """The same as each one's own function: what went well and does not stay open is counted many at a time."""
        streams: list[StreamVisit] = []
        locals: list[LocalVisit] = []
        for visit, raised in visits:
            kind = visit.kind
            if kind == "stream":
                if visit.protocol == "http" and _is_usual(visit) and visit not in self._answered:
                    streams.append(visit)
                    continue
                self._count_streams(streams)  # in their order: the newest is a bucket's exemplar
                streams = []
                self._stream_ended(visit, raised)
            elif kind == "local":
                if visit.parent.protocol == "http" and _is_usual(visit):
                    locals.append(visit)
                    continue
                self._count_locals(locals)
                locals = []
                self._local_ended(visit, raised)
        self._count_streams(streams)
        self._count_locals(locals)
        self._count_begun()

    def _count_streams(self, visits: Sequence[StreamVisit]) -> None:
        self._streams_completed += len(visits)
        self._requests_success += len(visits)
        self._request_us.observe_all(*_taken(visits))

    def _count_locals(self, visits: Sequence[LocalVisit]) -> None:
        self._local_us.observe_all(*_taken(visits))

    def _count_begun(self) -> None:
        for visit in self._begun:
            protocol = visit.protocol
            if protocol != "probe":
                self._streams += 1
                if protocol != "tcp":
                    self._requests += 1
        self._begun.clear()
        for local in self._local_begun:
            if local.parent.protocol != "probe":
                self._local += 1
        self._local_begun.clear()

    def _stream_ended(self, visit: StreamVisit, raised: object) -> None:
        if visit.protocol == "probe":
            return
        failed = is_failed(visit)
        if failed:
            self._streams_failed += 1
        else:
            self._streams_completed += 1
        if visit.protocol == "tcp":
            return
        if failed:
            self._requests_failed += 1
        else:
            self._requests_success += 1
        end = 0.0
        if self._answered:
            end = self._answered.pop(visit, 0.0)
        marks = visit.marks
        if marks:
            end = marks.get("upgraded") or marks.get("event") or end
        self._request_us.observe(((end or visit.ended) - visit.started) * 1e6, visit.trace_id if visit.sampled else "")

    def _local_ended(self, visit: LocalVisit, raised: object) -> None:
        stream: StreamVisit = visit.parent
        protocol = stream.protocol
        if protocol == "probe":
            return
        if is_failed(visit):
            self._local_error += 1
        marks = visit.marks
        end = marks.get("event")
        if protocol == "upgrade" and visit.status == 101:
            end = marks.get("upgraded") or marks.get("first_byte")
        if end is not None:
            self._answered[stream] = end
        elif protocol == "tcp":
            end = marks.get("connected")
        self._local_us.observe(((end or visit.ended) - visit.started) * 1e6, visit.trace_id if visit.sampled else "")

    # Reading -----------------------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        self._host.settle()
        self._count_begun()
        for seconds in self._host.take_round_trips():
            self._round_trips.observe(seconds)
        statistics = self._host.statistics()
        assert isinstance(statistics, AgentStatistics)
        exported, dropped = spans_sent(self._host)
        values: dict[str, float | Histogram] = {
            "agent_connection_active": int(statistics.connected),
            "agent_reconnections_total": statistics.reconnections,
            "agent_reconnection_errors_total": statistics.reconnection_errors,
            "agent_consecutive_errors": statistics.consecutive_errors,
            "agent_streams_total": self._streams,
            "agent_streams_active": self._streams - self._streams_completed - self._streams_failed,
            "agent_streams_completed": self._streams_completed,
            "agent_streams_failed": self._streams_failed,
            "agent_requests_total": self._requests,
            "agent_requests_success": self._requests_success,
            "agent_requests_failed": self._requests_failed,
            "agent_request_duration_microseconds": self._request_us,
            "agent_frames_received": statistics.frames_received,
            "agent_frames_sent": statistics.frames_sent,
            "agent_frames_error": statistics.frames_error,
            "agent_heartbeats_sent": statistics.heartbeats_sent,
            "agent_heartbeats_failed": statistics.heartbeats_failed,
            "agent_heartbeat_rtt_seconds": self._round_trips,
            "agent_local_requests_total": self._local,
            "agent_local_requests_error": self._local_error,
            "agent_local_request_duration_microseconds": self._local_us,
            "agent_spans_exported_total": exported,
            "agent_spans_dropped_total": dropped,
            "agent_logs_dropped_total": statistics.logs_dropped,
        }
        for name, family in FAMILIES.items():
            labels = (label_value(statistics.agent_id),) if family.labels else ()
            yield family.metric((labels, values[name]))
