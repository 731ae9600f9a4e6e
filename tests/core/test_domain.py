"""Where a name stands: which key a core knows it by, and what is above it."""

import pytest

from tunnel.core.domain import Domain

BASE = Domain("Tunnel.Example.com.")


@pytest.mark.parametrize(
    ("name", "above", "is_here"),
    [
        ("alice", [], False),
        ("example", [], False),
        ("tunnel.example.com", [], False),  # the base domain: what is above it is none of its business
        ("x.alice.tunnel.example.com", ["alice"], True),
        ("a.b.c.tunnel.example.com", ["b.c.tunnel.example.com", "c"], True),
        ("x.alice.localhost", ["alice"], True),
        ("x.tunnel.example.com.localhost", ["tunnel.example.com.localhost", "example.com.localhost", "com"], True),
        ("example.org", [], False),
        ("app.example.org", ["example.org"], False),
        ("www.app.example.co.uk", ["app.example.co.uk", "example.co.uk", "co.uk"], False),
        ("example.com", [], False),  # above the base domain it is a name like any other
        ("www.example.com", ["example.com"], False),
        ("alice.tunnel.example.com.evil.org", ["tunnel.example.com.evil.org", "example.com.evil.org",
                                               "com.evil.org", "evil.org"], False),
        ("nottunnel.example.com", ["example.com"], False),
    ],
)  # fmt: skip
def test_what_is_above(name: str, above: list[str], is_here: bool) -> None:
    assert BASE.name_of(name) == name
    assert BASE.above(name) == above
    assert BASE.above_here(name) == (above if is_here else [])


@pytest.mark.parametrize("base", ["localhost", "tunnel", "tunnel."])
def test_a_base_domain_of_one_label_has_no_tunnel_of_its_own(base: str) -> None:
    domain = Domain(base)
    assert domain.apex == ""
    assert domain.name_of(f"app.{base.strip('.')}") == "app"
    assert domain.above(f"x.app.{base.strip('.')}") == ["app"]


def test_hosts_and_names() -> None:
    assert BASE.apex == "tunnel.example.com"
    assert BASE.name_of("alice.tunnel.example.com") == BASE.name_of("alice.localhost") == "alice"
    assert BASE.host_of("alice") == "alice.tunnel.example.com"
    assert BASE.host_of("www.example.org") == "www.example.org"
