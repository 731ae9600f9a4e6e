"""The collector is called for what leaves cycles behind, not too often and not too rarely."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from tunnel.tuning import Litter


class Knot:
    def __init__(self) -> None:
        self.other = self


@pytest.fixture
def by_hand() -> Iterator[None]:
    """No collection but those that are asked for."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("by_hand")
def test_knots_do_not_pile_up() -> None:
    litter = Litter(least=10)
    seen: list[weakref.ref[Knot]] = []
    most = 0
    for _ in range(100):
        seen.append(weakref.ref(Knot()))
        most = max(most, sum(knot() is not None for knot in seen))
        litter.drop(living=3)
    assert most == 10
    assert sum(knot() is not None for knot in seen) == 0


def test_a_pass_waits_for_as_many_ends_as_there_are_living(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: passes.append(1))
    litter = Litter(least=10)
    for _ in range(999):
        litter.drop(living=1000)
    assert not passes
    litter.drop(living=1000)
    assert len(passes) == 1
    for _ in range(25):
        litter.drop(living=0)
    assert len(passes) == 3
