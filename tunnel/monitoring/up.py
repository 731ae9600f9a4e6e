"""`python -m tunnel.monitoring up`: what `tunnel up` starts, scraped by a Prometheus that tells an Alertmanager.

Rules, scrape configuration and routes are those under deploy/. At the end the tunnel drains first, then Prometheus
stops (it may still have something to tell), then Alertmanager.
"""

from __future__ import annotations

import argparse
import re
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunnel.errors import ConfigError
from tunnel.up import Up, data_dir_of, is_free, main_of, make_parser

if TYPE_CHECKING:
    import trio

    from tunnel.monitoring.child import Child

NAME = "tunnel.monitoring up"
LOOPBACK = "127.0.0.1"
PROMETHEUS_PORT, ALERTMANAGER_PORT = 9093, 9094  # 9090, Prometheus' own default, is the core's
RETENTION = "30d"
INTERVAL = "15s"


def make_monitoring_parser() -> argparse.ArgumentParser:
    """The flags of `tunnel up` and some more."""
    parser = make_parser(
        f"python -m {NAME}",
        "A tunnel on this machine with Prometheus and Alertmanager, without Docker: the rules, alerts and routes\n"
        "are those under deploy/. Both programs must be installed (Debian: prometheus, prometheus-alertmanager).",
    )
    for flag, metavar, text in (
        (
            "prometheus-addr",
            "HOST:PORT",
            f"where Prometheus listens; default: {LOOPBACK}:{PROMETHEUS_PORT}, or any free port",
        ),
        (
            "alertmanager-addr",
            "HOST:PORT",
            f"where Alertmanager listens; default: {LOOPBACK}:{ALERTMANAGER_PORT}, or any free port",
        ),
        ("scrape-interval", "DURATION", f"how often metrics are read and rules evaluated; default: {INTERVAL}"),
        ("slack-url-file", "FILE", "holds the URL of a Slack webhook; without it nothing goes to Slack"),
        ("pagerduty-key-file", "FILE", "holds a PagerDuty integration key; without it nothing is paged"),
        ("webhook-url", "URL", "hears of every alert as well, as Alertmanager's JSON"),
    ):
        parser.add_argument(f"-{flag}", f"--{flag}", default="", metavar=metavar, help=text)
    return parser


def main(argv: Sequence[str]) -> int:
    """Exit code 0 after Ctrl-C, SIGTERM or SIGHUP, 1 when something failed, 2 when the command line is wrong."""
    return main_of(NAME, make_monitoring_parser(), argv, make_up)


def make_up(options: argparse.Namespace) -> Up:
    """Raises ConfigError for a bad command line, a missing program or file: before anything is started."""
    return Up(options, Monitoring(options).run)


