"""What is measured: our core and agent, from any checkout, and beside them the floor and nginx without a tunnel."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.figures import DIRECT, FLOOR, OURS
from benchmarks.processes import Process, poll
from benchmarks.servers import Servers

TRACED = ("-tracing-ratio", "0.1")  #: metrics and logs are on by default


@dataclass(frozen=True)
class Program:
    """How our modules are run. python: whose checkout; before: what stands between it and the module's name."""

    python: str = sys.executable
    before: tuple[str, ...] = ("-m",)


@dataclass
class Contender:
    """Answers `Host: host` on `port`. processes: "server" (of the public) and "agent", whose CPU is charged."""

    name: str
    port: int
    host: str = "app.localhost"
    processes: dict[str, Process] = field(default_factory=dict)
    secure: bool = False  # visitors come over TLS
    is_guest: bool = False  # may fail a part: then it is left out, and the others go on
    gave_up: str = ""  # why, in this part


@dataclass
class Core:
    """A core that is ready."""

    process: Process
    port: int
    link_port: int
    token_file: Path
    metrics_url: str


@dataclass
class Ours(Contender):
    core: Process = field(kw_only=True)
    agent: Process = field(kw_only=True)
    link_port: int = 0
    token_file: Path = Path()
    metrics_url: str = ""


def floor(servers: Servers) -> Contender:
    return Contender(FLOOR, servers.floor_port, processes={"server": servers.floor})


def direct(servers: Servers) -> Contender:
    return Contender(DIRECT, servers.nginx_port, processes={"server": servers.nginx})


def _environment(servers: Servers, traced: bool) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": servers.sink_url} if traced else {}


def _common(traced: bool) -> list[str]:
    return ["-log-json", "-metrics-addr", "127.0.0.1:0", *(TRACED if traced else ())]


@contextmanager
def start_core(
    servers: Servers, flags: Sequence[str] = (), *, traced: bool = True, program: Program | None = None
) -> Iterator[Core]:
    program = program or Program()
    data = servers.directory / f"data-{time.monotonic_ns()}"
    process = Process(
        program.python, *program.before, "tunnel.core", "-public-addr", "127.0.0.1:0", "-agent-addr", "127.0.0.1:0",
        "-dashboard-addr", "", "-data-dir", str(data), "-agent-tls=false", *_common(traced), *flags,
        directory=servers.directory, env=_environment(servers, traced),
    )  # fmt: skip
    try:
        ready = process.wait_record("core ready")
        port, link_port = (int(ready[name].rpartition(":")[2]) for name in ("public", "agents"))
        yield Core(process, port, link_port, data / "default.token", str(ready["metrics"]))
    finally:
        process.stop()


@contextmanager
def start_agent(
    servers: Servers,
    core: Core,
    flags: Sequence[str] = (),
    *,
    traced: bool = True,
    until_ready: bool = True,
    program: Program | None = None,
    local: str = "",
) -> Iterator[Process]:
    """local: the service's URL, instead of nginx's."""
    program = program or Program()
    process = Process(
        program.python, *program.before, "tunnel.agent", "-server", f"127.0.0.1:{core.link_port}", "-tls=false",
        "-token-file", str(core.token_file), "-subdomain", "app", "-local", local or f"http://127.0.0.1:{servers.nginx_port}",
        *_common(traced), *flags, directory=servers.directory, env=_environment(servers, traced),
    )  # fmt: skip
    try:
        if until_ready:
            process.wait_record("tunnel ready")
        yield process
    finally:
        process.stop()


@contextmanager
def start_tunnel(
    servers: Servers,
    *flags: str,
    name: str = OURS,
    core_flags: Sequence[str] = (),
    agent_flags: Sequence[str] = (),
    traced: bool = True,
    program: Program | None = None,
    local: str = "",
) -> Iterator[Ours]:
    """A core and an agent with JSON logs and these flags for both. local: the service's URL, instead of nginx's.

    traced: there is a collector, and so a tenth of the requests' spans are built and sent, or what `flags` says.
    """
    with (
        start_core(servers, (*flags, *core_flags), traced=traced, program=program) as core,
        start_agent(servers, core, (*flags, *agent_flags), traced=traced, program=program, local=local) as agent,
    ):
        processes = {"server": core.process, "agent": agent}
        yield Ours(
            name, core.port, processes=processes, core=core.process, agent=agent, secure="-public-tls" in core_flags,
            link_port=core.link_port, token_file=core.token_file, metrics_url=core.metrics_url,
        )  # fmt: skip


def wait_calm(processes: Sequence[Process], seconds: float = 10.0) -> None:
    """Until what was put off for later (log lines, spans) is done: under 4 % of a CPU for a moment."""

    def is_calm() -> bool:
        before = sum(one.cpu() for one in processes)
        time.sleep(0.5)
        return sum(one.cpu() for one in processes) - before < 0.02

    poll(is_calm, "the processes are calm", seconds)
