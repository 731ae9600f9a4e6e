"""What Promtail's pipeline stages make of a line: those that deploy/promtail uses, as its documentation says.

config = load(path, environment)                       # the YAML, variables expanded as -config.expand-env does
entry = run(job["pipeline_stages"], Entry(line, {"container": "tunnel-core"}))    # None: dropped
entry.labels, entry.line, entry.time, entry.metadata   # time: seconds since 1970, None: the time it was read at

Semantics from grafana.com/docs/loki, "Promtail pipelines": all stages share the extracted values, which begin as the
labels; a value that is missing leaves what it was to set as it is; a stage that fails passes the line on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

Stage = dict[str, Any]

_GO_LAYOUTS = {"RFC3339Nano": "2006-01-02T15:04:05.999999999Z07:00", "RFC3339": "2006-01-02T15:04:05Z07:00"}
_GO_PARTS = {
    "2006": r"(?P<year>\d{4})", "01": r"(?P<month>\d\d)", "02": r"(?P<day>\d\d)", "15": r"(?P<hour>\d\d)",
    "04": r"(?P<minute>\d\d)", "05": r"(?P<second>\d\d)(?P<fraction>\.\d+)?", "Z07:00": r"(?P<zone>Z|[+-]\d\d:\d\d)",
}  # fmt: skip


@dataclass
class Entry:
    """A log line on its way to Loki."""

    line: str
    labels: dict[str, str] = field(default_factory=dict)
    extracted: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    time: float | None = None


def expand(text: str, environment: Mapping[str, str]) -> str:
    """-config.expand-env: variables with defaults, two backslashes become one. Fails on any other dollar sign."""

    def value(match: re.Match[str]) -> str:
        return environment.get(match[1]) or match[2] or ""

    assert re.sub(r"\$\{\w+(:-[^}]*)?\}", "", text).find("$") < 0, "a bare dollar sign would be eaten"
    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", value, text).replace("\\\\", "\\")


def load(path: Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(expand(path.read_text(), environment or {}))
    return found


def go_time(layout: str, text: str) -> float | None:
    """time.Parse: seconds since 1970, or None. A fraction of the seconds is always taken."""
    layout = re.sub(r"\.[09]+", "", _GO_LAYOUTS.get(layout, layout))
    pattern = "".join(_GO_PARTS.get(part, re.escape(part)) for part in
                      re.split(f"({'|'.join(map(re.escape, _GO_PARTS))})", layout))  # fmt: skip
    match = re.fullmatch(pattern, text)
    if match is None:
        return None
    parts = match.groupdict()
    zone = parts.get("zone") or "Z"
    try:
        whole = datetime.fromisoformat(
            f"{parts['year']}-{parts['month']}-{parts['day']}T{parts['hour']}:{parts['minute']}:{parts['second']}"
            + ("+00:00" if zone == "Z" else zone)
        )
    except ValueError:
        return None
    return whole.astimezone(UTC).timestamp() + float(f"0{parts['fraction'] or '.0'}")


def run(stages: list[Stage], entry: Entry) -> Entry | None:
    """The entry after all stages, or None if one dropped it. Raises KeyError for a stage beyond us."""
    if not entry.extracted:
        entry = deepcopy(entry)
        entry.extracted = dict(entry.labels)
    for stage in stages:
        [(name, options)] = stage.items()
        if name == "match":
            if not selects(options["selector"], entry):
                continue
            if options.get("action", "keep") == "drop":
                return None
            if run(options["stages"], entry) is None:
                return None
            continue
        _STAGES[name](options, entry)
    return entry


def selects(selector: str, entry: Entry) -> bool:
    """A LogQL stream selector and line filters: `{container=~"a|b"} |~ "x"`."""
    match = re.fullmatch(r'\{(.*?)\}((?:\s*(?:\|=|!=|\|~|!~)\s*"[^"]*")*)', selector)
    assert match is not None, selector
    for name, sign, wanted in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', match[1]):
        value = entry.labels.get(name, "")
        found = re.fullmatch(wanted, value) is not None if "~" in sign else value == wanted
        if found == sign.startswith("!"):
            return False
    for sign, wanted in re.findall(r'(\|=|!=|\|~|!~)\s*"([^"]*)"', match[2]):
        found = re.search(wanted, entry.line) is not None if "~" in sign else wanted in entry.line
        if found == sign.startswith("!"):
            return False
    return True


def _json(options: Stage, entry: Entry) -> None:
    try:
        record = json.loads(entry.line)
    except ValueError:
        return
    for name, path in options["expressions"].items():
        value = record
        for part in (path or name).split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            entry.extracted[name] = value if isinstance(value, (str, bool, float)) else json.dumps(value)


def _regex(options: Stage, entry: Entry) -> None:
    if (match := re.search(options["expression"], entry.line)) is not None:
        entry.extracted.update({name: value or "" for name, value in match.groupdict().items()})


def _timestamp(options: Stage, entry: Entry) -> None:
    text = entry.extracted.get(options["source"])
    if isinstance(text, str) and (found := go_time(options["format"], text)) is not None:
        entry.time = found


def _labels(options: Stage, entry: Entry) -> None:
    for name, source in options.items():
        if (value := entry.extracted.get(source or name)) not in (None, ""):
            entry.labels[name] = str(value)


def _metadata(options: Stage, entry: Entry) -> None:
    for name, source in options.items():
        if (value := entry.extracted.get(source or name)) not in (None, ""):
            entry.metadata[name] = str(value)


def _labeldrop(options: list[str], entry: Entry) -> None:
    for name in options:
        entry.labels.pop(name, None)


def _template(options: Stage, entry: Entry) -> None:
    assert options["template"] == "{{ TrimSpace .Value }}", "beyond us"
    if (value := entry.extracted.get(options["source"])) is not None:
        entry.extracted[options["source"]] = str(value).strip()


def _output(options: Stage, entry: Entry) -> None:
    if (value := entry.extracted.get(options["source"])) is not None:
        entry.line = str(value)


_STAGES: dict[str, Any] = {
    "json": _json, "regex": _regex, "timestamp": _timestamp, "labels": _labels, "structured_metadata": _metadata,
    "labeldrop": _labeldrop, "template": _template, "output": _output,
}  # fmt: skip
