"""Tunnel Core Overview: what visitors get, whose fault a failure is, where the time goes, what is about to run out.

The panels of the reference page are all here, with its faults put right (OBSERVABILITY.md, section 5): sums before
ratios and quantiles, tunnel_connections_by_account instead of a label that tunnel_connections_active does not have,
tunnel_connections_limit instead of a number, the honest names of a Python process instead of go_*.
"""

from __future__ import annotations

from panels import (
    BAD_GOOD, GOOD_BAD, PLAIN, Json, annotation, bars, buckets, constant, dashboard, graph, heatmap, instant, logql,
    logs, query, row, stat, table, text, traceql, traces, variable,
)  # fmt: skip
from queries import (
    ACCOUNT, AGENTS, AGENTS_BY_ACCOUNT, CORE, FAILED, IN_TUNNEL, OUTCOME_COLOURS, RATE, SIDE_COLOURS, SIDES,
    VISITORS_FAULTS, mean, quantile, rate,
)  # fmt: skip

ERRORS = ((None, "green"), (0.01, "yellow"), (0.05, "red"))
LATENCY = ((None, "green"), (0.5, "yellow"), (2, "red"))
USED = ((None, "green"), (0.75, "yellow"), (0.9, "red"))
LAG = ((None, "green"), (0.1, "yellow"), (0.25, "red"))

#: of our rules: a Prometheus that others use too has alerts of theirs
FIRING = 'ALERTS{alertstate="firing",service=~"core-server|agent|monitoring"}'
#: an agent that has moved to another core stays listed at its first one, with 0
LINKED = f"max by (account_id, agent_id) (agent_connection_active{{{AGENTS_BY_ACCOUNT}}})"
REQUESTS = rate("tunnel_requests_total", CORE)
FAILURES = rate("tunnel_request_outcomes_total", f'{CORE},outcome=~"{FAILED}"')
FAILED_IN_TUNNEL = rate("tunnel_request_outcomes_total", f'{CORE},outcome=~"{IN_TUNNEL}"')
CARRIED = rate("tunnel_request_outcomes_total", f'{CORE},outcome!~"{VISITORS_FAULTS}"')
ANSWERED_5XX = rate("tunnel_requests_total", f'{CORE},code=~"5.."')
DURATION = "tunnel_request_duration_seconds"
#: A line that is no JSON (a crash, a log as text) gets the label __error__, and one of them fails a whole metric query: so
#: each takes these lines out, or the label off.
CORE_LOGS = '{container="tunnel-core"}'
LINES = f"{CORE_LOGS} | json"
FIELDS = f'{CORE_LOGS} | json msg="msg", host="host", duration="duration", status="status", outcome="outcome"'


def now() -> list[Json]:
    to_agents = {"title": "Agents", "url": "/d/tunnel-agents/agent-monitoring?${__url_time_range}"}
    return row(
        100, "Now",
        stat(101, "Cores up", """Cores that Prometheus can scrape. Red: none; nobody is served, or nobody can see. TunnelCoreDown tells
             of each that is down.""",
             query(f"sum(up{{{CORE}}})"), "short", BAD_GOOD),
        stat(102, "Requests", "Public requests answered a second, whatever the answer.", query(REQUESTS), "reqps", PLAIN),
        stat(103, "5xx answers", """Share of requests answered with 5xx, whoever made the answer: the core (no agent,
             time-out, …) or the local service itself. HighErrorRate watches it at 5 %.""",
             query(f"{ANSWERED_5XX} / {REQUESTS}"), "percentunit", ERRORS, decimals=2),
        stat(104, "Failed in the tunnel", f"""Share of requests that the tunnel itself failed ({IN_TUNNEL.replace("|", ", ")}), as the
             availability objective counts them (rules/slo.yml): without the visitors' own faults below the line, and without
             dead local services and agents above it.""",
             query(f"{FAILED_IN_TUNNEL} / {CARRIED}"), "percentunit", ERRORS, decimals=2),
        stat(105, "p95 latency", """95 % of requests took less, first byte of the request to last byte of the answer.
             HighLatency watches it at 2 s.""", query(quantile(0.95, DURATION, CORE)), "s", LATENCY),
        stat(106, "Agent limit used", "Agents connected, as a share of -max-connections. At 100 % new ones are refused.",
             query(f"sum(tunnel_connections_active{{{CORE}}}) / sum(tunnel_connections_limit{{{CORE}}})"),
             "percentunit", USED, decimals=1),
        stat(107, "Agents gone", """Agents that were here in the last 24 hours and have no link now (AgentDisconnected).
             Which ones: the agents' dashboard.""",
             query(f"count({LINKED} == 0) or vector(0)"), "short", GOOD_BAD,
             link=to_agents),
        stat(108, "Alerts firing", "Alerts of the tunnel's rules that fire now. Each one's runbook says what to do.",
             query(f"count({FIRING}) or vector(0)"), "short", GOOD_BAD),
    )  # fmt: skip


