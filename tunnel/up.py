"""`tunnel up`: core, agent and, unless a local service is named, a sample service, in one process on loopback.

For trying it out, and the only place that knows both ends. What it prints first is the public address, alone on its
line. It reads no settings file and no TUNNEL_ or AGENT_ variables (OTEL_ ones are honoured), and keeps its accounts and
keys apart from those of a core on the same machine.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol, TextIO, cast

from tunnel.config.helping import OneDash, explain, two_dashes
from tunnel.errors import ConfigError, TunnelError

if TYPE_CHECKING:
    import trio

    from tunnel.agent.client import Agent
    from tunnel.core.server import Core
    from tunnel.screen import Feed

DRAIN_TIMEOUT = 2.0  # seconds that open requests get after Ctrl-C; an open event stream must not hold it up
SAMPLE_NAME = "hello"  # the sample service's; one that is typed easily, for its port changes

#: a failed request is shown by us, with its cause; its access records come only when somebody asks for records
QUIET_LAYERS = "-layers=tracing,metrics,health"

DESCRIPTION = """\
Serve a local service through a tunnel on this machine, to try it: core, agent
and, unless a service is named, a small sample service. The public address is
printed first; Ctrl-C ends it all."""
EXAMPLES = """\
Examples:
  {prog}                              the sample service
  {prog} 3000                         http://localhost:3000
  {prog} 3000 -subdomain app          as http://app.localhost:8080
  {prog} 5173 -host-header local      where other names are refused

One dash or two. To serve the world, run a core on a server and agents elsewhere:
see README.md."""

_PORTS = {"public": 8080, "link": 8443, "core metrics": 9090, "dashboard": 9000, "agent metrics": 9091}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        said = explain(self, message)
        raise ConfigError(said if said.endswith("?") else f"{said}; {self.prog} -h shows how")


class Beside(Protocol):
    """Something that runs beside core and agent until it is cancelled, which happens after both have ended."""

    async def __call__(self, core: str, agent: str, *, task_status: trio.TaskStatus[list[str]]) -> None:
        """core, agent: their metrics addresses. Started with lines for the announcement. Raises TunnelError."""


def make_parser(prog: str = "python -m tunnel up", description: str = DESCRIPTION) -> argparse.ArgumentParser:
    """One dash or two, as everywhere."""
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [flags] [PORT or URL]",
        description=description,
        epilog=EXAMPLES.format(prog=prog),
        formatter_class=OneDash,
        allow_abbrev=False,
    )
    parser.add_argument("local", nargs="?", default="", metavar="PORT or URL", help="the service; default: a sample")
    for flag, default, metavar, text in (
        ("subdomain", "", "NAME", "the public name; default: a stable one that is made up"),
        ("host-header", "", "HOST", "Host that the service gets: local (its own address), or any name"),
        ("public-addr", "", "HOST:PORT", "where visitors come in; default: localhost:8080, or any free port"),
        ("data-dir", "", "DIR", "accounts and keys; default: a place in the state directory"),
        ("log-level", "warning", "WORD", "least level that is shown: debug, info, warning, error (default warning)"),
    ):
        choices = ("debug", "info", "warning", "error") if flag == "log-level" else None
        parser.add_argument(f"-{flag}", f"--{flag}", default=default, metavar=metavar, help=text, choices=choices)
    return parser


def main(argv: Sequence[str]) -> int:
    """Exit code 0 after Ctrl-C, SIGTERM or SIGHUP, 1 when something failed, 2 when the command line is wrong."""
    return main_of("tunnel up", make_parser(), argv, Up)


def main_of(
    name: str, parser: argparse.ArgumentParser, argv: Sequence[str], make: Callable[[argparse.Namespace], Up]
) -> int:
    """`main` for a program that runs an Up."""
    try:
        options = parser.parse_args(two_dashes(argv))
        import trio  # after the flags: `--help` is not to wait for it

        from tunnel.openfiles import raise_limit

        up = make(options)
        raise_limit()
        trio.run(up.run)
    except ConfigError as exc:
        print(f"{name}: {exc}", file=sys.stderr)
        return 2
    except TunnelError as exc:
        print(f"{name}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before our own handling of signals has begun
        pass
    return 0


class Up:
    """One run. Raises ConfigError for a bad command line."""

    def __init__(self, options: argparse.Namespace, beside: Beside | None = None) -> None:
        from tunnel.config import parse_address, parse_local
        from tunnel.screen import Feed

        self._options = options
        self._beside = beside
        self._feed: Feed = Feed()
        self._core: Core | None = None
        self._agent: Agent | None = None
        self._is_up = False
        try:
            if options.local or options.subdomain:
                parse_local(options.local or "http://localhost:1", options.subdomain)
            if options.public_addr:
                parse_address(options.public_addr)
        except ConfigError as exc:
            raise ConfigError(str(exc).removeprefix("-local: ")) from None
        except ValueError as exc:
            raise ConfigError(f"-public-addr: {exc}") from None

    async def run(self) -> None:
        """Until a signal has ended it. Raises TunnelError."""
        from tunnel.link.tasks import open_pair
        from tunnel.sample import serve_sample

        async with open_pair() as nursery:
            await nursery.start(self._watch_signals, nursery)
            out, live = self._set_up_output()
            local = self._options.local
            if not local:
                host, port = await nursery.start(serve_sample)
                local = f"http://{host}:{port}"
            async with open_pair() as programs:
                await self._start(programs, local)
                more = await self._start_beside(nursery)
                self._is_up = True
                self._announce(out, more)
                nursery.start_soon(self._show, out, live)
            nursery.cancel_scope.cancel()

    async def _watch_signals(self, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None]) -> None:
        """The first signal lets open requests finish for a moment; the second ends all now."""
        import trio

        from tunnel.interrupts import HANGUP, endings

        with trio.open_signal_receiver(*endings()) as signals:
            task_status.started()
            is_ending = False
            async for number in signals:
                if is_ending and number == HANGUP:
                    continue
                is_ending = True
                if not self._is_up or self._core is None or self._agent is None:
                    nursery.cancel_scope.cancel()
                    return
                self._is_up = False
                self._core.drain()
                self._agent.stop()

    def _set_up_output(self) -> tuple[TextIO, bool]:
        """(where to write, whether it is a terminal); log lines go where they don't tear the live status."""
        import trio

        from tunnel.log import setup
        from tunnel.screen import LogLines

        live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        lines = (
            cast(TextIO, LogLines(self._feed, trio.lowlevel.current_trio_token()))
            if live and sys.stderr.isatty()
            else sys.stderr
        )
        setup(self._options.log_level, stream=lines)
        return sys.stdout, live

    async def _start(self, programs: trio.Nursery, local: str) -> None:
        from tunnel.agent.client import Agent
        from tunnel.config import load_agent, load_core
        from tunnel.core.server import Core
        from tunnel.net import address_text
        from tunnel.tuning import tune

        data_dir, level = data_dir_of(self._options), self._options.log_level
        common = [f"-log-level={level}", f"-drain-timeout={DRAIN_TIMEOUT}"]
        common += [] if level in ("debug", "info") else [QUIET_LAYERS]
        public = self._options.public_addr or _address("public", "localhost")
        self._core = core = Core(load_core([*core_flags(public, data_dir), *common], {}))
        core.on_request = self._feed.add
        await programs.start(core.run)
        token_file = core.token_file or data_dir / "default.token"
        if not token_file.exists():
            raise ConfigError(f"the token {token_file} is gone; remove {data_dir} to start over")
        subdomain = self._options.subdomain or ("" if self._options.local else SAMPLE_NAME)
        flags = agent_flags(address_text(core.agent_address), token_file, local, subdomain, self._options.host_header)
        self._agent = agent = Agent(load_agent([*flags, *common], {}))
        await programs.start(agent.run)
        tune()

    async def _start_beside(self, nursery: trio.Nursery) -> list[str]:
        """What it says of itself; it is in the outer nursery, so it ends after core and agent."""
        from tunnel.net import address_text

        if self._beside is None:
            return []
        assert self._core is not None
        assert self._agent is not None
        addresses = [address_text(one.metrics_address) for one in (self._core, self._agent)]
        lines: list[str] = await nursery.start(self._beside, *addresses)
        return lines

    def _announce(self, out: TextIO, more: Sequence[str]) -> None:
        """The public addresses first and alone; then where to look."""
        from tunnel.net import address_text
        from tunnel.screen import write_lines

        assert self._core is not None
        assert self._agent is not None
        write_lines(out, *(tunnel.url for tunnel in self._agent.tunnels))
        metrics = f"http://{address_text(self._core.metrics_address)}"
        sample = "" if self._options.local else " (the sample service)"
        write_lines(
            out,
            *(f"local    {tunnel.local}{sample}" for tunnel in self._agent.tunnels),
            f"metrics  {metrics}/metrics (core)",
            f"metrics  http://{address_text(self._agent.metrics_address)}/metrics (agent)",
            f"health   {metrics}/healthz",
            f"status   http://{address_text(self._core.dashboard_address)}/",
            *more,
        )

    async def _show(self, out: TextIO, live: bool) -> None:
        from tunnel.screen import show_lines, show_live

        if live:
            from rich.console import Console

            await show_live(self._feed, Console(file=out))
        else:
            await show_lines(self._feed, out)


