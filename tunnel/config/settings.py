"""The settings of both programs: names, types, defaults, groups and help, in one place.

Everything else is derived from these classes: flags, environment variables, keys of the file, `--help`,
docs/CONFIGURATION.md. Durations are seconds, sizes bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Struct, field

from tunnel.config import kinds as v

LINK = "Link"
PUBLIC = "Visitors"
LIMITS = "Limits and time-outs"
STATE = "Accounts and state"
SEE = "Observability"
LIFE = "Life"
SERVICES = "Local services"


@dataclass(frozen=True, slots=True)
class Option:
    """What the classes say about a setting beside its name, type and default. flag: a second name for it."""

    kind: v.Kind
    group: str
    help: str
    flag: str = ""


class Settings(Struct, frozen=True, kw_only=True):
    """Shown without its secrets, wherever it is shown."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        shown = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return [(name, "***" if value and name in SECRETS else value) for name, value in shown]

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({inner})"


#: fields whose value is never shown (a database URL may hold a password)
SECRETS = frozenset({"token", "jwt_secret", "dashboard_token", "url"})


class DatabaseSettings(Settings, frozen=True, kw_only=True):
    url: Annotated[str, Option(v.DATABASE, STATE, "store; empty: SQLite in the data directory")] = ""
    wait: Annotated[float, Option(v.duration(0), STATE, "at the start, for a store that is away")] = 60.0


class AcmeSettings(Settings, frozen=True, kw_only=True):
    agree: Annotated[
        bool,
        Option(
            v.SWITCH,
            PUBLIC,
            "get certificates from the authority below, and accept its terms of service; needs -http-addr",
        ),
    ] = False
    email: Annotated[str, Option(v.EMAIL, PUBLIC, "where the authority may write to about them")] = ""
    directory: Annotated[str, Option(v.AUTHORITY, PUBLIC, "the authority (ACME directory); default: Let's Encrypt")] = (
        "https://acme-v02.api.letsencrypt.org/directory"
    )
    ca_cert: Annotated[
        str, Option(v.FILE, PUBLIC, "who signed the directory's own certificate (PEM); empty: a public authority")
    ] = ""
    names: Annotated[
        tuple[str, ...], Option(v.HOSTS, PUBLIC, "host names to have certificates for from the start; no wildcards")
    ] = ()
    on_demand: Annotated[
        str,
        Option(
            v.choice("served", "reserved", "off"),
            PUBLIC,
            "certificates for tunnels when visitors first ask: all that are served, reserved names only, none",
        ),
    ] = "served"
    max_orders: Annotated[
        int, Option(v.integer(1), LIMITS, "certificates that visitors' asking may bring about in an hour")
    ] = 10


class MetricsSettings(Settings, frozen=True, kw_only=True):
    go_names: Annotated[
        bool, Option(v.SWITCH, SEE, "also export the four go_* metric names", flag="go_metric_names")
    ] = False
    report_interval: Annotated[
        float, Option(v.duration(1, 240), SEE, "how often an agent reports its metrics over the link")
    ] = 15.0


class TracingSettings(Settings, frozen=True, kw_only=True):
    endpoint: Annotated[
        str, Option(v.ENDPOINT, SEE, "where spans go (OTLP base URL, or Zipkin's); empty: OTEL_* decides, or no export")
    ] = ""
    protocol: Annotated[str, Option(v.choice("http/protobuf", "grpc", "zipkin"), SEE, "how spans are exported")] = (
        "http/protobuf"
    )
    ratio: Annotated[float, Option(v.RATIO, SEE, "share of requests that is traced")] = 1.0
    visitor_context: Annotated[
        str, Option(v.choice("join", "link", "ignore"), SEE, "what a visitor's own trace context does")
    ] = "join"
    server_timing: Annotated[bool, Option(v.SWITCH, SEE, "add Server-Timing and traceresponse to answers")] = False
    propagators: Annotated[
        tuple[str, ...],
        Option(v.PROPAGATORS, SEE, "context headers read and written: tracecontext, baggage, b3, b3multi"),
    ] = ("tracecontext", "baggage")