def requests() -> list[Json]:
    by_side = [
        query(rate("tunnel_request_outcomes_total", f'{CORE},outcome=~"{outcomes}"'), side)
        for side, outcomes in SIDES.items()
    ]
    return row(
        200, "Requests: rate and errors",
        graph(201, "Requests by status", """Answers a second by the status that the visitor saw. 499: the visitor went
              away first, which is no failure of ours.""",
              [query(f'{rate("tunnel_requests_total", CORE, "code")} > 0', "{{code}}")], "reqps", stacked=True),
        graph(202, "Requests by outcome", """How requests ended, one word each: the same word is in the log, on the span,
              on the error page and in X-Tunnel-Outcome. README.md says whose side each is on and what to try.""",
              [query(f'{rate("tunnel_request_outcomes_total", CORE, "outcome")} > 0', "{{outcome}}")], "reqps",
              stacked=True, colours=OUTCOME_COLOURS),
        graph(203, "Whose side is it?", """Requests that did not end well, by the side that is to blame. Visitor: wrong
              names, broken requests, quotas, aborts. Agent: gone, or its link broke. Local service: refused, broke off,
              timed out. Core: overloaded, draining, or a bug of ours.""", by_side, "reqps", stacked=True,
              colours=SIDE_COLOURS),
        graph(204, "Error ratio", f"""Shares of all requests: 5xx answers, failed outcomes whatever the side ({FAILED.replace("|", ", ")}),
              and of these what the tunnel itself failed. Where 5xx answers are more than failed outcomes, local services
              answer 5xx themselves: look at their logs, not at the tunnel.""",
              [query(f"{ANSWERED_5XX} / {REQUESTS}", "5xx answers"), query(f"{FAILURES} / {REQUESTS}", "failed outcomes"),
               query(f"{FAILED_IN_TUNNEL} / {REQUESTS}", "failed in the tunnel"),
               query(f"clamp_min({ANSWERED_5XX} - {FAILURES}, 0) / {REQUESTS}", "5xx of the local service's own")],
              "percentunit", steps=ERRORS),
        graph(205, "Upstream errors by reason", """Requests that failed past the core. no_agent: the tunnel exists, nobody
              serves it. link_lost: the agent's link broke under the request. local_refused, local_broken, timeout: the
              agent is fine, its local service is not. overloaded: every agent of the tunnel is full.""",
              [query(rate("tunnel_upstream_errors_total", CORE, "reason"), "{{reason}}")], "reqps", stacked=True,
              colours=OUTCOME_COLOURS),
        graph(206, "Bytes carried", "Body bytes a second for visitors. in: towards local services; out: to visitors.",
              [query(rate("tunnel_bytes_total", CORE, "direction"), "{{direction}}")], "Bps"),
        graph(207, "Body sizes", "How large bodies are: half of them are smaller than p50, 95 % smaller than p95.",
              [query(quantile(0.5, "tunnel_request_size_bytes", CORE), "request p50"),
               query(quantile(0.95, "tunnel_request_size_bytes", CORE), "request p95"),
               query(quantile(0.5, "tunnel_response_size_bytes", CORE), "answer p50"),
               query(quantile(0.95, "tunnel_response_size_bytes", CORE), "answer p95")], "bytes"),
        table(208, "Failed requests by reason, in the range", "Counts over the dashboard's time range.",
              [instant(f"sum by (reason) (increase(tunnel_upstream_errors_total{{{CORE}}}[$__range]))")],
              {"reason": ("reason", ""), "Value": ("requests", "short")}, width=8, sort="requests"),
        graph(209, "Success ratio", "Requests answered with 2xx, as a share of all. 3xx and 4xx are not in it.",
              [query(f'{rate("tunnel_requests_total", CORE + ",code=~" + chr(34) + "2.." + chr(34))} / {REQUESTS}', "2xx")],
              "percentunit", ceiling=1),
    )  # fmt: skip


