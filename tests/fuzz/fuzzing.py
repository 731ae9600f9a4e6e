"""The loop: take an input, change some bytes, check; what fails is made smaller and kept in the corpus.

The corpus (corpus/TARGET/) holds inputs that once failed. The tests run all of it, and a short seeded part of the loop.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from framing.mutating import mutate
from fuzz.targets import Target

CORPUS = Path(__file__).parent / "corpus"
ENOUGH = 3  #: failures of a target after which the loop ends
MAX_SMALLER = 400  #: tries to make a failing input smaller


def kept(target: Target, corpus: Path = CORPUS) -> list[bytes]:
    """The inputs of the corpus."""
    return [path.read_bytes() for path in sorted((corpus / target.name).glob("*"))]


def failure_of(target: Target, data: bytes) -> Exception | None:
    try:
        target.check(data)
    except Exception as exc:
        return exc
    return None


def inputs(target: Target, seed: int, corpus: Path = CORPUS) -> Iterator[bytes]:
    """Without end, the same for the same seed."""
    chance = random.Random(seed)
    pool = [*target.seeds, *kept(target, corpus)]
    while True:
        made = mutate(chance.choice(pool), pool, chance)
        yield made
        if chance.random() < 0.01 and len(made) < 4000:
            pool.append(made)  # changes of changes reach further


def smaller(target: Target, data: bytes) -> bytes:
    """A shorter input that fails in the same way, if a few cuts make one."""
    kind = type(failure_of(target, data))
    size, tries = len(data) // 2, 0
    while size and tries < MAX_SMALLER:
        at = 0
        while at < len(data) and tries < MAX_SMALLER:
            shorter = data[:at] + data[at + size :]
            tries += 1
            if type(failure_of(target, shorter)) is kind:
                data = shorter
            else:
                at += size
        size //= 2
    return data


def fuzz(
    target: Target, seed: int, count: int, corpus: Path = CORPUS, say: Callable[[str], object] = print
) -> list[Path]:
    """So many inputs; returns where those that failed were kept. Stops after the first few."""
    found: list[Path] = []
    for number, data in enumerate(inputs(target, seed, corpus)):
        if number >= count or len(found) >= ENOUGH:
            break
        if failure_of(target, data) is None:
            continue
        data = smaller(target, data)
        path = corpus / target.name / hashlib.sha256(data).hexdigest()[:16]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        found.append(path)
        say(f"{target.name}, seed {seed}, input {number}: {failure_of(target, data)!r}\n  kept as {path}")
    return found
