"""The verdict between two commits: that it sees a change, and none in noise."""

from __future__ import annotations

import random

import pytest
from benchmarks.compare import BETTER, SAME, UNCLEAR, WORSE, interval, judge


def test_the_interval_is_that_of_the_sign_test() -> None:
    """Tables of the binomial distribution: 96.1 % for the second of nine, 97.9 % for the fourth of fifteen's 3.5 %."""
    assert interval([float(one) for one in range(1, 10)]) == (2, 8)
    assert interval([float(one) for one in range(1, 16)]) == (4, 12)
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (1, 6)
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (-float("inf"), float("inf"))  # five can't be so sure


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    chance = random.Random(3)
    held = 0
    for _ in range(2000):
        low, high = interval([chance.expovariate(1) for _ in range(9)])
        held += low <= 0.6931 <= high
    assert 0.95 <= held / 2000 <= 0.975


STEADY = [1.0, 1.004, 0.996, 1.002, 0.998, 1.001, 0.999, 1.003, 0.997]
RESTLESS = [1.0, 1.2, 0.8, 1.1, 0.9, 1.15, 0.85, 1.05, 0.95]


@pytest.mark.parametrize(
    ("ratios", "more_is_better", "word"),
    [
        (STEADY, True, SAME),
        ([one * 1.1 for one in STEADY], True, BETTER),
        ([one * 1.1 for one in STEADY], False, WORSE),
        ([one * 0.9 for one in STEADY], True, WORSE),
        ([one * 0.9 for one in STEADY], False, BETTER),
        ([one * 1.02 for one in STEADY], True, SAME),  # surely more, but not worth a word
        (RESTLESS, True, UNCLEAR),
        ([one * 1.1 for one in RESTLESS], False, UNCLEAR),  # it could be the machine
        ([one * 1.4 for one in RESTLESS], False, WORSE),  # it can't be
        ([1.5, 1.5, 1.5], False, UNCLEAR),  # too few rounds for a verdict
    ],
)
def test_verdicts(ratios: list[float], more_is_better: bool, word: str) -> None:
    found = judge(ratios, more_is_better=more_is_better)
    assert found.word == word
    assert found.low <= found.ratio <= found.high


def test_noise_alone_is_hardly_ever_called_a_change() -> None:
    chance = random.Random(7)
    words = [judge([chance.lognormvariate(0, 0.08) for _ in range(9)], more_is_better=True).word for _ in range(1000)]
    assert words.count(BETTER) + words.count(WORSE) <= 50  # 1 in 20
