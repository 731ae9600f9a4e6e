"""deploy/compose.yaml as the tests read it: variables replaced the way Compose does, services by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
FILE = DEPLOY / "compose.yaml"
VARIABLE = re.compile(r"(?<!\$)\$\{([A-Z_]+)(:-([^}]*))?\}")


def load(settings: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file with these settings; a variable without a default or setting is an AssertionError."""

    def replace(match: re.Match[str]) -> str:
        value = (settings or {}).get(match[1])
        assert value or match[2] is not None, f"{match[0]} has no default"
        return value or match[3]

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        return VARIABLE.sub(replace, node) if isinstance(node, str) else node

    project: dict[str, Any] = walk(yaml.safe_load(FILE.read_text()))
    return project


SERVICES: dict[str, dict[str, Any]] = load()["services"]
#: those that run our image
OURS = ("core", "agent", "sample", "setup")


def volumes(service: str) -> list[tuple[str, str, set[str]]]:
    """(source, target, options) of each mount."""
    mounts = []
    for mount in SERVICES[service].get("volumes", []):
        source, target, *options = mount.split(":")
        mounts.append((source, target, set(",".join(options).split(","))))
    return mounts


def health_command(service: str, **ports: str) -> list[str]:
    """What Docker runs to see whether a service is healthy; ports: old=new, as `p9090="40123"`."""
    test = SERVICES[service]["healthcheck"]["test"]
    assert test[0] == "CMD", test
    words = [word.replace("$$", "$") for word in test[1:]]
    for old, new in ports.items():
        assert any(old[1:] in word for word in words), words
        words = [word.replace(old[1:], new) for word in words]
    return words
