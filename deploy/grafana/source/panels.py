"""Panels of a Grafana dashboard as the plain dicts of its JSON, and how they are laid out.

A panel's id is written where it is made and never changes: links, library copies and alerts point at it. Sizes are in
Grafana's grid, 24 columns wide; a row places its panels from left to right and wraps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]
Steps = Sequence[tuple[float | None, str]]  #: thresholds: (from this value on, colour), the first one's value is None

PROMETHEUS: Json = {"type": "prometheus", "uid": "prometheus"}
LOKI: Json = {"type": "loki", "uid": "loki"}
TEMPO: Json = {"type": "tempo", "uid": "tempo"}
COLUMNS = 24

GOOD_BAD: Steps = ((None, "green"), (1, "red"))
BAD_GOOD: Steps = ((None, "red"), (1, "green"))
PLAIN: Steps = ((None, "blue"),)


# Queries ---------------------------------------------------------------------------------------------------------


def query(expr: str, legend: str = "", *, exemplar: bool = False) -> Json:
    """A range query. `legend` is a template such as "{{outcome}}"."""
    return {"datasource": PROMETHEUS, "expr": _one_line(expr), "legendFormat": legend, "range": True, "instant": False,
            "exemplar": exemplar, "editorMode": "code"}  # fmt: skip


def instant(expr: str, legend: str = "") -> Json:
    """The newest value of each series, as rows of a table."""
    return {**query(expr, legend), "range": False, "instant": True, "format": "table"}


def buckets(expr: str) -> Json:
    """A histogram's buckets for a heat map, with its exemplars."""
    return {**query(expr, "{{le}}", exemplar=True), "format": "heatmap"}


def logql(expr: str, legend: str = "", *, is_instant: bool = False) -> Json:
    return {"datasource": LOKI, "expr": _one_line(expr), "legendFormat": legend, "editorMode": "code",
            "queryType": "instant" if is_instant else "range"}  # fmt: skip


def traceql(text: str, limit: int = 20) -> Json:
    return {"datasource": TEMPO, "query": _one_line(text), "queryType": "traceql", "tableType": "traces",
            "limit": limit}  # fmt: skip


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


# Panels ----------------------------------------------------------------------------------------------------------


def panel(
    id: int, kind: str, title: str, description: str, targets: Sequence[Json], *, width: int, height: int = 8
) -> Json:
    """What all panels have. Targets get their letters here."""
    source = targets[0]["datasource"] if targets else None
    lettered = [{"refId": chr(ord("A") + i), **target} for i, target in enumerate(targets)]
    made: Json = {
        "id": id, "type": kind, "title": title, "description": _one_line(description),
        "gridPos": {"x": 0, "y": 0, "w": width, "h": height},
        "fieldConfig": {"defaults": {}, "overrides": []}, "options": {},
    }  # fmt: skip
    if targets:
        made |= {"datasource": source, "targets": lettered}
    return made


def stat(
    id: int, title: str, description: str, target: Json, unit: str, steps: Steps, *,
    width: int = 3, text: str = "value", decimals: int | None = None, link: Json | None = None,
) -> Json:  # fmt: skip
    """One number, coloured by its thresholds. text: "value" or "name" (the legend instead of the number)."""
    made = panel(id, "stat", title, description, [target], width=width, height=4)
    made["fieldConfig"]["defaults"] = {
        "unit": unit, "color": {"mode": "thresholds"}, "thresholds": thresholds(steps), "noValue": "none",
        "links": [link] if link else [],
    }  # fmt: skip
    if decimals is not None:
        made["fieldConfig"]["defaults"]["decimals"] = decimals
    made["options"] = {
        "colorMode": "value", "graphMode": "area" if text == "value" else "none", "justifyMode": "auto",
        "orientation": "auto", "textMode": text, "wideLayout": True, "showPercentChange": False,
        "percentChangeColorMode": "standard",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }  # fmt: skip
    return made


