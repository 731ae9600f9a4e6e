"""Names and the links that serve them: round robin, room, silence, holds."""

from time import monotonic
from typing import Any

import pytest

from tunnel.core.quotas import Account
from tunnel.core.registry import AgentLink, Registry, Tunnel
from tunnel.errors import Failure, Refused
from tunnel.handler import ConnectVisit, LinkVisit
from tunnel.link.link import Link
from tunnel.wire.frames import HTTP, NO_BODY, Open


@pytest.fixture
def registry(ticks: Any) -> Registry:
    return Registry("Tunnel.Example.com.", 600, ticks)


def link(account: str = "acme", id: str = "conn-1", max_streams: int = 2) -> AgentLink:
    visit = LinkVisit(ConnectVisit("192.0.2.1:1", id))
    return AgentLink(Link(True, 5, 15), visit, Account(account, account), max_streams)


def fill(agent: AgentLink) -> None:
    while agent.has_room:
        agent.link.session.open(Open(HTTP, 0, 0, NO_BODY, b"", b""), b"", True)


def test_names_and_hosts(registry: Registry) -> None:
    for host, name in (
        ("app.tunnel.example.com", "app"), ("app.localhost", "app"), ("www.example.org", "www.example.org"),
        ("a.b.tunnel.example.com", "a.b.tunnel.example.com"), ("tunnel.example.com", "tunnel.example.com"),
        (".localhost", ".localhost"), ("localhost", "localhost"), ("[::1]", "[::1]"),
    ):  # fmt: skip
        assert registry.name_of(host) == name
    assert registry.domain.host_of("app") == "app.tunnel.example.com"
    assert registry.domain.host_of("www.example.org") == "www.example.org"


def test_links_take_turns(registry: Registry) -> None:
    agents = [link(id=f"conn-{i}") for i in range(3)]
    for agent in agents:
        tunnel = registry.attach(agent, "app", "http", 0)
    assert [tunnel.choose() for _ in range(6)] == agents * 2
    fill(agents[1])
    assert [tunnel.choose() for _ in range(4)] == [agents[0], agents[2]] * 2
    registry.withdraw(agents[0])
    assert [tunnel.choose() for _ in range(2)] == [agents[2]] * 2
    fill(agents[2])
    with pytest.raises(Failure) as caught:
        tunnel.choose()
    assert (caught.value.outcome, caught.value.retry_after) == ("overloaded", 1)


def test_a_link_that_was_not_heard_of_is_the_last_choice(registry: Registry) -> None:
    agents = [link(id=f"conn-{i}") for i in range(2)]
    for agent in agents:
        tunnel = registry.attach(agent, "app", "http", 0)
    agents[0].link._last_heard = monotonic() - 10
    assert agents[0].link.is_quiet(monotonic())
    assert [tunnel.choose() for _ in range(2)] == [agents[1]] * 2
    fill(agents[1])
    assert tunnel.choose() is agents[0]
    with pytest.raises(Failure, match="no agent"):
        Tunnel("x", "http", "acme").choose()


def test_a_name_is_held_after_its_last_link(registry: Registry, ticks: Any) -> None:
    one, two = link(id="conn-1"), link(id="conn-2")
    registry.attach(one, "app", "http", 0)
    registry.attach(two, "app", "http", 0)
    assert registry.withdraw(one) == []
    assert registry.names_in_use() == {"app": "acme"}
    (tunnel,) = registry.withdraw(two)
    registry.detach(one)
    registry.detach(two)
    assert registry.links == {}
    assert registry.names_in_use() == {}
    ticks.now += 599
    assert registry.find("app.tunnel.example.com") is tunnel
    with pytest.raises(Refused) as caught:
        registry.check_free("app", "http", "other")
    assert caught.value.reason == "name_taken"
    registry.check_free("app", "tcp", "acme")
    assert registry.forget_expired() == []
    ticks.now += 2
    assert registry.find("app.tunnel.example.com") is None
    registry.check_free("app", "http", "other")
    assert registry.forget_expired() == [tunnel]


def test_a_name_in_use_is_its_accounts_and_its_protocols(registry: Registry) -> None:
    registry.attach(link(), "app", "http", 0)
    for agent, protocol in ((link("other"), "http"), (link(), "tcp")):
        with pytest.raises(Refused) as caught:
            registry.attach(agent, "app", protocol, 0)
        assert caught.value.reason == "name_taken"


def test_a_held_name_comes_back_to_its_account(registry: Registry, ticks: Any) -> None:
    one = link()
    tunnel = registry.attach(one, "app", "http", 0)
    registry.withdraw(one)
    assert registry.withdraw(one) == []
    assert registry.attach(link(id="conn-2"), "app", "http", 0) is tunnel
    registry.withdraw(registry.links["conn-2"])
    assert registry.attach(link(id="conn-3"), "app", "tcp", 0) is not tunnel


def test_a_full_host_name(registry: Registry) -> None:
    tunnel = registry.attach(link(), "www.example.org", "http", 0)
    assert registry.find("www.example.org") is tunnel
    assert registry.find("www.example.com") is None


def test_links_are_found_by_the_run_of_their_agent(registry: Registry) -> None:
    first, second, silent = link(id="conn-1"), link(id="conn-2"), link(id="conn-3")
    first.instance = second.instance = "run"
    for agent in (first, second, silent):
        for index, name in enumerate(("api", "web")):
            registry.attach(agent, name, "http", index)
    assert registry.links_of("run") == [first, second]
    assert registry.links_of("") == registry.links_of("other") == []  # one that says nothing is nobody's old link
    registry.withdraw(first)
    registry.detach(first)
    registry.detach(first)
    assert registry.links_of("run") == [second]
    registry.detach(second)
    assert registry.links_of("run") == [] and list(registry.links) == ["conn-3"]
