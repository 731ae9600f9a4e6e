"""Attributes that many spans say alike: a tunnel's names, a visitor, a target. Each group is made once and kept,
together with its encoding; it is a function of the few values that it is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tunnel.handler import Fields, LocalVisit, RequestVisit, StreamVisit

Attributes = dict[str, Any]  #: str, int and float values only

MAX_TEXT = 2048  # characters kept of a path, a query string, a user agent: they are visitors' and may be huge
MAX_METHOD = 100  # characters of a method that nobody knows
MAX_KEPT = 300  # characters of a text whose group is kept: longer ones are rare, and would take much memory
KNOWN_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})


class Common:
    """Attributes that recur from span to span. encoded: what an encoder made of them, b"" before."""

    __slots__ = ("attributes", "encoded")

    def __init__(self, attributes: Attributes) -> None:
        self.attributes = attributes
        self.encoded = b""


def of_request(visit: RequestVisit) -> tuple[Common, Common, Common, Common]:
    scheme, host, target = visit.scheme, visit.host[:MAX_KEPT], visit.target
    agent = user_agent(visit)
    return (
        route_group(visit.method[:MAX_METHOD], scheme, host, visit.http_version),
        ended_group(visit.status, visit.outcome, visit.tunnel, visit.agent_id, visit.connection_id, visit.account_id),
        (visitor_group if len(agent) <= MAX_KEPT else visitor_group.__wrapped__)(visit.client, agent),
        (url_group if len(target) <= MAX_KEPT else url_group.__wrapped__)(scheme, host, target),
    )


def of_stream(visit: StreamVisit) -> tuple[Common, Common, Common]:
    target = visit.target
    return (
        carried_group(visit.method[:MAX_METHOD], visit.protocol),
        ended_group(visit.status, visit.outcome, visit.tunnel, visit.agent_id, visit.connection_id, visit.account_id),
        (path_group if len(target) <= MAX_KEPT else path_group.__wrapped__)(target),
    )


def of_local(visit: LocalVisit) -> tuple[Common, ...]:
    scheme, address, method, target = visit.scheme, visit.address, visit.method, visit.target
    service = service_group(address, scheme, method[:MAX_METHOD], visit.status, visit.outcome)
    if not method:
        return (service,)
    return service, (full_group if len(target) <= MAX_KEPT else full_group.__wrapped__)(scheme, address, target)


def user_agent(visit: RequestVisit) -> str:
    headers = visit.request_headers
    if not isinstance(headers, Fields):
        return _find_user_agent(headers)
    agent = headers.agent
    if agent is None:
        agent = headers.agent = _find_user_agent(headers)
    return agent


def _find_user_agent(headers: Sequence[tuple[bytes, bytes]]) -> str:
    for field, value in headers:
        if len(field) == 10 and field.lower() == b"user-agent":
            return value[:MAX_TEXT].decode("latin-1")
    return ""


@lru_cache(1024)
def route_group(method: str, scheme: str, host: str, http_version: str) -> Common:
    out = _method(method)
    out["url.scheme"] = scheme
    out["network.protocol.version"] = http_version
    _put(out, "server.address", clean(host))
    return Common(out)


@lru_cache(4096)
def ended_group(status: int, outcome: str, tunnel: str, agent_id: str, connection_id: str, account_id: str) -> Common:
    """How it ended, and whose it was."""
    out: Attributes = {}
    _put(out, "http.response.status_code", status)
    _put(out, "tunnel.outcome", outcome)
    _put(out, "tunnel.name", tunnel)
    _put(out, "agent.id", clean(agent_id))
    _put(out, "tunnel.connection.id", connection_id)
    _put(out, "tunnel.account.id", account_id)
    return Common(out)


@lru_cache(4096)
def visitor_group(client: str, user_agent: str) -> Common:
    out: Attributes = {}
    _put(out, "client.address", client)
    _put(out, "user_agent.original", clean(user_agent))
    return Common(out)


@lru_cache(2048)
def url_group(scheme: str, host: str, target: str) -> Common:
    path, query = split_target(target)
    url = f"{scheme}://{clean(host)}{path}"
    out: Attributes = {"http.url": f"{url}?{query}" if query else url, "url.path": path}
    _put(out, "url.query", query)
    return Common(out)


@lru_cache(2048)
def path_group(target: str) -> Common:
    if not target:
        return Common({})
    path, query = split_target(target)
    out: Attributes = {"url.path": path}
    _put(out, "url.query", query)
    return Common(out)


@lru_cache(2048)
def full_group(scheme: str, address: str, target: str) -> Common:
    path, query = split_target(target)
    url = f"{scheme}://{address}{path}"
    full = f"{url}?{query}" if query else url
    return Common({"url.full": full, "http.url": full})


@lru_cache(1024)
def carried_group(method: str, protocol: str) -> Common:
    out = _method(method) if method else {}
    out["tunnel.stream.protocol"] = protocol
    return Common(out)


@lru_cache(1024)
def service_group(address: str, scheme: str, method: str, status: int, outcome: str) -> Common:
    host, _, port = address.rpartition(":")
    out: Attributes = {"server.address": host.strip("[]") or address, "url.scheme": scheme}
    if port.isascii() and port.isdigit():
        out["server.port"] = int(port)
    if method:
        out |= _method(method)
    _put(out, "http.response.status_code", status)
    _put(out, "tunnel.outcome", outcome)
    return Common(out)


def _put(out: Attributes, key: str, value: object) -> None:
    if value:
        out[key] = value


def _method(method: str) -> Attributes:
    if method in KNOWN_METHODS:
        return {"http.request.method": method, "http.method": method}
    original = clean(method)
    return {"http.request.method": "_OTHER", "http.request.method_original": original, "http.method": original}


def clean(text: str) -> str:
    """Bounded, and valid UTF-8: one lone surrogate would make the whole batch unsendable."""
    text = text[:MAX_TEXT]
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def split_target(target: str) -> tuple[str, str]:
    """A request target as (path, query string with the values redacted). An absolute target loses its authority."""
    path, _, query = target.partition("#")[0].partition("?")
    if "://" in path and not path.startswith("/"):
        path = "/" + path.partition("://")[2].partition("/")[2]
    return clean(path), redact(query) if query else ""


def redact(query: str) -> str:
    """`a=1&b=2&c` → `a=REDACTED&b=REDACTED&REDACTED`. Names stay; what has no `=` may be a name or a secret, and goes.
    `;` separates as `&` does."""
    parts = query[:MAX_TEXT].replace(";", "&").split("&")
    return clean("&".join(_redact_part(part) for part in parts))


def _redact_part(part: str) -> str:
    name, equals, _ = part.partition("=")
    return f"{name}=REDACTED" if equals else "REDACTED" if name else ""