class CoreSettings(Settings, frozen=True, kw_only=True):
    """The core's settings. `data_dir` may be empty: ask `tunnel.config.data_dir(settings)`."""

    agent_addr: Annotated[str, Option(v.ADDRESS, LINK, "where agents dial in")] = ":8443"
    agent_tls: Annotated[bool, Option(v.SWITCH, LINK, "TLS on the agents' links")] = True
    agent_cert: Annotated[
        str, Option(v.FILE, LINK, "certificate for agents' links (PEM); empty: self-made, pinned by fingerprint")
    ] = ""
    agent_key: Annotated[str, Option(v.FILE, LINK, "its private key (PEM)")] = ""
    heartbeat: Annotated[float, Option(v.duration(0.05), LINK, "time between heartbeats")] = 5.0
    heartbeat_timeout: Annotated[float, Option(v.duration(0.1), LINK, "a link that was silent for so long is dead")] = (
        15.0
    )
    auth_timeout: Annotated[float, Option(v.duration(0.05), LINK, "time an agent has to authenticate")] = 10.0

    public_addr: Annotated[str, Option(v.ADDRESS, PUBLIC, "where visitors come in")] = ":8080"
    public_tls: Annotated[
        bool, Option(v.SWITCH, PUBLIC, "TLS for visitors; a certificate that is given turns it on")
    ] = False
    public_cert: Annotated[
        str, Option(v.FILE, PUBLIC, "certificate for visitors (PEM), for TLS; with -public-cert-dir: the default")
    ] = ""
    public_key: Annotated[str, Option(v.FILE, PUBLIC, "its private key (PEM)")] = ""
    public_cert_dir: Annotated[
        str,
        Option(v.DIRECTORY, PUBLIC, "certificates by name: NAME.crt with NAME.key, or certbot's directory 'live'"),
    ] = ""
    http_addr: Annotated[
        str,
        Option(
            v.ADDRESS_OR_NONE,
            PUBLIC,
            "beside TLS: plain HTTP that sends visitors to https, and answers ACME challenges",
        ),
    ] = ""
    acme: AcmeSettings = field(default_factory=AcmeSettings)
    base_domain: Annotated[str, Option(v.DOMAIN, PUBLIC, "tunnels are reached as <subdomain>.<base domain>")] = (
        "localhost"
    )
    public_url: Annotated[
        str, Option(v.PUBLIC_URL, PUBLIC, "what visitors type, where it differs from public-addr (behind a proxy)")
    ] = ""
    tcp_ports: Annotated[
        str, Option(v.PORTS, PUBLIC, "public ports for TCP tunnels, such as 20000-20100; 0: any free port; empty: none")
    ] = ""
    trusted_proxies: Annotated[
        tuple[str, ...], Option(v.NETWORKS, PUBLIC, "proxies whose X-Forwarded-* and Forwarded are believed")
    ] = ()
    proxy_protocol: Annotated[
        tuple[str, ...],
        Option(v.NETWORKS, PUBLIC, "load balancers that begin each connection with a PROXY protocol header (v1, v2)"),
    ] = ()

    max_connections: Annotated[
        int, Option(v.integer(1), LIMITS, "agents connected in all; all links of one count once")
    ] = 1000
    max_connections_per_account: Annotated[
        int,
        Option(
            v.integer(-1), LIMITS, "agents of one account connected; -1: nine tenths of -max-connections; 0: no limit"
        ),
    ] = -1
    max_names_per_account: Annotated[
        int,
        Option(v.integer(0), LIMITS, "names that one account's agents serve or hold, reserved ones aside; 0: no limit"),
    ] = 10_000
    max_ports_per_account: Annotated[
        int, Option(v.integer(0), LIMITS, "TCP tunnels of one account, each with a port; 0: no limit")
    ] = 100
    max_streams: Annotated[int, Option(v.integer(1, 1_000_000), LIMITS, "open requests on one link")] = 1000
    address_share: Annotated[
        int,
        Option(
            v.integer(1, 100),
            LIMITS,
            "percent of these, as far as others leave them free, that visitors of one address may have; 100: all",
        ),
    ] = 50
    max_body: Annotated[int, Option(v.size(0), LIMITS, "largest request body; 0: no limit")] = 0
    max_head: Annotated[int, Option(v.size(1024), LIMITS, "largest request head")] = 65536
    max_target: Annotated[int, Option(v.size(256), LIMITS, "longest request target (path and query)")] = 16384
    max_fields: Annotated[int, Option(v.integer(0), LIMITS, "header fields of a request; 0: no limit")] = 200
    max_requests: Annotated[int, Option(v.integer(0), LIMITS, "requests on one visitor's connection; 0: no limit")] = (
        100_000
    )
    max_visitors: Annotated[int, Option(v.integer(0), LIMITS, "visitors' connections in all; 0: no limit")] = 10_000
    max_visitors_per_address: Annotated[
        int,
        Option(
            v.integer(0),
            LIMITS,
            "visitors' connections from one address, and its requests through -trusted-proxies, at a time; 0: no limit",
        ),
    ] = 2500
    max_attaching: Annotated[
        int, Option(v.integer(1), LIMITS, "agents' connections that have not authenticated yet")
    ] = 1000
    max_handshakes: Annotated[
        int,
        Option(v.integer(0), LIMITS, "handshakes a second from one address, agents' and visitors' TLS; 0: no limit"),
    ] = 100
    max_buffer: Annotated[
        int, Option(v.size(0), LIMITS, "bytes that all links together hold unread or unsent; 0: no limit")
    ] = 512 * 1024 * 1024
    stream_window: Annotated[
        int, Option(v.size(65536), LIMITS, "bytes of one request's or answer's body that are on a link unread")
    ] = 1024 * 1024
    link_window: Annotated[int, Option(v.size(65536), LIMITS, "the same of all bodies on a link together")] = (
        32 * 1024 * 1024
    )
    max_link_queue: Annotated[
        int, Option(v.size(0), LIMITS, "bytes that wait to be sent to one agent before it gets no new requests")
    ] = 64 * 1024 * 1024
    head_timeout: Annotated[float, Option(v.duration(0.05), LIMITS, "time for a request's head to arrive")] = 10.0
    request_timeout: Annotated[float, Option(v.duration(0.05), LIMITS, "time to the answer's head")] = 30.0
    body_idle_timeout: Annotated[
        float, Option(v.duration(0.05), LIMITS, "longest pause within a body (not event streams, not upgrades)")
    ] = 30.0
    keepalive_timeout: Annotated[float, Option(v.duration(0.05), LIMITS, "idle time of a visitor's connection")] = 60.0
    name_hold: Annotated[
        float,
        Option(v.duration(0, v.YEARS), LIMITS, "how long an unreserved name stays its account's after its last link"),
    ] = 600.0

    data_dir: Annotated[
        str, Option(v.DIRECTORY, STATE, "store, keys and certificate; empty: the platform's state directory")
    ] = ""
    invite_dir: Annotated[
        str, Option(v.DIRECTORY, STATE, "where to leave what the first agent needs: files token and fingerprint")
    ] = ""
    database: DatabaseSettings = field(default_factory=DatabaseSettings)
    jwt_secret: Annotated[str, Option(v.SECRET, STATE, "agents may come with a JWT signed by this (HS256)")] = ""
    jwt_secret_file: Annotated[str, Option(v.PATH, STATE, "the same, read from a file")] = ""
    jwt_public_key: Annotated[str, Option(v.FILE, STATE, "or by the owner of this public key (PEM, RS256)")] = ""

    metrics_addr: Annotated[str, Option(v.ADDRESS_OR_NONE, SEE, "metrics and health; empty: none")] = "127.0.0.1:9090"
    dashboard_addr: Annotated[str, Option(v.ADDRESS_OR_NONE, SEE, "status and health; empty: none")] = "127.0.0.1:9000"
    dashboard_token: Annotated[
        str, Option(v.SECRET, SEE, "who reads the status must have it; empty: made where it is not on loopback")
    ] = ""
    dashboard_token_file: Annotated[str, Option(v.PATH, SEE, "the same, read from a file")] = ""
    log_level: Annotated[str, Option(v.LEVEL, SEE, "least level that is logged")] = "info"
    log_json: Annotated[bool, Option(v.SWITCH, SEE, "log as JSON, one object a line, on standard output")] = False
    layers: Annotated[tuple[str, ...], Option(v.WORDS, SEE, "plug-ins, outermost first; names or module:attribute")] = (
        "tracing",
        "metrics",
        "logs",
        "health",
    )
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    tracing: TracingSettings = field(default_factory=TracingSettings)

    config: Annotated[str, Option(v.PATH, LIFE, "settings file (TOML)")] = ""
    workers: Annotated[
        int, Option(v.integer(1, 64), LIFE, "processes that share the ports (Linux); agents keep a link to each")
    ] = 1
    drain_delay: Annotated[
        float, Option(v.duration(0), LIFE, "after SIGTERM, time between not ready and closing the listeners")
    ] = 0.0
    drain_timeout: Annotated[float, Option(v.duration(0), LIFE, "time that accepted requests have to finish")] = 30.0