def core_flags(public: str, data_dir: Path) -> list[str]:
    """The core's command line. The link is plain: it never leaves this process."""
    return [
        f"-public-addr={public}",
        f"-agent-addr={_address('link')}",
        f"-metrics-addr={_address('core metrics')}",
        f"-dashboard-addr={_address('dashboard')}",
        f"-data-dir={data_dir}",
        "-agent-tls=false",
        "-tcp-ports=0",
    ]


def agent_flags(server: str, token_file: Path, local: str, subdomain: str, host_header: str = "") -> list[str]:
    """The agent's command line."""
    flags = [
        f"-server={server}",
        f"-token-file={token_file}",
        f"-local={local}",
        f"-host-header={host_header}",
        f"-metrics-addr={_address('agent metrics')}",
        "-tls=false",
    ]
    return [*flags, f"-subdomain={subdomain}"] if subdomain else flags


def data_dir_of(options: argparse.Namespace) -> Path:
    """Where accounts, keys and other state live; not created here. Raises ConfigError if there is no such place."""
    from tunnel.config import CoreSettings, data_dir

    given = options.data_dir
    return data_dir(CoreSettings(data_dir=given)) if given else data_dir(CoreSettings()) / "up"


def _address(what: str, host: str = "127.0.0.1") -> str:
    """The usual port if it is free, or 0: any."""
    port = _PORTS[what]
    return f"{host}:{port if is_free(host, port) else 0}"


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens on this port, on any address of the host that this machine has."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind, protocol) as sock:
                if sys.platform == "linux":  # elsewhere it would let us bind beside a listener on all addresses
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address)
        except OSError as exc:
            if exc.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
    return True
