"""What Filebeat makes of a line: those processors that deploy/filebeat uses, as its documentation says.

event = run(input_, config["processors"], line)     # {"message": …, "trace": {"id": …}, …} nested; None: dropped
flat(event)                                         # {"trace.id": …}

The script processor's JavaScript really runs (dukpy; Filebeat's own engine knows the same ES 5).
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import dukpy
import yaml
from promtail import go_time

Event = dict[str, Any]
_MISSING = object()


def load(path: Path, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """The YAML with ${NAME:default} put in; keys with dots mean nested ones and stay as they are written."""

    def value(match: re.Match[str]) -> str:
        return (environment or {}).get(match[1]) or match[2] or ""

    found: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+)(?::([^}]*))?\}", value, path.read_text()))
    return found


def run(source: dict[str, Any], processors: list[dict[str, Any]], line: str) -> Event | None:
    """A line read by one input, through the input's processors and then all others."""
    event: Event = {"message": line.rstrip("\n")}
    for name, value in deepcopy(source.get("fields", {})).items():
        assert source["fields_under_root"]
        put(event, name, value)
    for processor in [*source.get("processors", []), *processors]:
        if not apply(processor, event):
            return None
    return event


def get(event: Event, name: str) -> Any:
    value: Any = event
    for part in name.split("."):
        value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
    return value


def put(event: Event, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for part in parents:
        event = event.setdefault(part, {})
        assert isinstance(event, dict), f"{name}: {part} is no object"
    event[last] = value


def drop(event: Event, name: str) -> None:
    parent, _, last = name.rpartition(".")
    holder = get(event, parent) if parent else event
    if isinstance(holder, dict):
        holder.pop(last, None)


def flat(event: Event, prefix: str = "") -> Event:
    """Leaves by their dotted names."""
    found: Event = {}
    for name, value in event.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found


def apply(processor: dict[str, Any], event: Event) -> bool:
    """False when the event is dropped. Raises KeyError for a processor beyond us."""
    if "if" in processor:
        branch = processor["then"] if holds(processor["if"], event) else processor.get("else", [])
        return all(apply(one, event) for one in branch)
    [(name, options)] = processor.items()
    if name == "drop_event":
        [(key, condition)] = options.items()
        assert key == "when.not.or"
        return any(holds(one, event) for one in condition)
    _PROCESSORS[name](options or {}, event)
    return True


def holds(condition: dict[str, Any], event: Event) -> bool:
    [(kind, options)] = condition.items()
    if kind == "has_fields":
        return all(get(event, name) is not _MISSING for name in options)
    [(name, wanted)] = options.items()
    value = get(event, name)
    if kind == "equals":
        return bool(value == wanted)
    assert kind == "regexp", kind
    return isinstance(value, str) and re.search(wanted, value) is not None


def _decode_json(options: dict[str, Any], event: Event) -> None:
    for name in options["fields"]:
        try:
            record = json.loads(get(event, name))
        except (ValueError, TypeError):
            continue
        if isinstance(record, dict):
            put(event, options["target"], record)


def _rename(options: dict[str, Any], event: Event) -> None:
    for one in options["fields"]:
        value = get(event, one["from"])
        if value is _MISSING:
            assert options.get("ignore_missing"), f"{one['from']} is missing: Filebeat gives the event an error"
            continue
        assert get(event, one["to"]) is _MISSING, f"{one['to']} is there: Filebeat does not rename over it"
        drop(event, one["from"])
        put(event, one["to"], value)


def _drop_fields(options: dict[str, Any], event: Event) -> None:
    for name in options["fields"]:
        drop(event, name)


def _dissect(options: dict[str, Any], event: Event) -> None:
    pattern = "".join(
        (f"(?P<{part[2:-1]}>.*?)" if len(part) > 3 else ".*") if part.startswith("%{") else re.escape(part)
        for part in re.split(r"(%\{\w*\})", options["tokenizer"])
    )
    match = re.fullmatch(pattern, get(event, options["field"]), re.S)
    assert match is not None, "Filebeat marks the event"
    for name, value in match.groupdict().items():
        put(event, f"{options['target_prefix']}.{name}", value)


def _timestamp(options: dict[str, Any], event: Event) -> None:
    value = get(event, options["field"])
    if value is _MISSING:
        assert options["ignore_missing"]
        return
    times = [go_time(layout, value) for layout in options["layouts"] if isinstance(value, str)]
    if (found := next((one for one in times if one is not None), None)) is not None:  # else it is logged, no more
        put(event, "@timestamp", found)


def _script(options: dict[str, Any], event: Event) -> None:
    assert options["lang"] == "javascript"
    known = {name: value for name, value in flat(event).items() if isinstance(value, (str, int, float))}
    made = dukpy.evaljs(
        [options["source"],
         """var made = {};
            process({
              Get: function (name) { return name in dukpy.known ? dukpy.known[name] : null; },
              Put: function (name, value) { made[name] = value; }
            });
            made;"""],
        known=known,
    )  # fmt: skip
    for name, value in made.items():
        put(event, name, value)


_PROCESSORS: dict[str, Any] = {
    "decode_json_fields": _decode_json, "rename": _rename, "drop_fields": _drop_fields, "dissect": _dissect,
    "timestamp": _timestamp, "script": _script,
}  # fmt: skip