class Monitoring:
    """Prometheus and Alertmanager of one run. Raises ConfigError."""

    def __init__(self, options: argparse.Namespace) -> None:
        from tunnel.config import parse_address
        from tunnel.monitoring.files import find_deploy
        from tunnel.monitoring.programs import find_programs

        self._options = options
        self._programs = find_programs()
        self._deploy = find_deploy()
        self._interval = options.scrape_interval or INTERVAL
        if not re.fullmatch(r"[1-9]\d*(ms|s|m)", self._interval):
            raise ConfigError("-scrape-interval: expected a duration such as 15s, 500ms or 1m")
        for flag in ("prometheus_addr", "alertmanager_addr"):
            try:
                if value := getattr(options, flag):
                    parse_address(value)
            except ValueError as exc:
                raise ConfigError(f"-{flag.replace('_', '-')}: {exc}") from None
        self._slack = secret_file(options, "slack_url_file")
        self._pager = secret_file(options, "pagerduty_key_file")

    async def run(self, core: str, agent: str, *, task_status: trio.TaskStatus[list[str]]) -> None:
        """Until cancelled. core, agent: their metrics addresses. Its value are the lines to show, once both serve."""
        import trio

        from tunnel.link.tasks import open_pair

        children = self._prepare(core, agent)
        async with open_pair() as nursery:
            try:
                for child in children:
                    began = time.monotonic()
                    progress(f"{child.name}: starting")
                    await child.start()
                    nursery.start_soon(child.watch)
                    await child.wait_ready()
                    progress(f"{child.name}: ready after {time.monotonic() - began:.1f} s")
                task_status.started(self._lines(*children))
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):  # each stop has its own bound
                    for child in reversed(children):
                        await child.stop()

    def _prepare(self, core: str, agent: str) -> list[Child]:
        """Their files written and their command lines made: Alertmanager, then Prometheus, which tells it."""
        from tunnel.monitoring.files import write_alertmanager, write_prometheus
        from tunnel.net import address_text

        state = data_dir_of(self._options)
        alerts = choose_address(self._options.alertmanager_addr, ALERTMANAGER_PORT)
        metrics = choose_address(self._options.prometheus_addr, PROMETHEUS_PORT)
        addresses = {"alertmanager": near(alerts), "prometheus": near(metrics)}
        targets = {"core": core, "agents": agent, **{name: address_text(one) for name, one in addresses.items()}}
        try:
            routes = write_alertmanager(
                self._deploy, state / "alertmanager", self._slack, self._pager, self._options.webhook_url
            )
            rules = write_prometheus(self._deploy, state / "prometheus", targets, self._interval)
        except OSError as exc:
            raise ConfigError(f"{exc.filename}: {exc.strerror}") from None
        return [
            self._child("alertmanager", alerts, routes, "--storage.path", "--cluster.listen-address="),
            self._child(
                "prometheus", metrics, rules, "--storage.tsdb.path",
                f"--storage.tsdb.retention.time={RETENTION}", "--enable-feature=exemplar-storage",
            ),
        ]  # fmt: skip

    def _child(self, name: str, address: tuple[str, int], config: Path, storage: str, *flags: str) -> Child:
        from tunnel.monitoring.child import Child
        from tunnel.net import address_text

        command = [
            self._programs[name], f"--config.file={config}", f"{storage}={config.parent / 'data'}",
            f"--web.listen-address={address_text(address)}", f"--web.external-url=http://{address_text(near(address))}",
            "--log.level=warn", *flags,
        ]  # fmt: skip
        return Child(name, command, near(address), config.parent / f"{name}.log")

    def _lines(self, alertmanager: Child, prometheus: Child) -> list[str]:
        boards = self._deploy / "grafana" / "dashboards"
        return [
            f"metrics  {prometheus.url} (Prometheus, keeps {RETENTION})",
            f"alerts   {prometheus.url}/alerts (rules), {alertmanager.url} (Alertmanager)",
            f"boards   {boards} (import into a Grafana whose data source is {prometheus.url})",
        ]


def choose_address(given: str, usual: int) -> tuple[str, int]:
    """What was given, or the usual port on loopback; a free port where that is 0, or where the usual one is taken."""
    from tunnel.config import parse_address

    host, port = parse_address(given) if given else (LOOPBACK, usual if is_free(LOOPBACK, usual) else 0)
    if not port:  # neither program can tell which one the kernel gave it
        with socket.create_server((host or LOOPBACK, 0)) as probe:
            port = probe.getsockname()[1]
    return host, port


def near(address: tuple[str, int]) -> tuple[str, int]:
    """How we and the other one reach it; no host means all interfaces."""
    return address[0] or LOOPBACK, address[1]


def secret_file(options: argparse.Namespace, name: str) -> str:
    """The absolute path that was given, or "". Raises ConfigError when it can't be read."""
    given: str = getattr(options, name)
    if not given:
        return ""
    path = Path(given).expanduser().resolve()
    try:
        path.open("rb").close()
    except OSError as exc:
        raise ConfigError(f"-{name.replace('_', '-')}: {exc.strerror}: {path}") from None
    return str(path)


def progress(line: str) -> None:
    """On standard error: the first line of standard output stays the public address."""
    print(line, file=sys.stderr, flush=True)
