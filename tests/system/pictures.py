"""Draws docs/img from a run with real traffic and real faults: `nox -s pictures`. No test; it takes three minutes."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from acmeserver import AcmeServer
from crewing import pids
from observing import Prometheus, tracing
from running import RunningAgent, RunningCore
from service import Service
from test_dashboard_queries import copy_of_rules, visit
from watching import SpanTap

ROOT = Path(__file__).parents[2]
MINUTES = 3.0
WRONG = "tt_" + "s" * 43
BASE = "tunnel.test"
NAMES = ("app", "shop", "blog")


def never_finish(core: RunningCore, ended: threading.Event) -> None:
    """Heads that never end, some a second."""
    held: list[socket.socket] = []
    while not ended.wait(1):
        held.append(socket.create_connection(core.public))
        with suppress(OSError):
            held[-1].sendall(b"GET / HTTP/1.1\r\nHost: app.local")
        for old in held[:-20]:
            old.close()
    for old in held:
        old.close()


def try_tokens(core: RunningCore, service: Service, ended: threading.Event) -> None:
    """An agent that is started again and again with a token that is no good."""
    while not ended.wait(4):
        stranger = RunningAgent(core, service.url, token=WRONG, agent_id="stranger", ready=False)
        stranger.expected_code = 1
        stranger.wait()
        stranger.close()


def ask_secured(server: AcmeServer, core: RunningCore, ended: threading.Event) -> None:
    """Visitors over TLS, who hear of one name after the other and trust the authority only: until a name has its
    certificate they go away again."""
    began = time.monotonic()
    while not ended.wait(0.1):
        for name in NAMES[: 1 + int((time.monotonic() - began) / 30)]:
            with suppress(OSError), server.visit(core.public, f"{name}.{BASE}") as visitor:
                visitor.sendall(f"GET /echo HTTP/1.1\r\nHost: {name}.{BASE}\r\n\r\n".encode())
                visitor.recv(65536)


def start_crew(
    directory: Path, stack: ExitStack, ended: threading.Event
) -> tuple[Prometheus, RunningCore, RunningAgent]:
    """A core and an agent of two workers each, with certificates from an authority."""
    server = AcmeServer(directory / "authority")
    stack.callback(server.close)
    tap = stack.enter_context(SpanTap(directory))
    traced, environment = tracing(tap.endpoint)
    core = RunningCore(
        directory / "core", "-workers=2", "-heartbeat=200ms", "-public-tls", "-http-addr=127.0.0.1:0", "-acme-agree",
        f"-acme-directory={server.directory}", f"-acme-ca-cert={server.web_ca}", f"-base-domain={BASE}", *traced,
        environment=environment,
    )  # fmt: skip
    stack.callback(core.close)
    server.tell(http_port=core.http[1])
    service = Service()
    flags = ("-workers=2", "-metrics-report-interval=1s", "-heartbeat=200ms", *traced)
    agent = RunningAgent(core, ",".join(f"{name}={service.url}" for name in NAMES), *flags, environment=environment)
    stack.callback(agent.close)
    targets = {
        "tunnel-core": (core.metrics, "/metrics"),
        "tunnel-agents": (core.metrics, "/metrics/agents"),
        "tunnel-agent": (agent.metrics, "/metrics"),
    }
    prometheus = stack.enter_context(Prometheus(directory, targets, "1s", [copy_of_rules(directory / "rules.yml")[0]]))
    threading.Thread(target=ask_secured, args=(server, core, ended), daemon=True).start()
    return prometheus, core, agent


def main() -> None:
    source = ROOT / "deploy" / "grafana" / "source"
    sys.path.append(str(source))  # after ours: this file has the same name
    spec = importlib.util.spec_from_file_location("drawing", source / "pictures.py")
    assert spec is not None and spec.loader is not None
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tap = stack.enter_context(SpanTap(directory))
        traced, environment = tracing(tap.endpoint)
        core = RunningCore(directory / "core", "-heartbeat=200ms", "-head-timeout=2s", *traced, environment=environment)
        stack.callback(core.close)
        service, other = Service(), Service()
        nobody = stack.enter_context(socket.socket())
        nobody.bind(("127.0.0.1", 0))
        often = ("-metrics-report-interval=1s", "-heartbeat=200ms", *traced)
        local = f"app={service.url},closed=http://127.0.0.1:{nobody.getsockname()[1]}"
        agent = RunningAgent(core, local, *often, environment=environment)
        stack.callback(agent.close)
        token = core.new_token("limited")
        limits = "-requests-per-second 9 -requests-burst 9 -requests-per-month 2200 -connections 3"
        core.command("account", "limit", "limited", *limits.split())

        def start_second() -> RunningAgent:
            flags = ("-subdomain=limited", *often)
            return RunningAgent(core, other.url, *flags, token=token, agent_id="second", environment=environment)

        second = start_second()
        targets = {
            "tunnel-core": (core.metrics, "/metrics"),
            "tunnel-agents": (core.metrics, "/metrics/agents"),
            "tunnel-agent": (agent.metrics, "/metrics"),
        }
        rules = copy_of_rules(directory / "rules.yml")[0]
        prometheus = stack.enter_context(Prometheus(directory, targets, "1s", [rules]))
        ended = threading.Event()
        (directory / "crew").mkdir()
        crewed, *crews = start_crew(directory / "crew", stack, ended)
        threads = [
            threading.Thread(target=visit, args=(core, ended), daemon=True),
            threading.Thread(target=visit, args=(core, ended), daemon=True),
            threading.Thread(target=never_finish, args=(core, ended), daemon=True),
            threading.Thread(target=try_tokens, args=(core, service, ended), daemon=True),
        ]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        time.sleep(MINUTES * 60 / 3)
        second.kill()  # an agent that is gone for a while
        for program in crews:
            os.kill(pids(program)[1], signal.SIGKILL)
        time.sleep(20)
        second = start_second()
        stack.callback(second.close)
        time.sleep(max(0.0, began + MINUTES * 60 - time.monotonic()))
        others = dict.fromkeys(("Workers", "The monitoring itself"), f"http://127.0.0.1:{crewed.port}")
        for path in drawing.draw_all(f"http://127.0.0.1:{prometheus.port}", ROOT / "docs" / "img", MINUTES, others):
            print(path.relative_to(ROOT))
        ended.set()
        for thread in threads:
            thread.join(10)


if __name__ == "__main__":
    sys.exit(main())
