"""Header fields through the tunnel: what is kept, what is dropped, what is set."""

import gzip
from collections.abc import Callable

import pytest
from pair import Tunnel
from running import RunningAgent, RunningCore
from service import Service
from visiting import Connection

pytestmark = pytest.mark.system

SET_BY_US = ["X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "Forwarded", "X-Request-Id"]


def test_names_keep_their_case_and_order(tunnel: Tunnel) -> None:
    fields = [
        "zEtA: 1",
        "Accept: */*",
        "COOKIE: a=1",
        "x-under_score: _",
        "Cookie: b=2",
        "X-Empty:",
        "aLpHa: two  words",
    ]
    with tunnel.connect() as visitor:
        lines = visitor.ask("GET /head", *fields).body.decode().split("\r\n")
    names = [line.partition(":")[0] for line in lines[1:-2]]
    assert names == ["Host", "zEtA", "Accept", "COOKIE", "x-under_score", "Cookie", "X-Empty", "aLpHa", *SET_BY_US]
    assert "aLpHa: two  words" in lines and "COOKIE: a=1" in lines and "Cookie: b=2" in lines


def test_bytes_above_ascii_pass(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        assert b"X-Name: J\xc3\xb6rg" in visitor.ask("GET /head", "X-Name: J\xc3\xb6rg").body


def test_an_answers_fields_keep_their_case_order_and_number(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask("GET /headers")
    assert answer.fields[:5] == [
        ("X-oDD-cAsE", "Yes"), ("Set-Cookie", "a=1; Path=/"), ("set-cookie", "b=2"), ("Zeta", "1"), ("Alpha", "2"),
    ]  # fmt: skip
    assert answer.all("set-cookie") == ["a=1; Path=/", "b=2"]


def test_an_answers_hop_by_hop_fields_are_removed(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask("GET /headers")
    for name in ("connection", "keep-alive", "x-private", "proxy-authenticate", "x-tunnel-outcome"):
        assert answer.all(name) == [], name
    assert answer["x-request-id"] != "not-yours" and len(answer["x-request-id"]) >= 8


def test_a_requests_hop_by_hop_fields_are_removed(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        head = visitor.ask(
            "GET /head", "Connection: keep-alive, X-Mine, close-not, Host, Cookie2", "X-Mine: secret",
            "Keep-Alive: 300", "Proxy-Connection: keep-alive", "Proxy-Authorization: Basic eDp5", "TE: trailers",
            "Upgrade: h2c", "HTTP2-Settings: AAMAAABk", "X-Kept: yes",
        ).body.decode()  # fmt: skip
    names = [line.partition(":")[0] for line in head.split("\r\n")[1:-2]]
    assert names == ["Host", "X-Kept", *SET_BY_US]


def test_a_visitor_cannot_remove_what_we_set(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        visitor.ask("GET /head", "Connection: X-Forwarded-For, Forwarded, X-Request-Id")
    received = tunnel.service.wait_request("/head")
    assert all(received.get(name) for name in SET_BY_US)


def test_compressed_bodies_pass_untouched(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask("GET /gzip", "Accept-Encoding: gzip, br;q=0.5")
        assert tunnel.service.wait_request("/gzip").get("accept-encoding") == "gzip, br;q=0.5"
        assert (answer["content-encoding"], answer.framing) == ("gzip", "length")
        assert answer.body == gzip.compress(b"squeezed " * 100, mtime=0)
        sent = gzip.compress(b"upwards " * 50, mtime=0)
        assert visitor.ask("POST /echo", "Content-Encoding: gzip", body=sent).body == sent


def test_who_asked_is_said(tunnel: Tunnel) -> None:
    host = f"App.LocalHost:{tunnel.core.public[1]}"
    with tunnel.connect() as visitor:
        visitor.ask("GET /head", f"Host: {host}", "X-Request-Id: kept-42")
    received = tunnel.service.wait_request("/head")
    assert received.get("host") == received.get("x-forwarded-host") == host
    assert received.get("x-forwarded-for") == "127.0.0.1"
    assert received.get("x-forwarded-proto") == "http"
    assert received.get("forwarded") == f'for=127.0.0.1;host="{host}";proto=http'
    assert received.get("x-request-id") == "kept-42"


def test_spoofed_values_are_replaced(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask(
            "GET /head", "X-Forwarded-For: 6.6.6.6", "x-forwarded-proto: https", "X-Forwarded-Host: bank.example",
            "Forwarded: for=6.6.6.6", "X-Forwarded-For: 7.7.7.7", "X-Request-Id: no good\tid", "X-Tunnel-Outcome: ok",
        )  # fmt: skip
    received = tunnel.service.wait_request("/head")
    assert (received.get("x-forwarded-for"), received.get("x-forwarded-proto")) == ("127.0.0.1", "http")
    assert received.get("x-forwarded-host") == "app.localhost"
    assert "6.6.6.6" not in received.head.decode()
    assert received.get("x-request-id") == answer["x-request-id"] != "no good\tid"


def test_request_ids_differ(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        assert len({visitor.ask("GET /echo")["x-request-id"] for _ in range(20)}) == 20


def test_a_service_gets_the_host_that_it_wants(
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    core, service = start_core("-agent-tls=false"), start_service()
    start_agent(core, service.url, "-subdomain=app", "-host-header=local")
    with Connection(core.public, "app.localhost") as visitor:
        for count in (1, 2):
            visitor.ask("GET /head", "Host: app.localhost")
            received = service.wait_request("/head", count)
            assert received.get("host") == service.url.removeprefix("http://")
            assert received.get("x-forwarded-host") == "app.localhost"
            assert 'host="app.localhost"' in received.get("forwarded")


@pytest.mark.parametrize("flags", [(), ("-host-header=local",), ("-host-header=app.test",)])
def test_redirects_lead_to_where_the_visitor_came(
    flags: tuple[str, ...],
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    """Whatever Host the service gets; behind a proxy too."""
    core, service = start_core("-trusted-proxies=127.0.0.1", "-agent-tls=false"), start_service()
    start_agent(core, service.url, "-subdomain=app", *flags)
    host = f"app.localhost:{core.public[1]}"
    with Connection(core.public, "app.localhost") as visitor:
        for _ in range(2):  # the second on a kept connection
            assert visitor.ask("GET /redirect", f"Host: {host}")["location"] == f"http://{host}/echo"
        proxied = ("Host: app.localhost", "X-Forwarded-Proto: https", "X-Forwarded-Host: www.example")
        where = "https://www.example" if flags else "http://app.localhost"
        assert visitor.ask("GET /redirect", *proxied)["location"] == f"{where}/echo"


def test_trusted_proxies_are_believed(
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    core, service = start_core("-trusted-proxies=127.0.0.0/8,10.0.0.0/8", "-agent-tls=false"), start_service()
    start_agent(core, service.url, "-subdomain=app")
    with Connection(core.public, "app.localhost") as visitor:
        visitor.ask(
            "GET /head", "X-Forwarded-For: 6.6.6.6, 192.0.2.7, 10.1.2.3", "X-Forwarded-Proto: https",
            "X-Forwarded-Host: www.example", "Forwarded: for=192.0.2.7;proto=https", "X-Request-Id: proxied",
        )  # fmt: skip
        received = service.wait_request("/head")
        assert received.get("x-forwarded-for") == "6.6.6.6, 192.0.2.7, 10.1.2.3, 127.0.0.1"
        assert (received.get("x-forwarded-proto"), received.get("x-forwarded-host")) == ("https", "www.example")
        assert received.get("forwarded").startswith("for=192.0.2.7;proto=https, for=127.0.0.1;")
        visitor.ask("GET /head")
        assert service.wait_request("/head", 2).get("x-forwarded-for") == "127.0.0.1"
