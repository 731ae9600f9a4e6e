"""Where spans go: choosing the exporter from our options and the OTEL_* variables, and making it.

Nothing of OpenTelemetry is imported before `make_exporter` and `make_resource`, which run on the export thread, so a
start is not delayed by it and gRPC (39 MB) is loaded only where it was chosen.

What our configuration says outright wins over OTEL_*: an endpoint (OTEL_TRACES_EXPORTER is not asked then), a protocol
or propagators other than the default. Above both is OTEL_SDK_DISABLED: no spans, whatever is configured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    import requests
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import SpanExporter

HTTP, GRPC, ZIPKIN, CONSOLE = "http/protobuf", "grpc", "zipkin", "console"
PROTOCOLS = (HTTP, GRPC, ZIPKIN)
_TRACES_PATH = "/v1/traces"
_ZIPKIN_PATH = "/api/v2/spans"
_CREDENTIAL_PROVIDERS = (
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
)
_NEEDS = {
    GRPC: ("opentelemetry.exporter.otlp.proto.grpc", "grpc"),
    ZIPKIN: ("opentelemetry.exporter.zipkin.json", "zipkin"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """protocol: one of PROTOCOLS or "console". endpoint: a full URL for HTTP and Zipkin, a base for gRPC."""

    protocol: str
    endpoint: str

    @property
    def shown(self) -> str:
        """The endpoint without user, password and query, for logs."""
        try:
            parts = urlsplit(self.endpoint)
            return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        except ValueError:
            return self.protocol


@dataclass(frozen=True, slots=True)
class Limits:
    """queue: finished visits kept. batch: spans an export. delay: seconds between exports. timeout: of one export."""

    queue: int = 2048
    batch: int = 512
    delay: float = 5.0
    timeout: float = 30.0


def choose_target(options: Mapping[str, Any], environ: Mapping[str, str]) -> Target | None:
    """Where to export to, or None if nothing is configured. ValueError: our options name an unknown protocol."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    endpoint = str(options.get("endpoint") or "").strip()
    exporters = "" if endpoint else environ.get("OTEL_TRACES_EXPORTER", "")
    named = [word.strip().lower() for word in exporters.split(",") if word.strip()]
    if named == ["none"]:
        return None
    protocol = str(options.get("protocol") or HTTP)
    if protocol not in PROTOCOLS:
        raise ValueError(f"tracing.protocol is {protocol!r}: it must be one of {', '.join(PROTOCOLS)}")
    if protocol == HTTP:
        if CONSOLE in named:
            return Target(CONSOLE, "")
        if ZIPKIN in named:
            protocol = ZIPKIN
        elif _environment_protocol(environ) == GRPC:
            protocol = GRPC
    return _zipkin(endpoint, environ) if protocol == ZIPKIN else _otlp(protocol, endpoint, environ)


def _environment_protocol(environ: Mapping[str, str]) -> str:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if value := environ.get(name, "").strip().lower():
            return value
    return ""


def _zipkin(endpoint: str, environ: Mapping[str, str]) -> Target | None:
    if endpoint:
        return Target(ZIPKIN, _with_path(endpoint, _ZIPKIN_PATH))
    endpoint = environ.get("OTEL_EXPORTER_ZIPKIN_ENDPOINT", "").strip()
    return Target(ZIPKIN, endpoint) if endpoint else None


def _otlp(protocol: str, endpoint: str, environ: Mapping[str, str]) -> Target | None:
    if not endpoint:
        if exact := environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip():
            return Target(protocol, exact)
        endpoint = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
    if not endpoint:
        return None
    return Target(protocol, endpoint if protocol == GRPC else _with_path(endpoint, _TRACES_PATH))


def _with_path(endpoint: str, path: str) -> str:
    """The URL with the path added to its own, unless it already ends so. A bare host:port means plain HTTP."""
    if "://" not in endpoint:
        endpoint = "http://" + endpoint
    parts = urlsplit(endpoint)
    own = parts.path.rstrip("/")
    return urlunsplit(parts._replace(path=own if own.endswith(path) else own + path))


