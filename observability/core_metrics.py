"""The core's metrics: what its visits say, counted in plain integers, and what its owners count, read at a scrape.

When things are counted:
1. A request counts once, when it ends, in tunnel_requests_total, the outcomes and every request histogram, so that
   their counts agree. A long-lived answer counts when it ends too, but its duration is that up to the 101 (upgrade)
   or up to its first event (event stream): the life of it is in the stream histogram.
2. A connection on which nothing was sent (no method, no outcome) is no request. One that ended without an outcome
   was cut off by something unforeseen: "internal".
3. A stream counts when it opens; streams open = opened - closed, so the gauge can't drift. Those that opened are only
   noted in that moment, and counted before anybody looks.
4. Links, accounts, quotas and bytes are rebuilt from statistics() at each scrape: what is gone has no series.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import Metric

from observability import buckets
from observability.buckets import Histogram
from observability.exposition import Family, families, label_value
from observability.runtime import spans_sent
from tunnel.handler import (
    Begin,
    ConnectVisit,
    CoreStatistics,
    Ended,
    Host,
    LinkVisit,
    Observer,
    QueryVisit,
    RequestVisit,
    StreamVisit,
)

#: outcomes of requests that failed past the core: tunnel_upstream_errors_total{reason}
UPSTREAM = ("no_agent", "link_lost", "local_refused", "local_broken", "timeout", "overloaded")
QUOTA_TYPES = ("connection", "bandwidth", "requests", "names", "ports")
#: limits that refusals are counted by; tunnel.errors.LIMITS
LIMITS = (
    "header_bytes", "header_count", "target_length", "body_bytes",
    "head_time", "idle_time", "body_idle_time", "first_byte_time",
    "connection_requests", "connections", "connections_per_address",
    "link_streams", "streams_per_address", "stream_buffer", "link_buffer", "buffer",
    "attaching", "attaching_bytes", "attaching_time", "handshakes", "failed_logins",
)  # fmt: skip
#: how orders for certificates end; tunnel.core.issuing.authority.RESULTS
ORDERS = ("ok", "invalid", "rate_limited", "refused", "unreachable", "broken", "timeout")
LISTENERS = ("agent", "public")  #: that may have TLS
CHECKS = ("listeners", "store", "draining")  #: of readiness that a core has; those of a supervisor are made of these
CODES = (200, 404, 429, 499, 500, 502, 503, 504)  #: status codes with a series from start-up
MAX_CONNECTING = 100  #: series of links that have not authenticated yet: strangers must not make series at will
MAX_OPERATIONS = 64  #: of store queries; a closed set by contract, bounded here all the same

FAMILIES = families(
    Family("tunnel_connections_total", "counter", "Agent links that authenticated."),
    Family("tunnel_connections_active", "gauge", "Agents connected now; all links of one count once."),
    Family("tunnel_connections_by_account", "gauge", "The same, by account.", ("account_id",)),
    Family("tunnel_connection_state", "gauge", "1 for each link and the state it is in.", ("connection_id", "state")),
    Family("tunnel_connection_rtt_seconds", "histogram", "Round trips of heartbeats on agent links."),
    Family("tunnel_authentication_failures_total", "counter", "Agent links refused.", ("reason",)),
    Family("tunnel_streams_total", "counter", "Streams opened over all links."),
    Family("tunnel_streams_active", "gauge", "Streams open now."),
    Family("tunnel_stream_duration_seconds", "histogram", "Open to close of a stream."),
    Family("tunnel_requests_total", "counter", "Public requests by the status that the visitor saw.", ("code",)),
    Family("tunnel_request_duration_seconds", "histogram", "First byte of a request to the last of its answer."),
    Family("tunnel_time_to_first_byte_seconds", "histogram", "Request head read to answer head written."),
    Family("tunnel_request_size_bytes", "histogram", "Body bytes of requests."),
    Family("tunnel_response_size_bytes", "histogram", "Body bytes of answers."),
    Family("tunnel_quota_exceeded_total", "counter", "Refusals because a quota was used up.", ("type",)),
    Family("tunnel_limit_refusals_total", "counter", "What was refused or ended at a limit.", ("limit",)),
    Family("tunnel_protocol_errors_total", "counter", "Agent connections that broke the link protocol."),
    Family("tunnel_held_bytes", "gauge", "Unread bodies and what waits to be sent, on all links."),
    Family("tunnel_held_bytes_limit", "gauge", "How many of them there may be; +Inf for no limit."),
    Family("tunnel_quota_usage", "gauge", "Quota used in the current period.", ("account_id", "type")),
    Family("tunnel_quota_limit", "gauge", "Quota limit in force; +Inf for none.", ("account_id", "type"), "min"),
    Family("tunnel_bytes_total", "counter", "Body bytes carried for visitors.", ("direction",)),
    Family("tunnel_request_outcomes_total", "counter", "Public requests by how they ended.", ("outcome",)),
    Family("tunnel_upstream_errors_total", "counter", "Requests that failed past the core.", ("reason",)),
    Family("tunnel_connections_limit", "gauge", "Agents that the core accepts at most.", merge="max"),
    Family("tunnel_db_query_duration_seconds", "histogram", "Queries to the store.", ("operation",)),
    Family("tunnel_link_queued_bytes", "gauge", "Bytes that wait to be sent, on all links."),
    Family("tunnel_streams_stalled", "gauge", "Open streams whose window is used up, by who is slow.", ("side",)),
    Family("tunnel_spans_exported_total", "counter", "Spans that the collector took."),
    Family("tunnel_spans_dropped_total", "counter", "Spans dropped because the collector did not take them."),
    Family("tunnel_logs_dropped_total", "counter", "Log records dropped because the output did not take them."),
    Family(
        "tunnel_certificate_expiry_timestamp_seconds",
        "gauge",
        "When the first certificate of a listener with TLS expires.",
        ("listener",),
        "min",
    ),
    Family("tunnel_acme_orders_total", "counter", "Orders for certificates by how they ended.", ("result",)),
    Family(
        "tunnel_acme_names_failing",
        "gauge",
        "Names whose certificate is missed or due, and whose orders fail.",
        (),
        "max",
    ),
    Family("tunnel_readiness_check", "gauge", "1 while this check of readiness holds, else 0.", ("check",), "min"),
    Family("tunnel_build_info", "gauge", "Version of the tunnel and of Python.", ("version", "python"), "max"),
)
#: of a core with several workers, in addition
WORKER_FAMILIES = families(
    Family("tunnel_workers", "gauge", "Worker processes that should be there."),
    Family("tunnel_workers_active", "gauge", "Worker processes that serve."),
    Family("tunnel_worker_restarts_total", "counter", "Worker processes that ended and were replaced."),
)


def _is_usual(visit: RequestVisit) -> bool:
    """It went well, with all that an answer has, and took as long as it says."""
    if visit.outcome != "ok" or visit.event_stream or not 100 <= visit.status <= 599:
        return False
    marks = visit.marks
    return "first_byte" in marks and "head" in marks and "upgraded" not in marks


class CoreMetrics:
    """A layer that counts, and a collector that is read at each scrape. Both run on the run loop's thread.

    `link_began` and `link_ended` are told of every link: the agents' page remembers who has gone.
    """

    def __init__(
        self,
        host: Host,
        link_began: Callable[[LinkVisit], None] | None = None,
        link_ended: Callable[[LinkVisit], None] | None = None,
    ) -> None:
        self._host = host
        self._link_ended = link_ended
        self._connected = 0
        self._connecting: dict[ConnectVisit, None] = {}  # in the order they came
        self._refusals = dict.fromkeys(host.refusals, 0)
        self._round_trips = Histogram(buckets.ROUND_TRIP_SECONDS)
        self._begun: list[StreamVisit] = []  # not counted yet
        self._streams = 0
        self._stream_seconds = Histogram(buckets.STREAM_SECONDS)
        self._codes = [0] * 600  # by status; 0 stands for those outside 100 to 599
        self._outcomes = dict.fromkeys((*host.outcomes, *UPSTREAM, "internal"), 0)
        self._request_seconds = Histogram(buckets.REQUEST_SECONDS)
        self._first_byte_seconds = Histogram(buckets.REQUEST_SECONDS)
        self._request_bytes = Histogram(buckets.BODY_BYTES)
        self._response_bytes = Histogram(buckets.BODY_BYTES)
        self._queries: dict[str, Histogram] = {}
        begins: dict[str, Begin] = {"stream": self._begun.append, "connect": self._connect_began}
        if link_began:
            begins["link"] = link_began
        self.layer = Observer(
            begins,
            {"connect": self._connect_ended, "link": self._link_is_over},
            {"request": self._request_ended, "stream": self._stream_ended, "query": self._query_ended},
            self._all_ended,
        )

    # Counting ----------------------------------------------------------------------------------------------------

    def _all_ended(self, visits: Sequence[Ended]) -> None:
        """The same as each one's own function: requests that went well, and streams, are counted many at a time."""
        usual: list[RequestVisit] = []
        stream_seconds: list[float] = []
        for visit, raised in visits:
            kind = visit.kind
            if kind == "stream":
                if visit.protocol != "probe":
                    stream_seconds.append(visit.ended - visit.started)
            elif kind == "request":
                if _is_usual(visit):
                    usual.append(visit)
                    continue
                self._count_usual(usual)  # in their order: the newest is a bucket's exemplar
                usual = []
                self._request_ended(visit, raised)
            elif kind == "query":
                self._query_ended(visit, raised)
        self._count_usual(usual)
        self._stream_seconds.observe_all(stream_seconds)
        self._count_begun()

    def _count_usual(self, visits: Sequence[RequestVisit]) -> None:
        trace_ids = [visit.trace_id if visit.sampled else "" for visit in visits]
        self._request_seconds.observe_all([visit.ended - visit.started for visit in visits], trace_ids)
        marks = [visit.marks for visit in visits]
        self._first_byte_seconds.observe_all([mark["first_byte"] - mark["head"] for mark in marks], trace_ids)
        self._request_bytes.observe_all([visit.bytes_in for visit in visits])
        self._response_bytes.observe_all([visit.bytes_out for visit in visits])
        codes = self._codes
        for visit in visits:
            codes[visit.status] += 1
        self._outcomes["ok"] += len(visits)

    def _count_begun(self) -> None:
        for visit in self._begun:
            if visit.protocol != "probe":
                self._streams += 1
        self._begun.clear()

    def _stream_ended(self, visit: StreamVisit, raised: object) -> None:
        if visit.protocol != "probe":
            self._stream_seconds.observe(visit.ended - visit.started)

    def _request_ended(self, visit: RequestVisit, raised: object) -> None:
        outcome = visit.outcome
        if not outcome:
            if not visit.method:
                return
            outcome = "internal"
        marks = visit.marks
        end = visit.ended
        first_byte = marks.get("first_byte")
        if "upgraded" in marks:
            end = marks["upgraded"]
            first_byte = first_byte or end
        elif visit.event_stream:
            end = marks.get("event") or first_byte or end
        trace_id = visit.trace_id if visit.sampled else ""
        self._request_seconds.observe(end - visit.started, trace_id)
        if first_byte is not None and "head" in marks:
            self._first_byte_seconds.observe(first_byte - marks["head"], trace_id)
        self._request_bytes.observe(visit.bytes_in)
        self._response_bytes.observe(visit.bytes_out)
        code = 499 if outcome == "visitor_aborted" else visit.status or 500
        self._codes[code if 100 <= code <= 599 else 0] += 1
        self._outcomes[outcome if outcome in self._outcomes else "internal"] += 1

    def _connect_began(self, visit: ConnectVisit) -> None:
        self._connecting[visit] = None

    def _connect_ended(self, visit: ConnectVisit, raised: object) -> None:
        del self._connecting[visit]
        if visit.outcome == "ok":
            self._connected += 1
        elif visit.outcome == "refused":
            self._refusals[visit.reason if visit.reason in self._refusals else "protocol"] += 1

    def _link_is_over(self, visit: LinkVisit, raised: object) -> None:
        if self._link_ended:
            self._link_ended(visit)

    def _query_ended(self, visit: QueryVisit, raised: object) -> None:
        operation = visit.operation
        histogram = self._queries.get(operation)
        if histogram is None:
            if len(self._queries) >= MAX_OPERATIONS:
                operation = "other"
            histogram = self._queries.setdefault(operation, Histogram(buckets.QUERY_SECONDS))
        histogram.observe(visit.ended - visit.started)

    # Reading -----------------------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        self._host.settle()
        self._count_begun()
        for seconds in self._host.take_round_trips():
            self._round_trips.observe(seconds)
        statistics = self._host.statistics()
        assert isinstance(statistics, CoreStatistics)
        yield from self._links(statistics)
        yield from self._requests()
        yield from self._quotas(statistics)
        one = FAMILIES
        yield one["tunnel_bytes_total"].metric((("in",), statistics.bytes_in), (("out",), statistics.bytes_out))
        yield one["tunnel_db_query_duration_seconds"].metric(
            *(((label_value(operation),), histogram) for operation, histogram in sorted(self._queries.items()))
        )
        exported, dropped = spans_sent(self._host)
        yield one["tunnel_spans_exported_total"].metric(((), exported))
        yield one["tunnel_spans_dropped_total"].metric(((), dropped))
        yield one["tunnel_logs_dropped_total"].metric(((), statistics.logs_dropped))
        expiry = statistics.certificate_expiry
        yield one["tunnel_certificate_expiry_timestamp_seconds"].metric(
            *(((name,), expiry[name]) for name in LISTENERS if name in expiry)
        )
        orders = statistics.acme_orders
        yield one["tunnel_acme_orders_total"].metric(*(((result,), orders.get(result, 0)) for result in ORDERS))
        yield one["tunnel_acme_names_failing"].metric(((), statistics.acme_failing))
        yield one["tunnel_readiness_check"].metric(*(((name,), self._holds(name)) for name in CHECKS))
        yield one["tunnel_build_info"].metric(((label_value(self._host.version), platform.python_version()), 1))

    def _holds(self, name: str) -> bool:
        """As /readyz says: one that is not there yet, or breaks, does not hold."""
        check = self._host.checks.get(name)
        try:
            return check is not None and bool(check()[0])
        except Exception:
            return False

    def _links(self, statistics: CoreStatistics) -> Iterator[Metric]:
        states = {label_value(link.connection_id): link.state for link in statistics.links}
        connecting = 0
        for visit in self._connecting:
            if visit.connection_id and connecting < MAX_CONNECTING:
                connecting += states.setdefault(label_value(visit.connection_id), "connecting") == "connecting"
        one = FAMILIES
        yield one["tunnel_connections_total"].metric(((), self._connected))
        yield from connections(statistics)
        yield one["tunnel_connection_state"].metric(*((pair, 1) for pair in states.items()))
        yield one["tunnel_link_queued_bytes"].metric(((), sum(link.queue_bytes for link in statistics.links)))
        yield one["tunnel_streams_stalled"].metric(
            (("visitor",), sum(link.stalled_visitor for link in statistics.links)),
            (("agent",), sum(link.stalled_agent for link in statistics.links)),
        )
        yield one["tunnel_connections_limit"].metric(((), statistics.connections_limit))
        yield one["tunnel_connection_rtt_seconds"].metric(((), self._round_trips))
        yield one["tunnel_authentication_failures_total"].metric(*(((why,), n) for why, n in self._refusals.items()))

    def _requests(self) -> Iterator[Metric]:
        one = FAMILIES
        yield one["tunnel_streams_total"].metric(((), self._streams))
        yield one["tunnel_streams_active"].metric(((), self._streams - self._stream_seconds.count))
        yield one["tunnel_stream_duration_seconds"].metric(((), self._stream_seconds))
        yield one["tunnel_requests_total"].metric(
            *(((str(code) if code else "other",), n) for code, n in enumerate(self._codes) if n or code in CODES)
        )
        yield one["tunnel_request_duration_seconds"].metric(((), self._request_seconds))
        yield one["tunnel_time_to_first_byte_seconds"].metric(((), self._first_byte_seconds))
        yield one["tunnel_request_size_bytes"].metric(((), self._request_bytes))
        yield one["tunnel_response_size_bytes"].metric(((), self._response_bytes))
        yield one["tunnel_request_outcomes_total"].metric(*(((word,), n) for word, n in self._outcomes.items()))
        yield one["tunnel_upstream_errors_total"].metric(*(((word,), self._outcomes[word]) for word in UPSTREAM))

    def _quotas(self, statistics: CoreStatistics) -> Iterator[Metric]:
        one = FAMILIES
        exceeded = statistics.quota_exceeded
        yield one["tunnel_quota_exceeded_total"].metric(*(((type,), exceeded.get(type, 0)) for type in QUOTA_TYPES))
        refusals = statistics.limit_refusals
        yield one["tunnel_limit_refusals_total"].metric(*(((limit,), refusals.get(limit, 0)) for limit in LIMITS))
        yield one["tunnel_protocol_errors_total"].metric(((), statistics.protocol_errors))
        yield one["tunnel_held_bytes"].metric(((), statistics.held_bytes))
        yield one["tunnel_held_bytes_limit"].metric(((), statistics.held_bytes_limit))
        yield from quotas(statistics)


def connections(statistics: CoreStatistics) -> Iterator[Metric]:
    """Agents that are connected. One with links to several workers counts once, as it does for the limits."""
    agents = {(link.account_id, link.instance or link.connection_id) for link in statistics.links}
    one = FAMILIES
    accounts = Counter(label_value(account_id) for account_id, _ in agents)
    yield one["tunnel_connections_active"].metric(((), len(agents)))
    yield one["tunnel_connections_by_account"].metric(*(((account,), n) for account, n in accounts.items()))


def quotas(statistics: CoreStatistics) -> Iterator[Metric]:
    one = FAMILIES
    linked = {link.account_id for link in statistics.links}
    rows = {
        (label_value(quota.account_id), quota.type): quota
        for quota in statistics.quotas
        if quota.account_id in linked and quota.type in QUOTA_TYPES
    }
    yield one["tunnel_quota_usage"].metric(*((pair, quota.usage) for pair, quota in rows.items()))
    yield one["tunnel_quota_limit"].metric(*((pair, quota.limit) for pair, quota in rows.items()))
