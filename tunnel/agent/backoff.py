"""How long an agent waits before it dials again.

Full jitter: a wait is drawn evenly between 0 and a bound that doubles, so that many agents which lost the same core
do not come back in step. The bound stays low after network errors (a core that restarts has all agents back within
seconds) and grows high when the core says that it has too much to do, or refuses what it is asked for: then a person
has to choose another name, or free that one, and each attempt is a line in the core's log. No clock and no waiting in
here.
"""

from __future__ import annotations

import random
from collections.abc import Callable

FIRST = 0.2  # seconds: the bound of the first wait
NETWORK_CAP = 2.0  # seconds: after network errors
REFUSAL_CAP = 30.0  # seconds: after a refusal (errors.SLOW_REFUSALS)
PATIENCE = 300.0  # seconds: the longest wait that a core may ask for
HELD = 5.0  # seconds that a link has to hold to count as good
CALM = 60.0  # seconds that one has to hold before it is sent away: an upgrade sends all away, but not every few seconds


class Backoff:
    """Waits before reconnecting. `failures`: waits drawn since the last link that held.

    uniform(low, high): the random source. held: seconds a link has to last to start over from the first bound.
    """

    def __init__(self, uniform: Callable[[float, float], float] = random.uniform, held: float = HELD) -> None:
        self.failures = 0
        self._uniform = uniform
        self._held = held
        self._hurried = False

    def after_network_error(self, asked: float = 0) -> float:
        """Seconds to wait after a failed dial, or a refusal that is of no kind below.

        asked: the seconds that the core wants; the drawn wait comes on top, so that not all come back at once.
        """
        return _sane(asked) + self._next(NETWORK_CAP)

    def after_refusal(self, asked: float = 0) -> float:
        """Seconds to wait after a refusal for load, or of what was asked for."""
        return _sane(asked) + self._next(REFUSAL_CAP)

    def after_link(self, lasted: float, *, go_away: bool = False) -> float:
        """Seconds to wait after a link that was up for `lasted` seconds.

        0 after a go-away. But a core that sends one link after another away is met with waits from the second time on,
        which grow as after refusals: else the two programs would spin, or links that are told to go pile up.
        """
        if lasted >= (max(self._held, CALM) if go_away else self._held):
            self.failures = 0
            self._hurried = False
        if not go_away:
            return self._next(NETWORK_CAP)
        if self._hurried:
            return self._next(REFUSAL_CAP)
        self._hurried = True
        return 0.0

    def _next(self, cap: float) -> float:
        bound = min(cap, FIRST * 2.0 ** min(self.failures, 32))
        self.failures += 1
        return self._uniform(0.0, bound)


def _sane(asked: float) -> float:
    return min(asked, PATIENCE) if asked > 0 else 0.0
