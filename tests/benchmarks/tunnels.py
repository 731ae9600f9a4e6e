"""What is measured: our core and agent, from any checkout, and beside them the floor and nginx without a tunnel."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes import Process, poll
from benchmarks.servers import Servers

TRACED = ("-tracing-ratio", "0.1")  #: metrics and logs are on by default


@dataclass
class Contender:
    """Answers `Host: host` on `port`. processes: by role, each one's CPU is charged."""

    name: str
    port: int
    host: str = "app.localhost"
    processes: dict[str, Process] = field(default_factory=dict)


@dataclass
class Ours(Contender):
    """Our core and agent. link: what an agent needs to reach the core, as flags; token_file: beside it."""

    link: tuple[str, ...] = ()
    token_file: Path = Path()

    @property
    def core(self) -> Process:
        return self.processes["core"]

    @property
    def agent(self) -> Process:
        return self.processes["agent"]


def floor(servers: Servers) -> Contender:
    return Contender("floor", servers.floor_port, processes={"server": servers.floor})


def direct(servers: Servers) -> Contender:
    return Contender("nginx directly", servers.nginx_port, processes={"server": servers.nginx})


@contextmanager
def start_tunnel(
    servers: Servers,
    *flags: str,
    name: str = "tunnel",
    core_flags: Sequence[str] = (),
    traced: bool = True,
    python: str = sys.executable,
    run: Sequence[str] = ("-m",),
) -> Iterator[Ours]:
    """A core and an agent with JSON logs and these flags for both. run: what stands between python and the module.

    traced: there is a collector, so that the sampled requests' spans are built and sent.
    """
    directory = servers.directory
    data = directory / f"data-{time.monotonic_ns()}"
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": servers.sink_url} if traced else {}
    common = ["-log-json", "-metrics-addr", "127.0.0.1:0", *(TRACED if traced else ()), *flags]
    core = Process(
        python, *run, "tunnel.core", "-public-addr", "127.0.0.1:0", "-agent-addr", "127.0.0.1:0", "-dashboard-addr", "",
        "-data-dir", str(data), "-agent-tls=false", *common, *core_flags, directory=directory, env=env,
    )  # fmt: skip
    agent = None
    try:
        ready = core.wait_record("core ready")
        link = ("-server", ready["agents"], "-tls=false")
        token_file = data / "default.token"
        agent = Process(
            python, *run, "tunnel.agent", *link, "-token-file", str(token_file), "-subdomain", "app",
            "-local", f"http://127.0.0.1:{servers.nginx_port}", *common, directory=directory, env=env,
        )  # fmt: skip
        agent.wait_record("tunnel ready")
        port = int(ready["public"].rpartition(":")[2])
        processes = {"core": core, "agent": agent}
        yield Ours(name, port, processes=processes, link=link, token_file=token_file)
    finally:
        if agent is not None:
            agent.stop()
        core.stop()


def wait_calm(processes: Sequence[Process], seconds: float = 5.0) -> None:
    """Until what was put off for later (log lines, spans) is done: under 2 % of a CPU for a moment."""

    def is_calm() -> bool:
        before = sum(one.cpu() for one in processes)
        time.sleep(0.25)
        return sum(one.cpu() for one in processes) - before < 0.02

    poll(is_calm, "the processes are calm", seconds)
