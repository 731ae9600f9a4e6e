"""TraceQL, as far as this project asks it, evaluated on spans as Tempo would.

    find('{ kind = server && duration > 500ms } | select(span.tunnel.outcome)', spans)
    # → the spans that match, each as {selected attribute: value}

A span is {"service": …, "name": …, "kind": "server", "status": "error", "duration": seconds, "attributes": {…}}.
Semantics: grafana.com/docs/tempo, "Construct a TraceQL query". A comparison with an attribute that is not there is
false; types are not converted: a number never equals a string.
"""

from __future__ import annotations

import re
from typing import Any

Span = dict[str, Any]

_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_CONDITION = re.compile(
    r'\s*(resource\.service\.name|span\.[\w.]+|name|kind|status|duration)\s*(=~|!=|>=|<=|=|>|<)\s*'
    r'("[^"]*"|[\d.]+(?:ns|us|ms|s|m|h)|-?[\d.]+|nil|true|false|[a-z]+)\s*'
)  # fmt: skip
_KINDS = {"server", "client", "internal", "producer", "consumer", "unspecified"}
_STATES = {"error", "ok", "unset"}


class QueryError(Exception):
    """Tempo refuses the query, or it is beyond us."""


def find(query: str, spans: list[Span]) -> list[dict[str, Any]]:
    """Raises QueryError."""
    match = re.fullmatch(r"\s*\{(.*?)\}\s*(?:\|\s*select\(([^)]*)\)\s*)?", query)
    if match is None:
        raise QueryError(query)
    conditions = [_condition(part, query) for part in match[1].split("&&")]
    selected = [name.strip() for name in (match[2] or "").split(",") if name.strip()]
    if bad := [name for name in selected if not name.startswith(("span.", "resource."))]:
        raise QueryError(f"{query}: {bad}")
    return [{name: _value(name, span) for name in selected} for span in spans
            if all(_holds(span, *one) for one in conditions)]  # fmt: skip


def _condition(text: str, query: str) -> tuple[str, str, Any]:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise QueryError(f"{query}: {text!r}")
    name, sign, word = match.groups()
    value: Any
    if word.startswith('"'):
        value = word[1:-1]
    elif word == "nil":
        value = None
    elif unit := re.fullmatch(r"([\d.]+)(ns|us|ms|s|m|h)", word):
        value = float(unit[1]) * _UNITS[unit[2]]
    elif word in ("true", "false"):
        value = word == "true"
    elif re.fullmatch(r"-?[\d.]+", word):
        value = float(word)
    else:
        value = word
        if word not in {"kind": _KINDS, "status": _STATES}.get(name, ()):
            raise QueryError(f"{query}: {word!r} is no value of {name}")
    if (name == "duration") != (unit_of(word) is not None) or (name in ("kind", "status") and word.startswith('"')):
        raise QueryError(f"{query}: {text!r} compares what can't be compared")
    return name, sign, value


def unit_of(word: str) -> str | None:
    match = re.fullmatch(r"[\d.]+(ns|us|ms|s|m|h)", word)
    return match[1] if match else None


def _value(name: str, span: Span) -> Any:
    if name == "resource.service.name":
        return span["service"]
    if name.startswith("span."):
        return span["attributes"].get(name.removeprefix("span."))
    return span[name]


def _holds(span: Span, name: str, sign: str, wanted: Any) -> bool:
    value = _value(name, span)
    if wanted is None:
        return (value is None) == (sign == "=")
    if value is None or isinstance(value, str) != isinstance(wanted, str):
        return False
    if sign == "=~":
        return re.fullmatch(wanted, value) is not None
    return {"=": value == wanted, "!=": value != wanted, ">": value > wanted, "<": value < wanted,
            ">=": value >= wanted, "<=": value <= wanted}[sign]  # fmt: skip
