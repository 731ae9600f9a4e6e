"""Draws docs/img from a run with real traffic and real faults: `nox -s pictures`. No test; it takes three minutes."""

from __future__ import annotations

import importlib.util
import socket
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from observing import Prometheus
from running import RunningAgent, RunningCore
from service import Service
from test_dashboard_queries import copy_of_rules, visit

ROOT = Path(__file__).parents[2]
MINUTES = 3.0


def main() -> None:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "deploy" / "grafana" / "source" / "pictures.py")
    assert spec is not None and spec.loader is not None
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        core, service, other = RunningCore(directory / "core", "-heartbeat=200ms"), Service(), Service()
        stack.callback(core.close)
        nobody = stack.enter_context(socket.socket())
        nobody.bind(("127.0.0.1", 0))
        often = ("-metrics-report-interval=1s", "-heartbeat=200ms")
        agent = RunningAgent(core, f"app={service.url},closed=http://127.0.0.1:{nobody.getsockname()[1]}", *often)
        stack.callback(agent.close)
        token = core.new_token("limited")
        core.command("account", "limit", "limited", "-requests-per-second", "9", "-requests-burst", "9")
        second = RunningAgent(core, other.url, "-subdomain=limited", *often, token=token, agent_id="second")
        targets = {
            "tunnel-core": (core.metrics, "/metrics"),
            "tunnel-agents": (core.metrics, "/metrics/agents"),
            "tunnel-agent": (agent.metrics, "/metrics"),
        }
        rules = copy_of_rules(directory / "rules.yml")[0]
        prometheus = stack.enter_context(Prometheus(directory, targets, "1s", [rules]))
        ended = threading.Event()
        threads = [threading.Thread(target=visit, args=(core, ended), daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        time.sleep(MINUTES * 60 / 3)
        second.kill()  # an agent that is gone for a while
        time.sleep(20)
        second = RunningAgent(core, other.url, "-subdomain=limited", *often, token=token, agent_id="second")
        stack.callback(second.close)
        time.sleep(max(0.0, began + MINUTES * 60 - time.monotonic()))
        for path in drawing.draw_all(f"http://127.0.0.1:{prometheus.port}", ROOT / "docs" / "img", MINUTES):
            print(path.relative_to(ROOT))
        ended.set()
        for thread in threads:
            thread.join(10)


if __name__ == "__main__":
    sys.exit(main())
