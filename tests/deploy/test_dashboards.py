"""The Grafana files hang together: JSON as its source writes it, ids, places, units, data sources, parsed queries."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from contract import AGENT, CORE, RUNTIME, WORKERS, table

from tunnel.errors import LIMITS

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
FILES = sorted((GRAFANA / "dashboards").glob("*.json"))
UNITS = {"short", "reqps", "ops", "cps", "percentunit", "s", "µs", "bytes", "Bps"}  # Grafana's ids, as used here
TEXT_ONLY = {"row", "text", "logs"}
#: what Grafana would put for its variables
VARIABLES = {"job": "tunnel-core", "instance": ".*", "account": ".*", "agent": ".*", "agents_job": "tunnel-agents",
             "__rate_interval": "1m", "__range": "1h"}  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def data_sources() -> dict[str, dict[str, Any]]:
    [path] = (GRAFANA / "provisioning" / "datasources").glob("*.yml")
    return {one["uid"]: one for one in yaml.safe_load(path.read_text())["datasources"]}


def substituted(expr: str) -> str:
    return re.sub(r"\$(\w+)", lambda match: VARIABLES[match[1]], expr)


def promql(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(where, expression) of every Prometheus query, those of annotations included."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            if target["datasource"]["uid"] == "prometheus":
                yield f"{panel['title']}/{target['refId']}", substituted(target["expr"])
    for one in dashboard["annotations"]["list"]:
        yield one["name"], substituted(one["expr"])


def test_the_files_are_what_their_source_writes(tmp_path: Path) -> None:
    root = GRAFANA.parents[1]
    document = tmp_path / "docs" / "DASHBOARDS.md"
    copy = tmp_path / "deploy" / "grafana"
    shutil.copytree(GRAFANA / "source", copy / "source", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "dashboards").mkdir()
    document.parent.mkdir()
    shutil.copy(root / "docs" / "DASHBOARDS.md", document)
    subprocess.run([sys.executable, copy / "source"], check=True, env={"PYTHONPATH": str(root)})
    written = {path.name: path.read_text() for path in (copy / "dashboards").iterdir()}
    assert written == {path.name: path.read_text() for path in FILES}, "run: python deploy/grafana/source"
    assert document.read_text() == (root / "docs" / "DASHBOARDS.md").read_text(), "run: python deploy/grafana/source"


def test_every_row_has_its_picture() -> None:
    """`nox -s pictures` draws them; each is of a row that is there."""
    shown = set(re.findall(r"\(img/(\S+)\)", (GRAFANA.parents[1] / "docs" / "DASHBOARDS.md").read_text()))
    assert shown == {path.name for path in (GRAFANA.parents[1] / "docs" / "img").iterdir()}
    assert len(shown) > 10


#: metrics of the contract that no panel shows → why
NOT_SHOWN = {"process_virtual_memory_bytes": "resident memory is what counts"}


def test_every_metric_is_on_a_dashboard() -> None:
    text = "".join(path.read_text() for path in FILES)
    assert {
        name for name in table(CORE, AGENT, RUNTIME, WORKERS) if not re.search(rf"\b{name}", text)
    } == NOT_SHOWN.keys()


def test_every_limit_is_in_a_panel() -> None:
    """But for everyday ends, which the table of all limits counts."""
    [panels] = [load(path)["panels"] for path in FILES if path.stem == "tunnel-core"]
    named = set()
    for panel in panels:
        for target in panel.get("targets", ()):
            for words in re.findall(r'limit=~"([a-z_|]+)"', target.get("expr", "")):
                named |= set(words.split("|"))
    assert named == set(LIMITS) - {"idle_time", "connection_requests", "first_byte_time"}


def test_failed_in_the_tunnel_is_what_the_objective_counts() -> None:
    """A dead local service is no failure of the tunnel, on the dashboard as in the alerts."""
    rules = (GRAFANA.parent / "prometheus" / "rules" / "slo.yml").read_text()
    failed, carried = ({*re.findall(rf'outcome{sign}"([a-z_|]+)"', rules)} for sign in ("=~", "!~"))
    board = dict(promql(load(GRAFANA / "dashboards" / "tunnel-core.json")))
    expr = board["Failed in the tunnel/A"]
    assert ({*re.findall(r'outcome=~"([^"]*)"', expr)}, {*re.findall(r'outcome!~"([^"]*)"', expr)}) == (failed, carried)


#: series that every job has
EVERYBODYS = r"\b(up|process_\w+|python_\w+|trio_\w+|scrape_\w+)\{"


def test_all_jobs_are_all_cores(tmp_path: Path) -> None:
    """With "All" in each variable: a core that is down is 0, and nobody else's processor, memory, files are shown."""
    board = load(GRAFANA / "dashboards" / "tunnel-core.json")
    chosen = {one["name"]: one.get("allValue") or one["query"] for one in board["templating"]["list"]}

    def asked(expr: str) -> str:
        return re.sub(r"\$(\w+)", lambda match: (chosen | {"__rate_interval": "2m", "__range": "1h"})[match[1]], expr)

    exprs = {
        f"{panel['title']}/{target['refId']}": asked(target["expr"])
        for panel in board["panels"]
        for target in panel.get("targets", ())
        if target["datasource"]["uid"] == "prometheus" and re.search(EVERYBODYS, target["expr"])
    } | {one["name"]: asked(one["expr"]) for one in board["annotations"]["list"] if re.search(EVERYBODYS, one["expr"])}
    assert {"Cores up/A", "CPU/A", "Memory/A", "Memory growth/A", "Open files/A", "Restarts"} <= set(exprs)
    names = {name for expr in exprs.values() for name in re.findall(EVERYBODYS, expr)} - {"up"}
    others = [f'job="{job}",instance="x:1"' for job in ("prometheus", "tunnel-agent", "alertmanager", "node")]
    series = {f"{name}{{{labels}}}": "1+1x30" for name in names for labels in others}
    series |= {f"up{{{labels}}}": "1x30" for labels in others}
    series |= {'up{job="tunnel-core",instance="core:9090"}': "1x10 0x20"}
    zero = {"labels": "{}", "value": 0}
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": expr, "eval_time": "20m", "exp_samples": [zero] if where == "Cores up/A" else []}
            for where, expr in exprs.items()
        ],
    }
    file = tmp_path / "tests.yml"
    file.write_text(json.dumps({"evaluation_interval": "1m", "tests": [test]}))  # JSON is YAML
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_two_with_stable_names() -> None:
    assert {load(path)["uid"]: load(path)["title"] for path in FILES} == {
        "tunnel-core": "Tunnel Core Overview", "tunnel-agents": "Agent Monitoring",
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels(path: Path) -> None:
    panels = load(path)["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place, title = panel["gridPos"], panel["title"]
        assert place["x"] + place["w"] <= 24, title
        for cell in [(x, y) for x in range(place["x"], place["x"] + place["w"])
                     for y in range(place["y"], place["y"] + place["h"])]:  # fmt: skip
            assert taken.setdefault(cell, title) == title, f"{title} lies on {taken[cell]}"
        if panel["type"] == "row":
            continue
        assert len(panel["description"]) > 10, title
        is_traces = panel.get("datasource", {}).get("uid") == "tempo"
        if panel["type"] not in TEXT_ONLY and not is_traces:
            assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, title
        assert all(re.fullmatch("[A-Z]", target["refId"]) for target in panel.get("targets", ())), title


#: keys that Grafana writes itself and its published schema lacks
UNPUBLISHED = {".templating.list[].definition", ".annotations.list[].useValueForTime",
               ".annotations.list[].titleFormat", ".annotations.list[].textFormat"}  # fmt: skip


def unknown(given: Any, kept: Any, where: str = "") -> Iterator[str]:
    """What of `given` is not in `kept`, empty values aside."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from unknown(value, kept[key], f"{where}.{key}")
            elif value not in (None, [], {}, False, ""):
                yield f"{where}.{key}"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for one, other in zip(given, kept, strict=True):
            yield from unknown(one, other, f"{where}[]")
    elif given != kept:
        yield where


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_grafana_knows_every_key(path: Path) -> None:
    """By the models made from Grafana's own schemas: panels, options, queries. What they don't know is lost."""
    from grafana_foundation_sdk.cog import plugins  # late: it is large
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()

    def lost(board: dict[str, Any]) -> set[str]:
        return set(unknown(board, json.loads(JSONEncoder().encode(Dashboard.from_json(board)))))

    board = load(path)
    assert lost(board) == UNPUBLISHED
    wrong = next(panel for panel in board["panels"] if panel["type"] == "timeseries")
    wrong["options"]["lengend"] = wrong["options"].pop("legend")
    wrong["fieldConfig"]["defaults"]["custom"]["lineWith"] = 1
    assert lost(board) - UNPUBLISHED == {".panels[].options.lengend", ".panels[].fieldConfig.defaults.custom.lineWith"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_data_sources_exist(path: Path) -> None:
    known = data_sources()
    for kind, uid in re.findall(r'"type": "(\w+)",\s+"uid": "([\w-]+)"', path.read_text()):
        assert known[uid]["type"] == kind


def test_data_sources_lead_to_each_other() -> None:
    text = next((GRAFANA / "provisioning" / "datasources").glob("*.yml")).read_text()
    known = data_sources()
    named = re.findall(r"datasourceUid: (\w+)", text)
    assert set(named) == {"prometheus", "tempo", "jaeger", "loki"} == set(known)
    [pattern] = {field["matcherRegex"] for field in known["loki"]["jsonData"]["derivedFields"]}
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    for line in (f'{{"msg":"request","trace_id":"{trace_id}"}}', f"INFO request trace_id={trace_id} span_id=b7ad"):
        match = re.search(pattern, line)
        assert match is not None and match[1] == trace_id
    assert not re.search(r"(?<!\$)\$(?!\$)[{_]", text), "Grafana would expand this itself"


def test_providers_and_dashboards_are_apart() -> None:
    assert not list((GRAFANA / "provisioning").rglob("*.json")) and not list((GRAFANA / "dashboards").glob("*.y*ml"))


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: prometheus) is not here")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_queries_parse(path: Path, tmp_path: Path) -> None:
    """By Prometheus' own parser: each query as a recording rule."""
    rules = [
        {"record": f"query_{i}", "expr": expr, "labels": {"where": where}}
        for i, (where, expr) in enumerate(promql(load(path)))
    ]
    assert len(rules) > 25
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))  # JSON is YAML
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
