"""From counted numbers to a page: metric families with exact sample names, in both formats of Prometheus.

prometheus_client writes both formats. Two things need care. (1) OpenMetrics demands `_total` on every counter, and
prometheus_client would add it to the bare names that existing dashboards use (`agent_requests_success`): a family
with such a name is exposed as `unknown` (`untyped` in the text format), the one type that keeps the sample name in
both; `rate()` does not look at types. (2) Exemplars exist in OpenMetrics only and on our histograms only. `_created`
samples are never made.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import trio
from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import (
    CounterMetricFamily,
    Exemplar,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.openmetrics import exposition as openmetrics_exposition
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from observability.buckets import Histogram
from tunnel.handler import Page, PageAnswer, PageRequest

__all__ = ["Family", "Metric", "answer", "choose", "families", "label_value", "number", "page", "render"]

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
EOF_LINE = b"# EOF\n"
MAX_LABEL = 128  # characters of a label's value: ids are short; Prometheus' own default limit is none

#: Unicode categories: control, format, surrogate, private, unassigned, line and paragraph separators
_UNFIT = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

#: names that are legal anyway; this "escaping" is the one that does not walk through them letter by letter
_ESCAPING = "allow-utf-8"

number = cast(Callable[[float], str], floatToGoString)


class Family(NamedTuple):
    """A line of the contract: name as sampled, type ("counter", "gauge", "histogram"), help, label names.

    merge: what the numbers of several workers make together: "sum", "max" or "min".
    """

    name: str
    type: str
    help: str
    labels: tuple[str, ...] = ()
    merge: str = "sum"

    @property
    def is_bare(self) -> bool:
        """A counter whose name lacks `_total`."""
        return self.type == "counter" and not self.name.endswith("_total")

    def metric(self, *samples: tuple[Sequence[str], float | Histogram]) -> Metric:
        """The family with these samples, each (label values, number or histogram)."""
        if self.type == "histogram":
            histogram = HistogramMetricFamily(self.name, self.help, labels=self.labels)
            for labels, value in samples:
                assert isinstance(value, Histogram)
                histogram.add_metric(labels, list(_buckets(value)), value.sum)
            return histogram
        metric: UnknownMetricFamily | CounterMetricFamily | GaugeMetricFamily
        if self.is_bare:
            metric = UnknownMetricFamily(self.name, self.help, labels=self.labels)
        elif self.type == "counter":
            metric = CounterMetricFamily(self.name, self.help, labels=self.labels)
        else:
            metric = GaugeMetricFamily(self.name, self.help, labels=self.labels)
        for labels, value in samples:
            assert not isinstance(value, Histogram)
            metric.add_metric(labels, value)
        return metric

    def header(self, is_openmetrics: bool) -> str:
        """The HELP and TYPE lines, for a page that writes its own samples."""
        name, type = self.name, self.type
        if self.is_bare:
            type = "unknown" if is_openmetrics else "untyped"
        elif type == "counter" and is_openmetrics:
            name = name.removesuffix("_total")
        return f"# HELP {name} {self.help}\n# TYPE {name} {type}\n"


def _buckets(histogram: Histogram) -> Iterator[tuple[str, int] | tuple[str, int, Exemplar]]:
    """(le, cumulative count, exemplar where there is one)"""
    total = 0
    for bound, count, seen in zip(
        (*histogram.bounds, float("inf")), histogram.counts, histogram.exemplars, strict=True
    ):
        total += count
        if seen is None:
            yield number(bound), total
        else:
            yield number(bound), total, Exemplar({"trace_id": seen[0]}, seen[1], round(seen[2], 3))


def families(*rows: Family) -> dict[str, Family]:
    return {row.name: row for row in rows}


def label_value(text: str) -> str:
    """An id as a label's value: bounded, and without characters that would spoil the page (controls, surrogates)."""
    if text.isascii() and text.isprintable() and len(text) <= MAX_LABEL:
        return text
    return "".join("?" if unicodedata.category(char) in _UNFIT else char for char in text[:MAX_LABEL])


class _Snapshot:
    """What prometheus_client's writers take: something that collects."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


_write_text = cast(Callable[[Collector, str], bytes], exposition.generate_latest)
_write_openmetrics = cast(Callable[[Collector, str], bytes], openmetrics_exposition.generate_latest)


def render(metrics: Iterable[Metric], is_openmetrics: bool = False) -> bytes:
    """The whole page at once."""
    return (_write_openmetrics if is_openmetrics else _write_text)(_Snapshot(metrics), _ESCAPING)


def choose(accept: str) -> bool:
    """Whether an Accept header prefers OpenMetrics 1.0.0 to the text format, which is the default."""
    best_openmetrics = best_text = 0.0
    for choice in accept.lower().split(","):
        media, *parameters = (part.strip() for part in choice.split(";"))
        values = dict(part.partition("=")[::2] for part in parameters)
        try:
            quality = float(values.get("q", "1"))
        except ValueError:
            continue
        if media == "application/openmetrics-text" and values.get("version", "1.0.0") == "1.0.0":
            best_openmetrics = max(best_openmetrics, quality)
        elif media == "text/plain" and values.get("version", "0.0.4") == "0.0.4":
            best_text = max(best_text, quality)
    return best_openmetrics > 0 and best_openmetrics >= best_text


def page(registry: CollectorRegistry) -> Page:
    """The metrics page. The numbers are taken in one go, so that identities hold; writing them lets others run."""

    async def metrics(request: PageRequest) -> PageAnswer:
        return await answer(list(registry.collect()), request)

    return metrics


async def answer(metrics: Sequence[Metric], request: PageRequest) -> PageAnswer:
    """A page with these families, in the format that is asked for."""
    is_openmetrics = choose(request.headers.get("accept", ""))
    parts = []
    for metric in metrics:
        parts.append(render((metric,), is_openmetrics).removesuffix(EOF_LINE))
        await trio.lowlevel.checkpoint()
    if is_openmetrics:
        parts.append(EOF_LINE)
    return PageAnswer(200, b"".join(parts), OPENMETRICS if is_openmetrics else TEXT)
