"""Pictures of the dashboards, drawn from a Prometheus that has real data: what a reader sees before there is a Grafana.

    python deploy/grafana/source/pictures.py http://127.0.0.1:9093 docs/img [MINUTES]

Each row of a dashboard becomes one PNG with the panels that ask Prometheus, where Grafana puts them, with its colours,
units, thresholds and exemplars. Panels that ask Loki or Tempo are left out. Needs matplotlib (the extra `pictures`).
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from documents import DASHBOARDS, has_picture, picture_of, rows_of

COLUMNS = 24
WIDTH = 12.0  # inches
ROW = 0.33
DPI = 100
MOST_SERIES = 8  # in a legend

#: Grafana's classic palette, and the names that fixed colours have in the dashboards
PALETTE = ("#7EB26D", "#EAB839", "#6ED0E0", "#EF843C", "#E24D42", "#1F78C1", "#BA43A9", "#705DA0", "#508642", "#CCA300")
COLOURS = {
    "green": "#56A64B", "yellow": "#F2CC0C", "orange": "#FF780A", "red": "#E02F44", "blue": "#3274D9", "purple": "#A352CC",
    "light-blue": "#5794F2", "super-light-blue": "#8AB8FF", "light-orange": "#FF9830", "dark-orange": "#E55400",
    "light-purple": "#B877D9", "dark-purple": "#7C2EA3", "light-red": "#F2495C", "dark-red": "#AD0317",
}  # fmt: skip
PAPER, BORDER, INK, FAINT = "#F4F5F5", "#DCDDDE", "#24292E", "#7B8087"

Labels = dict[str, str]
Series = tuple[Labels, list[float], list[float]]


class Source:
    """A Prometheus and the stretch of time that is drawn."""

    def __init__(self, url: str, minutes: float) -> None:
        self._url = url.rstrip("/")
        self.end = time.time()
        self.start = self.end - minutes * 60
        self.step = max(1.0, minutes * 60 / 150)

    def range(self, query: str) -> list[Series]:
        found = self._get("query_range", query=query, start=self.start, end=self.end, step=self.step)["result"]
        return [
            (one["metric"], *(list(map(float, each)) for each in zip(*one["values"], strict=True))) for one in found
        ]

    def now(self, query: str) -> list[tuple[Labels, float]]:
        found = self._get("query", query=query, time=self.end)["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]

    def exemplars(self, query: str) -> list[tuple[float, float]]:
        """(time, value) of each that the query's series have."""
        found = self._get("query_exemplars", query=query, start=self.start, end=self.end)
        return [(float(each["timestamp"]), float(each["value"])) for one in found for each in one["exemplars"]]

    def _get(self, path: str, **parameters: Any) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]


def substituted(expression: str, job: str, minutes: float) -> str:
    values = {"job": job, "instance": ".*", "account": ".*", "agent": ".*", "agents_job": "tunnel-agents"}
    values |= {"__rate_interval": "20s", "__range": f"{max(1, round(minutes))}m"}
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], expression)


def legend(format_: str, labels: Labels) -> str:
    if format_ and format_ != "__auto":
        return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), format_)
    return ", ".join(value for name, value in labels.items() if name != "__name__") or "value"


