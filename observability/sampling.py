"""Which traces are recorded: decided once, at the start of a trace, from its id.

By default the ratio of the trace id decides for everybody. A visitor's sampled flag then buys nothing: an operator's
bill is not the visitor's to write. `parentbased_*` in OTEL_TRACES_SAMPLER trusts the flag: the operator's choice.
An agent follows the core: the flag that crossed the link decides, or traces would have holes.

The rule is the SDK's TraceIdRatioBased (lower 64 bits of the id below ratio * 2^64), so two cores with one ratio agree.
It is kept as a comparison of hex strings, which costs 0.05 µs.
"""

from __future__ import annotations

from collections.abc import Mapping

SAMPLERS = frozenset(
    f"{prefix}{name}" for prefix in ("", "parentbased_") for name in ("always_on", "always_off", "traceidratio")
)
_ALL = "g"  # sorts after every hex string
_RANGE = 1 << 64


class Sampler:
    """ratio: 0.0 to 1.0 of new traces. trusts_parent: a visitor's own flag decides where there is one."""

    __slots__ = ("bound", "ratio", "trusts_parent")

    def __init__(self, ratio: float, trusts_parent: bool = False) -> None:
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"the ratio of traces to record must lie between 0 and 1, not {ratio}")
        self.ratio = ratio
        self.trusts_parent = trusts_parent
        limit = round(ratio * _RANGE)
        self.bound = _ALL if limit >= _RANGE else f"{limit:016x}"

    def decide(self, trace_id: str) -> bool:
        """Whether a trace of ours with this id (32 hex digits) is recorded."""
        return trace_id[16:] < self.bound

    def decide_joined(self, trace_id: str, flag: bool) -> bool:
        """Whether a visitor's trace that we join is recorded; `flag` is its own sampled flag."""
        return flag if self.trusts_parent else self.decide(trace_id)


def choose_sampler(ratio: float, environ: Mapping[str, str]) -> tuple[Sampler, str]:
    """(sampler, complaint): OTEL_TRACES_SAMPLER where set, else our ratio for everybody.

    The ratio's argument is OTEL_TRACES_SAMPLER_ARG, else `ratio`. As OpenTelemetry asks, a bad value in the environment
    is complained about (one line for the log, "" if all is well) and ignored; a bad `ratio` raises ValueError.
    """
    name = environ.get("OTEL_TRACES_SAMPLER", "").strip().lower()
    if not name:
        return Sampler(ratio), ""
    if name not in SAMPLERS:
        return Sampler(ratio), f"OTEL_TRACES_SAMPLER={name} is not supported"
    trusts_parent = name.startswith("parentbased_")
    if name.endswith("always_on"):
        return Sampler(1.0, trusts_parent), ""
    if name.endswith("always_off"):
        return Sampler(0.0, trusts_parent), ""
    argument = environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip()
    if not argument:
        return Sampler(ratio, trusts_parent), ""
    try:
        return Sampler(float(argument), trusts_parent), ""
    except ValueError:
        return Sampler(ratio, trusts_parent), f"OTEL_TRACES_SAMPLER_ARG={argument} is not a number from 0 to 1"
