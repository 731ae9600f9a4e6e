"""`python -m tunnel.agent`: serve local services through a core."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunnel.interrupts import ADVICE, HANGUP, endings, leave, quietly
from tunnel.workers import VARIABLE

if TYPE_CHECKING:
    from tunnel.agent.client import Agent
    from tunnel.agent.supervisor import Supervisor
    from tunnel.log import Logger


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when stopped, 1 when it gives up, 2 when the configuration is wrong."""
    return quietly(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> int:
    from tunnel.config import load_agent
    from tunnel.config.hiding import SHOWN, hide_secrets
    from tunnel.errors import ConfigError

    given = sys.argv[1:] if argv is None else argv
    hidden = hide_secrets(given, "agent")
    if VARIABLE in os.environ:
        from tunnel.agent.worker import work

        return work()
    try:
        settings = load_agent(given, os.environ)
    except ConfigError as exc:
        from tunnel.config.asked import asks_for_json
        from tunnel.log import complain

        complain("tunnel agent", exc, asks_for_json(given, os.environ, "agent"))
        return 2
    import trio  # after the flags: `--help` is not to wait for it

    from tunnel.agent.client import Agent, Stopped
    from tunnel.agent.places import make_room_for_files
    from tunnel.log import get_logger, setup
    from tunnel.tuning import tune

    setup(settings.log_level, settings.log_json)
    log = get_logger("tunnel.agent")
    if hidden:
        log.warning(SHOWN, names=hidden)
    if settings.token_file and is_open_to_others(settings.token_file):
        advice = f"chmod 600 {shlex.quote(settings.token_file)}"
        log.warning("token file can be read by others", file=settings.token_file, advice=advice)
    make_room_for_files(log)
    agent: Agent | Supervisor
    try:
        if settings.workers > 1:
            from tunnel.agent.supervisor import Supervisor

            agent = Supervisor(settings)
        else:
            agent = Agent(settings)
        tune()
        trio.run(_serve, agent, log)
    except ConfigError as exc:
        log.error("can't start", error=str(exc))
        return 2
    except Stopped as exc:
        log.error("giving up", reason=exc.reason, error=str(exc))
        return 1
    log.info("stopped")
    return 0


def is_open_to_others(path: str) -> bool:
    """Whether this is a file of ours that our group or others may read. Somebody else's is theirs to judge: what a
    container is given, what root lets a service's group read."""
    try:
        found = Path(path).stat()
    except OSError:
        return False
    return os.name == "posix" and found.st_uid == os.geteuid() and bool(found.st_mode & 0o044)


async def _serve(agent: Agent | Supervisor, log: Logger) -> None:
    """The first SIGTERM, SIGINT or SIGHUP lets open requests finish; a second SIGTERM or SIGINT ends all now."""
    import trio

    from tunnel.link.tasks import open_pair
    from tunnel.notify import Notifier

    systemd = Notifier(os.environ)
    async with open_pair() as nursery:

        async def watch_signals(*, task_status: trio.TaskStatus[None]) -> None:
            with trio.open_signal_receiver(*endings()) as signals:
                task_status.started()
                stopping = False
                async for number in signals:
                    if stopping and number == HANGUP:
                        continue
                    if stopping:
                        nursery.cancel_scope.cancel()
                    else:
                        log.info("draining", timeout=f"{agent.settings.drain_timeout:g}s", advice=ADVICE)
                    stopping = True
                    systemd.stopping()
                    agent.stop()

        await nursery.start(watch_signals)
        nursery.start_soon(systemd.feed_watchdog)
        systemd.ready("dialing, and dialing again whenever the link is lost")
        await agent.run()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    leave(main())
