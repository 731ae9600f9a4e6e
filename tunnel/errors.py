"""Errors and outcomes: who is to blame, and what everybody is told about it.

The one table from cause to status, side and text stands here. An outcome's name is the metric label, the span
attribute `tunnel.outcome`, the log field, the error page's code and the header `X-Tunnel-Outcome`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


class TunnelError(Exception):
    """Something failed in a way we have words for: one line, fit for a user."""


class ConfigError(TunnelError):
    """Bad flag, file, address, certificate: what is wrong and what to do. The program ends with exit code 2."""


class WireError(TunnelError):
    """The other end broke the link protocol (tunnel/SPEC.md). The link ends.

    limit: the word of LIMITS that it went beyond, if that is what it did.
    """

    def __init__(self, text: str, limit: str = "") -> None:
        super().__init__(text)
        self.limit = limit


class LocalWireError(TunnelError):
    """We were about to break the link protocol: a bug on this side."""


class Refused(TunnelError):
    """The core does not take this agent. reason: a word of REFUSALS; `final` says that trying again is useless.

    retry_after: seconds that the core asks for before the next attempt.
    """

    def __init__(self, reason: str, text: str, retry_after: float = 0) -> None:
        super().__init__(text)
        self.reason = reason
        self.retry_after = retry_after

    @property
    def final(self) -> bool:
        return self.reason in FINAL_REFUSALS


class Failure(TunnelError):
    """A request or stream ends with this outcome. The text is the particular cause, one line, safe to show.

    status: of the answer, where it differs from the table's. limit: the word of LIMITS that was reached, where the
    outcome alone does not say it.
    """

    def __init__(self, outcome: str, text: str = "", retry_after: float = 0, status: int = 0, limit: str = "") -> None:
        super().__init__(text or row_of(outcome, limit).title)
        self.outcome = outcome
        self.text = text
        self.retry_after = retry_after
        self.status = status
        self.limit = limit or _LIMITS_BY_OUTCOME.get(outcome, "")


#: what tunnel_limit_refusals_total counts by; docs/LIMITS.md says what each is
LIMITS = (
    "header_bytes", "header_count", "target_length", "body_bytes",  # of a request
    "head_time", "idle_time", "body_idle_time", "first_byte_time",  # of a visitor's connection and its local service
    "connection_requests", "connections", "connections_per_address",  # of visitors' connections
    "link_streams", "streams_per_address", "stream_buffer", "link_buffer", "buffer",  # of links
    "attaching", "attaching_bytes", "attaching_time", "handshakes", "failed_logins",  # of connections on their way in
)  # fmt: skip
_LIMITS_BY_OUTCOME = {"head_too_large": "header_bytes", "uri_too_long": "target_length", "body_too_large": "body_bytes"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row. side: whose fault ("visitor", "core", "agent", "local service", "nobody").

    failed: the record is an ERROR and the span an error. code: number on the wire in a reset frame (SPEC.md).
    blames: the side as an answer names it, where no single request of that side is at fault.
    """

    name: str
    code: int
    status: int
    side: str
    failed: bool
    title: str
    advice: str
    blames: str = ""


_ROWS = (
    Outcome("ok", 0, 200, "nobody", False, "The request was answered.", ""),
    Outcome("visitor_aborted", 1, 499, "visitor", False, "The visitor went away before the answer was complete.", ""),
    Outcome(
        "bad_request", 2, 400, "visitor", False,
        "The request is not valid HTTP.", "Check the client, or any proxy between it and this server.",
    ),
    Outcome(
        "method_not_allowed", 3, 405, "visitor", False,
        "This method is not passed through the tunnel.", "CONNECT and TRACE are refused; use another method.",
    ),
    Outcome(
        "request_timeout", 4, 408, "visitor", False,
        "The request did not arrive in time.", "Send the whole request without long pauses.",
    ),
    Outcome(
        "body_too_large", 5, 413, "visitor", False,
        "The request's body is larger than this tunnel accepts.",
        "Send less, or ask the operator to raise the limit (-max-body).",
    ),
    Outcome(
        "uri_too_long", 6, 414, "visitor", False,
        "The request's address is too long.", "Shorten the URL, or send the data in the body.",
    ),
    Outcome(
        "head_too_large", 7, 431, "visitor", False,
        "The request's header fields are too large.", "Clear this site's cookies, or send fewer or shorter fields.",
    ),
    Outcome(
        "no_tunnel", 8, 404, "visitor", False,
        "There is no tunnel with this name.",
        "Check the host name. If the tunnel is yours, start an agent that serves it.",
    ),
    Outcome(
        "no_agent", 9, 503, "agent", True,
        "The tunnel exists, but no agent is connected for it.",
        "Start the agent, or wait for it to reconnect, then try again.",
    ),
    Outcome(
        "link_lost", 10, 502, "agent", True,
        "The connection to the agent broke before the answer was complete.",
        "Try again; the agent reconnects by itself. If it persists, look at the agent's log and network.",
    ),
    Outcome(
        "local_refused", 11, 502, "local service", True,
        "The agent is connected, but its local service does not accept connections.",
        "Start the local service, or correct the agent's -local address.",
    ),
    Outcome(
        "local_broken", 12, 502, "local service", True,
        "The local service broke off, or its answer is not valid HTTP.",
        "Look at the local service's own log.",
    ),
    Outcome(
        "timeout", 13, 504, "local service", True,
        "The local service did not answer in time.",
        "Look at what the local service is doing. If it needs longer: core and agent each have a -request-timeout, and "
        "the shorter one counts; within an answer it is the core's -body-idle-timeout.",
    ),
    Outcome(
        "quota", 14, 429, "visitor", False,
        "The account that this tunnel belongs to has reached its limit.",
        "Nothing is wrong with this request. Come back when Retry-After has passed; the tunnel's owner can have the "
        "limit raised.",
        "visitor (all visitors of the account's tunnels together)",
    ),
    Outcome(
        "overloaded", 15, 503, "core", True,
        "Every agent of this tunnel is at its limit of open requests.", "Try again in a moment, or add an agent.",
    ),
    Outcome(
        "draining", 16, 503, "core", True,
        "The server is shutting down.", "Try again in a moment; another instance may take over.",
    ),
    Outcome(
        "internal", 17, 500, "core", True,
        "Something went wrong inside the tunnel.", "Report it with the request id; the log has the details.",
    ),
)  # fmt: skip

