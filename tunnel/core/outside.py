"""What visitors type: the core's address as it is seen from outside, where a proxy or NAT may stand in front."""

from __future__ import annotations

import urllib.parse

from tunnel.config import CoreSettings
from tunnel.core.registry import Registry, Tunnel


class Outside:
    """listening_port: of visitors' listener, once that is known."""

    def __init__(self, settings: CoreSettings, registry: Registry) -> None:
        self.listening_port = 0
        self._settings = settings
        self._registry = registry
        self._public_url = urllib.parse.urlsplit(settings.public_url)

    def url_of(self, tunnel: Tunnel) -> str:
        """What visitors type for a tunnel."""
        if tunnel.protocol == "tcp":
            return f"tcp://{self._settings.base_domain}:{tunnel.port}"
        scheme = self._public_url.scheme or ("https" if self._settings.public_tls else "http")
        default = 443 if scheme == "https" else 80
        port = self.port(default)
        suffix = f":{port}" if port != default else ""
        return f"{scheme}://{self._registry.domain.host_of(tunnel.name)}{suffix}"

    def port(self, default: int = 443) -> int:
        """The port that visitors type."""
        return (self._public_url.port if self._public_url.scheme else self.listening_port) or default
