"""What docs/DASHBOARDS.md says of each panel: made from the dashboards, between its marks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DASHBOARDS = Path(__file__).resolve().parent.parent / "dashboards"
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "DASHBOARDS.md"


def rows_of(board: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(heading, panels) of each row."""
    heading, panels = "", list[dict[str, Any]]()
    for panel in [*board["panels"], {"type": "row", "title": ""}]:
        if panel["type"] != "row":
            panels.append(panel)
            continue
        if panels:
            yield heading, panels
        heading, panels = panel["title"], []


def has_picture(panels: list[dict[str, Any]]) -> bool:
    """Not of logs and traces."""
    return any(one.get("datasource", {}).get("uid") == "prometheus" for one in panels)


def picture_of(uid: str, heading: str) -> str:
    """The file's name: "tunnel-core-requests.png" for "Requests: rate and errors"."""
    word = re.split(r"[:(]", heading)[0].strip().lower()
    return f"{uid}-{re.sub(r'[^a-z]+', '-', word)}.png"


def section(board: dict[str, Any]) -> str:
    lines = [f"## {board['title']}", ""]
    for heading, panels in rows_of(board):
        lines += [f"### {heading}", ""]
        if has_picture(panels):
            lines += [f"![{heading}](img/{picture_of(board['uid'], heading)})", ""]
        lines += ["| panel | what it shows |", "| --- | --- |"]
        lines += [f"| {one['title']} | {one['description'].replace('|', chr(92) + '|')} |" for one in panels]
        lines += [""]
    return "\n".join(lines)


def document(boards: list[dict[str, Any]], text: str) -> str:
    """The document with what is between its marks made anew."""
    made = "\n".join(section(board) for board in boards)
    return re.sub(
        r"(<!-- panels: .*?-->\n).*(<!-- /panels -->)", lambda match: match[1] + made + match[2], text, flags=re.DOTALL
    )
