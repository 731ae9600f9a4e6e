"""The table is closed: what it lists works the same for both ends, all else is somebody's error."""

import itertools

import pytest

from tunnel.errors import LocalWireError, WireError
from tunnel.wire import states

ALL = list(itertools.product(range(len(states.STATES)), range(len(states.MOVES))))


@pytest.mark.parametrize(("state", "move"), ALL)
def test_every_pair(state: int, move: int) -> None:
    if (state, move) in states.TABLE:
        after = states.TABLE[state, move]
        assert states.after_sending(state, move) == states.after_receiving(state, move) == after
    else:
        words = f"{states.MOVES[move]}.*{states.STATES[state]}"
        with pytest.raises(LocalWireError, match=words):
            states.after_sending(state, move)
        with pytest.raises(WireError, match=words):
            states.after_receiving(state, move)


def test_done_is_final_and_reached() -> None:
    assert not [pair for pair in states.TABLE if pair[0] == states.DONE]
    reached = {states.IDLE}
    for _ in ALL:
        reached |= {after for (state, _), after in states.TABLE.items() if state in reached}
    assert reached == set(range(len(states.STATES)))
