"""Pictures of the dashboards, drawn from a Prometheus that has real data: what a reader sees before there is a Grafana.

    python deploy/grafana/source/pictures.py http://127.0.0.1:9093 docs/img [MINUTES]

Each dashboard becomes one PNG with the panels that ask Prometheus, where Grafana puts them. Panels that ask Loki or Tempo
are left out. Needs matplotlib (the extra `pictures`).
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

DASHBOARDS = Path(__file__).resolve().parents[1] / "dashboards"
COLUMNS = 24
COLUMN, ROW = 0.62, 0.30  # inches
MOST_SERIES = 12  # in a legend


class Source:
    """A Prometheus and the stretch of time that is drawn."""

    def __init__(self, url: str, minutes: float) -> None:
        self._url = url.rstrip("/")
        self.end = time.time()
        self.start = self.end - minutes * 60
        self.step = max(1.0, minutes * 60 / 120)

    def range(self, query: str) -> list[tuple[dict[str, str], list[float], list[float]]]:
        found = self._get("query_range", query=query, start=self.start, end=self.end, step=self.step)
        return [
            (one["metric"], [float(at) for at, _ in one["values"]], [float(value) for _, value in one["values"]])
            for one in found
        ]

    def now(self, query: str) -> list[tuple[dict[str, str], float]]:
        return [(one["metric"], float(one["value"][1])) for one in self._get("query", query=query, time=self.end)]

    def _get(self, path: str, **parameters: Any) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]["result"]


def substituted(expression: str, job: str, minutes: float) -> str:
    values = {"job": job, "instance": ".*", "account": ".*", "agent": ".*", "agents_job": "tunnel-agents"}
    values |= {"__rate_interval": "20s", "__range": f"{max(1, round(minutes))}m"}
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], expression)


def legend(format_: str, labels: dict[str, str]) -> str:
    if format_ and format_ != "__auto":
        return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), format_)
    return ", ".join(value for name, value in labels.items() if name != "__name__") or "value"


def shown(value: float, unit: str | None) -> str:
    """A value in its unit, as Grafana would write it, three digits at most."""
    if not math.isfinite(value):
        return "no data" if math.isnan(value) else "no limit"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit in ("s", "µs"):
        seconds = value if unit == "s" else value / 1e6
        for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
            if seconds * factor >= 1 or name == "µs":
                return f"{seconds * factor:.3g} {name}"
    if unit in ("bytes", "Bps"):
        name = "B/s" if unit == "Bps" else "B"
        for factor, prefix in ((2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
            if abs(value) >= factor:
                return f"{value / factor:.3g} {prefix}{name}"
        return f"{value:.3g} {name}"
    suffix = {"reqps": " req/s", "ops": " /s", "cps": " /s"}.get(unit or "", "")
    return f"{value:.3g}{suffix}"


def targets_of(panel: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in panel.get("targets", ()) if one.get("datasource", {}).get("uid") == "prometheus"]


class Board:
    """One dashboard on one figure."""

    def __init__(self, board: dict[str, Any], source: Source, minutes: float) -> None:
        self._title = board["title"]
        self._panels = place(board["panels"])
        self._job = board["uid"] if board["uid"] == "tunnel-core" else "tunnel-agents"
        self._source = source
        self._minutes = minutes

    def draw(self, path: Path) -> None:
        from matplotlib import pyplot as plt
        from PIL import Image

        rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in self._panels)
        width, height = COLUMNS * COLUMN, rows * ROW
        figure = plt.figure(figsize=(width, height), dpi=72)
        for panel in self._panels:
            at = panel["gridPos"]
            left, top = at["x"] / COLUMNS, 1 - at["y"] / rows
            if panel["type"] == "row":
                figure.text(0.005, top - 0.75 / rows, panel["title"], fontsize=12, fontweight="bold")
                continue
            # room for the title above and the axis' labels below and to the left, in inches
            box = (
                left + 0.55 / width,
                top - (at["h"] * ROW - 0.3) / height,
                at["w"] / COLUMNS - 0.75 / width,
                (at["h"] * ROW - 0.65) / height,
            )
            axes = figure.add_axes(box)
            axes.set_title(panel["title"], fontsize=9, loc="left")
            axes.tick_params(labelsize=7)
            self._panel(axes, panel)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white", metadata={"Software": None})
        plt.close(figure)
        with Image.open(path) as image:
            image.convert("RGB").quantize(48).save(path, optimize=True)  # lines and text need few colours

    def _panel(self, axes: Any, panel: dict[str, Any]) -> None:
        unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit")
        kind = panel["type"]
        if kind == "stat":
            self._stat(axes, panel, unit)
        elif kind == "heatmap":
            self._heatmap(axes, panel)
        elif kind in ("table", "bargauge"):
            self._table(axes, panel, unit)
        else:
            self._lines(axes, panel, unit)

    def _ask(self, target: dict[str, Any]) -> str:
        return substituted(target["expr"], self._job, self._minutes)

    def _history(self, target: dict[str, Any]) -> list[tuple[dict[str, str], list[float], list[float]]]:
        """Agents come to Prometheus over the core or by themselves; only the latter have process metrics."""
        found = self._source.range(self._ask(target))
        if not found and self._job == "tunnel-agents":
            found = self._source.range(substituted(target["expr"], "tunnel-agent", self._minutes))
        return found

    def _stat(self, axes: Any, panel: dict[str, Any], unit: str | None) -> None:
        found = self._source.now(self._ask(targets_of(panel)[0]))
        text = shown(found[0][1] if found else math.nan, unit)
        axes.axis("off")
        axes.text(0.5, 0.45, text, fontsize=15, ha="center", va="center", transform=axes.transAxes)

    def _lines(self, axes: Any, panel: dict[str, Any], unit: str | None) -> None:
        from matplotlib.ticker import FuncFormatter

        drawn = 0
        for target in targets_of(panel):
            for labels, times, values in self._history(target):
                name = legend(target.get("legendFormat", ""), labels) if drawn < MOST_SERIES else "_"
                axes.plot([at - self._source.end for at in times], values, linewidth=1, label=name)
                drawn += 1
        self._time_axis(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
        if drawn:
            axes.legend(fontsize=6, loc="upper left", framealpha=0.6)
        else:
            axes.text(0.5, 0.5, "no data", fontsize=9, ha="center", va="center", transform=axes.transAxes, alpha=0.6)

    def _heatmap(self, axes: Any, panel: dict[str, Any]) -> None:
        """Observations a second by bucket; the darker, the more."""
        rows = [
            (float(labels["le"].replace("+Inf", "inf")), dict(zip(times, values, strict=True)))
            for labels, times, values in self._source.range(self._ask(targets_of(panel)[0]))
        ]
        rows.sort(key=lambda row: row[0])
        moments = sorted({at for _, values in rows for at in values})
        grid = []
        below: dict[float, float] = {}
        for _, values in rows:  # the buckets are cumulative
            grid.append([max(0.0, values.get(at, 0.0) - below.get(at, 0.0)) or math.nan for at in moments])
            below = values
        if moments:
            ages = [at - self._source.end for at in moments]
            axes.pcolormesh(ages, range(len(rows)), grid, cmap="YlOrRd", shading="nearest")
            unit = "s" if self._job == "tunnel-core" else "µs"
            names = [shown(bound, unit) if math.isfinite(bound) else "longer" for bound, _ in rows]
            axes.set_yticks(range(len(rows)), names)
        self._time_axis(axes)

    def _table(self, axes: Any, panel: dict[str, Any], unit: str | None) -> None:
        axes.axis("off")
        lines = []
        for target in targets_of(panel):
            for labels, value in self._source.now(self._ask(target)):
                lines.append(f"{legend(target.get('legendFormat', ''), labels)[:60]}: {shown(value, unit)}")
        text = "\n".join(lines[:12]) or "no data"
        axes.text(0, 0.95, text, fontsize=7, va="top", transform=axes.transAxes, family="monospace")

    def _time_axis(self, axes: Any) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 3, 6, 10]))
        axes.set_xlim(self._source.start - self._source.end, 0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} s" if value else "now"))


def place(panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The panels that ask Prometheus and their rows, moved up where others are left out."""
    kept: list[dict[str, Any]] = []
    for panel in panels:
        if panel["type"] == "row":
            if kept and kept[-1]["type"] == "row":
                kept.pop()
            kept.append(panel)
        elif targets_of(panel):
            kept.append(panel)
    if kept and kept[-1]["type"] == "row":
        kept.pop()
    tops = sorted({panel["gridPos"]["y"] for panel in kept})
    heights = {top: max(one["gridPos"]["h"] for one in kept if one["gridPos"]["y"] == top) for top in tops}
    moved: dict[int, int] = {}
    below = 0
    for top in tops:
        moved[top] = below
        below += heights[top]
    return [{**panel, "gridPos": {**panel["gridPos"], "y": moved[panel["gridPos"]["y"]]}} for panel in kept]


def draw_all(url: str, directory: Path, minutes: float) -> list[Path]:
    """Raises OSError where there is no Prometheus. The files it wrote."""
    import matplotlib as mpl

    mpl.use("Agg")
    source = Source(url, minutes)
    written = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        written.append(directory / f"{path.stem}.png")
        Board(json.loads(path.read_text(encoding="utf-8")), source, minutes).draw(written[-1])
    return written


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    for one in draw_all(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) == 4 else 5.0):
        print(one)
