"""Why a connection to the agents' port ended before it was a link, in words: OpenSSL's own name lines of its source."""

from __future__ import annotations

import ssl

from tunnel.http.client import NO_TLS
from tunnel.net import reason_of


def why_early(exc: BaseException) -> str:
    """One line. Cases of TLS: (1) the other end speaks something else, (2) it went away, (3) it said no, as who does
    not trust our certificate does, (4) anything else. Without TLS the error says it."""
    if not isinstance(exc, ssl.SSLError):
        return str(exc)
    reason = reason_of(exc)
    if reason in NO_TLS or reason == "UNEXPECTED_MESSAGE":
        return "it does not speak TLS, which this port wants of agents (-tls)"
    if isinstance(exc, ssl.SSLEOFError) or reason == "UNEXPECTED_EOF_WHILE_READING":
        return "it was closed within the TLS handshake"
    if "ALERT" in reason:
        what = reason.rpartition("ALERT_")[2].replace("_", " ").lower()
        return f"the other end broke TLS off ({what}); does it trust this core's certificate (-server-fingerprint)?"
    return f"the TLS handshake failed ({reason})"
