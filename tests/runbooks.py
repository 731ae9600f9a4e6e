"""The pages of deploy/runbooks and the alerts they are for, cut into what tests look at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RUNBOOKS = ROOT / "deploy" / "runbooks"
PAGES = sorted(path for path in RUNBOOKS.glob("*.md") if path.name != "README.md")
SECTIONS = ["What it means", "How to see it", "Likely causes", "What to do", "False alarm", "Related"]

_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def alerts() -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: (file of the rule, the rule), in the order of the files."""
    return {
        rule["alert"]: (path.name, rule)
        for path in sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }


def recorded() -> set[str]:
    """The names of recorded series."""
    files = (ROOT / "deploy" / "prometheus" / "rules").glob("*.yml")
    return {name for path in files for name in re.findall(r"- record: (\S+)", path.read_text())}


def sections(text: str) -> dict[str, str]:
    """By heading, in order; what is above the first heading is not in it."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def queries(text: str, language: str) -> list[str]:
    """The lines of the blocks in this language ("promql", "logql", "traceql", "sh"), comments left out."""
    lines = [line.strip() for _, kind, body in _BLOCK.findall(text) if kind == language for line in body.splitlines()]
    return [line for line in lines if line and not line.startswith("# ")]


def languages(text: str) -> set[str]:
    return {kind for _, kind, _ in _BLOCK.findall(text)}


def series_named(query: str) -> list[tuple[str, set[str]]]:
    """(name, labels it is asked for) of each series of a PromQL query; name "" for a bare selector."""
    text = re.sub(r"(\b(?:by|without|on|ignoring|group_left|group_right)) *\([^)]*\)", " ", _STRING.sub('""', query))
    text = re.sub(r"\[[^\]]*\]|\boffset \w+", " ", text)
    found = []
    for name, labels in re.findall(r"([a-zA-Z_:][\w:]*)?\s*\{([^}]*)\}", text):
        found.append((name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", labels))))
    rest = re.sub(r"\{[^}]*\}", " {", text)  # a function's name stands before a bracket, a series' does not
    for name in re.findall(r"(?<![\w:.])([a-zA-Z_:][\w:]*)(?![\w:])(?!\s*[({])", rest):
        if name not in ("and", "or", "unless", "by", "on", "bool", "without", "ignoring", "group_left"):
            found.append((name, set()))
    return found


def labels_grouped(query: str) -> set[str]:
    """The labels that a PromQL query groups or matches by."""
    lists = re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right) *\(([^)]*)\)", query)
    return {label.strip() for one in lists for label in one.split(",") if label.strip()}
