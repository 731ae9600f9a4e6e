"""Every alert has a page, and what the pages tell an operator to type exists: metrics, labels, log lines, fields, span
attributes, outcomes, settings, commands, addresses. What a live Prometheus says to the queries is in tests/system."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from contract import AGENT, CORE, RUNTIME, WORKERS, table
from runbooks import (
    PAGES,
    ROOT,
    RUNBOOKS,
    SECTIONS,
    alerts,
    labels_grouped,
    languages,
    queries,
    recorded,
    sections,
    series_named,
)

from tunnel.config.options import program
from tunnel.core.phrases import Limit, parse_commands
from tunnel.core.quotas import TYPES
from tunnel.core.store import OPERATIONS
from tunnel.errors import OUTCOMES, REFUSALS

ALERTS = alerts()
TEXTS = {path.stem: path.read_text() for path in PAGES}
PAGE = pytest.mark.parametrize("name", TEXTS)
#: series that Prometheus, its Alertmanager or a scrape makes, and their own labels
FOREIGN = {
    "up", "ALERTS", "scrape_duration_seconds", "scrape_samples_scraped", "scrape_samples_post_metric_relabeling",
    "scrape_series_added", "prometheus_tsdb_head_series", "prometheus_rule_evaluation_failures_total",
    "prometheus_rule_group_last_duration_seconds", "prometheus_rule_group_iterations_missed_total",
    "prometheus_notifications_errors_total", "prometheus_notifications_alertmanagers_discovered",
    "prometheus_config_last_reload_successful", "alertmanager_config_last_reload_successful",
    "prometheus_config_last_reload_success_timestamp_seconds",
    "prometheus_sd_discovered_targets", "alertmanager_notifications_failed_total",
}  # fmt: skip
FOREIGN_LABELS = {"alertstate", "config", "rule_group", "__name__"}
TARGET_LABELS = {"job", "instance", "service", "cluster"}
AGENT_LABELS = {"agent_id", "account_id"}  # of the agents' page and of what is recorded from it
SOURCES = "\n".join(
    path.read_text() for room in ("tunnel", "observability") for path in sorted((ROOT / room).rglob("*.py"))
)


def index() -> str:
    """What README.md has between its marks."""
    rows = ["| alert | severity | what it says |", "| --- | --- | --- |"]
    for name, (_, rule) in ALERTS.items():
        rows.append(f"| [{name}]({name}.md) | {rule['labels']['severity']} | {rule['annotations']['summary']} |")
    return "\n".join(rows)


def known_series() -> dict[str, set[str]]:
    """Sample names of the contract with their labels, targets' and agents' labels aside."""
    found: dict[str, set[str]] = {}
    for name, row in table(CORE, AGENT, RUNTIME, WORKERS).items():
        if row.type == "histogram":
            found |= {f"{name}_{part}": {*row.labels} for part in ("sum", "count")}
            found[f"{name}_bucket"] = {*row.labels, "le"}
        else:
            found[name] = {*row.labels}
    return found


def test_every_alert_has_its_page_and_every_page_its_alert() -> None:
    assert set(TEXTS) == set(ALERTS)


def test_the_index_is_current() -> None:
    shown = re.search(r"<!-- alerts:.*?-->\n(.*?)<!-- /alerts -->", (RUNBOOKS / "README.md").read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == index(), f"it should be:\n{index()}"


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_leads_to_its_page(name: str) -> None:
    url = ALERTS[name][1]["annotations"]["runbook_url"]
    assert url == '{{ or $externalLabels.runbooks "deploy/runbooks" }}/' + name + ".md"


@pytest.mark.parametrize(("base", "expected"), [("", "deploy/runbooks"), ("https://git.example.com/x", "")])
def test_the_address_is_set_in_one_place(base: str, expected: str, tmp_path: Path) -> None:
    """As Prometheus fills it in, without the external label and with it."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.fail("promtool is missing: install the package prometheus (scripts/packages)")
    annotations = {
        "summary": "No tunnel core is scraped",
        "description": ALERTS["TunnelCoreAbsent"][1]["annotations"]["description"],
        "runbook_url": f"{base or expected}/TunnelCoreAbsent.md",
    }
    labels = {"job": "tunnel-core", "severity": "critical", "service": "core-server"}
    case = {
        "interval": "1m",
        "external_labels": {"runbooks": base} if base else {},
        "alert_rule_test": [
            {
                "eval_time": "30m",
                "alertname": "TunnelCoreAbsent",
                "exp_alerts": [{"exp_labels": labels, "exp_annotations": annotations}],
            }
        ],
    }
    file = tmp_path / "tests.yml"
    rules = str(ROOT / "deploy" / "prometheus" / "rules" / "core.yml")
    file.write_text(json.dumps({"rule_files": [rules], "evaluation_interval": "1m", "tests": [case]}))
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_lose_the_address_on_their_way_out() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert {"action": "labeldrop", "regex": "runbooks"} in config["alerting"]["alert_relabel_configs"]


