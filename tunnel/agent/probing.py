"""Do the local services accept connections? Looked at now and then by a TCP connect that sends nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from tunnel.errors import Failure
from tunnel.http.client import Service
from tunnel.log import get_logger

log = get_logger("tunnel.agent")

INTERVAL = 15.0  #: seconds between two looks
ADVICE = "start it, or serve another address; until then visitors are told that it is down"


class LocalProber:
    """Watches `services`; says in the log when one comes or goes."""

    def __init__(self, services: Sequence[Service], interval: float = INTERVAL) -> None:
        self._services = services
        self._interval = interval
        self._states: dict[str, str] = {}  # by address: "" for up, or why not

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            for service in self._services:
                await self._look(service)
            await trio.sleep(self._interval)

    async def _look(self, service: Service) -> None:
        try:
            (await service.connect()).close()
            state = ""
        except Failure as exc:
            state = str(exc)
        before = self._states.get(service.address, "")
        self._states[service.address] = state
        if state and not before:
            log.warning("local service is down", local=service.address, reason=state, advice=ADVICE)
        elif before and not state:
            log.info("local service is up", local=service.address)

    def details(self) -> dict[str, Any]:
        """By address."""
        return {
            address: {"up": not state, "reason": state or "it accepts connections"}
            for address, state in self._states.items()
        }
