"""Reaching the core: TCP, TLS with its ways to trust, and words for what goes wrong on the way."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from pathlib import Path

import trio
import trio_websocket

from tunnel.config import AgentSettings
from tunnel.errors import ConfigError, Refused, TunnelError
from tunnel.http.client import NO_TLS
from tunnel.net import Socket, dial, reason_of, with_tls
from tunnel.tls import TlsSocket
from tunnel.trust import EXPIRED, NOT_YET, WRONG_ADDRESS, WRONG_NAME, explain_authorities, explain_refusal

_DATES = "renew it at the core (-agent-cert), or give -server-fingerprint, which does not look at dates"
_NAMES = "dial it (-server) by a name that it is for, or give -server-fingerprint"
_TRUST = "give -server-fingerprint (the core prints it at its start) or -ca-cert"
#: what to do, by OpenSSL's code
_ADVICE = {EXPIRED: _DATES, NOT_YET: _DATES, WRONG_NAME: _NAMES, WRONG_ADDRESS: _NAMES}


def tls_context(settings: AgentSettings, worker: int | None = None) -> ssl.SSLContext | None:
    """How the core's certificate is checked: pinned, by an authority, or not at all. Raises ConfigError.

    worker: of the core, that the connection is meant for (SPEC.md, "Workers").
    """
    if not settings.tls:
        return None
    if settings.server_fingerprint or settings.tls_skip_verify:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        try:
            context = ssl.create_default_context(cafile=settings.ca_cert or None)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigError(f"-ca-cert: {explain_authorities(Path(settings.ca_cert), exc)}") from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if worker is not None:
        context.set_alpn_protocols(["http/1.1", f"x-tunnel-worker/{worker}"])
    return context


async def dial_core(host: str, port: int) -> Socket:
    """Raises TunnelError."""
    try:
        return await dial(host, port)
    except OSError as exc:
        raise TunnelError(f"can't reach the core at {host}:{port}: {reason_of(exc)}") from exc


async def secure(socket: Socket, context: ssl.SSLContext, host: str, settings: AgentSettings) -> Socket:
    """TLS on the link, and the pin. Raises TunnelError."""
    secured = socket
    try:
        secured = with_tls(socket, context, server_side=False, server_name=host)
        await secured.handshake()
    except ssl.SSLCertVerificationError as exc:
        secured.close()
        raise TunnelError(
            f"the core's certificate is not trusted: {explain_refusal(exc, host, settings.ca_cert)}; "
            f"{_ADVICE.get(exc.verify_code, _TRUST)}"
        ) from exc
    except (ssl.SSLError, trio.BrokenResourceError) as exc:
        secured.close()
        raise TunnelError(
            f"TLS with {settings.server} failed ({_explain_tls(exc)}); does the core have TLS on "
            "its links (-agent-tls), and is this its address for agents?"
        ) from exc
    except BaseException:
        secured.close()
        raise
    if settings.server_fingerprint:
        sock = secured.sock
        assert isinstance(sock, TlsSocket)
        found = hashlib.sha256(sock.getpeercert() or b"").hexdigest()
        if not hmac.compare_digest(found, plain_fingerprint(settings.server_fingerprint)):
            secured.close()
            raise TunnelError(
                f"the core's certificate has the fingerprint sha256:{found}, not the one of -server-fingerprint; "
                "either the core has a new certificate or somebody is in between"
            )
    return secured


def _explain_tls(exc: BaseException) -> str:
    return "it does not speak TLS" if isinstance(exc, ssl.SSLError) and exc.reason in NO_TLS else reason_of(exc)


def plain_fingerprint(text: str) -> str:
    """64 lower-case hex digits of "sha256:AB:CD:…" in any of its spellings."""
    return text.lower().removeprefix("sha256:").replace(":", "")


def explain_handshake(settings: AgentSettings, exc: Exception) -> str:
    """A line for a WebSocket handshake that failed."""
    if isinstance(exc, trio_websocket.ConnectionRejected):
        return f"{settings.server} is no tunnel core's address for agents (it answered HTTP {exc.status_code})"
    hint = "" if settings.tls else "; does the core expect TLS (-tls)?"
    return f"{settings.server} closed the connection during the WebSocket handshake{hint}"


__all__ = ["Refused", "dial_core", "explain_handshake", "plain_fingerprint", "secure", "tls_context"]
