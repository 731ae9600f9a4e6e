"""Agent Monitoring: which agents are here, what they and their local services do, and what their links are like.

By default it shows what agents report over their links (job tunnel-agents: no inbound port, behind any NAT). Set the
variable Job to tunnel-agent for agents that Prometheus scrapes itself; their process is visible then, too.
The panels of the reference page are all here; ratios and means are of sums, so that they are right for many agents.
"""

from __future__ import annotations

from panels import (
    BAD_GOOD, GOOD_BAD, PLAIN, Json, annotation, buckets, dashboard, graph, heatmap, instant, logql, logs, query, row,
    stat, table, variable,
)  # fmt: skip
from queries import AGENT, RATE, mean, quantile, rate

ERRORS = ((None, "green"), (0.05, "yellow"), (0.1, "red"))
LATENCY = ((None, "green"), (500_000, "yellow"), (2_000_000, "red"))
LAG = ((None, "green"), (0.1, "yellow"), (0.25, "red"))

BY = "agent_id, instance"
WHO = "{{agent_id}} {{instance}}"
REQUESTS = rate("agent_requests_total", AGENT)
SUCCESS = rate("agent_requests_success", AGENT)
LOCAL = rate("agent_local_requests_total", AGENT)
LOCAL_ERRORS = rate("agent_local_requests_error", AGENT)
DURATION = "agent_request_duration_microseconds"
LOCAL_DURATION = "agent_local_request_duration_microseconds"
#: an agent that has moved to another core stays listed at its first one, with 0
LINKED = f"max by (account_id, agent_id) (agent_connection_active{{{AGENT}}})"
DIRECT = 'job="$job",instance=~"$instance"'  #: of the process that answers the scrape: an agent, or the core for all


def now() -> list[Json]:
    return row(
        100, "Now",
        stat(101, "Agents connected", "Agents with a link to a core now.",
             query(f"count({LINKED} == 1) or vector(0)"), "short", BAD_GOOD),
        stat(102, "Agents gone", """Agents that were here in the last 24 hours and have no link now. AgentDisconnected fires after two
             minutes.""", query(f"count({LINKED} == 0) or vector(0)"), "short", GOOD_BAD),
        stat(103, "Requests", "Requests a second that agents accepted.", query(REQUESTS), "reqps", PLAIN),
        stat(104, "Success rate", """Share of requests answered below 500 (or left by the visitor). The rest: the local service could
             not be reached, broke off, or answered 5xx.""",
             query(f"{SUCCESS} / {REQUESTS}"), "percentunit", ((None, "red"), (0.9, "yellow"), (0.95, "green")), decimals=2),
        stat(105, "Local errors", "Share of requests to local services without an answer, or with 5xx. LocalServiceErrors: 10 %.",
             query(f"{LOCAL_ERRORS} / {LOCAL}"), "percentunit", ERRORS, decimals=2),
        stat(106, "p95 at the agent", "95 % of requests took less, from the agent's accepting them to the end of the answer.",
             query(quantile(0.95, DURATION, AGENT)), "µs", LATENCY),
        stat(107, "Reconnects", "Attempts to get a lost link back, in the dashboard's time range.",
             query(f"sum(increase(agent_reconnections_total{{{AGENT}}}[$__range]))"), "short",
             ((None, "green"), (5, "yellow"), (50, "red")), decimals=0),
        stat(108, "Consecutive errors", "The worst agent's failed attempts since its link was last up. 0: all are connected.",
             query(f"max(agent_consecutive_errors{{{AGENT}}})"), "short", ((None, "green"), (1, "yellow"), (10, "red"))),
    )  # fmt: skip


