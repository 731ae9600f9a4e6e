"""A real Prometheus scrapes both programs' pages, in both formats, and gives back numbers, types and exemplars."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import trio
from fakehost import FakeHost

from observability import metrics
from tunnel.handler import (
    AgentReport,
    LocalVisit,
    Page,
    PageAnswer,
    PageRequest,
    RequestVisit,
    StreamVisit,
    Visit,
    monotonic,
)
from tunnel.http.pages import serve_pages

pytestmark = pytest.mark.system

TRACE = "0af7651916cd43dd8448eb211c80319c"
CONFIG = """
global:
  scrape_interval: 200ms
  scrape_timeout: 200ms
scrape_configs:
"""
JOB = """
- job_name: {job}
  metrics_path: {path}
  static_configs: [targets: ["127.0.0.1:{port}"]]
"""


def as_text(page: Page) -> Page:
    """The same page for a scraper that does not know OpenMetrics."""

    async def text(request: PageRequest) -> PageAnswer:
        return await page(replace(request, headers={}))

    return text


async def visits(layer: Any, role: str) -> None:
    async def handler(visit: Visit) -> None:
        visit.outcome, visit.status = "ok", 200
        visit.sampled, visit.trace_id = True, TRACE
        if isinstance(visit, RequestVisit):
            visit.method = "GET"

    handle = layer(handler)
    for _ in range(7):
        stream = StreamVisit(None, "http")
        await handle(stream)
        await handle(RequestVisit("192.0.2.1", "http") if role == "core" else LocalVisit(stream, "localhost:1", "http"))


@asynccontextmanager
async def serving(pages: dict[str, Page]) -> AsyncIterator[int]:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_pages, listeners, pages)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def get(port: int, path: str, **query: str) -> Any:
    """A GET of Prometheus' API: its "data"; None while it does not answer."""
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
    except OSError:
        return None
    async with stream:
        await stream.send_all(f"GET /api/v1/{path}?{urlencode(query)} HTTP/1.0\r\nHost: a\r\n\r\n".encode())
        data = b""
        async for part in stream:
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return json.loads(body)["data"] if b" 200 " in head.partition(b"\r\n")[0] else None


async def wait_scraped(port: int, jobs: int) -> None:
    """Until every target has been scraped; fails with what Prometheus says of those that it can't read."""
    said: list[str] = []
    with trio.move_on_after(30):
        while True:
            data = await get(port, "targets")
            targets = data["activeTargets"] if data else []
            said = [f"{target['scrapePool']}: {target['health']} {target['lastError']}" for target in targets]
            if len(targets) == jobs and all(target["health"] == "up" for target in targets):
                return
            await trio.sleep(0.1)
    pytest.fail(f"not all targets were scraped: {said}")


async def query(port: int, text: str) -> dict[str, float]:
    """Values by job."""
    data = await get(port, "query", query=text)
    return {result["metric"]["job"]: float(result["value"][1]) for result in data["result"]}


@pytest.fixture
def prometheus() -> str:
    program = shutil.which("prometheus")
    if program is None:
        pytest.fail("prometheus is missing: install the package prometheus")
    return program


async def test_a_real_prometheus_reads_it_all(prometheus: str, tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        core, agent = FakeHost(nursery=nursery), FakeHost("agent", {"metrics": {"go_names": True}}, nursery)
        async with metrics.plugin(core) as core_layer, metrics.plugin(agent) as agent_layer:
            await visits(core_layer, "core")
            await visits(agent_layer, "agent")
            core.add_link("c1")
            assert agent.report is not None
            core.agent_reports = [AgentReport("agent-1", "acme", agent.report(), monotonic(), True)]
            pages = {
                "/core": core.pages["/metrics"],
                "/core-text": as_text(core.pages["/metrics"]),
                "/agents": core.pages["/metrics/agents"],
                "/agents-text": as_text(core.pages["/metrics/agents"]),
                "/agent": agent.pages["/metrics"],
                "/agent-text": as_text(agent.pages["/metrics"]),
            }
            async with serving(pages) as port, running(prometheus, tmp_path, port, list(pages)) as api:
                await wait_scraped(api, len(pages))
                await check(api)


@asynccontextmanager
async def running(prometheus: str, tmp_path: Path, port: int, paths: list[str]) -> AsyncIterator[int]:
    """A Prometheus that scrapes these paths, each as a job of the path's name; yields its API's port."""
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG + "".join(JOB.format(job=path[1:], path=path, port=port) for path in paths))
    with socket.socket() as probe:  # it has no way to tell a port that the kernel chose
        probe.bind(("127.0.0.1", 0))
        api = probe.getsockname()[1]
    command = [
        prometheus,
        f"--config.file={config}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{api}",
        "--enable-feature=exemplar-storage",
        "--log.level=error",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = await trio.lowlevel.open_process(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield api
        finally:
            process.kill()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                await process.wait()


async def check(api: int) -> None:
    cores, agents = {"core", "core-text"}, {"agent", "agent-text"}
    reported = agents | {"agents", "agents-text"}
    assert await query(api, 'tunnel_requests_total{code="200"}') == dict.fromkeys(cores, 7)
    assert await query(api, "tunnel_connections_active") == dict.fromkeys(cores, 1)
    for name in ("agent_requests_total", "agent_requests_success", "agent_streams_completed"):
        assert await query(api, name) == dict.fromkeys(reported, 7)
    assert await query(api, 'agent_requests_success{account_id="acme"}') == dict.fromkeys(reported - agents, 7)
    assert await query(api, "agent_connection_active") == dict.fromkeys(reported, 1)
    assert set(await query(api, "go_goroutines")) == agents
    assert set(await query(api, "trio_run_loop_lag_seconds")) == cores | agents
    latency = "histogram_quantile(0.95, sum by (le, job) (tunnel_request_duration_seconds_bucket))"
    assert set(await query(api, latency)) == cores
    # the scraper in OpenMetrics finds the trace, the one in text has none
    for name, job in (("tunnel_request_duration_seconds", "core"), ("agent_request_duration_microseconds", "agent")):
        found = await get(api, "query_exemplars", query=f"{name}_bucket", start="0", end="9999999999")
        assert {series["seriesLabels"]["job"] for series in found} == {job}
        assert {e["labels"]["trace_id"] for series in found for e in series["exemplars"]} == {TRACE}
