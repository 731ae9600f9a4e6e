"""`python -m tunnel.core`: serve; with a command (account, token, tunnel, usage, migrate): work on the store."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from tunnel.interrupts import leave, quietly
from tunnel.workers import VARIABLE

if TYPE_CHECKING:
    from tunnel.core.server import Core
    from tunnel.core.supervisor import Supervisor


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when drained, 1 when the store is away or an upgrade broke off: another start may help. 2 for a wrong
    configuration. A command has its own."""
    return quietly(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> int:
    from tunnel.config import data_dir, load_core, split_command
    from tunnel.config.hiding import SHOWN, hide_secrets
    from tunnel.errors import ConfigError

    given = sys.argv[1:] if argv is None else argv
    hidden = hide_secrets(given, "core")
    if VARIABLE in os.environ:
        from tunnel.core.worker import work

        return work()
    try:
        flags, words = split_command(given)
        settings = load_core(flags, os.environ)
        if words:
            from tunnel.core.commands import run_command

            return run_command(
                words,
                database_url=settings.database.url,
                data_dir=data_dir(settings),
                base_domain=settings.base_domain,
                name_hold=settings.name_hold,
            )
    except ConfigError as exc:
        from tunnel.config.asked import asks_for_json
        from tunnel.log import complain

        complain("tunnel core", exc, asks_for_json(given, os.environ, "core"))
        return 2
    import trio  # after the flags: `--help` is not to wait for it

    from tunnel.core.capacity import make_room_for_files
    from tunnel.core.certificates import ignore_odd_names
    from tunnel.core.database import StoreError
    from tunnel.core.server import Core
    from tunnel.log import get_logger, setup
    from tunnel.tuning import tune

    setup(settings.log_level, settings.log_json)
    ignore_odd_names()
    log = get_logger("tunnel.core")
    if hidden:
        log.warning(SHOWN, names=hidden)
    make_room_for_files(settings, log)
    core: Core | Supervisor
    try:
        if settings.workers > 1:
            from tunnel.core.supervisor import Supervisor

            core = Supervisor(settings)
        else:
            core = Core(settings)
        tune()
        trio.run(_serve, core)
    except (ConfigError, StoreError) as exc:
        log.error("can't start", error=str(exc))
        return 2 if isinstance(exc, ConfigError) else 1
    return 1 if core.is_orphan else 0


async def _serve(core: Core | Supervisor) -> None:
    """The first SIGTERM or SIGINT drains; the second ends all now. SIGHUP: the certificates are read again, but where
    it says that our terminal is gone it drains, too. SIGUSR2: a new process takes over."""
    import trio

    from tunnel.core.upgrade import UpgradeError
    from tunnel.interrupts import Terminal
    from tunnel.link.tasks import open_pair
    from tunnel.log import get_logger
    from tunnel.notify import Notifier

    systemd = Notifier(os.environ)

    async def reload() -> None:
        systemd.reloading()
        await core.reload()
        systemd.ready("serving")

    async def upgrade() -> None:
        try:
            systemd.main_pid(await core.upgrade())
        except UpgradeError as exc:
            log.error("upgrade failed, this core goes on", error=str(exc))

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await core.run(task_status=task_status)
        nursery.cancel_scope.cancel()

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR2") if hasattr(signal, name)]
    log = get_logger("tunnel.core")
    terminal = Terminal()
    async with open_pair() as nursery:

        async def watch_signals(*, task_status: trio.TaskStatus[None]) -> None:
            with trio.open_signal_receiver(*known) as signals:
                task_status.started()
                draining = False
                async for number in signals:
                    if number == signal.SIGHUP and not terminal.has_gone:
                        nursery.start_soon(reload)
                        continue
                    if number == signal.SIGUSR2:
                        nursery.start_soon(upgrade)
                        continue
                    if draining and number != signal.SIGHUP:  # a terminal's end comes from the shell and the kernel
                        nursery.cancel_scope.cancel()
                    draining = True
                    systemd.stopping()
                    core.drain()

        await nursery.start(watch_signals)
        await nursery.start(run)
        await trio.lowlevel.checkpoint_if_cancelled()  # stopped before it was ready
        systemd.ready("serving")
        nursery.start_soon(systemd.feed_watchdog)


if __name__ == "__main__":
    leave(main())