def latency() -> list[Json]:
    first = "tunnel_time_to_first_byte_seconds"
    return row(
        300, "Latency",
        heatmap(301, "Request duration", """Each column: how many requests a second took how long. Two bands mean two kinds
                of requests. The dots are exemplars: single requests whose trace is kept; click one to open it.""",
                buckets(rate(f"{DURATION}_bucket", CORE, "le")), "s", "reqps"),
        graph(302, "Request duration, quantiles", """First byte of the request to last byte of the answer; for an upgrade to
              the 101, for an event stream to its first event. Dots are exemplars: click one to open its trace.""",
              [query(quantile(0.5, DURATION, CORE), "p50", exemplar=True), query(quantile(0.95, DURATION, CORE), "p95"),
               query(quantile(0.99, DURATION, CORE), "p99"), query(mean(DURATION, CORE), "mean")],
              "s", width=12, steps=LATENCY),
        graph(303, "Time to first byte, quantiles", """Request head read to answer head written: what the core, the link, the
              agent and the local service need, without slow uploads and downloads. If this is low and the duration high,
              bodies are large or visitors slow.""",
              [query(quantile(0.5, first, CORE), "p50", exemplar=True), query(quantile(0.95, first, CORE), "p95"),
               query(quantile(0.99, first, CORE), "p99")], "s", width=12),
        graph(304, "Share of requests within", """How many requests took at most 100 ms, 500 ms, 2 s. The latency objective
              compares with one of these.""",
              [query(f"{rate(f'{DURATION}_bucket', f'{CORE},le={chr(34)}{le}{chr(34)}')} / {rate(f'{DURATION}_count', CORE)}",
                     legend) for le, legend in (("0.1", "100 ms"), ("0.5", "500 ms"), ("2.0", "2 s"))],
              "percentunit", width=12, ceiling=1),
    )  # fmt: skip


def time_spent() -> list[Json]:
    count = rate(f"{DURATION}_count", CORE)
    whole = rate(f"{DURATION}_sum", CORE)
    agent = f"{rate('agent_request_duration_microseconds_sum', AGENTS)} / 1e6"
    local = f"{rate('agent_local_request_duration_microseconds_sum', AGENTS)} / 1e6"
    return row(
        400, "Where the time went",
        graph(401, "Mean request, by where its time went", """The mean duration of a request, cut in three. local service:
              what the agent waited for it. agent: its own share. core, link and visitor: the rest, slow visitors included.
              Agents report every few seconds, so an edge may lag. Exact phases of single requests: the traces beside
              it.""",
              [query(f"{local} / {count}", "local service"),
               query(f"clamp_min({agent} - {local}, 0) / {count}", "agent"),
               query(f"clamp_min({whole} - {agent}, 0) / {count}", "core, link and visitor")],
              "s", stacked=True, colours={"local service": "purple", "agent": "orange", "core, link and visitor": "blue"}),
        traces(402, "Slow requests, traced", """Traces of requests slower than 500 ms, newest first. A trace shows visitor →
               core → link → agent → local service; its root span has tunnel.phase.*_ms, which add up to the whole.""",
               traceql('{ resource.service.name = "tunnel-core" && span.http.request.method != nil && kind = server && duration > 500ms } | select('
                       "span.tunnel.outcome, span.tunnel.phase.queue_ms, span.tunnel.phase.link_ms, "
                       "span.tunnel.phase.agent_ms, span.tunnel.phase.local_ms)"), width=8),
        traces(403, "Failed requests, traced", """Traces of requests with a failed outcome or a 5xx. The span in red, the
               deepest one, is where it began.""",
               traceql('{ resource.service.name = "tunnel-core" && span.http.request.method != nil && kind = server && status = error } | select('
                       "span.tunnel.outcome, span.http.response.status_code, span.agent.id)"), width=8),
        text(404, "The phases of one request", "Where to read the exact phases of a single request.", """
**visitor** (its head arrives) → **queue** (until a stream is open: names, quotas, an agent with room) → **link** → **agent** →
**local** (the local service, to its answer's head) → **link** → **answer** (the head goes to the visitor) → **body**.
A body that comes in parts is **upload**, before link. Of a request that got no answer, or half of one, **local** is what the agent had
waited for the service; **remote** is link, agent and service together, where the agent could not say which of them it was: it does after
0.2 s, so much more than that is a link or an agent that stands still.
They are on each request's root span as `tunnel.phase.*_ms` and add up to its duration. `-tracing-server-timing` also sends core, link,
agent and local milliseconds to the visitor, in the answer's `Server-Timing`, where browsers show them.""", height=4),
    )  # fmt: skip


