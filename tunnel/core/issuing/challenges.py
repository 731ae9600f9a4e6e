"""What the authority comes to read: answers to challenges that are pending now, and nothing else (RFC 8555, 8.3).

They are also files, because the authority may reach another process than the one that has ordered: another worker, or
the core that takes over in an upgrade. A file is good for an hour, so that a core that was killed leaves nothing that
is answered for ever.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import trio

from tunnel.core.private import write_secret

PREFIX = "/.well-known/acme-challenge/"
LIFE = 3600.0  #: seconds
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Challenges:
    """directory: where they are kept; made when there is the first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pending: dict[str, tuple[str, str]] = {}  # by token: (name, answer)

    def put(self, name: str, token: str, answer: str) -> None:
        """Answer this from now on, to those who ask under this name. Raises OSError, ValueError for an odd token."""
        if _TOKEN.fullmatch(token) is None:
            raise ValueError("the challenge's token is malformed")
        write_secret(self._directory / token, f"{name}\n{answer}\n")
        self._pending[token] = (name, answer)

    def drop(self, name: str) -> None:
        """The order for this name is over. Never raises."""
        for token in [token for token, (owner, _) in self._pending.items() if owner == name]:
            self._pending.pop(token, None)
            try:
                (self._directory / token).unlink(missing_ok=True)
            except OSError:
                pass

    def sweep(self) -> None:
        """Remove what cores that were killed have left. Never raises."""
        try:
            for path in self._directory.iterdir():
                if time.time() - path.stat().st_mtime > LIFE:
                    path.unlink(missing_ok=True)
        except OSError:
            pass

    async def find(self, name: str, token: str) -> bytes | None:
        """The answer for this name and token, if it is pending."""
        known = self._pending.get(token)
        if known is None and _TOKEN.fullmatch(token) is not None:
            known = await trio.to_thread.run_sync(self._read, token)
        if known is None or known[0] != name:
            return None
        return known[1].encode()

    def _read(self, token: str) -> tuple[str, str] | None:
        path = self._directory / token
        try:
            if time.time() - path.stat().st_mtime > LIFE:
                return None
            name, _, answer = path.read_text().rstrip("\n").partition("\n")
        except (OSError, ValueError):
            return None
        return name, answer
