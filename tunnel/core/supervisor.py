"""A core of several workers: the process that holds the ports, starts the workers, and is one core to everybody else.

It takes no visitor and no agent itself. What is its own:

- *once for all*: the store's first start and migration, the certificate that is made, the invitation, the ports (those
  of TCP tunnels too), the pages, the log, the announcement;
- *the whole*: which names and agents there are (tunnel/core/roster.py), so that limits and names hold over all workers,
  and which worker a connection is to go to;
- *life*: a worker that ends is replaced; SIGTERM, SIGHUP and SIGUSR2 mean for all workers what they mean for one core.

Visitors wait in the listening sockets, which stay open whatever becomes of a worker: none of them is reset.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio

from tunnel.config import CoreSettings, data_dir, parse_address, parse_ports, sections
from tunnel.core.board import Board, Rows, make_board
from tunnel.core.certificates import Certificates, for_agents, for_visitors
from tunnel.core.first import FirstToken, ensure_default, leave_invitation
from tunnel.core.inherited import AGENTS, HTTP, PUBLIC, inherit
from tunnel.core.issuing.making import CERTIFICATES, place_for
from tunnel.core.ownpages import OwnPages
from tunnel.core.ports import OwnPorts, SharedPorts
from tunnel.core.private import make_private
from tunnel.core.recent import RecentRequests, together
from tunnel.core.roster import Roster
from tunnel.core.starting import FORGET_INTERVAL, announce, check_settings
from tunnel.core.status import Said, status_page, united
from tunnel.core.store import Store
from tunnel.core.storing import reach
from tunnel.core.upgrade import Predecessor, Successor, UpgradeError
from tunnel.errors import ConfigError, Refused
from tunnel.handler import CoreStatistics, QuotaStatistics
from tunnel.interrupts import ADVICE
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.plugins import Program
from tunnel.workers.channel import Handler, WithFiles, close_files, copies
from tunnel.workers.crew import Crew
from tunnel.workers.process import Worker
from tunnel.workers.whole import Whole, WorkerPages

log = get_logger("tunnel.core")

WAIT_SECONDS = 10.0  #: that a connection waits for a worker which is being replaced: as long as an agent does
MAX_WAITING = 64  #: connections that wait so; nobody has said yet who they are, so they must not take all our files
SHARED = (PUBLIC, HTTP, AGENTS)  #: listeners that the workers accept from


class Supervisor:
    """A core with these settings, as `Core` is one. Raises ConfigError for settings that can't work."""

    def __init__(self, settings: CoreSettings) -> None:
        check_settings(settings)
        if not sys.platform.startswith("linux"):
            raise ConfigError("-workers: several processes on one port need Linux")
        self.settings = settings
        self.data_dir: Path = data_dir(settings)
        self.is_orphan = False
        self.fingerprint = ""
        self._inherited = inherit(os.environ)
        self._sockets: dict[str, list[socket.socket]] = {}  # by the names of tunnel.core.inherited
        self._roster = Roster(settings.name_hold)
        self._draining = trio.Event()
        self._is_handed_over = False
        self._is_up = False
        self._waiting = 0  # connections that wait for a worker which is being replaced
        self._successor: Successor | None = None
        self._pages = OwnPages(settings, self.data_dir, self._inherited)
        self._first: FirstToken | None = None
        public_host = parse_address(settings.public_addr)[0]
        self._key = secrets.token_bytes(16)
        self._run_id = secrets.token_hex(8)
        self._board_file = make_board(settings.workers)
        self._board = Board(self._board_file, settings.workers, -1, self._key)
        self._rows = Rows(self._board)
        self._ports = SharedPorts(OwnPorts(public_host, parse_ports(settings.tcp_ports), self._inherited))
        self._crew = Crew(
            settings.workers,
            module="tunnel.core",
            log_level=settings.log_level,
            log_json=settings.log_json,
            orders=self._orders,
            handlers=self._handlers,
            on_end=self._lose,
        )
        self._gone = CoreStatistics(0, 0, 0, [], [], {})  # of workers that have ended
        self._program = Program("core", sections(settings), self.statistics, list)
        self._whole = Whole(self._program, self._crew, "core", Said, self._retire, {"draining": self._check_draining})
        self._before = RecentRequests()  # of workers that have ended

    # What others may ask --------------------------------------------------------------------------------------

    async def say(self) -> Said:
        """All workers as one."""
        await self._whole.refresh()
        checks = self._program.readiness()
        tunnels = united(tunnel for _, said in self._whole.said for tunnel in said.tunnels)
        recent = together([self._before.say(), *(said.recent for _, said in self._whole.said)])
        return Said(self.statistics(), checks, tunnels, self._program.details(), recent)

    def statistics(self) -> CoreStatistics:
        """Of all workers, as of their last word, with what those that have ended had counted."""
        total = CoreStatistics(self.settings.max_connections, 0, 0, [], [], {}, held_bytes_limit=0)
        _count(total, self._gone)
        for _, said in self._whole.said:
            one = said.statistics
            _count(total, one)
            total.links += one.links
            total.held_bytes += one.held_bytes
            total.held_bytes_limit += one.held_bytes_limit
            total.acme_failing = max(total.acme_failing, one.acme_failing)
            total.certificate_expiry.update(one.certificate_expiry)
        total.quotas = add_quotas(
            [said.statistics.quotas for _, said in self._whole.said], self._roster.by_account, self._ports.by_account
        )
        return total

    def _retire(self, said: Said) -> None:
        _count(self._gone, said.statistics)
        self._before.add(said.recent)

    def _check_draining(self) -> tuple[bool, str]:
        return (False, "shutting down") if self._draining.is_set() else (True, "serving")

    # Life -----------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Begin to shut down, as `Core.drain`."""
        if self._successor is not None and not self._draining.is_set():
            self._successor.end()
            self._successor = None
        self._draining.set()

    async def reload(self) -> None:
        """Every worker reads its certificates again."""
        for _, fingerprint in await self._crew.ask("reload"):
            self.fingerprint = fingerprint

    async def upgrade(self) -> int:
        """As `Core.upgrade`: a new supervisor with workers of its own takes over. Raises UpgradeError."""
        if self._successor is not None or self._draining.is_set() or not self._is_up:
            raise UpgradeError("this core is starting, shutting down, or has a successor already")
        successor = self._successor = Successor({**self._sockets, **self._pages.sockets, **self._ports.sockets()})
        log.info("upgrade: successor started", pid=successor.pid)
        try:
            await successor.wait_ready()
        except BaseException:
            self._successor = None
            raise
        self._pages.stop()
        names = self._roster.names()
        await self._crew.ask("stop taking agents")  # all of them before the first agent dials again
        await self._crew.ask("send agents away")
        self.is_orphan = not await successor.wait_moved(names)
        if self.is_orphan:
            log.error("upgrade broke off, this core ends too", error="the successor ended after it had taken the ports")
        self._is_handed_over = True
        self._draining.set()
        return successor.pid

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until drained. Raises ConfigError as `Core.run`, and when a worker can't start."""
        async with open_pair() as background:
            async with self._program.supervised(self.settings.layers, background):
                if await self._prepare():
                    await self._serve(background, task_status)
                else:
                    task_status.started()
            background.cancel_scope.cancel()
        log.info("stopped")

    async def _serve(self, background: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        await background.start(self._crew.run)
        background.start_soon(self._forget_names)
        pages = WorkerPages(self._program.pages, self._crew)
        self._pages.start(background, pages, status_page(self))
        if self._inherited.channel is not None:
            await Predecessor(self._inherited.channel).follow(self._roster.names)
        self._crew.open()
        self._is_up = True
        self._announce()
        task_status.started()
        await self._draining.wait()
        await self._finish()

    async def _prepare(self) -> bool:
        """What is done once: store, first start, certificates, ports. False: a drain began."""
        settings = self.settings
        try:
            make_private(self.data_dir)
        except OSError as exc:
            raise ConfigError(f"-data-dir: can't make {self.data_dir} ({exc.strerror}); give another one") from exc
        store = Store(settings.database.url, self.data_dir)
        if not await reach(store, settings.database.wait, self._draining):
            return False
        try:
            self._first = await ensure_default(store, self.data_dir)
        finally:
            await store.close()
        agent_tls: Certificates | None = for_agents(settings, self.data_dir)
        acme = place_for(settings, self.data_dir)
        for_visitors(settings, acme / CERTIFICATES if acme is not None else None)
        self.fingerprint = agent_tls.fingerprint if agent_tls is not None else ""
        if settings.invite_dir:
            leave_invitation(Path(settings.invite_dir), self.data_dir / "default.token", self.fingerprint)
        take = self._inherited.listen
        self._sockets[PUBLIC] = take(PUBLIC, parse_address(settings.public_addr), "-public-addr")
        self._sockets[AGENTS] = take(AGENTS, parse_address(settings.agent_addr), "-agent-addr")
        if settings.http_addr:
            self._sockets[HTTP] = take(HTTP, parse_address(settings.http_addr), "-http-addr")
        return True

    async def _finish(self) -> None:
        """All workers stop accepting, then finish what they have."""
        settings = self.settings
        delay = 0.0 if self._is_handed_over else settings.drain_delay
        log.info("draining", delay=f"{delay:g}s", timeout=f"{settings.drain_timeout:g}s", advice=ADVICE)
        await trio.sleep(delay)
        self._crew.end()
        await self._crew.ask("close", self._is_handed_over)
        self._ports.close_all()
        for name in SHARED:
            for sock in self._sockets.get(name, ()):
                sock.close()
        if self._successor is not None:
            await self._successor.go()
        await self._crew.wait_ended(settings.drain_timeout)

    async def _forget_names(self) -> None:
        while True:
            await trio.sleep(FORGET_INTERVAL)
            for name in self._roster.forget_expired():
                log.info("name is free again", tunnel=name)

    # Workers --------------------------------------------------------------------------------------------------

    def _orders(self, worker: Worker) -> tuple[Any, Sequence[int]]:
        sockets = [(name, self._sockets.get(name, [])) for name in SHARED]
        orders = {
            "settings": msgspec.to_builtins(self.settings),
            "count": self._crew.count,
            "sockets": [[name, len(socks)] for name, socks in sockets],
            "key": self._key,
            "core": self._run_id,
            "names": [[other, self._roster.names_of(other)] for other in self._crew.living],
        }
        files = [sock.fileno() for _, socks in sockets for sock in socks]
        return orders, copies([*files, self._board_file])

    def _lose(self, worker: Worker) -> None:
        self._roster.lose(worker.number)
        self._ports.drop(worker.key)
        self._rows.drop(worker.key)
        self._board.clear_counts(worker.number)
        self._crew.tell("names", {"worker": worker.number, "gone": True})

    def _handlers(self, worker: Worker) -> Mapping[str, Handler]:
        """What this worker may ask for."""
        crew, roster, ports, rows = self._crew, self._roster, self._ports, self._rows

        def names(message: Any, files: list[int]) -> None:
            up, down = [tuple(name) for name in message.get("up", ())], message.get("down", ())
            roster.learn(worker.number, up, down, message.get("held", True))
            crew.tell("names", {"worker": worker.number, **message}, but=worker)

        async def sync(message: Any, files: list[int]) -> None:
            await crew.ask("sync")  # answered in its order: what was told before is known then

        def admit(message: Any, files: list[int]) -> Any:
            return roster.admit(worker.number, *message)

        def drop(message: Any, files: list[int]) -> None:
            roster.drop(message)

        def port(message: Any, files: list[int]) -> Any:
            try:
                sockets = ports.take(worker.key, *message)
            except Refused as exc:
                return exc.reason, str(exc)
            return WithFiles(None, copies([sock.fileno() for sock in sockets]))

        def port_back(message: Any, files: list[int]) -> None:
            ports.give_back(worker.key, *message)

        def visitor(message: Any, files: list[int]) -> None:
            number, *rest = message
            target = crew.living.get(number, worker)  # it has been told by now that the other one is gone
            target.channel.tell("visitor", rest, files)

        def tcp_visitor(message: Any, files: list[int]) -> None:
            number, *rest = message
            crew.living.get(number, worker).channel.tell("tcp visitor", rest, files)

        async def agent(message: Any, files: list[int]) -> None:
            number, address = message
            try:
                if self._waiting < MAX_WAITING:
                    self._waiting += 1
                    try:
                        with trio.move_on_after(WAIT_SECONDS):
                            target = await crew.wait_ready(number)
                            target.channel.tell("agent", address, files)
                            files = []
                    finally:
                        self._waiting -= 1
            finally:
                close_files(files)

        def row(message: Any, files: list[int]) -> int:
            return rows.take(worker.key, message)

        def row_back(message: Any, files: list[int]) -> None:
            rows.give_back(worker.key, message)

        return {
            "names": names, "sync": sync, "admit": admit, "drop": drop, "port": port, "port back": port_back,
            "row": row, "row back": row_back, "visitor": visitor, "tcp visitor": tcp_visitor,
            "agent": agent,
        }  # fmt: skip

    def _announce(self) -> None:
        public, agents = (self._sockets[name][0].getsockname()[:2] for name in (PUBLIC, AGENTS))
        plain = self._sockets.get(HTTP)
        announce(
            self.settings,
            self._first,
            public=public,
            agents=agents,
            metrics=self._pages.metrics,
            dashboard=self._pages.dashboard,
            fingerprint=self.fingerprint,
            plain=plain[0].getsockname()[:2] if plain else None,
            workers=self._crew.count,
        )


def _count(total: CoreStatistics, one: CoreStatistics) -> None:
    total.bytes_in += one.bytes_in
    total.bytes_out += one.bytes_out
    total.logs_dropped += one.logs_dropped
    total.protocol_errors += one.protocol_errors
    for mine, its in (
        (total.quota_exceeded, one.quota_exceeded),
        (total.limit_refusals, one.limit_refusals),
        (total.acme_orders, one.acme_orders),
    ):
        for name, count in its.items():
            mine[name] = mine.get(name, 0) + count


def add_quotas(
    quotas: Sequence[Sequence[QuotaStatistics]], agents: Mapping[str, int], ports: Mapping[str, int]
) -> list[QuotaStatistics]:
    """Those of several workers as one: what is stored once, and what each has not stored yet. agents, ports: that
    accounts have at all of them together."""
    rows: dict[tuple[str, str], QuotaStatistics] = {}
    for one in (one for worker in quotas for one in worker):
        key = one.account_id, one.type
        row = rows.setdefault(key, QuotaStatistics(one.account_id, one.type, -math.inf, one.limit))
        row.usage = max(row.usage, one.usage - one.pending)
        row.pending += one.pending
        row.limit = min(row.limit, one.limit)
    known_here = {"connection": agents, "ports": ports}
    for row in rows.values():
        counted = known_here.get(row.type)
        row.usage = row.usage + row.pending if counted is None else counted.get(row.account_id, 0)
    return list(rows.values())