def links() -> list[Json]:
    rtt = "tunnel_connection_rtt_seconds"
    return row(
        500, "Agent links",
        graph(501, "Agents and their limit", """Agents connected now (all links of one count once), and how many the core takes (-max-connections).
              HighConnectionCount fires at 90 % of it, ConnectionLimitReached at 100 %.""",
              [query(f"sum(tunnel_connections_active{{{CORE}}})", "attached"),
               query(f"sum(tunnel_connections_limit{{{CORE}}})", "limit")], "short", log=True),
        graph(502, "Agents by account", "Agents connected now, by account: the ten with most.",
              [query(f"topk(10, sum by (account_id) (tunnel_connections_by_account{{{ACCOUNT}}}))", "{{account_id}}")],
              "short", stacked=True),
        graph(503, "Links by state", """connecting: not authenticated yet; many of them are strangers or a slow store.
              draining: told to go elsewhere.""",
              [query(f"sum by (state) (tunnel_connection_state{{{CORE}}})", "{{state}}")], "short", stacked=True),
        graph(504, "New links", "Agent links that authenticated, a second. Steady above 0: agents lose their links again and again.",
              [query(rate("tunnel_connections_total", CORE), "new links")], "cps"),
        graph(505, "Refused links by reason", """Agents turned away, a second. bad_token, revoked, expired: look at who dials in.
              connection_quota, name_quota, port_quota, too_many_connections: limits. The log lines "authentication failed" and
              "agent refused" have the address.""",
              [query(f'{rate("tunnel_authentication_failures_total", CORE, "reason")} > 0', "{{reason}}"),
               query(rate("tunnel_authentication_failures_total", CORE), "all")], "cps"),
        graph(506, "Round trip of links", """Heartbeats' round trips over all links: the network between core and agents, and how
              quickly both ends turn. All links at once: look at saturation. One: see the agents' dashboard.""",
              [query(quantile(0.5, rtt, CORE), "p50"), query(quantile(0.95, rtt, CORE), "p95"),
               query(quantile(0.99, rtt, CORE), "p99")], "s"),
    )  # fmt: skip


def streams() -> list[Json]:
    duration = "tunnel_stream_duration_seconds"
    return row(
        600, "Streams",
        graph(601, "Open streams", "Exchanges open on all links: requests in flight, WebSockets, event streams, TCP connections.",
              [query(f"sum(tunnel_streams_active{{{CORE}}})", "open")], "short"),
        graph(602, "New streams", "Streams opened a second. A request of a tunnel opens one; refused requests open none.",
              [query(rate("tunnel_streams_total", CORE), "opened")], "ops"),
        graph(603, "Stream duration", "Open to close. WebSockets and event streams live long, so p95 may be hours.",
              [query(quantile(0.5, duration, CORE), "p50"), query(quantile(0.95, duration, CORE), "p95"),
               query(mean(duration, CORE), "mean")], "s", log=True),
    )  # fmt: skip


