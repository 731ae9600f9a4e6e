"""What we accept of the table, and of the table with bytes changed, everybody reads alike (framing/comparing.py)."""

import random

import pytest
from framing.comparing import compare
from framing.mutating import mutate
from framing.readers import ours
from framing.requestcases import CASES, CHUNKED, GET, POST, Case


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_case_is_read_alike(case: Case) -> None:
    compare(case.raw)
    compare(case.raw + GET + b"\r\n")
    accepted, _ = ours(case.raw)
    assert len([one for one in accepted if one.whole]) >= len(case.passed)


@pytest.mark.parametrize("seed", range(8))
def test_mutated_cases_are_read_alike(seed: int) -> None:
    chance = random.Random(seed)
    seeds = [case.raw for case in CASES if len(case.raw) < 2000]
    seeds += [
        GET + b"A: b\r\n\r\n",
        POST + b"Content-Length: 5\r\n\r\nhello",
        CHUNKED + b"5\r\nhello\r\n0\r\nA: b\r\n\r\n",
    ] * 50
    taken = sum(compare(mutate(chance.choice(seeds), seeds, chance)) for _ in range(1500))
    assert taken > 100  # not everything was refused