def shown(value: float, unit: str | None, end: float = 0.0) -> str:
    """A value in its unit, as Grafana would write it, three digits at most. end: the present, for moments."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "∞"
    if unit == "percentunit":
        return f"{value * 100:.3g}%"
    if unit == "dateTimeFromNow":
        seconds = abs(value / 1000 - end)
        text = next(f"{seconds / size:.0f} {name}" for size, name in
                    ((31536000, "years"), (86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
                    if seconds >= 1.5 * size or size == 1)  # fmt: skip
        return f"in {text}" if value / 1000 > end else f"{text} ago"
    if unit in ("s", "µs"):
        seconds = value if unit == "s" else value / 1e6
        if not seconds:
            return "0 s"
        for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
            if abs(seconds) * factor >= 1 or name == "µs":
                return f"{seconds * factor:.3g} {name}"
    if unit in ("bytes", "Bps"):
        name = "B/s" if unit == "Bps" else "B"
        for factor, prefix in ((2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
            if abs(value) >= factor:
                return f"{value / factor:.3g} {prefix}{name}"
        return f"{value:.3g} {name}"
    suffix = {"reqps": " req/s", "ops": " /s", "cps": " /s"}.get(unit or "", "")
    for factor, prefix in ((1e6, " Mil"), (1e3, " K")):
        if abs(value) >= 10 * factor:
            return f"{value / factor:.3g}{prefix}{suffix}"
    return f"{value:.4g}{suffix}" if abs(value) >= 1000 else f"{value:.3g}{suffix}"


def colour_at(panel: dict[str, Any], value: float) -> str:
    """By the panel's thresholds."""
    colour = "green"
    for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            colour = step["color"]
    return COLOURS[colour]


