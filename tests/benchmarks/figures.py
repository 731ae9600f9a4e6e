"""What is measured, in which unit, and what many measurements of it come to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

#: measure → contender → one value a round
Figures = dict[str, dict[str, list[float]]]

FLOOR, OURS, DIRECT, PLAIN = "floor", "tunnel", "nginx directly", "no TLS"
CONNECTIONS = (1, 4, 8, 32, 256)
APART = (1, 4, 8, 32)  #: connections of the part with a processor for each program


class Measure(NamedTuple):
    """title: its row in a table. base: whom ratios are to."""

    title: str
    unit: str
    more_is_better: bool = False
    base: str = FLOOR


def _titled(count: int) -> str:
    return f"{count} connection{'s' if count > 1 else ''}"


def _rates() -> dict[str, Measure]:
    made: dict[str, Measure] = {}
    for count in CONNECTIONS:
        title = _titled(count)
        made[f"rps {count}"] = Measure(title, "requests/s", True)
        made[f"p50 {count}"] = Measure(f"p50, {title}", "ms")
        made[f"server cpu {count}"] = Measure(f"server's CPU, {title}", "µs/request")
        made[f"agent cpu {count}"] = Measure(f"agent's CPU, {title}", "µs/request")
    return made


MEASURES: dict[str, Measure] = {
    **_rates(),
    **{f"apart {count}": Measure(_titled(count), "requests/s", True) for count in APART},
    "tls rps": Measure("32 connections", "requests/s", True, PLAIN),
    "tls server cpu": Measure("core's CPU", "µs/request", base=PLAIN),
    "tls agent cpu": Measure("agent's CPU", "µs/request", base=PLAIN),
    "paced p50": Measure("p50", "ms"),
    "paced p99": Measure("p99", "ms"),
    "paced late": Measure("p99 of the client's own lateness, contained in both", "ms"),
    "fresh": Measure("new connections, one request on each", "connections/s", True),
    "down": Measure("100 MiB down", "MB/s", True, DIRECT),
    "up": Measure("100 MiB up", "MB/s", True, DIRECT),
    "down server cpu": Measure("server's CPU, down", "ms/MiB", base=DIRECT),
    "down agent cpu": Measure("agent's CPU, down", "ms/MiB", base=DIRECT),
    "up server cpu": Measure("server's CPU, up", "ms/MiB", base=DIRECT),
    "up agent cpu": Measure("agent's CPU, up", "ms/MiB", base=DIRECT),
    "mixed p50": Measure("p50", "ms", base=DIRECT),
    "mixed p99": Measure("p99", "ms", base=DIRECT),
    "mixed late": Measure("p99 of the client's own lateness, contained in both", "ms", base=DIRECT),
    "rss core": Measure("core, idle", "MiB"),
    "rss agent": Measure("agent, idle", "MiB"),
    "rss per agent": Measure("core, for each of 1,000 idle agents", "KiB"),
    "rss per visitor": Measure("core, for each of 2,000 idle visitors", "KiB"),
    "layers cpu": Measure("CPU of core and agent", "µs/request", base="none"),
    "help core": Measure("core --help", "s"),
    "help agent": Measure("agent --help", "s"),
    "core ready": Measure("core, start to ready", "s"),
    "growth cpu": Measure("core's CPU, all requests to one agent", "µs/request", base="1 agent"),
    "spread cpu": Measure("core's CPU, requests over many agents", "µs/request", base="over 32 agents"),
    "crowd attach": Measure("until 5,000 agents are attached", "s"),
    "crowd scrape": Measure("a page of metrics with 5,000 agents", "ms"),
    "crowd cpu": Measure("core's CPU, 5,000 idle agents", "% of one"),
    "crowd rss": Measure("core with 5,000 idle agents", "MiB"),
    "crowd rss each": Measure("for each of them", "KiB"),
    "burst rss core": Measure("core, bursts of 1,000 visitors", "MiB", base="before"),
    "burst rss agent": Measure("agent, bursts of 1,000 visitors", "MiB", base="before"),
    "first request": Measure("agent, start to first request served", "s"),
}


def note(figures: Figures, measure: str, contender: str, value: float) -> None:
    """Another round's."""
    figures.setdefault(measure, {}).setdefault(contender, []).append(value)


