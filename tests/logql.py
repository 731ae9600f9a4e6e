"""LogQL, as far as this project asks it, evaluated on lines as Loki would.

    evaluate('{container="tunnel-core"} |= "error" | json | duration > 1s', lines)   # → the labels of each line found
    select(query, entries)      # the same of entries that have stream labels and structured metadata
    measure(query, entries)     # of a metric query: {labels: value}

Semantics: grafana.com/docs/loki, "Log queries", "Metric queries". `| json` makes labels of a line's keys; one that the
stream has already becomes NAME_extracted; a line that is no JSON stays, with the label `__error__`. A label that is not
there is "" to =, !=, =~ and !~; a comparison with a number or a duration drops the line then, and one that can't be
read stays with `__error__`. A metric query in which an error is left fails as a whole.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"[-+]?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+")
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|`[^`]*`|\|=|\|~|!=|!~|=~|==|>=|<=|[{}()\[\],|=<>]|[\w.]+)')
_TAKEN_APART = re.compile(r"\{\{\s*\.(\w+)\s*\}\}")

Labels = dict[str, Any]
Key = tuple[tuple[str, str], ...]


class QueryError(Exception):
    """Loki refuses the query, or a metric query meets a line with an error."""


@dataclass
class Record:
    """What Loki holds of a line."""

    line: str
    labels: Labels = field(default_factory=dict)
    metadata: Labels = field(default_factory=dict)


def go_duration(text: object) -> float | None:
    """time.ParseDuration: seconds, or None where it fails (a bare number, a number without a unit)."""
    if not isinstance(text, str) or not _DURATION.fullmatch(text):
        return None
    parts = re.findall(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)", text)
    return sum(float(number) * _UNITS[unit] for number, unit in parts) * (-1 if text.startswith("-") else 1)


def evaluate(query: str, lines: Iterable[str]) -> list[Labels]:
    """The labels of the lines that a query finds; its stream selector is the caller's business."""
    return select(re.sub(r"^\s*\{[^}]*\}", "{}", query), [Record(line) for line in lines])


def select(query: str, records: Sequence[Record]) -> list[Labels]:
    """Raises QueryError for a query that is none, or beyond us."""
    reader = _Reader(query)
    pipeline = reader.pipeline()
    reader.end()
    return [found for record in records if (found := pipeline(record)) is not None]


def measure(query: str, records: Sequence[Record]) -> dict[Key, float]:
    """By the labels of each series. Raises QueryError."""
    reader = _Reader(query)
    vector = reader.vector()
    reader.end()
    return vector(records)


Pipeline = Callable[[Record], Labels | None]
Vector = Callable[[Sequence[Record]], dict[Key, float]]
Stage = Callable[[Record, Labels], Labels | None]


