"""Where the core shows itself: metrics and health on one address, status and health on another."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import trio

from tunnel.config import CoreSettings, parse_address
from tunnel.core.admin import choose_token, guard
from tunnel.core.inherited import DASHBOARD, METRICS, Inherited
from tunnel.handler import Page
from tunnel.http.pages import serve_pages
from tunnel.log import get_logger

log = get_logger("tunnel.core")

Address = tuple[str, int]


class OwnPages:
    """sockets: by the names of tunnel.core.inherited. metrics, dashboard: where they are, None where there are none."""

    def __init__(self, settings: CoreSettings, data_dir: Path, inherited: Inherited) -> None:
        self.sockets: dict[str, list[socket.socket]] = {}
        self.metrics: Address | None = None
        self.dashboard: Address | None = None
        self._settings, self._data_dir, self._inherited = settings, data_dir, inherited
        self._scopes: list[trio.CancelScope] = []

    def start(self, nursery: trio.Nursery, pages: Mapping[str, Page], status: Page) -> None:
        """Serve them as tasks of this nursery. Raises ConfigError."""
        settings = self._settings
        if settings.metrics_addr:
            self.metrics = self._listen(METRICS, settings.metrics_addr, "-metrics-addr")
            nursery.start_soon(self._serve, METRICS, pages, self.metrics)
        if settings.dashboard_addr:
            self.dashboard = self._listen(DASHBOARD, settings.dashboard_addr, "-dashboard-addr")
            token, made = choose_token(settings.dashboard_token, self.dashboard[0], self._data_dir)
            if made is not None:
                log.info("the status page needs a token, others can reach it", file=str(made))
            shown = {path: page for path, page in pages.items() if not path.startswith("/metrics")}
            shown |= {"/": status, "/status": status}
            nursery.start_soon(self._serve, DASHBOARD, guard(shown, token), self.dashboard)

    def stop(self) -> None:
        """Somebody else serves them from now on, from the same sockets."""
        for scope in self._scopes:
            scope.cancel()

    def _listen(self, name: str, where: str, what: str) -> Address:
        sockets = self.sockets[name] = self._inherited.listen(name, parse_address(where), what)
        address: Address = sockets[0].getsockname()[:2]
        return address

    async def _serve(self, name: str, pages: Mapping[str, Page], address: Address) -> None:
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(one)) for one in self.sockets[name]]
        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            await serve_pages(listeners, pages, bound=address[0])
