"""Names and where they stand: below the base domain, or anywhere else in the DNS.

A subdomain of the base domain (one label) is known by that label, `x.localhost` too, since browsers find it on their
own machine; every other host name is known whole. So `alice` and `alice.tunnel.example` are one name, and below it
there may be `x.alice.tunnel.example`. What follows for who may have which is decided in tunnel/core/claiming.py.
"""

from __future__ import annotations

#: labels of a name: nobody types more, and each name above one that is claimed is looked up
MAX_LABELS = 16


class Domain:
    """base: the base domain. apex: it as a tunnel's name, "" where it is a single label: no tunnel is served there."""

    __slots__ = ("_base", "_suffix", "apex")

    def __init__(self, base: str) -> None:
        self._base = base.lower().strip(".")
        self._suffix = "." + self._base
        self.apex = self._base if "." in self._base else ""

    def name_of(self, host: str) -> str:
        """The tunnel name that a (normalised) host name means."""
        for suffix in (self._suffix, ".localhost"):
            if host.endswith(suffix):
                label = host[: -len(suffix)]
                if label and "." not in label:
                    return label
        return host

    def host_of(self, name: str) -> str:
        return name if "." in name else name + self._suffix

    def above(self, name: str) -> list[str]:
        """The names above this one, nearest first. Below the base domain they end with its subdomain, elsewhere with
        the last name of two labels."""
        found: list[str] = []
        if name == self.apex:
            return found
        host = name
        while "." in (host := host.partition(".")[2]):
            found.append(self.name_of(host))
            if "." not in found[-1]:
                break
        return found

    def above_here(self, name: str) -> list[str]:
        """The same if the name is below the base domain, else none."""
        found = self.above(name)
        return found if found and "." not in found[-1] else []
