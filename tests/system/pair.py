"""A core and an agent that serve one local service, as the tests hold them in hand."""

from __future__ import annotations

from dataclasses import dataclass

from running import RunningAgent, RunningCore
from service import Service
from visiting import Connection


@dataclass(frozen=True)
class Tunnel:
    """host: the public name; `connect` makes a visitor's raw connection to it."""

    core: RunningCore
    agent: RunningAgent
    service: Service
    host: str

    def connect(self, timeout: float = 10.0) -> Connection:
        return Connection(self.core.public, self.host, timeout)
