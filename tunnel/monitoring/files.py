"""What Prometheus and Alertmanager read here: the files under deploy/, with this machine's addresses and receivers.

The shipped files are used as they are. Whom to scrape stands in files of its own, which are written anew; a few lines
(cluster name, interval, receivers whose secrets nobody gave) are changed as text, so that no YAML library is needed.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path

import tunnel
from tunnel.errors import ConfigError

DISTRIBUTION = "trio-tunnel"
MARK = Path("prometheus", "prometheus.yml")  #: a file by which the directory is known
SLACK_FILE, PAGER_FILE = "/etc/alertmanager/slack_url", "/etc/alertmanager/pagerduty_key"  #: as shipped

SERVICES = {"core": "core-server", "agents": "agent", "prometheus": "monitoring", "alertmanager": "monitoring"}


def find_deploy() -> Path:
    """The deploy/ directory: of the checkout, or what was installed with the package. Raises ConfigError."""
    checkout = Path(tunnel.__file__).resolve().parents[1] / "deploy"
    if (checkout / MARK).is_file():
        return checkout
    try:
        installed = importlib.metadata.files(DISTRIBUTION) or ()
    except importlib.metadata.PackageNotFoundError:
        installed = ()
    for one in installed:
        path = Path(str(one.locate()))
        if path.parts[-3:] == ("deploy", *MARK.parts) and path.is_file():
            return path.resolve().parents[1]
    raise ConfigError("the files of deploy/ are not installed with this package: run it in a checkout")


def write_prometheus(deploy: Path, where: Path, targets: Mapping[str, str], interval: str) -> Path:
    """Its configuration under `where`: rules as shipped, `targets` as "core" → "127.0.0.1:9090", … The path.

    Raises ConfigError when the shipped file has not the lines that are changed here.
    """
    source = deploy / "prometheus"
    text = (source / MARK.name).read_text()
    for setting, value in (
        ("scrape_interval", interval),
        ("evaluation_interval", interval),
        ("cluster", "tunnel-local"),
        ("environment", "local"),
    ):
        text, count = re.subn(rf"(?m)^(\s+{setting}:) \S+$", rf"\1 {value}", text)
        if count != 1:
            raise ConfigError(f"{source / MARK.name} has not one line `{setting}: …`")
    rules, lists = where / "rules", where / "targets"
    for directory in (rules, lists):
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("*.yml"):  # a rule that an older version shipped is not to stay
            old.unlink()
    for path in sorted((source / "rules").glob("*.yml")):
        (rules / path.name).write_text(path.read_text())
    for name, address in targets.items():
        entry = {"targets": [address], "labels": {"service": SERVICES[name]}}
        (lists / f"{name}.yml").write_text(json.dumps([entry]) + "\n")  # JSON is YAML
    (where / MARK.name).write_text(text)
    return where / MARK.name


def write_alertmanager(deploy: Path, where: Path, slack: str = "", pager: str = "", webhook: str = "") -> Path:
    """Its configuration under `where`; without a secret's file the receivers that need it are left out. The path.

    slack, pager: files with the secrets. webhook: a URL that hears of every alert as well. Such a receiver that has
    nothing left takes its alerts all the same: they are to be seen on Alertmanager's page.
    """
    source = deploy / "alertmanager" / "alertmanager.yml"
    text = source.read_text()
    for given, shipped, keys in (
        (slack, SLACK_FILE, ("slack_api_url_file", "slack_configs")),
        (pager, PAGER_FILE, ("pagerduty_configs",)),
    ):
        if given:
            if f": {shipped}\n" not in text:
                raise ConfigError(f"{source} has no setting with the value {shipped}")
            text = text.replace(f": {shipped}\n", f": {json.dumps(given)}\n")
        else:
            for key in keys:
                text = without(text, key)
    if webhook:
        hook = f"webhook_configs: [{{url: {json.dumps(webhook)}, send_resolved: true}}]"
        text = re.sub(r"(?m)^(\s*)- name: .+$", lambda found: f"{found[0]}\n{found[1]}  {hook}", text)
    where.mkdir(parents=True, exist_ok=True)
    path = where / "alertmanager.yml"
    path.touch(mode=0o600)  # a webhook's URL may hold a secret
    path.write_text(text)
    return path


def without(text: str, key: str) -> str:
    """YAML text without this key, wherever it stands, and all that is indented below it."""
    kept, depth = [], -1
    for line in text.splitlines(keepends=True):
        indent = len(line) - len(line.lstrip())
        if depth >= 0 and (not line.strip() or indent > depth):
            continue
        depth = indent if line.strip().startswith(f"{key}:") else -1
        if depth < 0:
            kept.append(line)
    return "".join(kept)
