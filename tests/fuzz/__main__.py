"""`nox -s fuzz -- MINUTES [TARGET …]`, or `PYTHONPATH=tests python -m fuzz MINUTES [TARGET …]`."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from fuzz.fuzzing import ENOUGH, fuzz
from fuzz.targets import TARGETS

ROUND = 1000  #: inputs of one target before it is the next one's turn


def main(arguments: list[str]) -> int:
    minutes = float(arguments[0]) if arguments else 5.0
    chosen = [TARGETS[name] for name in arguments[1:] or TARGETS]
    end = time.monotonic() + minutes * 60
    seed = first = random.SystemRandom().randrange(1 << 32)
    total = 0
    found: set[Path] = set()
    while chosen and time.monotonic() < end:
        for target in list(chosen):
            failed = fuzz(target, seed, ROUND)
            found |= set(failed)
            total += ROUND
            if len(failed) >= ENOUGH:  # what is wrong with it is known by now
                chosen.remove(target)
        seed += 1
    print(f"{total} inputs from seed {first} on, {len(found)} failed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
