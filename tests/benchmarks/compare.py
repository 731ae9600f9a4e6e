"""Has it become slower? Two commits, each in a checkout and an environment of its own, under the same load in turns.

Ratios are taken round by round, so that a slow moment of the machine hits both. What they say is judged by the interval
that holds their median with at least 95 % confidence, whatever their distribution (order statistics): a change is one
only if all of that interval lies beyond 1, and counts only if the median is further off than `THRESHOLD`.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.load import cost, wrk
from benchmarks.measures import curl, turns
from benchmarks.processes import Failed
from benchmarks.results import ROOT
from benchmarks.servers import Servers
from benchmarks.tunnels import Contender, Program, start_tunnel

ROUNDS = 9
SECONDS = 2
THRESHOLD = 0.03  #: a change of less is not worth a word
CONFIDENCE = 0.95

BETTER, WORSE, SAME, UNCLEAR = "better", "worse", "the same", "unclear"


@dataclass(frozen=True)
class Verdict:
    """Of ratios new to old. low, high: where their median is, by CONFIDENCE."""

    word: str
    ratio: float
    low: float
    high: float


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Holds the median of what the values are drawn from, at least so surely; infinite where they are too few.

    The chance that the median lies below the k-th smallest of n values is that of fewer than k heads in n throws.
    """
    ranked = sorted(values)
    count = len(ranked)
    tail, k = 0.0, 0
    while k < count and 2 * (tail + math.comb(count, k) / 2**count) <= 1 - confidence:
        tail += math.comb(count, k) / 2**count
        k += 1
    return (ranked[k - 1], ranked[count - k]) if k else (-math.inf, math.inf)


def judge(ratios: Sequence[float], *, more_is_better: bool, threshold: float = THRESHOLD) -> Verdict:
    """Ratios of new to old, one a round."""
    low, high = interval(ratios)
    middle = statistics.median(ratios)
    if low <= 1 <= high:  # no change was seen; only a narrow interval says that there is none
        word = SAME if 1 - threshold <= low and high <= 1 + threshold else UNCLEAR
    elif abs(middle - 1) <= threshold:
        word = SAME
    else:
        word = BETTER if (middle > 1) == more_is_better else WORSE
    return Verdict(word, middle, low, high)


@contextmanager
def checked_out(revision: str, directory: Path) -> Iterator[str]:
    """The python of an environment with that commit."""
    tree, environment = directory / "tree", directory / "environment"
    directory.mkdir()
    _run("git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), revision)
    try:
        _run(sys.executable, "-m", "venv", str(environment))
        python = str(environment / "bin" / "python")
        _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", str(tree))
        yield python
    finally:
        _run("git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {done.stdout}{done.stderr}")


#: measure → more is better
COMPARED = {
    "requests/s, 32 connections": True,
    "core's CPU a request, 32 connections": False,
    "agent's CPU a request, 32 connections": False,
    "requests/s, 1 connection": True,
    "CPU a request, 1 connection": False,
    "100 MiB down, MB/s": True,
    "100 MiB up, MB/s": True,
}


def measure(one: Contender, servers: Servers) -> dict[str, float]:
    processes = list(one.processes.values())
    many, (core, agent) = cost(partial(wrk, one.port, one.host, 32, SECONDS), processes)
    single, paid = cost(partial(wrk, one.port, one.host, 1, SECONDS // 2), processes)
    transfers = [size / seconds / 1e6 for size, seconds in (curl(one, servers, way) for way in ("down", "up"))]
    return dict(zip(COMPARED, (many.rps, core, agent, single.rps, sum(paid), *transfers), strict=True))


def compare(servers: Servers, old: str, new: str, rounds: int = ROUNDS) -> bool:
    """Measure and print; whether nothing has become worse. new: a commit, or empty for the files as they are."""
    with ExitStack() as stack:
        sides: list[Contender] = []
        for name, revision in (("old", old), ("new", new)):
            python = (
                stack.enter_context(checked_out(revision, servers.directory / name)) if revision else sys.executable
            )
            sides.append(stack.enter_context(start_tunnel(servers, name=name, program=Program(python))))
            wrk(sides[-1].port, sides[-1].host, 8, 2)
        seen: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
        for one in turns(sides, rounds):
            seen[one.name].append(measure(one, servers))
    print(f"{new or 'the files as they are'} against {old}, {rounds} rounds; ratios new to old")
    verdicts = {key: judge_measure(key, seen["old"], seen["new"]) for key in COMPARED}
    for key, found in verdicts.items():
        before, after = (statistics.median(row[key] for row in seen[side]) for side in ("old", "new"))
        print(
            f"  {key:40} {before:9,.1f} → {after:9,.1f}   {found.ratio:.3f} x  [{found.low:.3f}, {found.high:.3f}]"
            f"  {found.word}"
        )
    return all(found.word != WORSE for found in verdicts.values())


def judge_measure(key: str, old: Sequence[dict[str, float]], new: Sequence[dict[str, float]]) -> Verdict:
    ratios = [after[key] / before[key] for before, after in zip(old, new, strict=True)]
    return judge(ratios, more_is_better=COMPARED[key])
