"""What a core does as it starts, as one process or as the supervisor of several: look at its settings, say where
everything is."""

from __future__ import annotations

from typing import Any

from tunnel.config import CoreSettings
from tunnel.core.first import FirstToken, agent_command
from tunnel.core.inherited import Inherited, adopt
from tunnel.errors import ConfigError
from tunnel.log import get_logger
from tunnel.net import address_text
from tunnel.wire.frames import MOST_WINDOW
from tunnel.workers.member import Member

log = get_logger("tunnel.core")

MAX_HEAD = 96 * 1024  #: the largest -max-head: with our own fields it must fit wire.frames.MAX_HEAD
FORGET_INTERVAL = 10.0  #: seconds between looks for names whose hold is over

Address = tuple[str, int]


def announce(
    settings: CoreSettings,
    first: FirstToken | None,
    *,
    public: Address,
    agents: Address,
    metrics: Address | None,
    dashboard: Address | None,
    fingerprint: str,
    plain: Address | None = None,
    **more: Any,
) -> None:
    """Say where all of it is; until an agent has come also the whole command that connects one, to be pasted. The token
    stays in its file."""

    def url(address: Address | None, path: str = "") -> str:
        return f"http://{address_text(address)}{path}" if address else "off"

    log.info(
        "core ready",
        public=address_text(public),
        agents=address_text(agents),
        **({"http": url(plain)} if plain else {}),
        metrics=url(metrics, "/metrics"),
        status=url(dashboard),
        fingerprint=fingerprint or "none (no TLS on the agents' links)",
        **more,
    )
    if first is not None:
        command = agent_command(f"{settings.base_domain}:{agents[1]}", first.path, fingerprint)
        why = "first start" if first.is_new else "no agent has come yet"
        log.info(f"{why}: connect an agent with this command", command=command)


def check_settings(settings: CoreSettings) -> None:
    """What no single setting shows. Raises ConfigError."""
    if settings.max_head > MAX_HEAD:
        raise ConfigError(f"-max-head: at most {MAX_HEAD} bytes, the link carries no larger head")
    if not settings.stream_window <= settings.link_window <= MOST_WINDOW:
        raise ConfigError("-link-window: at least -stream-window, and less than 2 GiB")


def handed_to(member: Member) -> Inherited:
    """The listening sockets that a worker is given with its orders."""
    numbers = iter(member.files)
    return Inherited({name: [adopt(next(numbers)) for _ in range(count)] for name, count in member.orders["sockets"]})
