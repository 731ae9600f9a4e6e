"""The figures as a file, and as a page: docs/benchmarks.json and, between two markers, docs/benchmarks.md.

A part that was measured again replaces its figures and leaves the others, each with the versions it was measured with.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import MEASURES, REACH, Figures, Reach, ratios, spread

ROOT = Path(__file__).parents[2]
JSON, PAGE = ROOT / "docs" / "benchmarks.json", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- figures: written by nox -s benchmarks -->", "<!-- /figures -->"
WIDTH = 24  #: characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"

#: part → (title, what its tables say on top)
TITLES: dict[str, tuple[str, str]] = {
    "rates": ("Requests a second, kept connections", "nginx answers 1 KiB; wrk is the visitor. CPU is that of /proc."),
    "apart": (
        "A processor for each program",
        "Core and floor are held on one processor, the agent on another, as on a machine of its own: it shows what the "
        "kernel's choice of processors does to the figures above.",
    ),
    "tls": ("TLS", "With metrics, logs and 10 % traced; TLS 1.3 at one place at a time; ratios are to none."),
    "latency": (
        "Latency at 200 requests a second",
        "Open loop: a request's time counts from when it was planned to be sent.",
    ),
    "fresh": ("New connections", "Eight at a time, each for one request."),
    "bulk": ("Bulk", "One transfer at a time, by curl; ratios are to nginx without a tunnel."),
    "mixed": (
        "Small requests beside big ones",
        "200 a second, open loop, while four downloads of 100 MiB go on; ratios are to nginx without a tunnel.",
    ),
    "memory": ("Memory", "Resident, metrics and logs on."),
    "layers": ("What observing costs", "Core and agent together, 32 connections; ratios are to none."),
    "growth": (
        "Growth",
        "32 connections. A burst is 1,000 visitors, 16 downloads and 8 uploads at once; memory is that of afterwards.",
    ),
    "startup": ("Start", "Until everything works, on a machine that has run it before."),
}


class Part(NamedTuple):
    """What was measured, and what is to be said about it."""

    figures: Figures
    remarks: Sequence[str] = ()


def machine() -> dict[str, Any]:
    """What the figures depend on, and no name."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("trio", "h11", "trio-websocket")},
    }


def revision() -> str:
    """The commit that is checked out, with a + where files differ from it; empty where there is no git."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def save(parts: dict[str, Part], path: Path = JSON) -> dict[str, Any]:
    """Add these parts to the file; all of it."""
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, part in parts.items():
        rounded = {
            measure: {who: [float(f"{value:.5g}") for value in values] for who, values in by.items()}
            for measure, by in part.figures.items()
        }
        about = {"machine": machine(), "revision": revision()}
        document[name] = {**about, "figures": rounded, "remarks": list(part.remarks)}
    ordered = {name: document[name] for name in TITLES if name in document}
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    return ordered


# As text ---------------------------------------------------------------------------------------------------------


def bar(value: float, most: float) -> str:
    """Of WIDTH characters for `most`, to an eighth of one."""
    eighths = round(value / most * WIDTH * 8) if most else 0
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()


def number(value: float) -> str:
    """With three digits that say something."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def table(figures: Figures) -> list[str]:
    """A Markdown table of a part: each measure, each contender, best of the contenders at full width."""
    rows = [
        "| | | min | median | max | ratio | |",
        "| --- | --- | ---: | ---: | ---: | ---: | :--- |",
    ]
    for key, by_contender in figures.items():
        measure = MEASURES[key]
        title = f"{measure.title}, {measure.unit}"
        most = max(statistics.median(values) for values in by_contender.values())
        for contender, values in by_contender.items():
            found = ratios(figures, key, contender, measure.base) if contender != measure.base else []
            ratio = f"{statistics.median(found):.2f} x" if found else ""
            low, middle, high = spread(values)
            cells = [title, contender, number(low), number(middle), number(high), ratio, bar(middle, most)]
            rows.append(_row(cells))
            title = ""
    return rows


def _beside(value: float, one: Reach) -> str:
    """With as many digits as it takes to tell it from the bounds."""
    shown = number(value)
    is_close = any(value != bound and shown == number(bound) for bound in (one.reach, one.land))
    return f"{value:.3f}" if is_close else shown


def reach(parts: Iterable[Figures]) -> list[str]:
    """The figures to reach beside what was measured."""
    merged: Figures = {}
    for figures in parts:
        merged.update(figures)
    rows = ["| | reach | good enough | measured | |", "| --- | ---: | ---: | ---: | --- |"]
    for one in REACH:
        value = one.value(merged)
        sign = "≥" if one.more_is_better else "≤"
        shown = f"{_beside(value, one)} {one.unit}" if value is not None else ""
        bounds = [f"{sign} {bound:g} {one.unit}" for bound in (one.reach, one.land)]
        rows.append(_row([one.title, *bounds, shown, one.verdict(merged)]))
    return rows


def page(document: dict[str, Any]) -> list[str]:
    """All that is generated."""
    rows = ["## What to reach", "", *reach(part["figures"] for part in document.values()), ""]
    for name, part in document.items():
        title, words = TITLES[name]
        rows += [f"## {title}", "", f"{words} {_origin(part)}", "", *table(part["figures"]), ""]
        rows += [line for remark in part["remarks"] for line in (f"{remark}.", "")]
    return rows


def _origin(part: dict[str, Any]) -> str:
    about = part["machine"]
    libraries = ", ".join(f"{name} {about[name]}" for name in ("trio", "h11", "trio-websocket"))
    rounds = max(len(values) for by in part["figures"].values() for values in by.values())
    return (
        f"{rounds} rounds on {about['cores']} {about['architecture']} cores, {about['system']}, "
        f"Python {about['python']}, {libraries}; commit {part['revision']}."
    )


def between_markers(text: str, generated: Sequence[str]) -> str:
    """`text` with what stands between the markers replaced. Raises ValueError when it has none."""
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"no {BEGIN} … {END}")
    return "\n".join([head + BEGIN, "", *generated, END + tail])


def write(document: dict[str, Any], path: Path = PAGE) -> None:
    path.write_text(between_markers(path.read_text(), page(document)))


def shown(name: str, part: Part) -> str:
    """A part for the terminal: the same table with columns that stand."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table(part.figures)]
    del rows[1]
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    lines = [TITLES[name][0]]
    for row in rows:
        cells = [row[i].ljust(widths[i]) if i in (0, 1, 6) else row[i].rjust(widths[i]) for i in range(7)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join([*lines, *(f"  {remark}" for remark in part.remarks)])