class _Reader:
    """Recursive descent over the query's tokens."""

    def __init__(self, query: str) -> None:
        self._query = query
        self._tokens, at = [], 0
        while query[at:].strip():
            if (match := _TOKEN.match(query, at)) is None:
                raise QueryError(f"{query!r} at {at}")
            self._tokens.append(match[1])
            at = match.end()
        self._at = 0

    def end(self) -> None:
        if self._at < len(self._tokens):
            raise QueryError(f"{self._query!r}: {self._tokens[self._at :]} is left")

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *wanted: str) -> str:
        token = self._peek()
        if not token or (wanted and token not in wanted):
            raise QueryError(f"{self._query!r}: {token!r} where {wanted or 'more'} was to come")
        self._at += 1
        return token

    def _name(self) -> str:
        token = self._take()
        if not re.fullmatch(r"[a-zA-Z_]\w*", token):
            raise QueryError(f"{self._query!r}: {token!r} is no name")
        return token

    def _string(self) -> str:
        token = self._take()
        if token[0] == "`":
            return token[1:-1]
        if token[0] != '"':
            raise QueryError(f"{self._query!r}: {token!r} is no string")
        return re.sub(r"\\(.)", r"\1", token[1:-1])

    def _names(self) -> list[str]:
        self._take("(")
        names = [self._name()]
        while self._take(",", ")") == ",":
            names.append(self._name())
        return names

    # Metric queries

    def vector(self) -> Vector:
        word = self._take("topk", "sum", "count_over_time", "sum_over_time", "quantile_over_time")
        if word == "topk":
            self._take("(")
            count = int(self._take())
            self._take(",")
            inner = self.vector()
            self._take(")")
            return lambda records: dict(sorted(inner(records).items(), key=lambda one: -one[1])[:count])
        if word == "sum":
            self._take("by")
            names = self._names()
            self._take("(")
            inner = self.vector()
            self._take(")")
            return lambda records: _summed(inner(records), names)
        return self._over_time(word)

    def _over_time(self, word: str) -> Vector:
        self._take("(")
        share = 0.0
        if word == "quantile_over_time":
            share = float(self._take())
            self._take(",")
        pipeline = self.pipeline(is_metric=True)
        self._take("[")
        if not re.fullmatch(r"(\d+(ms|s|m|h|d))+", length := self._take()):
            raise QueryError(f"{self._query!r}: {length!r} is no length of time")
        self._take("]")
        self._take(")")
        names: list[str] | None = None
        if self._peek() == "by":
            self._take()
            names = self._names()

        def vector(records: Sequence[Record]) -> dict[Key, float]:
            values: dict[Key, list[float]] = {}
            for record in records:
                labels = pipeline(record)
                if labels is None:
                    continue
                if labels.get("__error__"):
                    raise QueryError(f"{labels['__error__']} in {record.line!r}: {self._query}")
                value = labels.pop(_UNWRAPPED, 1.0)
                if word != "count_over_time" and value is None:
                    continue
                chosen = labels if names is None else {name: labels[name] for name in names if name in labels}
                values.setdefault(_key(chosen), []).append(value)
            return {key: _reduced(word, share, found) for key, found in values.items()}

        return vector

    # Log queries

    def pipeline(self, *, is_metric: bool = False) -> Pipeline:
        stages = [self._selector()]
        while (token := self._peek()) and token not in ("[", ")"):
            if token in ("|=", "!=", "|~", "!~"):
                stages.append(_line_filter(self._take(), self._string()))
            else:
                self._take("|")
                stages.append(self._stage(is_metric))

        def pipeline(record: Record) -> Labels | None:
            labels: Labels | None = {**record.labels, **record.metadata}
            for stage in stages:
                if labels is None:
                    return None
                labels = stage(record, labels)
            return labels

        return pipeline

    def _selector(self) -> Stage:
        self._take("{")
        wanted = []
        while self._peek() != "}":
            wanted.append((self._name(), self._take("=", "!=", "=~", "!~"), self._string()))
            if self._peek() == ",":
                self._take()
        self._take("}")
        return lambda record, labels: labels if all(_matches(record.labels, *one) for one in wanted) else None

    def _stage(self, is_metric: bool) -> Stage:
        word = self._name()
        if word == "json":
            chosen = {}
            while self._peek() not in ("", "|", "[", ")", "|=", "!=", "|~", "!~"):
                name = self._name()
                self._take("=")
                chosen[name] = self._string()
                if self._peek() == ",":
                    self._take()
            return lambda record, labels: _json(record, labels, chosen)
        if word == "line_format":
            _check_template(self._string())
            return lambda record, labels: labels
        if word == "drop":
            dropped = [self._name()]
            while self._peek() == ",":
                self._take()
                dropped.append(self._name())
            return lambda record, labels: {name: value for name, value in labels.items() if name not in dropped}
        if word == "unwrap":
            return self._unwrap(is_metric)
        return self._filter(word)

    def _unwrap(self, is_metric: bool) -> Stage:
        if not is_metric:
            raise QueryError(f"{self._query!r}: unwrap in a log query")
        name, read = self._name(), _number
        if self._peek() == "(":
            if name not in ("duration", "duration_seconds"):
                raise QueryError(f"{self._query!r}: unknown conversion {name!r}")
            [name] = self._names()
            read = go_duration

        def unwrap(record: Record, labels: Labels) -> Labels:
            if not labels.get(name) and labels.get(name) != 0:
                return {**labels, _UNWRAPPED: None}  # such a line is not counted
            value = read(labels[name])
            return (
                {**labels, _UNWRAPPED: value} if value is not None else {**labels, "__error__": "SampleExtractionErr"}
            )

        return unwrap

    def _filter(self, name: str) -> Stage:
        sign = self._take("=", "!=", "=~", "!~", "==", ">", "<", ">=", "<=")
        token = self._peek()
        if token[:1] in ('"', "`"):
            if sign not in ("=", "!=", "=~", "!~"):
                raise QueryError(f"{self._query!r}: {sign} with a string")
            wanted = self._string()
            return lambda record, labels: labels if _matches(labels, name, sign, wanted) else None
        bound, read = go_duration(self._take()), go_duration
        if bound is None:
            bound, read = _number(token), _number
        if bound is None or sign in ("=~", "!~"):
            raise QueryError(f"{self._query!r}: {token!r} is neither number nor duration")
        limit = bound

        def compare(record: Record, labels: Labels) -> Labels | None:
            if name not in labels:
                return None
            value = read(labels[name])
            if value is None:
                return {**labels, "__error__": "LabelFilterErr"}
            return labels if _holds(value, sign, limit) else None

        return compare


