"""Which of a core's workers the agent's links are for, as one welcome after another says."""

from hypothesis import given
from hypothesis import strategies as st

from tunnel.agent.slots import MAX_WORKERS, Slot, Slots


class Rig:
    def __init__(self) -> None:
        self.served: set[Slot] = set()
        self.slots = Slots()

    def land(self, slot: Slot, workers: int, worker: int) -> bool:
        is_needed, fresh = self.slots.settle(slot, workers, worker, self.served.__contains__)
        assert is_needed or not fresh
        if is_needed:
            self.served.add(slot)
        return is_needed

    @property
    def workers(self) -> list[int | None]:
        return sorted((slot.worker for slot in self.slots.all), key=str)


def test_a_core_of_one_needs_one() -> None:
    rig = Rig()
    assert rig.land(rig.slots.all[0], 1, 0)
    assert rig.workers == [0]


def test_each_worker_gets_a_slot() -> None:
    rig = Rig()
    is_needed, fresh = rig.slots.settle(rig.slots.all[0], 3, 1, rig.served.__contains__)
    assert is_needed and [slot.worker for slot in fresh] == [0, 2]
    assert len({slot.number for slot in rig.slots.all}) == 3


def test_a_lost_hint_is_noticed() -> None:
    rig = Rig()
    first = rig.slots.all[0]
    rig.land(first, 2, 0)
    second = rig.slots.all[1]
    assert not rig.land(second, 2, 0)
    assert (first.worker, second.worker) == (0, 1)
    # When the first one's link is gone, it is welcome there, and the other is for the rest.
    rig.served.discard(first)
    assert rig.land(second, 2, 0)
    assert (first.worker, second.worker) == (1, 0)


def test_a_core_that_comes_back_with_other_workers() -> None:
    rig = Rig()
    rig.land(rig.slots.all[0], 4, 0)
    gone = [slot for slot in rig.slots.all if slot.worker in (2, 3)]
    rig.served.clear()
    rig.land(rig.slots.all[0], 2, 0)
    assert rig.workers == [0, 1] and all(slot.is_over for slot in gone)
    rig.served.clear()
    rig.land(rig.slots.all[1], 1, 0)
    assert rig.workers == [0]
    rig.land(rig.slots.all[0], 3, 0)
    assert rig.workers == [0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-3, 300), st.integers(0, 300), st.booleans()), max_size=30))
def test_whatever_a_core_says_the_slots_stay_sane(steps: list[tuple[int, int, int, bool]]) -> None:
    rig = Rig()
    for which, workers, worker, lost in steps:
        slot = rig.slots.all[which % len(rig.slots.all)]
        rig.served.discard(slot)
        worker = worker % max(1, min(workers, MAX_WORKERS))
        if rig.land(slot, workers, worker):
            assert slot in rig.slots.all and slot.worker == worker
            assert rig.workers == sorted(range(max(1, min(workers, MAX_WORKERS))), key=str)
        if lost:
            rig.served.clear()
        numbers = [one.number for one in rig.slots.all]
        assert len(numbers) == len(set(numbers)) and len(numbers) >= 1
