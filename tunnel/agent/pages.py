"""Where an agent's metrics and health are served."""

from __future__ import annotations

import socket

from tunnel.config import AgentSettings, parse_address
from tunnel.listening import InUseError, listen
from tunnel.log import get_logger
from tunnel.net import address_text

log = get_logger("tunnel.agent")


def listen_for_pages(settings: AgentSettings) -> list[socket.socket]:
    """Listening sockets at `metrics_addr`, which is not empty. Raises ConfigError.

    A second agent on a machine finds the usual port taken; if nobody has asked for that one, any will do. It is not
    worth an agent that does not start.
    """
    host, port = parse_address(settings.metrics_addr)
    try:
        return listen(host, port, "-metrics-addr")
    except InUseError:
        if settings.is_metrics_addr_given:
            raise
    sockets = listen(host, 0, "-metrics-addr")
    log.warning(
        "the usual port for metrics is in use, another one was taken",
        usual=settings.metrics_addr,
        address=address_text(sockets[0].getsockname()),
        advice="give each agent of this machine its own -metrics-addr, or none",
    )
    return sockets