def connections() -> list[Json]:
    rtt = "agent_heartbeat_rtt_seconds"
    return row(
        200, "Links",
        table(201, "Agents", """One line an agent. connected: 1 or 0; an agent that has gone stays listed for 24 hours, without its
              other figures.""",
              [instant(f"max by (account_id, {BY}) (agent_connection_active{{{AGENT}}})"),
               instant(f"sum by (account_id, {BY}) (rate(agent_requests_total{{{AGENT}}}{RATE}))"),
               instant(f"sum by (account_id, {BY}) (agent_streams_active{{{AGENT}}})"),
               instant(f"sum by (account_id, {BY}) (agent_reconnections_total{{{AGENT}}})")],
              {"account_id": ("account", ""), "agent_id": ("agent", ""), "instance": ("seen at", ""),
               "Value #A": ("connected", "short"), "Value #B": ("requests/s", "reqps"),
               "Value #C": ("open streams", "short"), "Value #D": ("reconnects", "short")}, width=16, sort="requests/s"),
        graph(202, "Connected agents", "Agents with a link, and those gone (for 24 hours).",
              [query(f"count({LINKED} == 1) or vector(0)", "connected"),
               query(f"count({LINKED} == 0) or vector(0)", "gone")], "short", stacked=True,
              colours={"connected": "green", "gone": "red"}),
        graph(203, "Reconnection rate", """Attempts to get a lost link back, a second, by agent. Without failed ones beside it: the link
              comes and goes (an unstable network, a core that drains, two agents with one name). HighReconnectionRate fires
              when each of its links comes back more than three times in ten minutes.""",
              [query(rate("agent_reconnections_total", AGENT, BY), WHO)], "cps"),
        graph(204, "Failed reconnections", "Attempts that failed, a second, by agent: the core is unreachable or refuses.",
              [query(rate("agent_reconnection_errors_total", AGENT, BY), WHO)], "cps"),
        graph(205, "Consecutive errors", "Failed attempts since the link was last up, by agent. It goes back to 0 with the link.",
              [query(f"max by ({BY}) (agent_consecutive_errors{{{AGENT}}})", WHO)], "short"),
        graph(206, "Heartbeat round trip, p95", """95 % of the heartbeats took less, by agent: the network to the core, and how quickly both
              turn. One agent alone: its network or machine.""",
              [query(quantile(0.95, rtt, AGENT, BY), WHO)], "s"),
        graph(207, "Heartbeats", "Heartbeats sent and failed (no answer in time), a second. After a failed one the agent dials anew.",
              [query(rate("agent_heartbeats_sent", AGENT), "sent"), query(rate("agent_heartbeats_failed", AGENT), "failed")],
              "ops", colours={"failed": "red"}),
        graph(208, "Frames", "Frames of the link protocol a second.",
              [query(rate("agent_frames_received", AGENT), "received"), query(rate("agent_frames_sent", AGENT), "sent"),
               query(rate("agent_frames_error", AGENT), "broken")], "ops", colours={"broken": "red"}),
    )  # fmt: skip


def requests() -> list[Json]:
    return row(
        300, "Requests",
        graph(301, "Request rate", "Requests accepted a second, by agent.",
              [query(rate("agent_requests_total", AGENT, BY), WHO)], "reqps", stacked=True),
        graph(302, "Success rate", "Share of requests answered below 500, by agent.",
              [query(f'{rate("agent_requests_success", AGENT, BY)} / {rate("agent_requests_total", AGENT, BY)}', WHO)],
              "percentunit", ceiling=1),
        graph(303, "Failed requests", "Requests a second that the local service did not answer, or with 5xx, by agent.",
              [query(rate("agent_requests_failed", AGENT, BY), WHO)], "reqps", stacked=True),
        heatmap(304, "Request duration", """Each column: how many requests a second took how long at the agent. The dots are exemplars
                (agents scraped directly have them): click one to open its trace.""",
                buckets(rate(f"{DURATION}_bucket", AGENT, "le")), "µs", "reqps"),
        graph(305, "Average latency", "Mean duration of a request at the agent, its local service included, by agent.",
              [query(mean(DURATION, AGENT, BY), WHO)], "µs", width=12),
        graph(306, "Request duration, quantiles", "All chosen agents together.",
              [query(quantile(0.5, DURATION, AGENT), "p50", exemplar=True), query(quantile(0.95, DURATION, AGENT), "p95"),
               query(quantile(0.99, DURATION, AGENT), "p99")], "µs", width=12, steps=LATENCY),
        graph(307, "Agent's own share", """What the agent adds to its local services: mean request at the agent less mean local request.
              High: the agent's machine is busy, or uploads arrive slowly.""",
              [query(f"clamp_min({mean(DURATION, AGENT)} - {mean(LOCAL_DURATION, AGENT)}, 0)", "agent")], "µs", width=12),
    )  # fmt: skip


def local_services() -> list[Json]:
    return row(
        400, "Local services",
        graph(401, "Local requests", "Requests to local services a second, by agent. Connections to TCP services are streams only.",
              [query(rate("agent_local_requests_total", AGENT, BY), WHO)], "reqps", stacked=True),
        graph(402, "Local errors", """Share without an answer, or with 5xx, by agent. The tunnel is fine; the service behind this agent is
              not: its own log says why.""",
              [query(f'{rate("agent_local_requests_error", AGENT, BY)} / {rate("agent_local_requests_total", AGENT, BY)}', WHO)],
              "percentunit", steps=ERRORS, ceiling=1),
        graph(403, "Local request duration", "Request to a local service to the end of its answer.",
              [query(quantile(0.5, LOCAL_DURATION, AGENT), "p50", exemplar=True),
               query(quantile(0.95, LOCAL_DURATION, AGENT), "p95"), query(quantile(0.99, LOCAL_DURATION, AGENT), "p99")],
              "µs", steps=LATENCY),
    )  # fmt: skip