class AgentSettings(Settings, frozen=True, kw_only=True):
    """The agent's settings. `metrics_addr` and `metrics_port` always agree; `token` is filled from `token_file`.

    is_metrics_addr_given: or it is the default, which gives way where it is in use; no setting of its own.
    """

    server: Annotated[str, Option(v.SERVER, LINK, "the core's address for agents")] = "localhost:8443"
    token: Annotated[str, Option(v.SECRET, LINK, "token or JWT; better from a file or the environment")] = ""
    token_file: Annotated[str, Option(v.PATH, LINK, "file that holds the token")] = ""
    agent_id: Annotated[str, Option(v.IDENTIFIER, LINK, "this agent's name; empty: made from the host's")] = ""
    tls: Annotated[bool, Option(v.SWITCH, LINK, "TLS on the link")] = True
    tls_skip_verify: Annotated[
        bool, Option(v.SWITCH, LINK, "do not check the core's certificate (anybody can listen in)")
    ] = False
    ca_cert: Annotated[str, Option(v.FILE, LINK, "authority that signed the core's certificate (PEM)")] = ""
    server_fingerprint: Annotated[
        str, Option(v.FINGERPRINT, LINK, "SHA-256 of the core's certificate, as the core prints it")
    ] = ""
    server_fingerprint_file: Annotated[str, Option(v.PATH, LINK, "the same, read from a file at the start")] = ""
    heartbeat: Annotated[float, Option(v.duration(0.05), LINK, "time between heartbeats")] = 5.0
    heartbeat_timeout: Annotated[float, Option(v.duration(0.1), LINK, "a link that was silent for so long is dead")] = (
        15.0
    )
    max_retries: Annotated[
        int, Option(v.integer(-1), LINK, "attempts to get the link back before giving up; -1: for ever")
    ] = -1

    max_buffer: Annotated[
        int,
        Option(
            v.size(0),
            LINK,
            "bytes that all links together hold unread or unsent, a quarter of it a link's window at most; 0: no limit",
        ),
    ] = 256 * 1024 * 1024

    local: Annotated[
        str, Option(v.LOCAL, SERVICES, "what to serve: http://localhost:3000, a port, or api=http://...,db=tcp://...")
    ] = "http://localhost:3000"
    subdomain: Annotated[
        str, Option(v.SUBDOMAIN, SERVICES, "public name (or full host name) of the one service; empty: a stable one")
    ] = ""
    host_header: Annotated[
        str,
        Option(
            v.HOST_HEADER,
            SERVICES,
            "Host that services get: local (their own address), or any name, and redirects there lead visitors to the "
            "public address; empty: what the visitor typed",
        ),
    ] = ""
    request_timeout: Annotated[
        float, Option(v.duration(0.05), SERVICES, "time the local service has to begin its answer")
    ] = 30.0

    metrics_addr: Annotated[str, Option(v.ADDRESS_OR_NONE, SEE, "metrics and health; empty: none")] = "127.0.0.1:9091"
    is_metrics_addr_given: bool = False
    metrics_port: Annotated[
        int, Option(v.integer(0, 65535), SEE, "the same on 127.0.0.1 with this port; 0: any free one")
    ] = 9091
    log_level: Annotated[str, Option(v.LEVEL, SEE, "least level that is logged")] = "info"
    log_json: Annotated[bool, Option(v.SWITCH, SEE, "log as JSON, one object a line, on standard output")] = False
    layers: Annotated[tuple[str, ...], Option(v.WORDS, SEE, "plug-ins, outermost first; names or module:attribute")] = (
        "tracing",
        "metrics",
        "logs",
        "health",
    )
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    tracing: TracingSettings = field(default_factory=TracingSettings)

    config: Annotated[str, Option(v.PATH, LIFE, "settings file (TOML)")] = ""
    workers: Annotated[int, Option(v.integer(1, 16), LIFE, "processes that serve as one agent (Linux)")] = 1
    drain_timeout: Annotated[float, Option(v.duration(0), LIFE, "time that open requests have to finish")] = 30.0