_UNWRAPPED = "\0value"


def _holds(value: float, sign: str, limit: float) -> bool:
    return {">": value > limit, "<": value < limit, ">=": value >= limit, "<=": value <= limit, "=": value == limit,
            "==": value == limit, "!=": value != limit}[sign]  # fmt: skip


def _matches(labels: Labels, name: str, sign: str, wanted: str) -> bool:
    value = _text(labels.get(name, ""))
    found = re.fullmatch(wanted, value, re.DOTALL) is not None if "~" in sign else value == wanted
    return found != sign.startswith("!")


def _line_filter(sign: str, wanted: str) -> Stage:
    def keep(record: Record, labels: Labels) -> Labels | None:
        found = re.search(wanted, record.line) is not None if "~" in sign else wanted in record.line
        return labels if found != sign.startswith("!") else None

    return keep


def _json(record: Record, labels: Labels, chosen: dict[str, str]) -> Labels:
    try:
        content = json.loads(record.line)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return {**labels, "__error__": "JSONParserErr"}
    found = {name: content.get(path) for name, path in chosen.items()} if chosen else _flat(content, "")
    return {**labels, **{f"{name}_extracted" if name in record.labels else name: value for name, value in found.items()
                         if value is not None}}  # fmt: skip


def _flat(content: dict[str, Any], prefix: str) -> Labels:
    flat: Labels = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}_")
        elif not isinstance(value, list):  # arrays are skipped
            flat[re.sub(r"\W", "_", prefix + name)] = value
    return flat


def _check_template(text: str) -> None:
    left = _TAKEN_APART.sub("", text)
    if "{{" in left or "}}" in left:
        raise QueryError(f"a template beyond us: {text!r}")


def _number(value: object) -> float | None:
    try:
        found = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return None if math.isnan(found) else found


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _key(labels: Labels) -> Key:
    return tuple(sorted((name, _text(value)) for name, value in labels.items()))


def _summed(values: dict[Key, float], names: list[str]) -> dict[Key, float]:
    sums: dict[Key, float] = {}
    for key, value in values.items():
        kept = tuple(pair for pair in key if pair[0] in names)
        sums[kept] = sums.get(kept, 0.0) + value
    return sums


def _reduced(word: str, share: float, values: list[float]) -> float:
    if word != "quantile_over_time":
        return math.fsum(values)
    values = sorted(values)
    rank = share * (len(values) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (rank - low)