OUTCOMES: dict[str, Outcome] = {row.name: row for row in _ROWS}
BY_CODE: dict[int, Outcome] = {row.code: row for row in _ROWS}

#: how an answer words an outcome where another limit than the usual one was reached, by the word of LIMITS
BY_LIMIT = {
    "connections": replace(
        OUTCOMES["overloaded"], title="The server has as many connections as it may.", advice="Try again in a moment."
    ),
    "connections_per_address": replace(
        OUTCOMES["overloaded"],
        side="visitor",
        title="This address has as many connections, or requests at a time, as it may.",
        advice="Close others, or try again in a moment.",
        blames="visitor (all who come from this address together)",
    ),
    "streams_per_address": replace(
        OUTCOMES["overloaded"],
        side="visitor",
        title="This address has as many of the tunnel's open requests as it may: others need room, too.",
        advice="Close others, or try again in a moment.",
        blames="visitor (all who come from this address together)",
    ),
    "buffer": replace(
        OUTCOMES["overloaded"],
        title="The server holds as much as it may of what others have not read yet.",
        advice="Try again in a moment.",
    ),
}


def row_of(outcome: str, limit: str = "") -> Outcome:
    """What everybody is told of an outcome, where this limit was reached. Raises KeyError for an unknown outcome."""
    return BY_LIMIT.get(limit) or OUTCOMES[outcome]


#: outcomes counted as tunnel_upstream_errors_total{reason}: the request failed past the core
UPSTREAM = ("no_agent", "link_lost", "local_refused", "local_broken", "timeout", "overloaded")

#: with these an agent says that nothing of the request was given to the local service (SPEC.md, Outcomes in RESET)
UNSENT = frozenset({"local_refused", "overloaded", "no_tunnel"})
#: what an agent can know; with any other outcome it has merely given the stream up, and blames nobody else for that
OF_AGENTS = UNSENT | {"ok", "bad_request", "local_broken", "timeout", "link_lost"}

#: why the core refuses a link: the label of tunnel_authentication_failures_total, and what the agent is told
REFUSALS = (
    "missing_token", "bad_token", "revoked", "expired", "account_disabled",  # credentials
    "bad_name", "name_taken", "name_reserved", "name_quota", "no_port", "port_quota",  # what it asks for
    "connection_quota", "too_many_connections", "draining", "unavailable",  # load, or the store does not answer
    "version", "protocol", "timeout",  # the talk itself
)  # fmt: skip
#: refusals for who the agent is: "authentication failed" in the log; those for other reasons are "agent refused"
CREDENTIAL_REFUSALS = frozenset({"missing_token", "bad_token", "revoked", "expired", "account_disabled"})
#: refusals that no retry can mend: the agent ends with exit code 1
FINAL_REFUSALS = CREDENTIAL_REFUSALS | {"bad_name", "version"}
#: refusals for load
LOAD_REFUSALS = frozenset({"connection_quota", "too_many_connections", "draining", "unavailable"})
#: refusals of what the agent asks for, until somebody gives that up or the agent's owner asks for something else
ASKED_REFUSALS = frozenset({"name_taken", "name_reserved", "name_quota", "no_port", "port_quota"})
#: back off up to 30 s instead of 2 s
SLOW_REFUSALS = LOAD_REFUSALS | ASKED_REFUSALS