def accounts() -> list[Json]:
    used = f"tunnel_quota_usage{{{ACCOUNT}}} / (tunnel_quota_limit{{{ACCOUNT}}} > 0 < +Inf)"
    return row(
        700, "Accounts and quotas",
        graph(701, "Refused for quota", """Refusals a second because an account used up its quota: of requests (429), of bandwidth
              (429), of agents (connection), names or TCP ports. Nobody else is affected. QuotaExceeded watches it.""",
              [query(rate("tunnel_quota_exceeded_total", CORE, "type"), "{{type}}")], "reqps", stacked=True),
        bars(702, "Quota used", """Use as a share of the limit, for accounts that have a link and a limit: the ten nearest to it. At 100 %
             the account is refused more: of requests and bandwidth until the month ends, of agents (connection), names and
             TCP ports until it has fewer, or the limit is raised (`account limit`).""",
             query(f"topk(10, max by (account_id, type) ({used}))", "{{account_id}} {{type}}"), "percentunit", USED, ceiling=1),
        table(703, "Top accounts", "Accounts by links, and by requests and bytes over the time range, among those with a link now.",
              [instant(f"topk(10, sum by (account_id) (tunnel_connections_by_account{{{ACCOUNT}}}))"),
               instant(f'sum by (account_id) (increase(tunnel_quota_usage{{{ACCOUNT},type="requests"}}[$__range]))'),
               instant(f'sum by (account_id) (increase(tunnel_quota_usage{{{ACCOUNT},type="bandwidth"}}[$__range]))')],
              {"account_id": ("account", ""), "Value #A": ("links", "short"), "Value #B": ("requests", "short"),
               "Value #C": ("bytes", "bytes")}, width=8, sort="requests"),
        graph(704, "Requests by account", "Requests a second, as the accounts' agents count them: the ten with most.",
              [query(f'topk(10, {rate("agent_requests_total", AGENTS_BY_ACCOUNT, "account_id")})', "{{account_id}}")],
              "reqps", width=12, stacked=True),
        graph(705, "Failed requests by account", """Requests a second that the local service did not answer, or with 5xx, as the
              accounts' agents count them: the ten with most.""",
              [query(f'topk(10, {rate("agent_requests_failed", AGENTS_BY_ACCOUNT, "account_id")})', "{{account_id}}")],
              "reqps", width=12, stacked=True),
    )  # fmt: skip


def saturation() -> list[Json]:
    return row(
        800, "Saturation",
        graph(801, "CPU", """Processor seconds a second, as a share of what the core can use: one processor, or one for each of its
              -workers. Near 100 % everything waits.""",
              [query(f"rate(process_cpu_seconds_total{{{CORE}}}{RATE}) / on (job, instance) (tunnel_workers{{{CORE}}} or up{{{CORE}}} > 0)",
                     "{{instance}}")], "percentunit", width=6,
              steps=((None, "green"), (0.7, "yellow"), (0.9, "red"))),
        graph(802, "Run-loop lag", """How late the run loop woke a task, the worst of the last 15 seconds: what every request had to
              wait at that moment. Above 5 s /healthz fails.""",
              [query(f"trio_run_loop_lag_seconds{{{CORE}}}", "{{instance}}")], "s", width=6, steps=LAG),
        graph(803, "Memory", """Resident memory (in place of go_memstats_*). It grows with open streams (a window each) and comes back
              after a burst. HighMemoryUsage watches it.""",
              [query(f"process_resident_memory_bytes{{{CORE}}}", "{{instance}}")], "bytes", width=6,
              steps=((None, "green"), (768 * 2**20, "red"))),
        graph(804, "Memory growth", """Trend of the resident memory over an hour (or what there is of it). Above 0 for many hours with
              flat traffic: a leak; the number of allocated blocks says whether it is Python's.""",
              [query(f"deriv(process_resident_memory_bytes{{{CORE}}}[1h])", "{{instance}}")], "Bps", width=6, floor=None),
        graph(805, "Tasks", """Trio tasks (in place of goroutines). living: a few for each link, stream and visitor. runnable: waiting
              for their turn; many of them mean a busy run loop.""",
              [query(f"trio_tasks_living{{{CORE}}}", "living {{instance}}"),
               query(f"trio_tasks_runnable{{{CORE}}}", "runnable {{instance}}")], "short", width=6),
        graph(806, "Garbage collection", """Seconds a second in which Python's garbage collector stopped everything, by generation (in
              place of go_gc_duration_seconds).""",
              [query(rate("python_gc_pause_seconds_sum", CORE, "generation"), "generation {{generation}}")], "percentunit",
              width=6, stacked=True),
        graph(807, "Open files", "File descriptors open, and the limit of the process. Each visitor and each link needs one.",
              [query(f"process_open_fds{{{CORE}}}", "open {{instance}}"), query(f"process_max_fds{{{CORE}}}", "limit {{instance}}")],
              "short", width=6, log=True),
        graph(808, "Allocated blocks", "Memory blocks that Python has allocated: grows with what the program holds, not with the heap's shape.",
              [query(f"python_allocated_blocks{{{CORE}}}", "{{instance}}")], "short", width=6),
        graph(809, "Queued for agents", """Bytes that wait to be sent on all links. Above some MiB for long: a link slower than what
              visitors send, or an agent that stands still.""",
              [query(f"sum by (instance) (tunnel_link_queued_bytes{{{CORE}}})", "{{instance}}")], "bytes", width=12),
        graph(810, "Stalled streams", """Open streams whose window is used up. visitor: somebody downloads more slowly than the local
              service sends. agent: a local service takes an upload more slowly than it comes. Neither slows others.""",
              [query(f"sum by (side) (tunnel_streams_stalled{{{CORE}}})", "waits for the {{side}}")], "short", width=12),
    )  # fmt: skip


