"""What the tests of metrics, traces and logs look through: spans as trees, a Prometheus, a Zipkin.

with SpanTap(tmp_path) as tap: ...                       # watching.py: a real OTLP receiver process
flags, environment = tracing(tap.endpoint)               # for start_core and start_agent: spans leave at once
spans = spans_of(tap); wait_trace(tap, trace_id, 4)      # as Span; once there are four of this trace
shape(spans)                                             # "GET S(tunnel.stream C(…))", a forest, children in order
check_nesting(spans)                                     # no child sticks out of its parent
with Prometheus(tmp_path, {"core": (core.metrics, "/metrics")}) as prometheus: prometheus.query("up")
"""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from running import Address, poll
from watching import SpanTap, free_port

KINDS = {1: "I", 2: "S", 3: "C"}


@dataclass(frozen=True)
class Span:
    """One span. start, end: nanoseconds since 1970. parent: "" for a root. kind: I, S or C."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    events: list[str]
    error: str  # the error status' description, "" for none
    links: list[str]  # trace ids

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


def span_of(found: dict[str, Any]) -> Span:
    """From OTLP's JSON."""
    status = found.get("status") or {}
    return Span(
        found["name"],
        KINDS[found["kind"]],
        found["traceId"],
        found["spanId"],
        found.get("parentSpanId", ""),
        int(found["startTimeUnixNano"]),
        int(found["endTimeUnixNano"]),
        {one["key"]: _value(one["value"]) for one in found.get("attributes", ())},
        [event["name"] for event in found.get("events", ())],
        (status.get("message") or "?") if status.get("code") == 2 else "",
        [link["traceId"] for link in found.get("links", ())],
    )


def _value(value: dict[str, Any]) -> Any:
    kind, held = next(iter(value.items()))
    return int(held) if kind == "intValue" else held


def tracing(endpoint: str, *flags: str, **environment: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Flags and environment for a program whose spans leave within 100 ms."""
    return (f"-tracing-endpoint={endpoint}", *flags), {"OTEL_BSP_SCHEDULE_DELAY": "100", **environment}


def spans_of(tap: SpanTap, trace_id: str = "") -> list[Span]:
    """All spans so far, or those of one trace."""
    return [span_of(one) for one in tap.spans if trace_id in ("", one["traceId"])]


def wait_trace(tap: SpanTap, trace_id: str, count: int) -> list[Span]:
    found: list[Span] = poll(
        lambda: (spans := spans_of(tap, trace_id)) and len(spans) >= count and spans,
        f"{count} spans of the trace {trace_id}", 15, 0.05,
    )  # fmt: skip
    return found


def shape(spans: list[Span]) -> str:
    """The tree, or trees, in words: "GET S(tunnel.stream C(agent.stream S(GET C)))"."""
    ids = {span.id for span in spans}
    assert len(ids) == len(spans), "a span came twice"

    def words(parent: str) -> str:
        below = [span for span in spans if (span.parent if span.parent in ids else "") == parent]
        below.sort(key=lambda span: (span.kind != "I", span.start))
        parts = [f"{one.name} {one.kind}" + (f"({inner})" if (inner := words(one.id)) else "") for one in below]
        return " ".join(parts)

    return words("")


def check_nesting(spans: list[Span], slack: float = 0) -> None:
    """No child sticks out of its parent; an agent's out of the core's by `slack` seconds at most."""
    by_id = {span.id: span for span in spans}
    for span in spans:
        assert span.start <= span.end
        parent = by_id.get(span.parent)
        if parent is not None:
            late = slack * 1e9 if span.name == "agent.stream" else 0
            assert parent.start <= span.start and span.end <= parent.end + late, (parent, span)


class Prometheus:
    """Debian's Prometheus with data of its own, scraping `targets`: job → (address, path).

    config: a whole configuration, instead of one made from the rest.
    """

    def __init__(
        self,
        directory: Path,
        targets: dict[str, tuple[Address, str]],
        interval: str = "250ms",
        rule_files: Sequence[Path] = (),
        config: Path | None = None,
    ) -> None:
        program = shutil.which("prometheus")
        if program is None:
            pytest.fail("prometheus is missing: install the package prometheus (scripts/packages)")
        jobs = [
            {"job_name": job, "metrics_path": path, "static_configs": [{"targets": [f"{where[0]}:{where[1]}"]}]}
            for job, (where, path) in targets.items()
        ]
        scrape = {"scrape_interval": interval, "scrape_timeout": interval}
        if config is None:
            config = directory / "prometheus.yml"
            rules = [str(file) for file in rule_files]
            whole = {"global": scrape, "scrape_configs": jobs, "rule_files": rules}
            config.write_text(json.dumps(whole))  # JSON is YAML
        self._targets = targets
        self._command = [
            program, f"--config.file={config}", f"--storage.tsdb.path={directory / 'prometheus'}",
            "--enable-feature=exemplar-storage", "--log.level=warn", "--rules.alert.resend-delay=1s",
        ]  # fmt: skip
        self._log_file = directory / "prometheus.log"
        self._log = self._log_file.open("wb")
        for _ in range(3):  # somebody else may get the port before it does; then it ends
            self._process = self._start()
            poll(lambda: self._process.poll() is not None or self.get("targets"), "Prometheus starts", 30, 0.05)
            if self._process.poll() is None:
                return
        raise AssertionError(self._log_file.read_text())

    def _start(self) -> subprocess.Popen[bytes]:
        self.port = free_port()
        listen = f"--web.listen-address=127.0.0.1:{self.port}"
        return subprocess.Popen([*self._command, listen], stdout=self._log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(10)
        self._log.close()

    def get(self, path: str, **query: str) -> Any:
        """A GET of the API: its "data"; None while it does not answer. Raises AssertionError for a bad query."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as exc:
            with exc:
                said = exc.read().decode()
            if exc.code == 503:  # it is starting
                return None
            raise AssertionError(f"{query}: {said}") from None
        except OSError:
            return None

    def wait_up(self) -> None:
        """Until every target has been scraped; else fails with what Prometheus says about it."""
        said: list[str] = []

        def up() -> bool:
            targets = (self.get("targets") or {}).get("activeTargets", ())
            said[:] = [f"{one['scrapePool']}: {one['health']} {one['lastError']}" for one in targets]
            return len(targets) == len(self._targets) and all(one["health"] == "up" for one in targets)

        try:
            poll(up, "every target is up", 30, 0.1)
        except AssertionError:
            raise AssertionError(f"{said}\n{self._log_file.read_text()}") from None

    def query(self, text: str) -> list[tuple[dict[str, str], float]]:
        """An instant query: (labels, value) of each series."""
        data = self.get("query", query=text)
        return [(one["metric"], float(one["value"][1])) for one in data["result"]]

    def value(self, text: str) -> float | None:
        """The value of a query with one series; None while it has none."""
        found = self.query(text)
        assert len(found) <= 1, found
        return found[0][1] if found else None