class Picture:
    """One row of a dashboard on one figure."""

    def __init__(self, job: str, panels: list[dict[str, Any]], source: Source, minutes: float) -> None:
        self._job, self._panels, self._source, self._minutes = job, panels, source, minutes

    def draw(self, path: Path) -> None:
        from matplotlib import pyplot as plt
        from matplotlib.patches import FancyBboxPatch
        from PIL import Image

        rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in self._panels)
        height = rows * ROW
        figure = plt.figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER)
        for panel in self._panels:
            at = panel["gridPos"]
            left, width = at["x"] / COLUMNS * WIDTH, at["w"] / COLUMNS * WIDTH
            top, tall = height - at["y"] * ROW, at["h"] * ROW
            gap = 0.05
            figure.add_artist(FancyBboxPatch(
                ((left + gap) / WIDTH, (top - tall + gap) / height), (width - 2 * gap) / WIDTH, (tall - 2 * gap) / height,
                boxstyle="square,pad=0", transform=figure.transFigure, facecolor="white", edgecolor=BORDER, linewidth=0.8,
                zorder=-1,
            ))  # fmt: skip
            figure.text(
                (left + 0.15) / WIDTH,
                (top - 0.25) / height,
                panel["title"],
                fontsize=7.5 if at["w"] < 4 else 8.5,
                color=INK,
                weight="bold",
            )

            def box(sides: tuple[float, float, float, float], at: tuple[float, ...] = (left, top, width, tall)) -> Any:
                """Axes with so many inches left free: left, right, above, below."""
                return figure.add_axes((
                    (at[0] + sides[0]) / WIDTH, (at[1] - at[3] + sides[3]) / height,
                    (at[2] - sides[0] - sides[1]) / WIDTH, (at[3] - sides[2] - sides[3]) / height,
                ))  # fmt: skip

            self._panel(box, panel)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor=PAPER, metadata={"Software": None})
        plt.close(figure)
        with Image.open(path) as image:
            image.convert("RGB").quantize(200, dither=Image.Dither.NONE).save(
                path, optimize=True
            )  # lines and text need few colours

    def _panel(self, box: Any, panel: dict[str, Any]) -> None:
        unit = panel["fieldConfig"]["defaults"].get("unit")
        kind = panel["type"]
        if kind == "stat":
            self._stat(box((0.05, 0.05, 0.35, 0.05)), panel, unit)
        elif kind == "heatmap":
            self._heatmap(box((0.65, 0.2, 0.4, 0.35)), panel)
        elif kind == "table":
            self._table(box((0.2, 0.2, 0.4, 0.15)), panel)
        elif kind == "bargauge":
            self._bars(box((0.2, 0.2, 0.4, 0.15)), panel, unit)
        else:
            self._lines(box, panel, unit)

    def _ask(self, target: dict[str, Any], job: str = "") -> str:
        return substituted(target["expr"], job or self._job, self._minutes)

    def _history(self, target: dict[str, Any]) -> list[Series]:
        """Agents come to Prometheus over the core or by themselves; only the latter have process metrics."""
        found = self._source.range(self._ask(target))
        if not found and self._job == "tunnel-agents":
            found = self._source.range(self._ask(target, "tunnel-agent"))
        return found

    def _ages(self, times: list[float]) -> list[float]:
        return [at - self._source.end for at in times]

    def _stat(self, axes: Any, panel: dict[str, Any], unit: str | None) -> None:
        [target] = panel["targets"]
        found = self._source.now(self._ask(target))
        value = found[0][1] if found else math.nan
        colour = FAINT if math.isnan(value) else colour_at(panel, value)
        axes.axis("off")
        for _, times, values in self._source.range(self._ask(target)):
            axes.fill_between(self._ages(times), values, alpha=0.18, color=colour, linewidth=0)
            axes.plot(self._ages(times), values, color=colour, linewidth=0.8, alpha=0.5)
            axes.set_ylim(0, 2.4 * max([one for one in values if math.isfinite(one)] or [1]) or 1)
        axes.text(0.5, 0.62, shown(value, unit), fontsize=17, ha="center", va="center", transform=axes.transAxes,
                  color=colour, weight="bold")  # fmt: skip

    def _lines(self, box: Any, panel: dict[str, Any], unit: str | None) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

        custom = panel["fieldConfig"]["defaults"]["custom"]
        fixed = {one["matcher"]["options"]: COLOURS[one["properties"][0]["value"]["fixedColor"]]
                 for one in panel["fieldConfig"]["overrides"]}  # fmt: skip
        drawn = [(legend(target.get("legendFormat", ""), labels), times, values)
                 for target in panel["targets"] for labels, times, values in self._history(target)]  # fmt: skip
        lines = min(len(drawn), MOST_SERIES) + (len(drawn) > MOST_SERIES)
        per_line = 2 if panel["gridPos"]["w"] > 8 else 1
        needed = math.ceil(lines / per_line)
        axes = box((0.65, 0.2, 0.4, 0.42 + 0.135 * max(1, needed)))
        is_stacked, base = custom["stacking"]["mode"] == "normal", dict[float, float]()
        handles = []
        for number, (name, times, values) in enumerate(drawn):
            colour = fixed.get(name, PALETTE[number % len(PALETTE)])
            ages = self._ages(times)
            if is_stacked:
                lower = [base.get(at, 0.0) for at in times]
                upper = [low + (value if math.isfinite(value) else 0) for low, value in zip(lower, values, strict=True)]
                base |= dict(zip(times, upper, strict=True))
                axes.fill_between(ages, lower, upper, color=colour, alpha=0.35, linewidth=0)
                values_drawn = upper
            else:
                values_drawn = values
            is_seen = not is_stacked or any(values)  # nothing, on top of the others, would take their colour
            handles += axes.plot(ages if is_seen else [], values_drawn if is_seen else [], linewidth=1.2, color=colour)
            finite = [value for value in values if math.isfinite(value)]
            said = f"{shown(finite[-1], unit)}, max {shown(max(finite), unit)}" if finite else "no data"
            handles[-1].set_label(f"{name}: {said}")
        self._time_axis(axes)
        if custom["scaleDistribution"]["type"] == "log":
            axes.set_yscale("symlog" if any(value <= 0 for _, _, values in drawn for value in values) else "log")
        else:
            low, high = axes.get_ylim()
            is_flat = all(not value for _, _, values in drawn for value in values)
            high = 1.0 if is_flat else panel["fieldConfig"]["defaults"].get("max") or high * 1.05
            axes.set_ylim(min(0.0, low), high)
            if unit in ("bytes", "Bps") and high > 1:
                axes.yaxis.set_major_locator(MultipleLocator(2 ** math.ceil(math.log2(high / 5))))
            else:
                axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))
        if custom["thresholdsStyle"]["mode"] != "off":
            for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
                if step["value"] is not None and step["value"] <= axes.get_ylim()[1]:
                    axes.axhline(step["value"], color=COLOURS[step["color"]], linewidth=0.8, linestyle=(0, (4, 4)))
        for target in panel["targets"]:
            if target.get("exemplar"):
                self._dots(axes, self._source.exemplars(self._ask(target)), axes.get_ylim()[1])
        if not drawn:
            axes.text(0.5, 0.5, "No data", fontsize=9, ha="center", va="center", transform=axes.transAxes, color=FAINT)
            return
        if len(handles) > MOST_SERIES:
            axes.plot([], [], alpha=0, label=f"and {len(handles) - MOST_SERIES} more")
        names = [*handles[:MOST_SERIES], *axes.lines[len(axes.lines) - (len(handles) > MOST_SERIES) :]]
        axes.legend(handles=[one for one in names if not one.get_label().startswith("_")], fontsize=6.5, frameon=False,
                    loc="upper left", ncol=per_line, labelcolor=INK, handlelength=1.2, labelspacing=0.25, borderpad=0,
                    bbox_to_anchor=(-0.08, -0.26 / (axes.get_position().height * axes.figure.get_figheight())))  # fmt: skip

    def _dots(self, axes: Any, exemplars: list[tuple[float, float]], ceiling: float) -> None:
        inside = [(at - self._source.end, min(value, ceiling * 0.98)) for at, value in exemplars][
            :: max(1, len(exemplars) // 60)
        ]
        axes.scatter([at for at, _ in inside], [value for _, value in inside], marker="D", s=9, color="#C4162A",
                     alpha=0.6, linewidths=0, zorder=3, clip_on=True)  # fmt: skip

    def _heatmap(self, axes: Any, panel: dict[str, Any]) -> None:
        """Observations a second by bucket; the darker, the more. The diamonds are exemplars."""
        [target] = panel["targets"]
        rows = [
            (float(labels["le"].replace("+Inf", "inf")), dict(zip(times, values, strict=True)))
            for labels, times, values in self._source.range(self._ask(target))
        ]
        rows.sort(key=lambda row: row[0])
        moments = sorted({at for _, values in rows for at in values})
        grid, below = [], dict[float, float]()
        for _, values in rows:  # the buckets are cumulative
            grid.append([max(0.0, values.get(at, 0.0) - below.get(at, 0.0)) ** 0.5 or math.nan for at in moments])
            below = values
        if moments:
            axes.pcolormesh(self._ages(moments), range(len(rows)), grid, cmap="Oranges", shading="nearest")
            bounds = [bound for bound, _ in rows]
            unit = panel["options"]["yAxis"]["unit"]
            axes.set_yticks(
                range(len(rows)), [shown(bound, unit) if math.isfinite(bound) else "longer" for bound in bounds]
            )
            dots = [(at, next(i for i, bound in enumerate(bounds) if value <= bound))
                    for at, value in self._source.exemplars(self._ask(target))]  # fmt: skip
            self._dots(axes, [(at, float(i)) for at, i in dots], len(rows))
            axes.set_ylim(-0.5, len(rows) - 0.5)
        self._time_axis(axes)
        axes.grid(visible=False)

    def _table(self, axes: Any, panel: dict[str, Any]) -> None:
        organized = panel["transformations"][-1]["options"]
        units = {one["matcher"]["options"]: one["properties"][0]["value"] for one in panel["fieldConfig"]["overrides"]}
        fields = sorted(organized["indexByName"], key=organized["indexByName"].__getitem__)
        merged: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
        for target in panel["targets"]:
            value_field = "Value" if len(panel["targets"]) == 1 else f"Value #{target['refId']}"
            for labels, value in self._source.now(self._ask(target)):
                key = tuple(
                    sorted(
                        (name, labels[name]) for name in fields if name in labels and name not in ("version", "python")
                    )
                )
                merged.setdefault(key, {}).update({**labels, value_field: value})
        names = {field: organized["renameByName"][field] for field in fields}
        lines = sorted(merged.values(), key=lambda line: self._order(line, panel, names), reverse=True)[:9]
        axes.axis("off")
        if not lines:
            axes.text(0.5, 0.5, "No data", fontsize=9, ha="center", va="center", transform=axes.transAxes, color=FAINT)
            return
        cells = [[shown(line.get(field, math.nan), units.get(names[field]), self._source.end) if field.startswith("Value")
                  else str(line.get(field, "")) for field in fields] for line in lines]  # fmt: skip
        made = axes.table(
            cells, colLabels=[names[field] for field in fields], loc="upper left", cellLoc="left", edges="B"
        )
        made.auto_set_font_size(False)
        made.set_fontsize(7.5)
        made.scale(1, 1.25)
        for (number, _), cell in made.get_celld().items():
            cell.set_edgecolor(BORDER)
            cell.set_text_props(color=COLOURS["blue"] if number == 0 else INK)

    def _order(self, line: dict[str, Any], panel: dict[str, Any], names: dict[str, str]) -> float:
        wanted = [each["displayName"] for each in panel["options"]["sortBy"]]
        value = next((line.get(field, 0.0) for field, name in names.items() if name in wanted), 0.0)
        return value if isinstance(value, float) and math.isfinite(value) else 0.0

    def _bars(self, axes: Any, panel: dict[str, Any], unit: str | None) -> None:
        [target] = panel["targets"]
        found = sorted(self._source.now(self._ask(target)), key=lambda one: one[1])
        axes.axis("off")
        if not found:
            axes.text(0.5, 0.5, "No data", fontsize=9, ha="center", va="center", transform=axes.transAxes, color=FAINT)
            return
        ceiling = panel["fieldConfig"]["defaults"].get("max") or max(value for _, value in found) or 1
        for number, (labels, value) in enumerate(found):
            axes.barh(number, ceiling, color=PAPER, height=0.5)
            axes.barh(number, min(value, ceiling), color=colour_at(panel, value), height=0.5)
            axes.text(0, number + 0.3, legend(target["legendFormat"], labels), fontsize=7.5, va="bottom", color=INK)
            axes.text(ceiling, number + 0.3, shown(value, unit), fontsize=7.5, va="bottom", ha="right", color=INK)
        axes.set_ylim(len(found) - 5.5 if len(found) < 5 else -0.5, len(found) - 0.2)

    def _time_axis(self, axes: Any) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 3, 6, 10]))
        axes.set_xlim(self._source.start - self._source.end, 0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} s" if value else "now"))
        axes.tick_params(labelsize=6.5, colors=FAINT, length=0)
        axes.grid(color=BORDER, linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)


