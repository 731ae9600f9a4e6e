"""The shipped Alertmanager configuration, by amtool: who hears of which alert, how often, and what silences what."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunnel.errors import LIMITS

DEPLOY = Path(__file__).parents[2] / "deploy"
FILE = DEPLOY / "alertmanager" / "alertmanager.yml"
CONFIG: dict[str, Any] = yaml.safe_load(FILE.read_text())
RECEIVERS = {"critical": "critical", "warning": "warning", "info": "default"}
ALERTS = {
    rule["alert"]: rule["labels"]["severity"]
    for path in sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


def amtool(*arguments: str) -> str:
    program = shutil.which("amtool")
    if program is None:
        pytest.fail("amtool is missing: install the package prometheus-alertmanager (scripts/packages)")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_valid() -> None:
    assert "SUCCESS" in amtool("check-config", str(FILE))


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_one_receiver(name: str) -> None:
    severity = ALERTS[name]
    labels = [f"alertname={name}", f"severity={severity}", "cluster=c"]
    amtool("config", "routes", "test", f"--config.file={FILE}", f"--verify.receivers={RECEIVERS[severity]}", *labels)


def test_the_pager_rings_once_and_only_for_what_is_critical() -> None:
    pagers = {one["name"]: len(one.get("pagerduty_configs", ())) for one in CONFIG["receivers"]}
    assert pagers == {"default": 0, "critical": 1, "warning": 0}
    assert not [route for route in CONFIG["route"]["routes"] if route.get("continue")]


def test_every_message_leads_to_the_runbook(tmp_path: Path) -> None:
    """As Alertmanager fills it in for a group of two; a group is of one alert, so its address is common to all."""
    assert "alertname" in CONFIG["route"]["group_by"]
    url = "https://git.example.com/x/StoreSlow.md"
    one = {"labels": {"alertname": "StoreSlow"}, "annotations": {"description": "It is slow.", "runbook_url": url}}
    data = {"status": "firing", "alerts": [one, one], "commonAnnotations": {"runbook_url": url}}
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "none.tmpl").write_text("")
    files = [f"--template.glob={tmp_path / 'none.tmpl'}", f"--template.data={tmp_path / 'data.json'}"]
    for receiver in CONFIG["receivers"]:
        for slack in receiver["slack_configs"]:
            said = amtool("template", "render", *files, f"--template.text={slack['text']}")
            assert said == f"It is slow.\nIt is slow.\nRunbook: {url}"
        for pager in receiver.get("pagerduty_configs", ()):
            said = amtool("template", "render", *files, f"--template.text={pager['details']['runbook']}")
            assert said == url


def test_what_is_silenced_exists_and_is_not_what_silences_it() -> None:
    for rule in CONFIG["inhibit_rules"]:
        [source], targets = rule["source_matchers"], rule["target_matchers"]
        limits = [one for one in targets if one.startswith("limit=")]  # a label more than the name
        for matcher in (source, *(one for one in targets if one not in limits)):
            for word in re.search(r'"(.*)"', matcher)[1].split("|"):  # type: ignore[index]
                assert [name for name in ALERTS if re.fullmatch(word, name)], f"{word}: there is no such alert"
        names = [one for one in (source, *targets) if one not in limits]
        assert not [name for name in ALERTS if all(is_match(one, name) for one in names)]
        for limit in limits:
            assert limit in {f'limit="{one}"' for one in LIMITS}


def is_match(matcher: str, name: str) -> bool:
    found = re.fullmatch(r'alertname=(~?)"(.*)"', matcher)
    assert found is not None, matcher
    return re.fullmatch(found[2] if found[1] else re.escape(found[2]), name) is not None


def test_no_secret_is_in_it() -> None:
    text = FILE.read_text()
    assert "hooks.slack.com" not in text
    assert not re.search(r"(service_key|routing_key|api_url|password)\s*:", text)