@PAGE
def test_a_page_has_its_parts(name: str) -> None:
    text, (file, rule) = TEXTS[name], ALERTS[name]
    when = f"after {rule['for']}" if "for" in rule else "at once"
    head = (
        f"# {name}\n\n{rule['annotations']['summary']}. Severity **{rule['labels']['severity']}**, {when}; "
        f"rule in [{file}](../prometheus/rules/{file}).\n\n## {SECTIONS[0]}\n"
    )
    assert " ".join(text.split()).startswith(" ".join(head.split())), f"it should begin so:\n{head}"
    found = sections(text)
    assert list(found) == SECTIONS
    for title, body in found.items():
        assert len(body.split()) >= (1 if title == "Related" else 10), title
    assert len(re.findall(r"^\d\. ", found["Likely causes"], re.MULTILINE)) >= 3
    assert len(re.findall(r"^\d\. ", found["What to do"], re.MULTILINE)) >= 3
    assert "promql" in languages(text)
    assert 25 <= len(text.splitlines()) <= 60


@PAGE
def test_related_pages_are_others(name: str) -> None:
    related = re.findall(r"\((\w+)\.md\)", sections(TEXTS[name])["Related"])
    assert related
    assert name not in related
    assert set(re.findall(r"\((\w+)\.md\)", TEXTS[name])) <= {*ALERTS, "README"}


@PAGE
def test_metrics_and_labels_exist(name: str) -> None:
    known, made = known_series(), recorded()
    for query in queries(TEXTS[name], "promql"):
        found = series_named(query)
        assert found, query
        for series, asked in found:
            allowed = TARGET_LABELS | FOREIGN_LABELS
            if series in known:
                allowed = TARGET_LABELS | known[series] | (AGENT_LABELS if series.startswith("agent_") else set())
            elif series in made:
                allowed = TARGET_LABELS | AGENT_LABELS | {"outcome"}
            else:
                assert series in FOREIGN or series == "", f"{series}: {query}"
            assert asked <= allowed, query
        grouped = set().union(*known.values(), TARGET_LABELS, AGENT_LABELS, FOREIGN_LABELS)
        assert labels_grouped(query) <= grouped, query


@PAGE
def test_values_of_closed_labels_exist(name: str) -> None:
    closed = {
        "outcome": set(OUTCOMES), "reason": {*REFUSALS, *OUTCOMES}, "operation": set(OPERATIONS),
        "type": set(TYPES), "listener": {"agent", "public"}, "side": {"visitor", "agent"},
        "job": {"tunnel-core", "tunnel-agents", "tunnel-agent", "prometheus", "alertmanager"},
    }  # fmt: skip
    for query in [*queries(TEXTS[name], "promql"), *queries(TEXTS[name], "logql")]:
        for label, sign, value in re.findall(r'(\w+) ?(=~|!=|=)"([^"]*)"', query):
            if label in closed:
                for word in value.split("|") if sign == "=~" else [value]:
                    assert any(re.fullmatch(word, one) for one in closed[label]), query


