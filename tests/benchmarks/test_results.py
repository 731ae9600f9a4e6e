"""Ratios, verdicts, tables with bars, and the page between its markers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.figures import FLOOR, MEASURES, OURS, REACH, Figures, ratios, spread
from benchmarks.results import (
    BEGIN,
    END,
    JSON,
    PAGE,
    TITLES,
    WIDTH,
    Part,
    bar,
    between_markers,
    number,
    page,
    reach,
    save,
    table,
)

FIGURES: Figures = {
    "rps 32": {FLOOR: [100.0, 200.0, 400.0], OURS: [150.0, 320.0, 560.0]},
    "server cpu 32": {FLOOR: [100.0, 100.0, 100.0], OURS: [60.0, 70.0, 66.0]},
    "agent cpu 32": {OURS: [30.0, 60.0, 50.0]},
}


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios(FIGURES, "rps 32", OURS, FLOOR) == [1.5, 1.6, 1.4]
    assert ratios(FIGURES, "agent cpu 32", OURS, FLOOR) == []
    assert spread([3.0, 1.0, 2.0]) == (1.0, 2.0, 3.0)


def test_what_is_to_be_reached_has_a_verdict() -> None:
    verdicts = {one.title: one.verdict(FIGURES) for one in REACH}
    assert verdicts["requests a second, 32 connections, to the floor's"] == "reached"
    assert verdicts["core's CPU a request, 32 connections"] == "good enough to land"
    assert verdicts["agent's CPU a request, 32 connections"] == "good enough to land"  # to the floor server's
    assert verdicts["agent --help"] == "not measured"
    slow: Figures = {"rps 32": {FLOOR: [100.0], OURS: [99.0]}, "help agent": {OURS: [0.6]}}
    verdicts = {one.title: one.verdict(slow) for one in REACH}
    assert verdicts["requests a second, 32 connections, to the floor's"] == "missed"
    assert verdicts["agent --help"] == "missed"


def test_each_figure_to_reach_comes_from_something_that_is_measured() -> None:
    everything: Figures = {
        key: {name: [1.0] for name in (FLOOR, OURS, measure.base)} for key, measure in MEASURES.items()
    }
    everything["growth cpu"] = {name: [1.0] for name in ("1 agent", "1,000 agents", "10,000 tunnels")}
    everything["layers cpu"] = {name: [1.0] for name in ("none", "+ 10 % traced", "+ 100 % traced")}
    assert [one.title for one in REACH if one.value(everything) is None] == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (99.96, "100"), (99.9, "99.9"), (10.0, "10.0"), (9.994, "9.99"), (0.0, "0.00")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("ours", "row"), [(0.5512, "0.551 x | missed"), (0.55, "0.55 x | good enough to land"), (0.57, "0.57 x | missed")]
)
def test_a_figure_is_told_from_its_bound(ours: float, row: str) -> None:
    figures: Figures = {"server cpu 32": {FLOOR: [100.0]}, "agent cpu 32": {OURS: [100 * ours]}}
    (line,) = (line for line in reach([figures]) if line.startswith("| agent's CPU"))
    assert line.endswith(f"| {row} |")


def test_bars_are_as_long_as_their_value() -> None:
    assert bar(10, 10) == "█" * WIDTH
    assert bar(5, 10) == "█" * (WIDTH // 2)
    assert bar(0, 10) == bar(0, 0) == ""
    assert bar(1, 8 * WIDTH) == "▏"


def test_a_table_has_a_row_for_each_contender() -> None:
    rows = table(FIGURES)
    assert rows[2] == f"| 32 connections, requests/s | floor | 100 | 200 | 400 | | {bar(200, 320)} |"
    assert rows[3] == f"| | tunnel | 150 | 320 | 560 | 1.50 x | {'█' * WIDTH} |"
    assert len(rows) == 2 + 5


def test_the_page_shows_what_to_reach_and_each_part() -> None:
    machine = {
        "cores": 2,
        "architecture": "x",
        "system": "Linux",
        "python": "3",
        "trio": "1",
        "h11": "2",
        "trio-websocket": "3",
    }
    document = {"rates": {"machine": machine, "revision": "abc+", "figures": FIGURES, "remarks": ["it rained"]}}
    text = "\n".join(page(document))
    assert "| requests a second, 32 connections, to the floor's | ≥ 1.5 x | ≥ 1 x | 1.50 x | reached |" in text
    assert "| requests a second, 4 connections | ≥ 1 x | ≥ 0.7 x | | not measured |" in text
    assert "3 rounds on 2 x cores, Linux, Python 3, trio 1, h11 2, trio-websocket 3; commit abc+." in text
    assert "\n".join(reach([FIGURES])) in text
    assert "\nit rained.\n" in text


def test_what_is_around_the_markers_stays() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = between_markers(text, ["new"])
    assert new == f"before\n{BEGIN}\n\nnew\n{END}\nafter\n"
    assert between_markers(new, ["new"]) == new
    with pytest.raises(ValueError, match="no <!--"):
        between_markers("no markers", ["new"])


def test_a_part_that_is_measured_again_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    save({"rates": Part(FIGURES), "startup": Part({"help agent": {OURS: [0.123456]}})}, path)
    assert json.loads(path.read_text())["startup"]["figures"] == {"help agent": {OURS: [0.12346]}}
    save({"startup": Part({"help agent": {OURS: [0.5]}}, ["again"])}, path)
    saved = json.loads(path.read_text())
    assert list(saved) == ["rates", "startup"]
    assert saved["rates"]["figures"] == FIGURES
    assert saved["startup"]["figures"] == {"help agent": {OURS: [0.5]}}
    assert saved["startup"]["remarks"] == ["again"]
    assert saved["startup"]["machine"]["cores"] >= 1


def test_the_page_is_that_of_the_figures() -> None:
    document = json.loads(JSON.read_text())
    assert set(document) <= set(TITLES)
    assert between_markers(PAGE.read_text(), page(document)) == PAGE.read_text(), "nox -s benchmarks -- table"