def workers() -> list[Json]:
    return row(
        1300, "Workers (only where -workers is more than 1)",
        graph(1301, "Workers of cores", "Processes that serve, and how many there should be. WorkersMissing watches it.",
              [query(f"tunnel_workers_active{{{CORE}}}", "serving {{instance}}"),
               query(f"tunnel_workers{{{CORE}}}", "wanted {{instance}}")], "short"),
        graph(1302, "Workers of agents", "The same at agents that have several, as they report it.",
              [query(f"agent_workers_active{{{AGENTS_BY_ACCOUNT}}}", "serving {{agent_id}}"),
               query(f"agent_workers{{{AGENTS_BY_ACCOUNT}}}", "wanted {{agent_id}}")], "short"),
        graph(1303, "Replaced workers", """Workers that ended and were replaced, in the dashboard's time range. The log says why each ended
              ("worker ended", "worker killed"). WorkerRestarts watches it.""",
              [query(f"increase(tunnel_worker_restarts_total{{{CORE}}}[$__range])", "core {{instance}}"),
               query(f"increase(agent_worker_restarts_total{{{AGENTS_BY_ACCOUNT}}}[$__range])", "agent {{agent_id}}")], "short"),
    )  # fmt: skip


def limits() -> list[Json]:
    metric = "tunnel_limit_refusals_total"

    def at(which: str) -> list[Json]:
        return [query(rate(metric, f'{CORE},limit=~"{which}"', "limit"), "{{limit}}")]

    return row(
        1200, "Limits and strangers (docs/LIMITS.md has each limit and its setting)",
        graph(1201, "Turned away: the core is full", """What the core refuses or ends a second because it is full. connections: visitors'
              connections in all; link_streams: open requests of one agent; link_buffer, buffer: bytes that nobody takes.
              CapacityLimitReached watches it.""", at("connections|link_streams|link_buffer|buffer"), "ops", stacked=True),
        graph(1202, "Visitors at their limits", """Ends a second of visitors' requests and connections. head_time: heads that never end
              (or connections that browsers open ahead); connections_per_address, streams_per_address: a flood, or a proxy that
              -trusted-proxies does not name; the rest: too large, or too slow. VisitorsHitLimits fires above 1.""",
              at("head_time|header_bytes|header_count|target_length|body_bytes|body_idle_time|connections_per_address|"
                 "streams_per_address"), "ops", stacked=True),
        graph(1203, "At the agents' port", """What is stopped a second before it is an agent. failed_logins: refusals that had to wait
              (0.25 s to 4 s), after three wrong credentials of one address; handshakes, attaching: floods and silent
              connections. AgentPortUnderLoad fires above 0.2.""",
              at("attaching|attaching_bytes|attaching_time|handshakes|failed_logins"), "ops", stacked=True),
        graph(1204, "Held bytes", """Unread bodies and what waits to be sent on all links, and how much that may be (-max-buffer).
              HeldBytesHigh fires at 75 %; at 100 % requests are refused and the greediest streams given up.""",
              [query(f"tunnel_held_bytes{{{CORE}}}", "held {{instance}}"),
               query(f"tunnel_held_bytes_limit{{{CORE}}} < +Inf", "limit {{instance}}")], "bytes"),
        graph(1205, "Broken protocol", """Connections a second that were closed because what came is not the link protocol, and links whose
              peer sent more than its window. Agents of ours never do. LinkProtocolErrors watches it.""",
              [query(rate("tunnel_protocol_errors_total", CORE), "links and strangers"),
               *at("stream_buffer|link_buffer"),
               query(rate("agent_frames_error", AGENTS), "frames, as agents saw them")], "ops"),
        table(1206, "Limits reached, in the range", """Counts over the dashboard's time range, everyday ends (idle_time,
              connection_requests) among them.""",
              [instant(f"sum by (limit) (increase({metric}{{{CORE}}}[$__range]))")],
              {"limit": ("limit", ""), "Value": ("times", "short")}, width=8, sort="times"),
    )  # fmt: skip