def graph(
    id: int, title: str, description: str, targets: Sequence[Json], unit: str, *,
    width: int = 8, height: int = 8, stacked: bool = False, steps: Steps = (), floor: float | None = 0,
    ceiling: float | None = None, log: bool = False, colours: dict[str, str] | None = None,
) -> Json:  # fmt: skip
    """Lines over time. steps: threshold lines; colours: by legend; log: a logarithmic axis."""
    made = panel(id, "timeseries", title, description, targets, width=width, height=height)
    defaults: Json = {
        "unit": unit, "color": {"mode": "palette-classic"},
        "thresholds": thresholds(steps or ((None, "green"),)),
        "custom": {
            "drawStyle": "line", "lineInterpolation": "linear", "lineWidth": 1, "showPoints": "auto", "pointSize": 4,
            "fillOpacity": 30 if stacked else 8, "gradientMode": "none", "spanNulls": False,
            "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
            "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
            "thresholdsStyle": {"mode": "dashed" if steps else "off"},
            "axisPlacement": "auto", "axisLabel": "",
        },
    }  # fmt: skip
    if floor is not None and not log:
        defaults["min"] = floor
    if ceiling is not None:
        defaults["max"] = ceiling
    made["fieldConfig"] = {
        "defaults": defaults,
        "overrides": [
            {"matcher": {"id": "byName", "options": name},
             "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}]}
            for name, colour in (colours or {}).items()
        ],
    }  # fmt: skip
    made["options"] = {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return made


def heatmap(id: int, title: str, description: str, target: Json, unit: str, cells: str, *, width: int = 12) -> Json:
    """A histogram over time; the dots are exemplars. unit: of the y axis; cells: of what is counted."""
    made = panel(id, "heatmap", title, description, [target], width=width)
    made["fieldConfig"]["defaults"] = {"unit": cells, "custom": {"scaleDistribution": {"type": "linear"}}}
    made["options"] = {
        "calculate": False, "cellGap": 1, "showValue": "never", "legend": {"show": True},
        "color": {"mode": "scheme", "scheme": "Oranges", "scale": "exponential", "exponent": 0.5, "steps": 64,
                  "fill": "dark-orange", "reverse": False},
        "exemplars": {"color": "rgba(255,0,255,0.7)"}, "filterValues": {"le": 1e-9},
        "rowsFrame": {"layout": "auto"}, "tooltip": {"mode": "single", "yHistogram": True, "showColorScale": False},
        "yAxis": {"unit": unit, "axisPlacement": "left", "reverse": False}, "cellValues": {"unit": cells},
    }  # fmt: skip
    return made


def bars(
    id: int, title: str, description: str, target: Json, unit: str, steps: Steps, *,
    width: int = 8, ceiling: float | None = None,
) -> Json:  # fmt: skip
    """One bar for each series, its newest value."""
    made = panel(id, "bargauge", title, description, [target], width=width)
    defaults: Json = {"unit": unit, "min": 0, "color": {"mode": "thresholds"}, "thresholds": thresholds(steps)}
    if ceiling is not None:
        defaults["max"] = ceiling
    made["fieldConfig"]["defaults"] = defaults
    made["options"] = {
        "displayMode": "gradient", "orientation": "horizontal", "showUnfilled": True, "valueMode": "color",
        "namePlacement": "auto", "sizing": "auto", "minVizWidth": 8, "minVizHeight": 16, "maxVizHeight": 300,
        "legend": {"showLegend": False, "displayMode": "list", "placement": "bottom", "calcs": []},
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }  # fmt: skip
    return made


def table(
    id: int, title: str, description: str, targets: Sequence[Json], columns: dict[str, tuple[str, str]], *,
    width: int = 12, sort: str = "",
) -> Json:  # fmt: skip
    """Instant queries side by side, joined by their labels. columns: field → (heading, unit), in order; the values of
    queries A, B, … are the fields "Value #A", "Value #B", … ("Value" if there is one query)."""
    made = panel(id, "table", title, description, targets, width=width)
    made["fieldConfig"] = {
        "defaults": {"unit": "short", "custom": {"align": "auto", "filterable": True, "cellOptions": {"type": "auto"}}},
        "overrides": [
            {"matcher": {"id": "byName", "options": heading}, "properties": [{"id": "unit", "value": unit}]}
            for heading, unit in columns.values()
            if unit
        ],
    }
    made["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "filterFieldsByName", "options": {"include": {"names": list(columns)}}},
        {"id": "organize", "options": {
            "indexByName": {field: i for i, field in enumerate(columns)},
            "renameByName": {field: heading for field, (heading, _) in columns.items()}, "excludeByName": {},
        }},
    ]  # fmt: skip
    made["options"] = {
        "showHeader": True, "cellHeight": "sm", "footer": {"show": False, "reducer": ["sum"], "fields": ""},
        "sortBy": [{"displayName": sort, "desc": True}] if sort else [],
    }  # fmt: skip
    return made


def logs(id: int, title: str, description: str, target: Json, *, width: int = 24, height: int = 9) -> Json:
    """Log lines, newest first. A line's trace id is a link to its trace (the data source's derived field)."""
    made = panel(id, "logs", title, description, [target], width=width, height=height)
    made["options"] = {
        "showTime": True, "showLabels": False, "showCommonLabels": False, "wrapLogMessage": True,
        "prettifyLogMessage": False, "enableLogDetails": True, "dedupStrategy": "none", "sortOrder": "Descending",
    }  # fmt: skip
    return made


def traces(id: int, title: str, description: str, target: Json, *, width: int = 12) -> Json:
    """Traces that a TraceQL query finds; a trace id opens the trace."""
    made = panel(id, "table", title, description, [target], width=width)
    made["fieldConfig"]["defaults"] = {"custom": {"align": "auto", "cellOptions": {"type": "auto"}}}
    made["options"] = {"showHeader": True, "cellHeight": "sm", "footer": {"show": False, "reducer": ["sum"]}}
    return made


def text(id: int, title: str, description: str, markdown: str, *, width: int = 24, height: int = 4) -> Json:
    made = panel(id, "text", title, description, [], width=width, height=height)
    made["options"] = {"mode": "markdown", "content": markdown.strip()}
    return made


def thresholds(steps: Steps) -> Json:
    return {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in steps]}


# The dashboard ---------------------------------------------------------------------------------------------------


def row(id: int, title: str, *panels: Json, collapsed: bool = False) -> list[Json]:
    """A heading and the panels under it, placed from y = 0 on."""
    heading = {"id": id, "type": "row", "title": title, "collapsed": collapsed, "panels": [],
               "gridPos": {"x": 0, "y": 0, "w": COLUMNS, "h": 1}}  # fmt: skip
    x, y, tallest = 0, 1, 0
    for one in panels:
        place = one["gridPos"]
        if x + place["w"] > COLUMNS:
            x, y, tallest = 0, y + tallest, 0
        place["x"], place["y"] = x, y
        x, tallest = x + place["w"], max(tallest, place["h"])
    return [heading, *panels]


def below_each_other(rows: Sequence[list[Json]]) -> list[Json]:
    y = 0
    for group in rows:
        for one in group:
            one["gridPos"]["y"] += y
        y = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in group)
    return [one for group in rows for one in group]