class Spread(NamedTuple):
    least: float
    median: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(min(values), statistics.median(values), max(values))


def ratios(figures: Figures, measure: str, contender: str, base: str) -> list[float]:
    """Round by round, so that a slow moment of the machine hits both. Empty where one of them is missing."""
    mine, other = (figures.get(measure, {}).get(name, []) for name in (contender, base))
    return [one / two for one, two in zip(mine, other, strict=False) if two]


class Reach(NamedTuple):
    """A figure to reach. value: what was measured, None where it was not."""

    title: str
    reach: float
    land: float
    value: Callable[[Figures], float | None]
    unit: str = "x"
    more_is_better: bool = False

    def verdict(self, figures: Figures) -> str:
        value = self.value(figures)
        if value is None:
            return "not measured"
        for bound, word in ((self.reach, "reached"), (self.land, "good enough to land")):
            if value >= bound if self.more_is_better else value <= bound:
                return word
        return "missed"


def _ratio(measure: str, contender: str = OURS, base: str = FLOOR) -> Callable[[Figures], float | None]:
    def value(figures: Figures) -> float | None:
        found = ratios(figures, measure, contender, base)
        return statistics.median(found) if found else None

    return value


def _across(measure: str, other: str) -> Callable[[Figures], float | None]:
    """Ours of one measure to the floor's of another."""

    def value(figures: Figures) -> float | None:
        mine, base = figures.get(measure, {}).get(OURS, []), figures.get(other, {}).get(FLOOR, [])
        found = [one / two for one, two in zip(mine, base, strict=False) if two]
        return statistics.median(found) if found else None

    return value


def _median(measure: str, contender: str = OURS) -> Callable[[Figures], float | None]:
    def value(figures: Figures) -> float | None:
        found = figures.get(measure, {}).get(contender)
        return statistics.median(found) if found else None

    return value


NONE, MEASURED_LOGGED, TENTH_TRACED, ALL_TRACED = "none", "metrics, logs", "+ 10 % traced", "+ 100 % traced"

#: With metrics and logs on and 10 % of requests traced; ratios to the floor of the same run.
REACH = (
    Reach("requests a second, 32 connections, to the floor's", 1.5, 1.0, _ratio("rps 32"), more_is_better=True),
    Reach("requests a second, 4 connections", 1.0, 0.7, _ratio("rps 4"), more_is_better=True),
    Reach("requests a second, 8 connections", 1.2, 0.8, _ratio("rps 8"), more_is_better=True),
    Reach("core's CPU a request, 32 connections", 0.65, 0.9, _ratio("server cpu 32")),
    Reach("agent's CPU a request, 32 connections", 0.4, 0.55, _across("agent cpu 32", "server cpu 32")),
    Reach("p50 of one connection", 2.2, 3.0, _ratio("p50 1")),
    Reach("100 MiB down, to nginx directly", 0.6, 0.4, _ratio("down", base=DIRECT), more_is_better=True),
    Reach("100 MiB up, to nginx directly", 0.4, 0.3, _ratio("up", base=DIRECT), more_is_better=True),
    Reach("p99 of small requests during 4 big downloads", 5.0, 10.0, _median("mixed p99"), "ms"),
    Reach("CPU with metrics, logs and 100 % traced, to none", 1.35, 1.6, _ratio("layers cpu", ALL_TRACED, NONE)),
    Reach("CPU with metrics, logs and 10 % traced, to none", 1.15, 1.3, _ratio("layers cpu", TENTH_TRACED, NONE)),
    Reach("idle agent on the core", 30, 60, _median("rss per agent"), "KiB"),
    Reach("idle visitor on the core", 10, 20, _median("rss per visitor"), "KiB"),
    Reach("agent --help", 0.25, 0.5, _median("help agent"), "s"),
    Reach("core's CPU a request with 1,000 agents, to 1", 1.15, 1.15, _ratio("growth cpu", "1,000 agents", "1 agent")),
    Reach(
        "core's CPU a request with 10,000 tunnels, to 1", 1.15, 1.15, _ratio("growth cpu", "10,000 tunnels", "1 agent")
    ),
    Reach("agent, start to first request served", 0.7, 1.5, _median("first request"), "s"),
)
