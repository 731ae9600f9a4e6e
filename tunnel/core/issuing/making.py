"""The parts put together as the settings say."""

from __future__ import annotations

import importlib.util
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from tunnel.config import CoreSettings
from tunnel.core.accounts import Accounts
from tunnel.core.certificates import Certificates
from tunnel.core.issuing.authority import Authority
from tunnel.core.issuing.challenges import Challenges
from tunnel.core.issuing.issuer import Issuer
from tunnel.core.issuing.ledger import Ledger
from tunnel.core.private import make_private
from tunnel.core.registry import Registry
from tunnel.errors import ConfigError
from tunnel.trust import explain_authorities

CERTIFICATES = "certificates"


def place_for(settings: CoreSettings, data_dir: Path) -> Path | None:
    """Where account, state and certificates of this authority lie; another authority begins anew, in another place.

    None where the core gets no certificates. Raises ConfigError.
    """
    if not settings.acme.agree:
        return None
    if importlib.util.find_spec("acme") is None:
        raise ConfigError("-acme-agree needs the package acme: pip install 'trio-tunnel[acme]'")
    if authorities := settings.acme.ca_cert:
        try:
            ssl.create_default_context(cafile=authorities)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigError(f"-acme-ca-cert: {explain_authorities(Path(authorities), exc)}") from exc
    where = settings.acme.directory.removeprefix("https://")
    place = data_dir / "acme" / re.sub(r"[^A-Za-z0-9.-]+", "-", where)[:100].strip(".")
    try:
        make_private(place / CERTIFICATES)
    except OSError as exc:
        raise ConfigError(f"-data-dir: can't make {place} ({exc.strerror}); give another one") from exc
    return place


def make_issuer(
    settings: CoreSettings,
    place: Path,
    certificates: Certificates,
    registry: Registry,
    accounts: Accounts,
    elsewhere: Mapping[str, Mapping[int, tuple[str, str]]],
) -> tuple[Issuer, Challenges]:
    """Run the issuer; what it has got is in `certificates`, what it must be asked for is in the challenges.

    elsewhere: names that other workers serve, as `Siblings.names`.
    """
    acme = settings.acme
    challenges = Challenges(place / "challenges")
    issuer = Issuer(
        Authority(acme.directory, place, challenges, acme.email, acme.ca_cert),
        Ledger(place / "state.json", acme.max_orders),
        challenges,
        certificates,
        place / CERTIFICATES,
        acme.names,
        acme.on_demand != "off",
        knows_names(settings, registry, accounts, elsewhere),
        is_shared=settings.workers > 1,
    )
    certificates.on_missing = issuer.ask
    return issuer, challenges


def knows_names(
    settings: CoreSettings,
    registry: Registry,
    accounts: Accounts,
    elsewhere: Mapping[str, Mapping[int, tuple[str, str]]],
) -> Callable[[str], Awaitable[bool]]:
    """Says whether a host name is one of ours: the base domain, reserved, or (unless that does not do) served now."""

    async def knows(host: str) -> bool:
        if host == settings.base_domain:
            return True
        if settings.acme.on_demand == "served":
            tunnel = registry.find(host)
            if tunnel is not None and tunnel.links and tunnel.protocol == "http":
                return True
            if any(protocol == "http" for _, protocol in elsewhere.get(registry.name_of(host), {}).values()):
                return True
        return await accounts.is_reserved(registry.name_of(host))

    return knows
