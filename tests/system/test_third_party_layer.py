"""A layer as a package of somebody else: installed with pip, found by its name, and harmless when it breaks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import RunningAgent, RunningCore
from service import Service
from watching import ask, get

pytestmark = pytest.mark.system

EXAMPLE = Path(__file__).parents[1] / "example_layer"
LAYERS = "-layers=tracing,metrics,slowest,logs,health"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The example installed into a directory of its own, without any network."""
    source = tmp_path_factory.mktemp("source")
    (source / "slowest").mkdir()
    for name in ("pyproject.toml", "slowest/__init__.py"):  # a build leaves files beside its source
        (source / name).write_text((EXAMPLE / name).read_text())
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--target", str(target), str(source)],
        check=True, timeout=120,
    )  # fmt: skip
    return str(target)


def test_it_is_found_by_its_name(
    site: str,
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[..., Service],
) -> None:
    core = start_core(LAYERS, environment={"PYTHONPATH": site})
    start_agent(core, f"app={start_service().url}")
    assert ask(core, "GET /echo").status == 200
    assert ask(core, "DELETE /echo").status == 200
    status, text = get(core.metrics, "/slowest")
    assert status == 200
    rows = json.loads(text)
    assert {(row["method"], row["tunnel"]) for row in rows} == {("GET", "app"), ("DELETE", "app")}
    assert all(0 < row["seconds"] < 5 for row in rows)


@pytest.mark.parametrize("where", ["entry", "middle", "exit"])
def test_a_broken_one_changes_no_answer_and_is_reported_once(
    where: str,
    site: str,
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[..., Service],
) -> None:
    core = start_core(LAYERS, environment={"PYTHONPATH": site, "SLOWEST_BREAKS": where})
    core.expected_broken_layers = 1
    start_agent(core, f"app={start_service().url}")
    assert [ask(core, "GET /echo").status for _ in range(3)] == [200, 200, 200]
    assert ask(core, "GET /", host="nobody.localhost").status == 404
    report = core.wait_for("layer switched off")
    assert report["level"] == "ERROR"
    assert report["layer"] == "slowest"
    assert "broken" in report["error"]
    core.wait_for("request", status=404)
    assert len([one for one in core.records if one["msg"] == "request"]) == 4