def store() -> list[Json]:
    metric = "tunnel_db_query_duration_seconds"
    return row(
        900, "Store",
        graph(901, "Store queries", """Queries a second by operation. Requests need none: agents that connect, administration, quota
              checks and the usage flush do.""",
              [query(rate(f"{metric}_count", CORE, "operation"), "{{operation}}")], "ops"),
        graph(902, "Store query duration, p95", "95 % of the queries took less, by operation. A slow store delays agents that connect.",
              [query(quantile(0.95, metric, CORE, "operation"), "{{operation}}")], "s"),
        graph(903, "Readiness", """The checks behind /readyz: 1 while one holds; 0 while one does not, with -workers at one of them at
              least. store at 0: StoreUnavailable. A balancer sends no visitors where /readyz says 503.""",
              [query(f"min by (instance, check) (tunnel_readiness_check{{{CORE}}})", "{{check}} {{instance}}")], "short", ceiling=1),
    )  # fmt: skip


def watching() -> list[Json]:
    return row(
        1000, "The monitoring itself",
        graph(1001, "Dropped", """Log records and spans a second that were thrown away because nobody took them (a full pipe, a dead
              collector). Traffic is not affected; what you see is incomplete.""",
              [query(rate("tunnel_logs_dropped_total", CORE), "log records"),
               query(rate("tunnel_spans_dropped_total", CORE), "spans")], "ops"),
        graph(1002, "Spans exported", "Spans a second that the collector took. 0: tracing exports nothing, or the collector is down.",
              [query(rate("tunnel_spans_exported_total", CORE), "spans")], "ops"),
        graph(1003, "Scrapes", "How long Prometheus needs for a page. It grows with accounts and links.",
              [query(f"scrape_duration_seconds{{{CORE}}}", "{{job}} {{instance}}"),
               query(f"scrape_duration_seconds{{{AGENTS}}}", "{{job}} {{instance}}")], "s"),
        graph(1004, "Series", """Samples a page. Bounded by design: no label carries a path, a header, an address or a request id. It
              grows with links and accounts only.""",
              [query(f"scrape_samples_scraped{{{CORE}}}", "{{job}} {{instance}}"),
               query(f"scrape_samples_scraped{{{AGENTS}}}", "{{job}} {{instance}}")], "short"),
        table(1005, "Versions", "What runs: version of the tunnel and of Python, and since when.",
              [instant(f"max by (instance, version, python) (tunnel_build_info{{{CORE}}})"),
               instant(f"max by (instance) (process_start_time_seconds{{{CORE}}}) * 1000")],
              {"instance": ("instance", ""), "version": ("version", ""), "python": ("python", ""),
               "Value #B": ("started", "dateTimeFromNow")}, width=8),
        table(1006, "Certificates", """When the first certificate in use by each listener runs out. The file may be newer: a core reads it
              again on SIGHUP. CertificateExpiresSoon fires two weeks before.""",
              [instant(f"min by (instance, listener) (tunnel_certificate_expiry_timestamp_seconds{{{CORE}}}) * 1000")],
              {"instance": ("instance", ""), "listener": ("listener", ""), "Value": ("expires", "dateTimeFromNow")}, width=8),
        graph(1007, "Certificate orders", """How orders at the ACME authority ended, and the names that lack a certificate, or a newer one,
              because theirs fail. All 0 where the core gets none itself (-acme-agree).""",
              [query(f"sum by (result) (increase(tunnel_acme_orders_total{{{CORE}}}[1h]))", "{{result}}, in the last hour"),
               query(f"tunnel_acme_names_failing{{{CORE}}}", "names failing")], "short"),
    )  # fmt: skip