def streams() -> list[Json]:
    return row(
        500, "Streams",
        graph(501, "Active streams", "Streams open now, by agent: requests in flight, WebSockets, event streams, TCP connections.",
              [query(f"sum by ({BY}) (agent_streams_active{{{AGENT}}})", WHO)], "short", stacked=True),
        graph(502, "Stream failure rate", """Streams that failed, a second, by agent. Connections to a TCP service that is down show here only;
              LocalServiceErrors watches them, too.""",
              [query(rate("agent_streams_failed", AGENT, BY), WHO)], "ops", stacked=True),
        graph(503, "Streams", "Streams accepted and completed a second. Apart for long: streams stay open.",
              [query(rate("agent_streams_total", AGENT), "accepted"), query(rate("agent_streams_completed", AGENT), "completed")],
              "ops"),
    )  # fmt: skip


def processes() -> list[Json]:
    return row(
        600, "The processes that answer the scrape (agents with job tunnel-agent)",
        graph(601, "CPU", """Processor seconds a second, as a share of what the agent can use: one processor, or one for each of
              its -workers. Near 100 % everything waits.""",
              [query(f"rate(process_cpu_seconds_total{{{DIRECT}}}{RATE}) / on (job, instance) (agent_workers{{{DIRECT}}} or up{{{DIRECT}}} > 0)",
                     "{{instance}}")], "percentunit", width=6,
              steps=((None, "green"), (0.7, "yellow"), (0.9, "red"))),
        graph(602, "Run-loop lag", "How late the run loop woke a task, the worst of the last 15 seconds.",
              [query(f"trio_run_loop_lag_seconds{{{DIRECT}}}", "{{instance}}")], "s", width=6, steps=LAG),
        graph(603, "Memory", "Resident memory.",
              [query(f"process_resident_memory_bytes{{{DIRECT}}}", "{{instance}}")], "bytes", width=6),
        graph(604, "Tasks", "Trio tasks: a few for the link and one or two for each stream.",
              [query(f"trio_tasks_living{{{DIRECT}}}", "{{instance}}")], "short", width=6),
        graph(605, "Dropped", """Log records and spans a second that agents threw away because nobody took them. Traffic is not
              affected; what you see is incomplete.""",
              [query(rate("agent_logs_dropped_total", AGENT), "log records"),
               query(rate("agent_spans_dropped_total", AGENT), "spans")], "ops", width=12),
        graph(606, "Spans exported", "Spans a second that the agents' collector took.",
              [query(rate("agent_spans_exported_total", AGENT), "spans")], "ops", width=12),
    )  # fmt: skip


def log_lines() -> list[Json]:
    agents = '{container="tunnel-agent"}'
    return row(
        700, "Logs",
        logs(701, "Failures", "Every failure at agents, with its trace id: click it to open the trace.",
             logql(f'{agents} |= "error" | json'), width=12),
        logs(702, "Links lost and found", "What agents say about their link.",
             logql(f'{agents} | json | msg =~ "connecting to server|authenticated|reconnecting|link ended|connection .*"'),
             width=12),
    )  # fmt: skip


def build() -> Json:
    return dashboard(
        "tunnel-agents", "Agent Monitoring",
        "Which agents are here, what they and their local services do, and what their links are like.",
        [
            variable("job", "Job", "label_values(agent_connection_active, job)", "tunnel-agents", multi=False),
            variable("instance", "Instance", 'label_values(agent_connection_active{job="$job"}, instance)'),
            variable("account", "Account",
                     'label_values(agent_connection_active{job="$job",instance=~"$instance"}, account_id)'),
            variable("agent", "Agent",
                     'label_values(agent_connection_active{job="$job",instance=~"$instance",account_id=~"$account"}, agent_id)'),
        ],
        [
            annotation("Alerts", "red", 'ALERTS{alertstate="firing",agent_id=~"$agent"}', "{{alertname}}", "{{agent_id}}"),
            annotation("Reconnects", "orange", f"changes(agent_connection_active{{{AGENT}}}[$__rate_interval]) > 0",
                       "Link lost or found", "{{agent_id}} {{instance}}"),
        ],
        [now(), connections(), requests(), local_services(), streams(), processes(), log_lines()],
    )  # fmt: skip
