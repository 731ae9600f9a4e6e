"""Names given, asked for and visited: one normal form, and nothing else gets through."""

import re
from ipaddress import IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.core import hostnames as names
from tunnel.core.hostnames import check_name, normalise_host, readable_name
from tunnel.errors import Refused

LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
good_names = st.from_regex(rf"\A{LABEL}(\.{LABEL}){{0,2}}\.[a-z]{{2,6}}\Z", fullmatch=False)


# Given names


def test_a_readable_name_is_stable() -> None:
    assert readable_name("acme", "agent-1", "http://localhost:3000") == "humble-badger-rjst"


def test_a_readable_name_depends_on_each_part_and_its_borders() -> None:
    parts = [("a", "b", "c"), ("ab", "", "c"), ("a", "bc", ""), ("a", "b", "d"), ("x", "b", "c"), ("a", "x", "c")]
    assert len({readable_name(*each) for each in parts}) == len(parts)


def test_the_word_lists_are_long_and_without_doubles() -> None:
    for words in (names._ADJECTIVES, names._NOUNS):
        assert len(words) >= 128
        assert len(set(words)) == len(words)
        assert all(re.fullmatch("[a-z]{2,10}", word) for word in words)


@given(st.text(), st.text(), st.text())
def test_a_readable_name_is_a_valid_name(account: str, agent: str, local: str) -> None:
    name = readable_name(account, agent, local)
    assert re.fullmatch(r"[a-z]+-[a-z]+-[2-9b-df-hj-np-tv-xz]{4}", name)
    assert check_name(name) == name


def test_ten_thousand_readable_names_do_not_collide() -> None:
    assert len({readable_name("acme", f"agent-{i}", "") for i in range(10_000)}) == 10_000


# Names asked for


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("api", "api"),
        ("API", "api"),
        (" api ", "api"),
        ("a-b-1", "a-b-1"),
        ("www.Example.COM.", "www.example.com"),
        ("0", "0"),
        ("bücher", "xn--bcher-kva"),
        ("Bücher.example", "xn--bcher-kva.example"),
        ("l" * 63, "l" * 63),
        (".".join("abcdefghijklmnop"), ".".join("abcdefghijklmnop")),
    ],
)
def test_names_are_normalised(asked: str, name: str) -> None:
    assert check_name(asked) == name


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("", "empty"),
        (".", "empty"),
        ("a..b", "two dots"),
        (".a", "begins with a dot"),
        ("-a", "hyphen"),
        ("a-", "hyphen"),
        ("a.b-.c", "hyphen"),
        (".".join("abcdefghijklmnopq"), "at most 16 parts"),
        ("*", "only letters"),
        ("*.example.org", "only letters"),
        ("a_b", "only letters"),
        ("a b", "only letters"),
        ("a\nb", "only letters"),
        ("a/b", "only letters"),
        ("a:80", "only letters"),
        ("*.example.com", "only letters"),
        ("x" * 64, "longer than 63"),
        (".".join(["x" * 60] * 5), "longer than 253"),
        ("x" * 5000, "longer than 253"),
        ("203.0.113.7", "address"),
        ("\u2028", ""),
        ("\ud800", ""),
        ("a\uff0e\u3002b", ""),
    ],
)
def test_bad_names_are_refused_with_the_reason(asked: str, why: str) -> None:
    with pytest.raises(Refused) as caught:
        check_name(asked)
    assert caught.value.reason == "bad_name"
    assert caught.value.final
    text = str(caught.value)
    assert why in text
    assert text.isprintable()
    assert len(text) < 3000


@given(st.text(max_size=300))
def test_a_name_is_refused_or_in_normal_form(asked: str) -> None:
    try:
        name = check_name(asked)
    except Refused:
        return
    assert re.fullmatch(rf"{LABEL}(\.{LABEL})*", name)
    assert check_name(name) == name
    assert normalise_host(name) == name


# Names visited


@pytest.mark.parametrize(
    ("field", "name"),
    [
        (b"api.localhost", "api.localhost"),
        (b"API.LocalHost:8080", "api.localhost"),
        ("api.localhost:8080", "api.localhost"),
        (b"api.localhost.", "api.localhost"),
        (b"api.localhost.:80", "api.localhost"),
        (b"api.localhost:", "api.localhost"),  # RFC 3986, 3.2.3: an empty port is the default one
        (b"127.0.0.1:8080", "127.0.0.1"),
        (b"my_app.example", "my_app.example"),
        (b"[::1]:8080", "[::1]"),
        (b"[2001:DB8::1]", "[2001:db8::1]"),
        (b"[::ffff:192.0.2.1]", "[::ffff:192.0.2.1]"),
    ],
)
def test_hosts_are_normalised(field: bytes | str, name: str) -> None:
    assert normalise_host(field) == name


@pytest.mark.parametrize(
    "field",
    [
        b"", b".", b":80", b"a..b", b".a", b"a:b", b"a:80:80", b"a:65536", b"a:-1", b"a:+80", b"a b", b" a", b"a\n",
        b"a ", b"user@a", b"a/b", b"a?b", b"a#b", b"a,b", b"a%2eb", b"\xc3\xa4", b"a\x00", b"[::1", b"::1", b"[::1]x",
        b"[]", b"[:::]", b"[fe80::1%eth0]", b"[127.0.0.1]", b"x" * 64, b".".join([b"x" * 60] * 5), b"a" * 100_000,
        "a:\u0661", "\u212a",
    ],
)  # fmt: skip
def test_malformed_hosts_raise(field: bytes | str) -> None:
    with pytest.raises(ValueError, match="Host field"):
        normalise_host(field)


@given(good_names, st.integers(0, 65535) | st.none(), st.booleans(), st.booleans())
def test_case_port_and_dot_make_no_difference(name: str, port: int | None, dot: bool, upper: bool) -> None:
    field = (name.upper() if upper else name) + ("." if dot else "") + ("" if port is None else f":{port}")
    assert normalise_host(field) == normalise_host(field.encode()) == name


@given(st.ip_addresses(v=6))
def test_every_ipv6_literal_is_kept(address: IPv6Address) -> None:
    assert normalise_host(f"[{address}]:80") == f"[{address}]"


@given(st.binary(max_size=40))
def test_any_bytes_are_malformed_or_in_normal_form(field: bytes) -> None:
    try:
        name = normalise_host(field)
    except ValueError:
        return
    assert normalise_host(name) == name == name.lower()


def test_the_cache_is_bounded() -> None:
    assert normalise_host.cache_info().maxsize == 4096