def variable(
    name: str, label: str, expr: str, current: str = "$__all", *, multi: bool = True, all_value: str = ".*"
) -> Json:
    """A choice from a label's values. "All" is a pattern, else `.*`: that also takes series that lack the label."""
    is_all = current == "$__all"
    made: Json = {
        "name": name, "label": label, "type": "query", "datasource": PROMETHEUS, "hide": 0, "skipUrlSync": False,
        "definition": expr, "query": {"query": expr, "refId": name, "qryType": 1}, "refresh": 2, "regex": "", "sort": 1,
        "multi": multi, "includeAll": multi,
        "current": {"selected": True, "text": ["All"] if is_all else current, "value": [current] if is_all else current},
    }  # fmt: skip
    if multi:
        made["allValue"] = all_value
    return made


def constant(name: str, value: str) -> Json:
    return {"name": name, "type": "constant", "hide": 2, "skipUrlSync": True, "query": value}


def annotation(name: str, colour: str, expr: str, title: str, text: str) -> Json:
    return {"name": name, "datasource": PROMETHEUS, "enable": True, "hide": False, "iconColor": colour,
            "expr": expr, "titleFormat": title, "textFormat": text, "useValueForTime": "false"}  # fmt: skip


def dashboard(
    uid: str, title: str, description: str, variables: Sequence[Json], annotations: Sequence[Json],
    rows: Sequence[list[Json]],
) -> Json:  # fmt: skip
    others = {"title": "Tunnel dashboards", "type": "dashboards", "tags": ["tunnel"], "asDropdown": True,
              "keepTime": True, "includeVars": True, "targetBlank": False, "icon": "external link", "tooltip": "",
              "url": ""}  # fmt: skip
    return {
        "uid": uid, "title": title, "description": description, "tags": ["tunnel"], "schemaVersion": 41, "version": 1,
        "editable": True, "graphTooltip": 1, "refresh": "30s", "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser", "timepicker": {}, "fiscalYearStartMonth": 0, "liveNow": False, "weekStart": "",
        "links": [others], "templating": {"list": list(variables)}, "annotations": {"list": list(annotations)},
        "panels": below_each_other(rows),
    }  # fmt: skip
