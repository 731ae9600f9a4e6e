"""The parts of a core that face visitors, made of its settings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from tunnel.config import CoreSettings
from tunnel.core.accounts import Accounts
from tunnel.core.exchange import Exchanger
from tunnel.core.forwarding import Forwarding
from tunnel.core.limits import Counts
from tunnel.core.plain import PlainSide
from tunnel.core.registry import Registry
from tunnel.handler import Layer
from tunnel.wire.held import Held


def make_exchanger(
    settings: CoreSettings,
    registry: Registry,
    accounts: Accounts,
    layers: Sequence[Layer],
    forwarding: Forwarding,
    refusals: Counts,
    held: Held,
) -> Exchanger:
    return Exchanger(
        registry,
        accounts,
        layers,
        forwarding,
        max_head=settings.max_head,
        max_target=settings.max_target,
        max_body=settings.max_body,
        head_timeout=settings.head_timeout,
        request_timeout=settings.request_timeout,
        body_idle_timeout=settings.body_idle_timeout,
        server_timing=settings.tracing.server_timing,
        max_fields=settings.max_fields,
        max_requests=settings.max_requests,
        refusals=refusals,
        held=held,
    )


def make_plain_side(
    settings: CoreSettings,
    forwarding: Forwarding,
    refusals: Counts,
    outside_port: Callable[[], int],
    find: Callable[[str, str], Awaitable[bytes | None]] | None,
) -> PlainSide:
    """find: answers to challenges of certificates."""
    return PlainSide(
        forwarding,
        refusals,
        outside_port=outside_port,
        find=find,
        max_head=settings.max_head,
        max_target=settings.max_target,
        max_fields=settings.max_fields,
        head_timeout=settings.head_timeout,
    )
