"""Whose turn it is, and what becomes of a guest that fails."""

from __future__ import annotations

import pytest
from benchmarks.figures import Figures
from benchmarks.measures import excused, turns
from benchmarks.processes import Failed
from benchmarks.tunnels import Contender


def test_each_round_begins_with_another() -> None:
    three = [Contender(name, 1) for name in "abc"]
    assert "".join(one.name for one in turns(three, 4)) == "abc" + "bca" + "cab" + "abc"


def test_a_guest_that_gives_up_is_left_out_with_its_figures() -> None:
    host, guest = Contender("host", 1), Contender("guest", 1, is_guest=True)
    figures: Figures = {}
    seen = []
    for one in turns([host, guest], 3):
        with excused(one, figures):
            seen.append(one.name)
            if seen.count("guest") == 2 and one is guest:
                raise Failed("no answer\nand a long log")
            figures.setdefault("rps 1", {}).setdefault(one.name, []).append(1.0)
    assert seen == ["host", "guest", "guest", "host", "host"]
    assert figures == {"rps 1": {"host": [1.0, 1.0, 1.0]}}
    assert guest.gave_up == "no answer"


def test_who_is_no_guest_may_not_fail() -> None:
    with pytest.raises(Failed), excused(Contender("host", 1), {}):
        raise Failed("no answer")
