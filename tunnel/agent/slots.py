"""Which of a core's workers each of an agent's links is for.

A core says in its welcome how many workers it has and which one the link is at. The agent keeps a slot for each of
them, and dials each slot's link again whenever it is lost. No waiting in here: what a welcome means for the slots is
decided in one step (SPEC.md, "Workers").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tunnel.agent.backoff import Backoff

MAX_WORKERS = 256  #: that an agent believes a core to have


@dataclass(eq=False, slots=True)
class Slot:
    """One link that is kept. number: tells it from the others; worker: the one it is for, None before the first
    welcome; is_over: the core has no such worker any more."""

    number: int
    worker: int | None = None
    is_over: bool = False
    backoff: Backoff = field(default_factory=Backoff)


class Slots:
    """Those that there are, one at least."""

    def __init__(self) -> None:
        self.all = [Slot(0)]
        self._numbers = 1

    def settle(
        self, slot: Slot, workers: int, worker: int, is_served: Callable[[Slot], bool]
    ) -> tuple[bool, list[Slot]]:
        """A link of this slot has been welcomed at `worker` of `workers`: whether to keep it, and the new slots that
        need links of their own. is_served: whether a slot has a link at the same core that is up.

        A slot whose worker there is no more is over: its link ends when that worker does, and is not dialled again.
        """
        workers = max(1, min(workers, MAX_WORKERS))
        owner = next((one for one in self.all if one.worker == worker and one is not slot), None)
        if owner is not None:
            if is_served(owner):
                return False, []  # the hint was lost on the way
            owner.worker = slot.worker  # it is here now, so the other one is for where this was to go
        slot.worker = worker
        for one in [one for one in self.all if one is not slot and (one.worker is None or one.worker >= workers)]:
            one.is_over = True
            self.all.remove(one)
        wanted = {one.worker for one in self.all}
        fresh = []
        for missing in (index for index in range(workers) if index not in wanted):
            fresh.append(Slot(self._numbers, missing))
            self._numbers += 1
        self.all += fresh
        return True, fresh