def test_queries_parse(tmp_path: Path) -> None:
    """By Prometheus' own parser: each query as a recording rule."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.fail("promtool is missing: install the package prometheus (scripts/packages)")
    found = [(name, query) for name, text in TEXTS.items() for query in queries(text, "promql")]
    rules = [{"record": f"query_{i}", "expr": expr, "labels": {"page": name}} for i, (name, expr) in enumerate(found)]
    assert len(rules) > 3 * len(TEXTS)
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))  # JSON is YAML
    done = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@PAGE
def test_log_lines_and_their_fields_exist(name: str) -> None:
    for query in queries(TEXTS[name], "logql"):
        assert re.search(r'\{container(="tunnel-(core|agent)"|=~"tunnel-core\|tunnel-agent")\}', query), query
        for texts in re.findall(r'\|[=~] "([^"]*)"', query):
            for text in texts.split("|"):
                assert text in SOURCES, text
        after = re.sub(r'"[^"]*"', '""', query.partition("| json")[2])
        fields = set(re.findall(r"\|\s*(\w+)\s*[=!<>]", after)) | labels_grouped(query)
        fields |= set(re.findall(r"\{\{\.(\w+)\}\}", query)) | set(re.findall(r"unwrap (\w+)", query))
        for field in fields - {"level", "msg", "__error__"}:
            assert re.search(rf"\b{field}=|\b{field}: (str|int)\b", SOURCES), field


@PAGE
def test_span_attributes_exist(name: str) -> None:
    spans = "".join(path.read_text() for path in (ROOT / "observability").glob("*.py"))
    for query in queries(TEXTS[name], "traceql"):
        assert query.startswith("{ ") and query.endswith(" }")
        for attribute in re.findall(r"\bspan\.([\w.]+)", query):
            assert f'"{attribute}"' in spans, attribute
        assert set(re.findall(r'service\.name = "([^"]*)"', query)) <= {"tunnel-core", "tunnel-agent"}
        for words in re.findall(r'tunnel\.outcome =~? "([^"]*)"', query):
            assert set(words.split("|")) <= set(OUTCOMES)


@pytest.mark.parametrize("name", [*TEXTS, "README"])
def test_settings_exist(name: str) -> None:
    """Flags as `-flag`, with a value or without, and keys of the file as `key = value` or `key`."""
    text = (RUNBOOKS / f"{name}.md").read_text()
    flags = {flag.replace("_", "-") for role in ("core", "agent") for flag in program(role).by_flag}
    table_of_settings = (ROOT / "docs" / "CONFIGURATION.md").read_text()
    keys = set(re.findall(r"^\| `-[^|]*\| [^|]*\| `([\w.]+)` \|", table_of_settings, re.MULTILINE))
    keys |= {key.rpartition(".")[2] for key in keys}
    ours = {limit.flag for limit in Limit.ALL} | {"expires", "month", "name"}  # of the administration's commands
    for word in re.findall(r"`-([a-z][a-z-]*)(?:[= ][^`]*)?`", text):
        assert word in flags | ours, word
    for key in re.findall(r"`([a-z_]+) = [^`]*`", text):
        assert key in keys, key
    others = {
        "requests_per_month",
        "bandwidth_bytes_per_month",
        "scrape_interval",
        "scrape_timeout",
        "runbook_url",
    } | set(REFUSALS)
    endings = "timeout|delay|hold|interval|month|addr|level|connections|account|url|cert|dir"
    for key in re.findall(rf"`([a-z]+(?:_[a-z]+)*_(?:{endings}))`", text):
        assert key in keys | others, key


@pytest.mark.parametrize("name", [*TEXTS, "README"])
def test_commands_exist(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text().replace("\\\n", " ")
    for line in re.findall(r"python -m (tunnel[^`\n]*)", text):
        command = line.partition(" > ")[0].partition("#")[0].replace("…", "").split(" -data-dir /var/lib/tunnel")[-1]
        words = shlex.split(command.removeprefix("tunnel.core"))
        if words not in ([], ["account"]):
            assert not isinstance(parse_commands(words), int), line
    for line in re.findall(r"`(account limit [^`]*)`", text):
        words = shlex.split(line.replace(" N", " 1").replace("account limit -", "account limit ACCOUNT -"))
        words += ["1"] if words[-1].startswith("-") else []
        assert not isinstance(parse_commands(words), int), line


@PAGE
def test_addresses_exist(name: str) -> None:
    """The pages that `curl` asks, on the ports that have them."""
    health = {"/healthz", "/readyz", "/health/detailed"}
    pages = {"9090": {*health, "/metrics", "/metrics/agents"}, "9091": {*health, "/metrics"}, "9000": {"/", "/status"}}
    for port, path in re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/.-]*)", TEXTS[name]):
        if port in pages:
            assert path in pages[port], f"{port}{path}"
        else:
            assert port in ("9093", "9094"), port


@pytest.mark.parametrize("name", [*TEXTS, "README"])
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (RUNBOOKS / f"{name}.md").read_text()):
        assert (RUNBOOKS / target).exists(), target
