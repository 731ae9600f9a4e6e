"""What Loki makes of the reference page's log queries, evaluated on lines: enough of LogQL for these, exactly as it is.

    evaluate('{container="tunnel-core"} |= "error" | json | duration > 1s', lines)   # → the labels of each line found

Semantics: grafana.com/docs/loki, "Log queries". `|= "x"` keeps lines that contain x; `| json` makes labels of a line's
keys; `| label > 1s` compares as Go's time.ParseDuration reads it: a line without the label is dropped, one whose label
does not parse stays, with the label `__error__`. The stream selector is the caller's business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"[-+]?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+")
_STAGE = re.compile(r'\|=\s*"([^"]*)"|\|\s*(json)\b|\|\s*(\w+)\s*(>=|<=|>|<)\s*([\w.]+)')


def go_duration(text: object) -> float | None:
    """time.ParseDuration: seconds, or None where it fails (a bare number, a number without a unit)."""
    if not isinstance(text, str) or not _DURATION.fullmatch(text):
        return None
    parts = re.findall(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)", text)
    return sum(float(number) * _UNITS[unit] for number, unit in parts) * (-1 if text.startswith("-") else 1)


def evaluate(query: str, lines: Iterable[str]) -> list[dict[str, Any]]:
    """The labels (that `| json` made) of the lines that a query finds. Raises AssertionError for a query beyond us."""
    pipeline = re.sub(r"^\s*\{[^}]*\}", "", query)
    stages = list(_STAGE.finditer(pipeline))
    assert "".join(stage[0] for stage in stages).replace(" ", "") == pipeline.replace(" ", ""), query
    found = []
    for line in lines:
        labels: dict[str, Any] | None = {}
        for stage in stages:
            labels = _apply(stage, line, labels)
            if labels is None:
                break
        else:
            found.append(labels or {})
    return found


def _apply(stage: re.Match[str], line: str, labels: dict[str, Any]) -> dict[str, Any] | None:
    contained, is_json, label, sign, bound = stage.groups()
    if contained is not None:
        return labels if contained in line else None
    if is_json:
        return {**labels, **json.loads(line)}
    if label not in labels:
        return None
    value, limit = go_duration(labels[label]), go_duration(bound)
    assert limit is not None, bound
    if value is None:
        return {**labels, "__error__": "LabelFilterErr"}
    holds = {">": value > limit, "<": value < limit, ">=": value >= limit, "<=": value <= limit}[sign]
    return labels if holds else None