def targets_of(panel: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in panel.get("targets", ()) if one.get("datasource", {}).get("uid") == "prometheus"]


def place(panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a row that ask Prometheus, from left to right where others are left out."""
    x, y, tallest, kept = 0, 0, 0, []
    for panel in panels:
        if not targets_of(panel):
            continue
        wide, tall = panel["gridPos"]["w"], panel["gridPos"]["h"]
        if x + wide > COLUMNS:
            x, y, tallest = 0, y + tallest, 0
        kept.append({**panel, "gridPos": {"x": x, "y": y, "w": wide, "h": tall}})
        x, tallest = x + wide, max(tallest, tall)
    return kept


def draw_all(url: str, directory: Path, minutes: float, others: Mapping[str, str] | None = None) -> list[Path]:
    """The files it wrote; older ones are removed. Raises OSError where there is no Prometheus.

    others: by the beginning of a row's heading, another Prometheus that has its data.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["font.family"] = "DejaVu Sans"
    sources = {begins: Source(each, minutes) for begins, each in {**(others or {}), "": url}.items()}
    written = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text(encoding="utf-8"))
        for title, panels in rows_of(board):
            if has_picture(panels):
                written.append(directory / picture_of(board["uid"], title))
                job = board["uid"] if board["uid"] == "tunnel-core" else "tunnel-agents"
                source = next(each for begins, each in sources.items() if title.startswith(begins))
                Picture(job, place(panels), source, minutes).draw(written[-1])
    for old in {*directory.glob("tunnel-*.png")} - {*written}:
        old.unlink()
    return written


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    for one in draw_all(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) == 4 else 5.0):
        print(one)
