"""What the agent says of local services that come and go."""

import logging
import socket

import pytest
import trio
from trio.testing import MockClock

from tunnel.agent.probing import ADVICE, INTERVAL, LocalProber
from tunnel.http.client import Service


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str]]:
    return [(one.levelname, one.getMessage(), vars(one)["fields"]["local"]) for one in caplog.records]


async def test_a_service_that_comes_and_goes_is_said_once_each(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tunnel.agent")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    service = Service("127.0.0.1", port, False)
    prober = LocalProber([service])
    down, up = ("WARNING", "local service is down", service.address), ("INFO", "local service is up", service.address)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(prober.run)
        await trio.sleep(3.5 * INTERVAL)
        assert said(caplog) == [down]
        fields = vars(caplog.records[0])["fields"]
        assert fields["reason"] == f"can't connect to {service.address}: Connection refused"
        assert fields["advice"] == ADVICE
        assert prober.details() == {service.address: {"up": False, "reason": fields["reason"]}}
        with socket.create_server(("127.0.0.1", port)):
            await trio.sleep(2 * INTERVAL)
            assert said(caplog) == [down, up]
            assert prober.details()[service.address]["up"]
        await trio.sleep(2 * INTERVAL)
        assert said(caplog) == [down, up, down]
        nursery.cancel_scope.cancel()


async def test_a_service_that_is_there_is_no_news(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tunnel.agent")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        prober = LocalProber([Service("127.0.0.1", listener.getsockname()[1], False)])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prober.run)
            await trio.sleep(2.5 * INTERVAL)
            nursery.cancel_scope.cancel()
    assert said(caplog) == []