def missing_extra(target: Target) -> str:
    """What to install for this target, in one line; "" if nothing is missing."""
    module, extra = _NEEDS.get(target.protocol, ("", ""))
    if not module:
        return ""
    try:
        found = find_spec(module) is not None
    except ImportError:
        found = False
    return "" if found else f"tracing over {target.protocol} needs more: pip install 'trio-tunnel[{extra}]'"


def read_limits(environ: Mapping[str, str]) -> tuple[Limits, list[str]]:
    """(limits, complaints) from OTEL_BSP_*; a bad value is complained about and the default stays."""
    complaints: list[str] = []

    def number(name: str, default: int) -> int:
        text = environ.get(name, "").strip()
        if not text:
            return default
        if text.isascii() and text.isdigit() and int(text) > 0:
            return int(text)
        complaints.append(f"{name}={text} is not a whole number above 0")
        return default

    queue = number("OTEL_BSP_MAX_QUEUE_SIZE", 2048)
    batch = min(number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512), queue)
    delay = number("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1e3
    timeout = number("OTEL_BSP_EXPORT_TIMEOUT", 30000) / 1e3
    return Limits(queue, batch, delay, timeout), complaints


def _timeout(limits: Limits, environ: Mapping[str, str], *names: str) -> float:
    """Seconds for one export: the exporter's own variable (default 10 s), but at most OTEL_BSP_EXPORT_TIMEOUT."""
    for name in names:
        try:
            own = float(environ[name])
        except (KeyError, ValueError):
            continue
        if own > 0:
            return min(own, limits.timeout)
    return min(10.0, limits.timeout)


def make_exporter(target: Target, limits: Limits, environ: Mapping[str, str]) -> SpanExporter:
    """The SDK's exporter. Slow (imports): call it on a thread. The rest of OTEL_EXPORTER_* it reads itself."""
    if target.protocol == ZIPKIN:
        from opentelemetry.exporter.zipkin.json import ZipkinExporter

        seconds = _timeout(limits, environ, "OTEL_EXPORTER_ZIPKIN_TIMEOUT")
        return ZipkinExporter(endpoint=target.endpoint, timeout=max(1, round(seconds)))
    if target.protocol == CONSOLE:
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr)
    seconds = _timeout(limits, environ, "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
    if target.protocol == GRPC:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

        return OverGrpc(endpoint=target.endpoint, timeout=seconds)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

    brings_session = any(environ.get(name, "").strip() for name in _CREDENTIAL_PROVIDERS)
    if brings_session or find_spec("requests") is None:  # which the exporter may do without one day
        return OverHttp(endpoint=target.endpoint, timeout=seconds)

    import requests

    session = requests.Session()
    exporter = OverHttp(endpoint=target.endpoint, timeout=seconds, session=session)
    look_once(session, target.endpoint)
    return exporter


def look_once(session: requests.Session, endpoint: str) -> None:
    """Have the session's proxies, certificates and ~/.netrc read now: by itself it does so at each request, and that
    is more than half of what a request costs."""
    from requests.utils import get_netrc_auth

    settings = session.merge_environment_settings(endpoint, {}, None, None, None)
    session.proxies, session.verify = settings["proxies"], settings["verify"]
    session.auth = get_netrc_auth(endpoint)
    session.trust_env = False


def make_resource(role: str, version: str) -> Resource:
    """Who sends: tunnel-core or tunnel-agent; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.version import __version__

    own = Resource(
        {
            "service.name": f"tunnel-{role}",
            "service.version": version,
            "telemetry.sdk.language": "python",
            "telemetry.sdk.name": "opentelemetry",
            "telemetry.sdk.version": __version__,
        }
    )
    return own.merge(OTELResourceDetector().detect())
