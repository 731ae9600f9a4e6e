"""Inputs that once failed, a short seeded part of the loop, and the loop itself."""

from pathlib import Path

import pytest
from fuzz.fuzzing import failure_of, fuzz, inputs, kept, smaller
from fuzz.targets import TARGETS, Target

EACH = pytest.mark.parametrize("name", TARGETS)
COUNT = 1500  #: inputs; `nox -s fuzz` takes as many as there is time for


@EACH
def test_what_is_kept_holds(name: str) -> None:
    target = TARGETS[name]
    for data in [*target.seeds, *kept(target)]:
        target.check(data)


@EACH
@pytest.mark.parametrize("seed", [1, 2])
def test_some_inputs(name: str, seed: int, tmp_path: Path) -> None:
    said: list[str] = []
    assert fuzz(TARGETS[name], seed, COUNT, tmp_path, said.append) == [], said


def test_the_same_seed_gives_the_same_inputs() -> None:
    made = [[data for data, _ in zip(inputs(TARGETS["frames"], 7), range(50), strict=False)] for _ in range(2)]
    assert made[0] == made[1] and len(set(made[0])) > 40


def test_what_fails_is_made_smaller_and_kept(tmp_path: Path) -> None:
    def check(data: bytes) -> None:
        assert b"\n" not in data

    target = Target("lines", [b"some words and more of them"], check)
    (path, *_) = fuzz(target, 1, 500, tmp_path, lambda text: None)
    assert path.read_bytes() == b"\n" and kept(target, tmp_path) == [b"\n"]
    assert isinstance(failure_of(target, b"a\nb"), AssertionError)
    assert smaller(target, b"x" * 100 + b"\n" + b"y" * 100) == b"\n"
