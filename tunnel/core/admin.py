"""Who may read the status: whoever has the dashboard's token, as soon as more than this machine can reach the page.

Health and readiness stay open, for probes. The token comes as `Authorization: Bearer …` from programs, or as the
password of HTTP Basic, for which a browser asks (RFC 6750, RFC 7617); the user's name does not matter.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from collections.abc import Mapping
from pathlib import Path

from tunnel.core.private import write_secret
from tunnel.errors import ConfigError
from tunnel.handler import Page, PageAnswer, PageRequest
from tunnel.net import is_loopback

MIN_TOKEN = 16  #: characters: what is shorter can be guessed
FILE = "dashboard.token"
#: what probes ask, which says no more than whether the core is well
OPEN = frozenset({"/healthz", "/readyz", "/health", "/health/live", "/health/ready"})

_DENIED = PageAnswer(
    401,
    b"the status needs the dashboard's token: Authorization: Bearer, or the password of HTTP Basic\n",
    headers={"WWW-Authenticate": 'Basic realm="tunnel status", charset="UTF-8"', "Cache-Control": "no-store"},
)


def choose_token(given: str, bound: str, data_dir: Path) -> tuple[str | None, Path | None]:
    """(token, the file it is in if it is ours): the one given; one of ours where others reach `bound`; else none.

    Raises ConfigError.
    """
    if given:
        if len(given) < MIN_TOKEN:
            raise ConfigError(f"-dashboard-token: at least {MIN_TOKEN} characters, or others will guess it")
        return given, None
    if is_loopback(bound):
        return None, None
    path = data_dir / FILE
    try:
        if not path.exists() or not path.stat().st_size:
            write_secret(path, secrets.token_urlsafe(24) + "\n")
        token = path.read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise ConfigError(f"can't keep the dashboard's token in {path} ({exc.strerror})") from exc
    except UnicodeError:
        token = ""
    if len(token) < MIN_TOKEN:
        raise ConfigError(f"{path} holds no token of at least {MIN_TOKEN} characters: remove it, and one is made")
    return token, path


def guard(pages: Mapping[str, Page], token: str | None) -> dict[str, Page]:
    """The same pages, all but those for probes only with this token; as they are where there is none."""
    if token is None:
        return dict(pages)
    if not token:
        raise ValueError("an empty token is no lock")
    return {path: page if path in OPEN else _guarded(page, token) for path, page in pages.items()}


def _guarded(page: Page, token: str) -> Page:
    async def guarded(request: PageRequest) -> PageAnswer:
        said = _credential(request.headers.get("authorization", ""))
        if not hmac.compare_digest(said.encode("utf-8", "replace"), token.encode()):
            return _DENIED
        return await page(request)

    return guarded


def _credential(field: str) -> str:
    """The token in an Authorization field; "" if there is none."""
    scheme, _, value = field.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("utf-8", "replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""
