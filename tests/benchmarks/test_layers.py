"""What each layer costs: CPU a request with none, metrics, metrics + logs, + 10 % traced, + 100 % traced, as ratios to
none. All tunnels run at once and take turns, so that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack

import pytest
from rig import Rig, Tunnel

pytestmark = pytest.mark.benchmark

SECONDS = 2
ROUNDS = 9  # a shared machine's speed wanders by a fifth within seconds: many short turns, and their median
CONNECTIONS = 32

#: name → (flags, traced)
CASES: dict[str, tuple[tuple[str, ...], bool]] = {
    "none": (("-layers=",), False),
    "metrics": (("-layers=metrics,health",), False),
    "metrics + logs": (("-layers=metrics,logs,health",), False),
    "+ 10 % traced": (("-tracing-ratio", "0.1"), True),
    "+ 100 % traced": (("-tracing-ratio", "1"), True),
}
BOUNDS = {"+ 10 % traced": 1.3, "+ 100 % traced": 1.6}


def test_cost_of_each_layer(rig: Rig) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": rig.sink_url}
    with ExitStack() as stack:
        tunnels: dict[str, Tunnel] = {}
        for name, (flags, is_traced) in CASES.items():
            tunnels[name] = stack.enter_context(rig.tunnel(*flags, env=env if is_traced else None))
            rig.load(tunnels[name].port, 8, 1)
        costs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CASES}
        for _ in range(ROUNDS):
            for name, tunnel in tunnels.items():
                load, (core, agent) = rig.cost(tunnel.port, [tunnel.core, tunnel.agent], CONNECTIONS, SECONDS)
                costs[name].append((load.rps, core, agent))
    print()
    ratios: dict[str, float] = {}
    for name, rows in costs.items():
        per_round = [(row[1] + row[2]) / (base[1] + base[2]) for row, base in zip(rows, costs["none"], strict=True)]
        ratios[name] = statistics.median(per_round)
        rps, core, agent = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:16} {rps:7.0f} rps  core {core:5.0f} µs  agent {agent:5.0f} µs  CPU {ratios[name]:.2f} x none")
    for name, bound in BOUNDS.items():
        assert ratios[name] <= bound, f"{name} costs {ratios[name]:.2f} x none"
