"""Sampling: the ratio of the trace id decides, as the SDK would; the environment chooses otherwise."""

from __future__ import annotations

import random

import pytest
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

from observability.sampling import Sampler, choose_sampler


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.1, 0.5, 0.999999, 1.0])
def test_it_decides_as_the_sdk_does(ratio: float) -> None:
    ours, theirs = Sampler(ratio), TraceIdRatioBased(ratio)
    ids = [random.getrandbits(128) for _ in range(2000)]
    edge = round(ratio * (1 << 64))
    ids += [n for n in (1, edge - 1, edge, edge + 1, (1 << 64) - 1, (1 << 128) - 1) if n > 0]
    for trace_id in ids:
        expected = theirs.should_sample(None, trace_id, "x").decision is Decision.RECORD_AND_SAMPLE
        assert ours.decide(f"{trace_id:032x}") == expected, hex(trace_id)


def test_the_share_is_about_the_ratio() -> None:
    source = random.Random(7)
    sampler = Sampler(0.1)
    taken = sum(sampler.decide(f"{source.getrandbits(128):032x}") for _ in range(20_000))
    assert 1800 < taken < 2200


def test_a_visitors_flag_buys_nothing_unless_it_is_trusted() -> None:
    low, high = "0" * 31 + "1", "f" * 32
    assert Sampler(0.5).decide_joined(high, True) is False
    assert Sampler(0.5).decide_joined(low, False) is True
    assert Sampler(0.5, trusts_parent=True).decide_joined(high, True) is True
    assert Sampler(0.5, trusts_parent=True).decide_joined(low, False) is False


@pytest.mark.parametrize(
    ("environment", "ratio", "trusts_parent"),
    [
        ({}, 0.25, False),
        ({"OTEL_TRACES_SAMPLER_ARG": "0.5"}, 0.25, False),  # an argument without a sampler is none
        ({"OTEL_TRACES_SAMPLER": "always_on"}, 1.0, False),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, 0.0, False),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"}, 0.5, False),
        ({"OTEL_TRACES_SAMPLER": "traceidratio"}, 0.25, False),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_on"}, 1.0, True),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, 0.0, True),
        ({"OTEL_TRACES_SAMPLER": "Parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"}, 0.5, True),
    ],
)
def test_choice(environment: dict[str, str], ratio: float, trusts_parent: bool) -> None:
    sampler, complaint = choose_sampler(0.25, environment)
    assert (sampler.ratio, sampler.trusts_parent, complaint) == (ratio, trusts_parent, "")


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_TRACES_SAMPLER": "jaeger_remote"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "many"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "1.5"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "nan"},
    ],
)
def test_a_bad_environment_is_named_and_ignored(environment: dict[str, str]) -> None:
    sampler, complaint = choose_sampler(0.25, environment)
    assert sampler.ratio == 0.25
    assert list(environment)[-1] in complaint


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_bad_ratio_of_ours_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        choose_sampler(ratio, {})
