"""The documents keep their word: tables, flags, settings and links in them are those of the code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tunnel import __version__
from tunnel.config import load_agent, load_core
from tunnel.config.options import program
from tunnel.core.phrases import parse_commands
from tunnel.core.quotas import AT_A_TIME
from tunnel.errors import LIMITS, OUTCOMES
from tunnel.monitoring.up import make_monitoring_parser

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.s*"))
SCRIPTS = sorted((ROOT / "scripts").iterdir())


def outcome_table() -> str:
    """What README.md has between its marks."""
    rows = ["| outcome | status | whose side | what happened | what to try |", "| --- | --- | --- | --- | --- |"]
    for row in OUTCOMES.values():
        rows.append(f"| `{row.name}` | {row.status} | {row.side} | {row.title} | {row.advice} |".replace("|  |", "| |"))
    return "\n".join(rows)


def test_the_table_of_outcomes_is_current() -> None:
    text = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- outcomes:.*?-->\n(.*?)<!-- /outcomes -->", text, re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == outcome_table(), f"it should be:\n{outcome_table()}"


def test_the_two_commands_are_on_the_first_screen() -> None:
    screen = (ROOT / "README.md").read_text().splitlines()[:32]
    assert "    sh scripts/up" in screen
    assert "    sh scripts/test" in screen


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), target


def commands(text: str) -> list[str]:
    """The command lines of our programs in a text, continuation lines joined."""
    text = text.replace("\\\n", " ")
    found = re.findall(r"(?:python -m (?:tunnel\.(?:core|agent)|tunnel up)|tunnel up)(?: [^`\n]*)?", text)
    return [line.partition("#")[0].partition(" > ")[0] for line in found]


@pytest.mark.parametrize("document", [*DOCUMENTS, *UNITS], ids=lambda path: path.name)
def test_flags_in_commands_exist(document: Path) -> None:
    flags = {role: set(program(role).by_flag) | {"help", "h", "version"} for role in ("core", "agent")}
    for line in commands(document.read_text()):
        role = "agent" if "tunnel.agent" in line else "core"
        if re.search(r" (account|token|tunnel|usage|migrate) \w", line):
            continue  # the administration's own grammar: below
        for flag in re.findall(r"\s--?([a-z][a-z-]*)", line.partition("python -m ")[2]):
            assert flag.replace("-", "_") in flags[role], line


@pytest.mark.parametrize("document", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_flags_in_the_text_exist(document: Path) -> None:
    known = {flag.replace("_", "-") for role in ("core", "agent") for flag in program(role).by_flag}
    known |= {"json", "expires", "version", "help", "h", "data-dir"}
    known |= {option.strip("-") for action in make_monitoring_parser()._actions for option in action.option_strings}
    for word in re.findall(r"`-([a-z][a-z-]*)(?:[= ][^`]*)?`", document.read_text()):
        assert word in known, word


def test_administration_commands_are_understood() -> None:
    seen = 0
    for document in DOCUMENTS:
        for line in commands(document.read_text()):
            match = re.search(r" ((?:account|token|tunnel|usage) \w.*)", line.replace("…", "x"))
            if match and " -h" not in line:
                assert not isinstance(parse_commands(shlex.split(match[1])), int), line
                seen += 1
    assert seen >= 5


def test_settings_files_in_the_documents_load(tmp_path: Path) -> None:
    text = (ROOT / "DEPLOYMENT.md").read_text()
    for path in ("/etc/tunnel/full.pem", "/etc/tunnel/key.pem"):
        made = tmp_path / Path(path).name
        made.write_text("")
        text = text.replace(path, str(made))
    blocks = re.findall(r"\n\n((?: {4}[^\n]*\n|\n(?= {4}))+)", text)
    settings = []
    for block in blocks:
        try:
            table = tomllib.loads(re.sub(r"(?m)^ {4}", "", block))
        except tomllib.TOMLDecodeError:
            continue  # a shell or nginx block
        settings.append(table)
        file = tmp_path / "settings.toml"
        file.write_text(re.sub(r"(?m)^ {4}", "", block).replace("sha256:…", "sha256:" + "0" * 64))
        (load_agent if "server" in table else load_core)([f"-config={file}"], {})
    assert len(settings) == 6


@pytest.mark.parametrize("unit", [one for one in UNITS if one.suffix == ".service"], ids=lambda path: path.name)
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here")
def test_units_are_hardened(unit: Path) -> None:
    """systemd's own score of what a unit could do, 10 (everything) to 0: the most of what is left is the network."""
    said = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here")
def test_units_are_valid(unit: Path, tmp_path: Path) -> None:
    for one in UNITS:  # a socket's unit names its service
        (tmp_path / one.name).write_text(re.sub(r"/opt/tunnel/bin/python", sys.executable, one.read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    problems = [line for line in done.stderr.splitlines() if unit.name in line]
    assert problems == [], done.stderr


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: prometheus) is not here")
def test_the_prometheus_configuration_is_valid() -> None:
    subprocess.run(["promtool", "check", "config", ROOT / "deploy/prometheus/prometheus.yml"], check=True)


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    shell = "bash" if script.read_text().startswith("#!/usr/bin/env bash") else "sh"
    subprocess.run([shell, "-n", script], check=True)
    assert script.name == "environment" or os.access(script, os.X_OK)


def test_the_changelog_knows_the_version() -> None:
    assert __version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_the_one_that_is_declared() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0" in text
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == {"text": "Apache-2.0"}


def _tests_in(path: Path) -> set[str]:
    return set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.M)) if path.exists() else set()


def test_each_threat_names_tests_that_exist() -> None:
    table = re.search(r"<!-- threats.*?-->\n(.*?)<!-- /threats -->", (ROOT / "SECURITY.md").read_text(), re.DOTALL)
    assert table is not None
    rows = table[1].strip().splitlines()[2:]
    assert len(rows) >= 14
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row.split("|")[3])
        assert named, row
        for path, test in named:
            assert test in _tests_in(ROOT / path), (path, test)


def test_the_page_of_limits_has_them_all() -> None:
    text = (ROOT / "docs" / "LIMITS.md").read_text()
    told = re.findall(r"^\| `(\w+)` \|", text, re.M)
    assert set(told) == {*LIMITS, *AT_A_TIME}
    flags = set(re.findall(r"`-([a-z-]+)`", text))
    assert {flag.replace("-", "_") for flag in flags} <= set(program("core").by_flag)
