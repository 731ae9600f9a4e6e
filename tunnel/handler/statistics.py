"""What the programs count: read when somebody asks, never told of."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


@dataclass(slots=True)
class QuotaStatistics:
    account_id: str
    type: str  # "connection", "bandwidth" or "requests"
    usage: float
    limit: float  # math.inf: none
    pending: float = 0.0  # what of the usage is known here only, as yet


@dataclass(slots=True)
class LinkStatistics:
    """What a link's owner counts in plain integers."""

    connection_id: str
    agent_id: str
    account_id: str
    state: str
    streams: int
    frames_in: int
    frames_out: int
    frames_bad: int
    queue_bytes: int
    rtt: float  # seconds, the newest; 0 before the first
    offset: float  # seconds, the other end's clock minus ours
    stalled_visitor: int = 0  # streams whose visitor does not take what has come: their window is used up
    stalled_agent: int = 0  # streams whose agent does not take what is to be sent
    instance: str = ""  # the same for all links of one agent; "" where it does not say
    worker: int = 0  # that has the link
    remote: str = ""  # the agent's address, host:port
    since: float = 0.0  # when it was welcomed, seconds since 1970


@dataclass(slots=True)
class CoreStatistics:
    connections_limit: float
    bytes_in: int
    bytes_out: int
    links: list[LinkStatistics]
    quotas: list[QuotaStatistics]
    quota_exceeded: dict[str, int]  # by type, since start
    logs_dropped: int = 0
    certificate_expiry: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # by listener: the first one's, since 1970
    limit_refusals: dict[str, int] = dataclasses.field(default_factory=dict)  # by limit, since start
    protocol_errors: int = 0  # links and would-be links that broke the protocol
    held_bytes: int = 0  # unread bodies and what waits to be sent, on all links
    held_bytes_limit: float = math.inf  # how many there may be
    acme_orders: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # for certificates, by result, since start; empty: none
    acme_failing: int = 0  # names that should have a certificate, or a newer one, and whose orders fail


@dataclass(slots=True)
class AgentStatistics:
    agent_id: str
    connected: bool
    reconnections: int  # attempts to get a lost link back
    reconnection_errors: int
    consecutive_errors: int
    frames_received: int
    frames_sent: int
    frames_error: int
    heartbeats_sent: int
    heartbeats_failed: int
    logs_dropped: int = 0
