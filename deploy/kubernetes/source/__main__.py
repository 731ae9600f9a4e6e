"""Writes monitoring/rules.yaml, the rules of deploy/prometheus as PrometheusRule objects, one a file.

    python deploy/kubernetes/source

A test holds the file against what this would write. The comments stay with the rules themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).resolve().parent.parent
RULES = KUBERNETES.parent / "prometheus" / "rules"
HEAD = "# Made from deploy/prometheus/rules by deploy/kubernetes/source: change the rules there, then run it.\n"


def build(path: Path) -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": f"tunnel-{path.stem}", "labels": {"app.kubernetes.io/part-of": "tunnel"}},
        "spec": yaml.safe_load(path.read_text(encoding="utf-8")),
    }


def text() -> str:
    made = [build(path) for path in sorted(RULES.glob("*.yml"))]
    return HEAD + yaml.safe_dump_all(made, sort_keys=False, allow_unicode=True, width=120)


if __name__ == "__main__":
    (KUBERNETES / "monitoring" / "rules.yaml").write_text(text(), encoding="utf-8")
