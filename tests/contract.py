"""The metrics part of the contract, as data: every name with its type, labels and buckets."""

from __future__ import annotations

from typing import NamedTuple

SECONDS = "0.0003 0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1.0 2.0 5.0 10.0 30.0 +Inf"
MICROSECONDS = (
    "300.0 500.0 1000.0 2000.0 5000.0 10000.0 20000.0 50000.0 100000.0 200000.0 500000.0 "
    "1e+06 2e+06 5e+06 1e+07 3e+07 +Inf"
)
STREAM = "0.001 0.005 0.01 0.05 0.1 0.5 1.0 2.0 5.0 10.0 30.0 60.0 300.0 1800.0 7200.0 43200.0 +Inf"
ROUND_TRIP = "0.0001 0.0002 0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1.0 2.0 5.0 +Inf"
QUERY = "0.0001 0.0002 0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1.0 5.0 +Inf"
BYTES = (
    "0.0 256.0 1024.0 4096.0 16384.0 65536.0 262144.0 1.048576e+06 4.194304e+06 1.6777216e+07 "
    "6.7108864e+07 2.68435456e+08 1.073741824e+09 +Inf"
)
PAUSE = "0.0001 0.0002 0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.5 +Inf"

# name | type | labels | buckets
CORE = f"""
tunnel_connections_total | counter
tunnel_connections_active | gauge
tunnel_connections_by_account | gauge | account_id
tunnel_connection_state | gauge | connection_id state
tunnel_connection_rtt_seconds | histogram | | {ROUND_TRIP}
tunnel_authentication_failures_total | counter | reason
tunnel_streams_total | counter
tunnel_streams_active | gauge
tunnel_stream_duration_seconds | histogram | | {STREAM}
tunnel_requests_total | counter | code
tunnel_request_duration_seconds | histogram | | {SECONDS}
tunnel_time_to_first_byte_seconds | histogram | | {SECONDS}
tunnel_request_size_bytes | histogram | | {BYTES}
tunnel_response_size_bytes | histogram | | {BYTES}
tunnel_quota_exceeded_total | counter | type
tunnel_limit_refusals_total | counter | limit
tunnel_protocol_errors_total | counter |
tunnel_held_bytes | gauge |
tunnel_held_bytes_limit | gauge |
tunnel_quota_usage | gauge | account_id type
tunnel_quota_limit | gauge | account_id type
tunnel_bytes_total | counter | direction
tunnel_request_outcomes_total | counter | outcome
tunnel_upstream_errors_total | counter | reason
tunnel_connections_limit | gauge
tunnel_db_query_duration_seconds | histogram | operation | {QUERY}
tunnel_link_queued_bytes | gauge
tunnel_streams_stalled | gauge | side
tunnel_spans_exported_total | counter
tunnel_spans_dropped_total | counter
tunnel_logs_dropped_total | counter
tunnel_certificate_expiry_timestamp_seconds | gauge | listener
tunnel_acme_orders_total | counter | result
tunnel_acme_names_failing | gauge
tunnel_readiness_check | gauge | check
tunnel_build_info | gauge | python version
"""
AGENT = f"""
agent_connection_active | gauge | agent_id
agent_reconnections_total | counter
agent_reconnection_errors_total | counter
agent_consecutive_errors | gauge
agent_streams_total | counter
agent_streams_active | gauge
agent_streams_completed | bare
agent_streams_failed | bare
agent_requests_total | counter
agent_requests_success | bare
agent_requests_failed | bare
agent_request_duration_microseconds | histogram | | {MICROSECONDS}
agent_frames_received | bare
agent_frames_sent | bare
agent_frames_error | bare
agent_heartbeats_sent | bare
agent_heartbeats_failed | bare
agent_heartbeat_rtt_seconds | histogram | | {ROUND_TRIP}
agent_local_requests_total | counter
agent_local_requests_error | bare
agent_local_request_duration_microseconds | histogram | | {MICROSECONDS}
agent_spans_exported_total | counter
agent_spans_dropped_total | counter
agent_logs_dropped_total | counter
"""
#: where there are several processes (-workers), in addition
WORKERS = """
tunnel_workers | gauge
tunnel_workers_active | gauge
tunnel_worker_restarts_total | counter
agent_workers | gauge
agent_workers_active | gauge
agent_worker_restarts_total | counter
"""
RUNTIME = f"""
process_virtual_memory_bytes | gauge
process_resident_memory_bytes | gauge
process_start_time_seconds | gauge
process_cpu_seconds_total | counter
process_open_fds | gauge
process_max_fds | gauge
python_allocated_blocks | gauge
trio_tasks_living | gauge
trio_tasks_runnable | gauge
trio_run_loop_lag_seconds | gauge
python_gc_pause_seconds | histogram | generation | {PAUSE}
"""
GO = """
go_memstats_alloc_bytes | gauge
go_memstats_heap_inuse_bytes | gauge
go_goroutines | gauge
go_gc_duration_seconds | summary
"""


class Row(NamedTuple):
    type: str
    labels: frozenset[str]
    buckets: tuple[str, ...]


def table(*texts: str) -> dict[str, Row]:
    rows = {}
    for line in "".join(texts).strip().splitlines():
        if line:
            name, type, labels, buckets, *_ = (*(part.strip() for part in line.split("|")), "", "", "")
            rows[name] = Row(type, frozenset(labels.split()), tuple(buckets.split()))
    return rows
