"""Where redirects of a service lead that was given another Host, as its visitors see it."""

import pytest

from tunnel.http.client import Service
from tunnel.http.redirects import Redirects

#: what the core says of a visitor who came to https://app.example.com
HTTPS = (
    b"X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: app.example.com\r\nX-Request-Id: 1\r\n"
)
#: and to http://app.localhost:8080
HTTP = b"x-forwarded-proto: http\r\nx-forwarded-host: app.localhost:8080\r\n"


def led(service: Service, to: str, asked: bytes = HTTPS) -> str:
    assert service.redirects is not None
    before, after = b"Found\r\nX-Location: http://localhost:3000/\r\n", b"Set-Cookie: a=b; Domain=localhost\r\n"
    head = service.redirects.rewrite(before + b"LOCATION: " + to.encode() + b"\r\n" + after, asked)
    assert head.startswith(before + b"LOCATION: ") and head.endswith(b"\r\n" + after)
    return head.removeprefix(before + b"LOCATION: ").removesuffix(b"\r\n" + after).decode()


LOCAL = Service("localhost", 3000, False, "local")
NAMED = Service("127.0.0.1", 3000, False, "app.test")
SECURE = Service("10.0.0.7", 443, True, "local")


@pytest.mark.parametrize(
    ("service", "to", "https", "http"),
    [
        # the Host that it was given, and its address
        (LOCAL, "http://localhost:3000/x?y#z", "https://app.example.com/x?y#z", "http://app.localhost:8080/x?y#z"),
        (LOCAL, "HTTP://LocalHost:3000/", "https://app.example.com/", "http://app.localhost:8080/"),
        (LOCAL, "http://localhost:3000", "https://app.example.com", "http://app.localhost:8080"),
        (LOCAL, "http://localhost:3000?a", "https://app.example.com?a", "http://app.localhost:8080?a"),
        (LOCAL, "//localhost:3000/x", "//app.example.com/x", "//app.localhost:8080/x"),
        (NAMED, "http://app.test/x", "https://app.example.com/x", "http://app.localhost:8080/x"),
        (NAMED, "http://app.test:80/x", "https://app.example.com/x", "http://app.localhost:8080/x"),
        (NAMED, "http://127.0.0.1:3000/x", "https://app.example.com/x", "http://app.localhost:8080/x"),
        (SECURE, "https://10.0.0.7/x", "https://app.example.com/x", "http://app.localhost:8080/x"),
        (SECURE, "https://10.0.0.7:443/x", "https://app.example.com/x", "http://app.localhost:8080/x"),
        # on loopback it has other names
        (LOCAL, "http://127.0.0.1:3000/", "https://app.example.com/", "http://app.localhost:8080/"),
        (LOCAL, "http://[::1]:3000/", "https://app.example.com/", "http://app.localhost:8080/"),
        (LOCAL, "http://0.0.0.0:3000/", "https://app.example.com/", "http://app.localhost:8080/"),
        # without TLS itself it wants TLS, with its own port or the usual one: that may not lead back to plain http
        (LOCAL, "https://localhost:3000/x", "https://app.example.com/x", "https://app.localhost/x"),
        (LOCAL, "https://localhost/x", "https://app.example.com/x", "https://app.localhost/x"),
        (NAMED, "https://app.test/x", "https://app.example.com/x", "https://app.localhost/x"),
        # and with TLS none
        (SECURE, "http://10.0.0.7/x", "http://app.example.com/x", "http://app.localhost:8080/x"),
    ],
)
def test_the_public_origin_comes_in(service: Service, to: str, https: str, http: str) -> None:
    assert led(service, to) == https
    assert led(service, to, HTTP) == http


@pytest.mark.parametrize(
    "to",
    [
        "/login", "login", "?a", "", "#a", "http:/localhost:3000/", "http:localhost:3000/", "mailto:a@localhost",
        "http://localhost/", "http://localhost:3001/", "http://localhost:30000/", "http://localhost.evil:3000/",
        "http://www.example/?to=http://localhost:3000/", "http://user@localhost:3000/", "ftp://localhost:3000/",
        "https://app.example.com/x", "///localhost:3000/",
    ],
)  # fmt: skip
def test_everything_else_stays(to: str) -> None:
    assert led(LOCAL, to) == to


@pytest.mark.parametrize(
    "asked",
    [
        b"", b"X-Forwarded-Proto: https\r\n", b"X-Forwarded-Host: app.example.com\r\n",
        b"X-Forwarded-Proto: gopher\r\nX-Forwarded-Host: app.example.com\r\n",
        b"X-Forwarded-Proto: https\r\nX-Forwarded-Host: app.example.com/evil\r\n",
        b"X-Forwarded-Proto: https\r\nX-Forwarded-Host: a b\r\n", b"X-Forwarded-Proto: https\r\nX-Forwarded-Host: \r\n",
        b"X-Forwarded-Proto: https\r\nX-Forwarded-Host: " + b"a" * 300 + b"\r\n",
    ],
)  # fmt: skip
def test_a_core_that_does_not_say_where_the_visitor_came_to(asked: bytes) -> None:
    assert led(LOCAL, "http://localhost:3000/", asked) == "http://localhost:3000/"


def test_a_reason_is_no_field() -> None:
    head = b"Location: http://localhost:3000/\r\n"
    assert Redirects("http", ["localhost:3000"]).rewrite(head, HTTPS) == head


def test_a_location_that_is_said_twice_leads_to_one_place() -> None:
    """Browsers take it, as long as both are the same; of others each is looked at by itself."""
    assert LOCAL.redirects is not None
    once, other = b"Location: http://localhost:3000/a\r\n", b"Location: http://www.example/\r\n"
    there = b"Location: https://app.example.com/a\r\n"
    assert LOCAL.redirects.rewrite(b"Found\r\n" + once + once, HTTPS) == b"Found\r\n" + there + there
    assert LOCAL.redirects.rewrite(b"Found\r\n" + other + once, HTTPS) == b"Found\r\n" + other + there


def test_a_service_that_gets_what_the_visitor_typed() -> None:
    assert Service("localhost", 3000, False).redirects is None
