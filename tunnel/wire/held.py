"""What the sessions of one program hold of others' bytes: unread bodies and what waits to be sent.

Windows bound each stream and each link; this bounds all of them together. A sender cannot know how much that is, so
when it is exceeded the stream that holds most on that link is given up (`overloaded`), and no new one begins while it
is full.
"""

from __future__ import annotations


class Held:
    """Bytes held now, and the most there may be (0: any number). `refused`: streams given up because of it."""

    __slots__ = ("bytes", "most", "refused")

    def __init__(self, most: int = 0) -> None:
        self.bytes = 0
        self.most = most
        self.refused = 0

    @property
    def is_full(self) -> bool:
        return 0 < self.most <= self.bytes
