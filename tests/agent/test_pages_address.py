"""Where an agent's pages are when the usual port is another's, and what it does before any link."""

import socket

import pytest
import trio
from trio.testing import MockClock

from tunnel.agent.client import Agent
from tunnel.agent.pages import listen_for_pages
from tunnel.agent.supervisor import Supervisor
from tunnel.config import AgentSettings
from tunnel.errors import ConfigError


def test_the_usual_port_gives_way(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        usual = f"127.0.0.1:{taken.getsockname()[1]}"
        (found,) = listen_for_pages(AgentSettings(metrics_addr=usual))
        with found:
            host, port = found.getsockname()
    assert host == "127.0.0.1" and f"{host}:{port}" != usual
    (record,) = caplog.records
    fields = vars(record)["fields"]
    assert record.levelname == "WARNING" and (fields["usual"], fields["address"]) == (usual, f"127.0.0.1:{port}")
    assert "-metrics-addr" in fields["advice"]


def test_one_that_is_free_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (found,) = listen_for_pages(AgentSettings(metrics_addr=f"127.0.0.1:{port}"))
    with found:
        assert found.getsockname()[1] == port
    assert not caplog.records


def test_one_that_was_given_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        usual = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"^-metrics-addr: {usual} is in use"):
            listen_for_pages(AgentSettings(metrics_addr=usual, is_metrics_addr_given=True))
    assert not caplog.records


async def test_what_a_service_has_closed_is_closed_while_no_request_comes(autojump_clock: MockClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        local = f"127.0.0.1:{server.getsockname()[1]}"
        agent = Agent(AgentSettings(server="127.0.0.1:9", local=local, metrics_addr="", layers=()))
        (service,) = agent.services
        kept = await service.connect()
        service.keep(kept)
        server.accept()[0].close()
    async with trio.open_nursery() as nursery:
        await agent._start(nursery, [])
        await trio.sleep(0.3)
        nursery.cancel_scope.cancel()
    assert kept.is_closed


@pytest.mark.parametrize("kind", [Agent, Supervisor])
async def test_both_kinds_of_agents_start(kind: type[Agent] | type[Supervisor]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        agent = kind(AgentSettings(server="127.0.0.1:9", metrics_addr=f"127.0.0.1:{port}", layers=()))
        async with trio.open_nursery() as nursery:
            if isinstance(agent, Agent):
                await agent._start(nursery, [])
            else:
                agent._serve_pages(nursery)
            assert agent.metrics_address is not None and agent.metrics_address[1] != port
            nursery.cancel_scope.cancel()
