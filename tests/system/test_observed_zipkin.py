"""A real Zipkin server takes our spans and gives the trace back by its id, with the right tree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import RunningAgent, RunningCore, poll
from service import Service
from watching import ask

pytestmark = pytest.mark.system

START_TIMEOUT = 60.0  #: seconds: a Java program on two busy processors


@pytest.fixture
def zipkin(tmp_path: Path) -> Iterator[str]:
    """A Zipkin that keeps spans in memory, on a port of the kernel's: its URL."""
    java, jars = shutil.which("java"), sorted(Path(__file__).parents[2].glob(".nox/zipkin/zipkin-server-*-exec.jar"))
    if java is None or not jars:
        pytest.fail("the Zipkin server or Java is missing: run scripts/packages and scripts/zipkin")
    output = tmp_path / "zipkin.log"
    options = ["--armeria.ports[0].ip=127.0.0.1", "--armeria.ports[0].port=0", "--armeria.ports[0].protocols[0]=http"]
    with output.open("wb") as log:
        process = subprocess.Popen(
            [java, "-Xmx256m", "-XX:TieredStopAtLevel=1", "-jar", str(jars[-1]), *options],
            cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        serving = re.compile(r"Serving HTTP at /127\.0\.0\.1:(\d+)")
        port = poll(lambda: serving.search(output.read_text()), "Zipkin serves", START_TIMEOUT, 0.1)[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(10)


def fetch(url: str) -> Any:
    """JSON; None for a 404."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as exc:
        exc.close()
        return None


def test_the_trace_comes_back_from_zipkin(
    zipkin: str,
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    flags = (f"-tracing-endpoint={zipkin}", "-tracing-protocol=zipkin")
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
    core, service = start_core(*flags, environment=environment), start_service()
    start_agent(core, service.url, "-subdomain=app", *flags, environment=environment)
    assert ask(core, "GET /echo?key=secret-value").status == 200
    record = core.wait_for("request", path="/echo")
    assert ask(core, "GET /garbage").outcome == "local_broken"
    broken = core.wait_for("request", path="/garbage")

    def whole(trace_id: str) -> Any:
        url = f"{zipkin}/api/v2/trace/{trace_id}"
        return poll(lambda: (found := fetch(url)) and len(found) >= 4 and found, "the whole trace", 15, 0.1)

    spans = {(one["name"], one["kind"]): one for one in whole(record["trace_id"])}
    assert set(spans) == {("get", "SERVER"), ("tunnel.stream", "CLIENT"), ("agent.stream", "SERVER"), ("get", "CLIENT")}
    request, stream = spans["get", "SERVER"], spans["tunnel.stream", "CLIENT"]
    agent, local = spans["agent.stream", "SERVER"], spans["get", "CLIENT"]
    assert request["id"] == record["span_id"] and "parentId" not in request
    assert [stream["parentId"], agent["parentId"], local["parentId"]] == [request["id"], stream["id"], agent["id"]]
    names = [one["localEndpoint"]["serviceName"] for one in (request, stream, agent, local)]
    assert names == ["tunnel-core", "tunnel-core", "tunnel-agent", "tunnel-agent"]
    assert request["tags"]["tunnel.outcome"] == "ok"
    assert "secret-value" not in json.dumps([request, stream, agent, local])
    events = [key for one in request["annotations"] for key in json.loads(one["value"])]
    assert events == ["head", "opened", "answered", "first_byte"]
    failed = [one for one in whole(broken["trace_id"]) if "error" in one.get("tags", {})]
    assert len(failed) == 4
    services = poll(lambda: fetch(f"{zipkin}/api/v2/services"), "services", 10, 0.1)
    assert {"tunnel-core", "tunnel-agent"} <= set(services)
