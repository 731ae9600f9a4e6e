"""Writes the dashboards' JSON and the tables of docs/DASHBOARDS.md: python deploy/grafana/source.

A test holds the files against what this would write.
"""

from __future__ import annotations

import json

import agent_monitoring
import core_overview
from documents import DASHBOARDS, DOCUMENT, document


def texts() -> dict[str, str]:
    """File name → its text."""
    made = {"tunnel-core.json": core_overview.build(), "tunnel-agents.json": agent_monitoring.build()}
    return {name: json.dumps(one, indent=2, ensure_ascii=False) + "\n" for name, one in made.items()}


if __name__ == "__main__":
    for name, text in texts().items():
        (DASHBOARDS / name).write_text(text, encoding="utf-8")
    boards = [json.loads(text) for text in texts().values()]
    DOCUMENT.write_text(document(boards, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
