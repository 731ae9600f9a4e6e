"""When something counts as growing."""

from __future__ import annotations

import pytest
from benchmarks.soak import WATCHED, Watched, grew, report

MEMORY = Watched("resident, MiB", 2, 0.02)


@pytest.mark.parametrize(
    ("values", "more"),
    [
        ([70.0, 90.0, 95.0, 96.0, 96.5, 96.0, 97.0, 96.2], 0),  # it fills at first
        ([70.0, 80.0, 90.0, 100.0, 110.0, 120.0, 130.0, 140.0], 20 - 2.3),
        ([200.0] * 4 + [200.0, 200.0, 204.0, 204.0], 0),  # 2 % of 200
        ([200.0] * 4 + [200.0, 200.0, 205.0, 205.0], 1),
        ([10.0, 10.0, 10.0, 9.0], 0),
    ],
)
def test_growth_is_asked_of_the_second_half(values: list[float], more: float) -> None:
    assert grew(values, MEMORY) == pytest.approx(more)


def test_too_few_say_nothing() -> None:
    with pytest.raises(ValueError, match="four"):
        grew([1.0, 2.0, 3.0], MEMORY)


def test_one_that_grows_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    steady = {watched.name: [100.0] * 8 for watched in WATCHED}
    assert report({"core": steady, "agent": steady})
    assert capsys.readouterr().out.count("steady") == 8
    leaking = {**steady, "open files": [float(one * 10) for one in range(8)]}
    assert not report({"core": steady, "agent": leaking})
    shown = capsys.readouterr().out
    assert "agent  open files     0 → 20 → 40 → 50 → 70   GREW by 16.0 more than it may" in shown
