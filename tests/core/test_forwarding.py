"""Who asked, as the local service is told: ours for everybody, a trusted proxy's word where it is one."""

from typing import Any, cast

import pytest

from tunnel.core.forwarding import MAX_LIST, Forwarding
from tunnel.core.request import Request
from tunnel.core.visitor import Visitor
from tunnel.http.forwarded import read_forwarded
from tunnel.http.heads import forwarded_head, parse_request

PROXIES = ("10.0.0.0/8", "2001:db8::/32", "127.0.0.1")


def made(
    address: str, *fields: str, trusted: tuple[str, ...] = PROXIES, host: str = "a.example.com", proto: str = "http"
) -> tuple[dict[str, str], Request]:
    """The fields for a visitor at the address, and its request; the agent would accept them."""
    request = Request(address, proto, visitor=Visitor(cast(Any, None), address, proto))
    raw = "\r\n".join(["GET / HTTP/1.1", f"Host: {host}", *fields, "", ""]).encode("latin-1")
    request.head, request.request_id = parse_request(raw, 16384), "r-1"
    forwarding = Forwarding(trusted)
    if forwarding.is_trusted(address):
        forwarding.identify(request)
    own = forwarding.fields(request)
    read_forwarded(forwarded_head(request.head, own, upgrade=False))
    pairs = [line.split(": ", 1) for line in own.decode("latin-1").split("\r\n")[:-1]]
    assert [name for name, _ in pairs] == [
        "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "Forwarded", "X-Request-Id"
    ]  # fmt: skip
    return {one[0]: one[1] for one in pairs}, request


@pytest.mark.parametrize("trusted", [PROXIES, ()])
def test_a_visitors_own_word_is_not_believed(trusted: tuple[str, ...]) -> None:
    sent = ("X-Forwarded-For: 6.6.6.6", "X-Forwarded-Proto: https", "X-Forwarded-Host: evil", "Forwarded: for=6.6.6.6")
    fields, request = made("192.0.2.1", *sent, trusted=trusted)
    assert fields == {
        "X-Forwarded-For": "192.0.2.1",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Host": "a.example.com",
        "Forwarded": 'for=192.0.2.1;host="a.example.com";proto=http',
        "X-Request-Id": "r-1",
    }
    assert (request.client, request.scheme) == ("192.0.2.1", "http")


def test_ipv6_and_https() -> None:
    fields, _ = made("2001:db9::1", proto="https", host="a.example.com:8443")
    assert fields["X-Forwarded-For"] == "2001:db9::1"
    assert fields["Forwarded"] == 'for="[2001:db9::1]";host="a.example.com:8443";proto=https'


@pytest.mark.parametrize("proxy", ["10.1.2.3", "2001:db8::7", "127.0.0.1"])
def test_a_trusted_proxys_word_is_passed_on(proxy: str) -> None:
    fields, request = made(
        proxy, "X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: https", "X-Forwarded-Host: public.example.org",
        'Forwarded: for=192.0.2.1;proto=https',
    )  # fmt: skip
    assert fields["X-Forwarded-For"] == f"192.0.2.1, {proxy}"
    assert (fields["X-Forwarded-Proto"], fields["X-Forwarded-Host"]) == ("https", "public.example.org")
    assert fields["Forwarded"].startswith("for=192.0.2.1;proto=https, for=")
    assert (request.client, request.scheme) == ("192.0.2.1", "https")


@pytest.mark.parametrize(
    ("chain", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("6.6.6.6, 192.0.2.1", "192.0.2.1"),  # the first is the visitor's own invention
        ("192.0.2.1, 10.9.9.9", "192.0.2.1"),
        ("192.0.2.1, 2001:db8::9, 10.9.9.9", "192.0.2.1"),
        ("10.7.7.7, 10.9.9.9", "10.7.7.7"),
        ("2001:db9::1", "2001:db9::1"),
        ("[2001:db9::1]:4711, [2001:db8::2]:80", "2001:db9::1"),
        ("192.0.2.1:4711, 10.9.9.9:80", "192.0.2.1"),
        ("192.0.2.1, ::ffff:10.9.9.9", "192.0.2.1"),
        ("::FFFF:192.0.2.1, [::FFFF:10.9.9.9]:80", "192.0.2.1"),
        ("", "10.0.0.1"),
        (" , ,", "10.0.0.1"),
        ("unknown", "unknown"),
    ],
)
def test_the_client_is_the_last_that_is_no_proxy(chain: str, client: str) -> None:
    fields, request = made("10.0.0.1", f"X-Forwarded-For: {chain}")
    assert request.client == client
    assert fields["X-Forwarded-For"].endswith("10.0.0.1")


def test_several_fields_are_one_list() -> None:
    fields, _ = made("10.0.0.1", "X-Forwarded-For: 192.0.2.1", "X-Forwarded-For: 10.0.0.2")
    assert fields["X-Forwarded-For"] == "192.0.2.1, 10.0.0.2, 10.0.0.1"


@pytest.mark.parametrize("proto", ["ftp", "", "https, ftp"])
def test_an_odd_scheme_is_not_passed_on(proto: str) -> None:
    assert made("10.0.0.1", f"X-Forwarded-Proto: {proto}")[0]["X-Forwarded-Proto"] == "http"


@pytest.mark.parametrize("pad", range(5))
def test_long_lists_are_cut_at_an_element(pad: int) -> None:
    addresses = ", ".join(["1" * (pad + 1), *["192.0.2.1"] * 1000])
    fields, request = made("10.0.0.1", f"X-Forwarded-For: {addresses}", f"Forwarded: {addresses}")
    assert set(fields["X-Forwarded-For"].split(", ")) == {"192.0.2.1", "10.0.0.1"}
    assert len(fields["X-Forwarded-For"]) <= MAX_LIST + 20
    assert fields["Forwarded"].startswith("192.0.2.1, ")
    assert request.client == "192.0.2.1"
    fields, _ = made("10.0.0.1", "Forwarded: " + "x" * (MAX_LIST + 1))
    assert fields["Forwarded"].startswith("for=10.0.0.1;")


def test_the_fields_of_a_connection_are_made_once_for_a_host() -> None:
    visitor = Visitor(cast(Any, None), "192.0.2.1", "http")
    forwarding = Forwarding(())
    texts = []
    for number, host in enumerate(("a", "a", "b")):
        request = Request(visitor.address, visitor.proto, visitor=visitor)
        request.head = parse_request(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(), 100)
        request.request_id = f"r-{number}"
        texts.append(forwarding.fields(request))
    assert texts[1] == texts[0].replace(b"r-0", b"r-1")
    assert b"X-Forwarded-Host: b\r\n" in texts[2] and b"r-2" in texts[2]
