"""One page of metrics for a program of several workers: what each has counted, made one.

By family (`Family.merge`, RULES for those of libraries):

- counters and histograms are added up, bucket by bucket; of exemplars the newest stays. What a worker had counted
  when it ended is kept and added for ever, so nothing goes backwards. Of one that is killed this is what it said last
  (LOOK_SECONDS at most before, and never less than a page has shown);
- gauges are added up, or the greatest or the least is taken; those of a worker that has ended are gone with it, and
  what was under way there has failed (BALANCES). Names that end in `_info` say the same everywhere and stay as they
  are;
- what describes the supervisor alone (the process' start) is its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from prometheus_client.core import Exemplar, Metric

from observability import agent_metrics, core_metrics, runtime
from observability.exposition import Family
from tunnel.handler import Offered

MAX_RETIRED = 1000  #: workers that have ended and are remembered
LOOK_SECONDS = 5.0  #: between two looks at the workers, if nobody asks for the page

#: for gauges that are not ours; all others are added up. Each process has its own descriptors: the fullest one counts
RULES = {"process_start_time_seconds": "own", "process_open_fds": "max", "process_max_fds": "min"}
_OURS: dict[str, Family] = {
    **core_metrics.FAMILIES, **core_metrics.WORKER_FAMILIES, **agent_metrics.FAMILIES, **agent_metrics.WORKER_FAMILIES,
    **runtime.FAMILIES, **runtime.GO_FAMILIES,
}  # fmt: skip

#: counters of what failed: all that began, and what of it ended well
BALANCES = {
    "agent_streams_failed": ("agent_streams_total", "agent_streams_completed"),
    "agent_requests_failed": ("agent_requests_total", "agent_requests_success"),
}

_ADD: dict[str, Callable[[float, float], float]] = {"sum": float.__add__, "max": max, "min": min, "own": max}

Labels = tuple[tuple[str, str], ...]
Key = tuple[str, Labels]  #: name of the sample, its labels


class Sample(msgspec.Struct, array_like=True):
    """exemplar: labels, value, unix seconds."""

    name: str
    labels: dict[str, str]
    value: float
    exemplar: tuple[dict[str, str], float, float] | None = None


class State(msgspec.Struct, array_like=True):
    """A family as it travels from a worker to its supervisor."""

    name: str
    help: str
    type: str
    samples: list[Sample]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[State])


def encode(metrics: Iterable[Metric]) -> bytes:
    return _encoder.encode([_state(metric) for metric in metrics])


def _state(metric: Metric) -> State:
    return State(
        metric.name,
        metric.documentation,
        metric.type,
        [
            Sample(
                sample.name,
                dict(sample.labels),
                float(sample.value),
                (dict(sample.exemplar.labels), sample.exemplar.value, float(sample.exemplar.timestamp or 0))
                if sample.exemplar
                else None,
            )
            for sample in metric.samples
        ],
    )


class _Sums:
    """Families under way to being one page. Samples keep the order in which they came first."""

    def __init__(self) -> None:
        self.heads: dict[str, State] = {}
        self.samples: dict[str, dict[Key, Sample]] = {}

    def add(self, states: Iterable[State], *, is_gone: bool = False, is_own: bool = False) -> None:
        for state in states:
            rule = rule_of(state)
            if (is_gone and state.type == "gauge") or (rule == "own" and not is_own):
                continue
            self.heads.setdefault(state.name, state)
            family = self.samples.setdefault(state.name, {})
            for sample in state.samples:
                key = sample.name, tuple(sample.labels.items())
                known = family.get(key)
                family[key] = sample if known is None else _merged(known, sample, rule)

    def states(self) -> list[State]:
        return [
            State(name, head.help, head.type, list(self.samples[name].values())) for name, head in self.heads.items()
        ]


def rule_of(state: State) -> str:
    """ "sum", "max", "min" or "own"."""
    if state.type != "gauge":
        return "sum"
    if state.name.endswith("_info"):
        return "max"
    ours = _OURS.get(state.name)
    return ours.merge if ours is not None else RULES.get(state.name, "sum")


def _merged(one: Sample, other: Sample, rule: str) -> Sample:
    if "quantile" in one.labels:  # of a summary: they can't be added, the worst says most
        rule = "max"
    value = _ADD[rule](one.value, other.value)
    exemplars = [sample.exemplar for sample in (one, other) if sample.exemplar]
    newest = max(exemplars, key=lambda exemplar: exemplar[2], default=None)
    return Sample(one.name, one.labels, value, newest)


class Merger:
    """Takes what workers say, gives families."""

    def __init__(self) -> None:
        self._newest: dict[str, list[State]] = {}  # by the worker's key
        self._gone = _Sums()
        self._retired: deque[str] = deque(maxlen=MAX_RETIRED)  # keys whose late answers count no more

    def take(self, offered: Iterable[Offered], keys: Sequence[str]) -> None:
        """keys: of the workers that are there now."""
        for one in offered:
            if one.key in self._retired:
                continue
            self._newest[one.key] = _decoder.decode(one.data)
            if one.is_last:
                self._retire(one.key)
        for key in [key for key in self._newest if key not in keys]:
            self._retire(key)

    def _retire(self, key: str) -> None:
        states = self._newest.pop(key)
        _settle(states)
        self._gone.add(states, is_gone=True)
        self._retired.append(key)

    def families(self, own: Iterable[Metric] = (), without: frozenset[str] = frozenset()) -> Iterator[Metric]:
        """own: the supervisor's part. without: families that it makes itself."""
        sums = _Sums()
        sums.add((_state(metric) for metric in own), is_own=True)
        mine = set(sums.heads)
        for states in [*self._newest.values(), self._gone.states()]:
            sums.add(state for state in states if state.name not in without)
        states = sums.states()
        states.sort(key=lambda state: state.name in mine)  # the workers' own first
        for state in states:
            yield _metric(state)


def _settle(states: Iterable[State]) -> None:
    """What was under way at a worker that has ended has failed."""
    found = {sample.name: sample for state in states for sample in state.samples if not sample.labels}
    for failed, (total, well) in BALANCES.items():
        if failed in found and total in found and well in found:
            found[failed].value = found[total].value - found[well].value


def _metric(state: State) -> Metric:
    metric = Metric(state.name, state.help, state.type)
    for sample in state.samples:
        exemplar: Any = Exemplar(*sample.exemplar) if sample.exemplar else None
        metric.add_sample(sample.name, sample.labels, sample.value, exemplar=exemplar)
    return metric