def log_lines() -> list[Json]:
    of_account = '| account_id=~"$account"'
    return row(
        1100, "Logs (per host and per path: what metrics must not carry)",
        graph(1101, "Log lines by level", "Lines a minute of the core, by level. Every failure is one ERROR line.",
              [logql(f'sum by (level) (count_over_time({CORE_LOGS} | json level="level" | drop __error__ [1m]))', "{{level}}")], "short",
              stacked=True, colours={"ERROR": "red", "WARNING": "orange", "INFO": "green", "DEBUG": "blue"}),
        table(1102, "Busiest hosts", "Requests by host over the time range, from the access log.",
              [logql(f'topk(10, sum by (host) (count_over_time({FIELDS} | msg="request" | __error__="" [$__range])))', is_instant=True)],
              {"host": ("host", ""), "Value #A": ("requests", "short")}, width=8, sort="requests"),
        table(1103, "Slowest hosts", "The 95th percentile of request duration by host over the time range, from the access log.",
              [logql(f'topk(10, quantile_over_time(0.95, {FIELDS} | msg="request" | unwrap duration_seconds(duration)'
                     ' | __error__="" [$__range]) by (host))', is_instant=True)],
              {"host": ("host", ""), "Value #A": ("p95", "s")}, width=8, sort="p95"),
        logs(1104, "Failures", """Every failure, and nothing else: a failing record has level ERROR and a field `error`. Click the trace
             id of a line to open its trace.""", logql(f'{CORE_LOGS} |= "error" | json {of_account}')),
        logs(1105, "Slow requests (over 1 s)", """The reference page's query with the pipe that it lacks.""",
             logql(f"{LINES} | duration > 1s {of_account}"), width=12),
        logs(1106, "Refused agents", """Agents that were turned away, with address and reason. Those whose
             credentials are no good are "authentication failed".""",
             logql(f'{CORE_LOGS} |~ "authentication failed|agent refused" | json'), width=12),
    )  # fmt: skip


def build() -> Json:
    return dashboard(
        "tunnel-core", "Tunnel Core Overview",
        "What visitors get, whose fault a failure is, where the time goes, and what is about to run out.",
        [
            # all cores, not all jobs: `up` and `process_…` are everybody's, and a core that is down has no series of its own
            variable("job", "Job", "label_values(tunnel_build_info, job)", all_value="tunnel-core.*"),
            variable("instance", "Instance", 'label_values(tunnel_build_info{job=~"$job"}, instance)'),
            variable("account", "Account", f"label_values(tunnel_connections_by_account{{{CORE}}}, account_id)"),
            constant("agents_job", "tunnel-agents"),
        ],
        [
            annotation("Alerts", "red", FIRING, "{{alertname}}", "{{severity}}"),
            annotation("Restarts", "blue", f"changes(process_start_time_seconds{{{CORE}}}[$__rate_interval]) > 0",
                       "Core started", "{{instance}}"),
        ],
        [now(), requests(), latency(), time_spent(), links(), streams(), accounts(), saturation(), workers(), limits(), store(), watching(),
         log_lines()],
    )  # fmt: skip
