"""Does it stay as it is when there is more of everything? More agents, more tunnels, a burst, and time (`soak.py`)."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from functools import partial

from benchmarks.crowds import idle_agents, sample, serving_agents
from benchmarks.figures import OURS, Figures, note
from benchmarks.load import cost, wrk
from benchmarks.measures import MIB, Effort, downloads, turns
from benchmarks.processes import Process, which
from benchmarks.servers import Servers
from benchmarks.tunnels import Contender, Ours, start_tunnel, wait_calm

AGENTS = 1000
FEW, SERVING = 32, 320  #: agents that requests are spread over
TUNNELS = 10  #: of each of the agents
CROWD = 5000  #: idle agents on one core
IDLE_SECONDS = 20.0
BURSTS = 5
BURST_SECONDS = 3
#: they are all of one account, and come from one address at once
ROOM = ("-max-handshakes=0", "-max-connections=6000", "-max-attaching=6000", "-max-names-per-account=0")

#: Asks for another agent's tunnel each time.
SPREAD = """
local at = 0
request = function()
    at = (at + 1) % {count}
    wrk.headers["Host"] = "many" .. at .. ".localhost"
    return wrk.format("GET", "/k1")
end
"""


def growth(servers: Servers, effort: Effort) -> Figures:
    return {**by_agents(servers, effort), **spread(servers, effort), **idle_crowd(servers), **bursts(servers)}


def by_agents(servers: Servers, effort: Effort) -> Figures:
    """What a request to one tunnel costs the core, alone and with others attached."""
    figures: Figures = {}
    with ExitStack() as stack:

        def tunnel(name: str) -> Ours:
            made = stack.enter_context(start_tunnel(servers, name=name, core_flags=ROOM))
            wrk(made.port, made.host, 32, 2)
            return made

        one, agents, tunnels = tunnel("1 agent"), tunnel("1,000 agents"), tunnel("10,000 tunnels")
        stack.enter_context(idle_agents(servers, agents, AGENTS))
        stack.enter_context(idle_agents(servers, tunnels, AGENTS, TUNNELS))
        wait_calm([agents.core, tunnels.core], 30)
        for each in turns([one, agents, tunnels], effort.rounds * 2):
            _, (core, _) = cost(partial(wrk, each.port, each.host, 32, effort.seconds), list(each.processes.values()))
            note(figures, "growth cpu", each.name, core)
    return figures


def spread(servers: Servers, effort: Effort) -> Figures:
    """Requests over many agents: each link carries little at a time then, and batches nothing."""
    figures: Figures = {}
    with start_tunnel(servers, core_flags=ROOM) as tunnel, serving_agents(servers, tunnel, SERVING):
        wait_calm([tunnel.core], 30)
        few, many = Contender(f"over {FEW} agents", tunnel.port), Contender(f"over {SERVING} agents", tunnel.port)
        for one in turns([few, many], effort.rounds):
            count = FEW if one is few else SERVING
            script = servers.directory / f"spread{count}.lua"
            script.write_text(SPREAD.replace("{count}", str(count)))
            load = partial(wrk, one.port, one.host, 32, effort.seconds, script=script)
            _, (core,) = cost(load, [tunnel.core])
            note(figures, "spread cpu", one.name, core)
    return figures


def idle_crowd(servers: Servers) -> Figures:
    """Thousands of agents that do nothing but heartbeats."""
    figures: Figures = {}
    with start_tunnel(servers, core_flags=ROOM) as tunnel:
        wrk(tunnel.port, tunnel.host, 8, 1)
        wait_calm(list(tunnel.processes.values()))
        before = tunnel.core.rss()
        began = time.monotonic()
        with idle_agents(servers, tunnel, CROWD):
            note(figures, "crowd attach", OURS, time.monotonic() - began)
            began = time.monotonic()
            sample(tunnel.metrics_url, "tunnel_connections_active")
            note(figures, "crowd scrape", OURS, (time.monotonic() - began) * 1000)
            time.sleep(5)  # until the last have had their first heartbeat
            cpu, start = tunnel.core.cpu(), time.monotonic()
            time.sleep(IDLE_SECONDS)
            note(figures, "crowd cpu", OURS, (tunnel.core.cpu() - cpu) / (time.monotonic() - start) * 100)
            note(figures, "crowd rss", OURS, tunnel.core.rss() / MIB)
            note(figures, "crowd rss each", OURS, (tunnel.core.rss() - before) / CROWD / 1024)
    return figures


def bursts(servers: Servers) -> Figures:
    """1,000 visitors at once, beside downloads and uploads; then nothing; and again."""
    figures: Figures = {}
    with start_tunnel(servers) as tunnel:
        wrk(tunnel.port, tunnel.host, 32, 2)
        rest(figures, "before", tunnel)
        for number in range(BURSTS):
            with downloads(tunnel, servers, 16), uploads(tunnel, servers, 8):
                wrk(tunnel.port, tunnel.host, 1000, BURST_SECONDS)
                if number == 0:
                    look(figures, "in the first", tunnel)
            rest(figures, f"after {number + 1}", tunnel)
    return figures


def rest(figures: Figures, when: str, tunnel: Ours) -> None:
    wait_calm(list(tunnel.processes.values()), 30)
    look(figures, when, tunnel)


def look(figures: Figures, when: str, tunnel: Ours) -> None:
    note(figures, "burst rss core", when, tunnel.core.rss() / MIB)
    note(figures, "burst rss agent", when, tunnel.agent.rss() / MIB)


def uploads(tunnel: Ours, servers: Servers, count: int) -> ExitStack:
    """So many at a time, each once."""
    url = f"http://127.0.0.1:{tunnel.port}/put"
    command = [which("curl"), "-sS", "-o", os.devnull, "-H", f"Host: {tunnel.host}", "-T", str(servers.big), url]
    stack = ExitStack()
    for _ in range(count):
        stack.callback(Process(*command, directory=servers.directory).stop)
    return stack
