"""Limits of a core, which several workers keep together: of each the kind that one process needs, or one of several."""

from __future__ import annotations

from tunnel.config import CoreSettings
from tunnel.core.limits import Rate, Shares
from tunnel.core.shared import SharedRate, SharedShares
from tunnel.core.siblings import Siblings


class Common:
    """siblings: None where this process is the whole core. kind: of tunnel.core.board, what is counted."""

    def __init__(self, settings: CoreSettings, siblings: Siblings | None) -> None:
        self._settings = settings
        self._siblings = siblings

    def part(self, limit: int) -> int:
        """Of a limit on this process' memory, its part."""
        return limit if self._siblings is None else -(-limit // self._siblings.count)

    def shares(self, kind: int, most: int) -> Shares:
        most_each = self._settings.max_visitors_per_address
        if self._siblings is None:
            return Shares(most, most_each)
        return SharedShares(most, most_each, self._siblings.board, kind)

    def rate(self, kind: int) -> Rate:
        most = self._settings.max_handshakes
        return Rate(most) if self._siblings is None else SharedRate(most, self._siblings.board, kind)
