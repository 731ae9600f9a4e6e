"""The life of both programs, with real processes: killed, stopped, cut off, drained, started again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from running import RunningAgent, RunningCore, poll
from service import Service
from visiting import Answer, Broken, Connection
from watching import Relay, ask, get, sample

pytestmark = pytest.mark.system

HEARTBEAT = ("-heartbeat=200ms", "-heartbeat-timeout=1s")
Start = Callable[..., RunningCore]
StartAgent = Callable[..., RunningAgent]
StartService = Callable[[], Service]


class Asking(threading.Thread):
    """A request in a thread of its own; `answer` is an Answer or the error, `took` seconds."""

    def __init__(self, core: RunningCore, line: str = "GET /hang", host: str = "app.localhost") -> None:
        super().__init__(daemon=True)
        self._core, self._line, self._host = core, line, host
        self.answer: Answer | Exception | None = None
        self.took = 0.0
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        try:
            self.answer = ask(self._core, self._line, host=self._host)
        except Exception as exc:
            self.answer = exc
        self.took = time.monotonic() - began

    def result(self, timeout: float = 10) -> Answer:
        self.join(timeout)
        assert isinstance(self.answer, Answer), repr(self.answer)
        return self.answer


def wait_served(core: RunningCore, timeout: float, host: str = "app.localhost") -> None:
    poll(lambda: _status(core, host) == 200, f"{host} is served again", timeout, 0.05)


def _status(core: RunningCore, host: str) -> int:
    try:
        return ask(core, "GET /echo", host=host).status
    except (OSError, Broken):
        return 0


# Killed ----------------------------------------------------------------------------------------------------------


def test_agent_killed_within_a_request(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    asking = Asking(core)
    service.wait_request("/hang")
    killed = time.monotonic()
    agent.kill()
    answer = asking.result()
    assert (answer.status, answer.outcome) == (502, "link_lost")
    assert time.monotonic() - killed < 1
    assert core.wait_for("request", outcome="link_lost")["level"] == "ERROR"
    answer = ask(core, "GET /echo")
    assert (answer.status, answer.outcome) == (503, "no_agent")
    assert int(answer["retry-after"]) > 0


def test_core_killed_and_started_again(
    start_core: Start, start_agent: StartAgent, start_service: StartService, ending: ExitStack
) -> None:
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url)  # no -subdomain: a name of the core's choice
    [(name, url)] = agent.tunnels.items()
    assert ask(core, "GET /echo", host=f"{name}.localhost").status == 200
    asking = Asking(core, host=f"{name}.localhost")
    service.wait_request("/hang")
    core.kill()
    asking.join(5)
    assert isinstance(asking.answer, Broken)
    # The other end of a cut link ends the work on its streams at once.
    assert service.wait_closed("/hang", 2)
    mark = agent.mark()
    again = core.again()
    ending.callback(again.close)
    wait_served(again, 5, f"{name}.localhost")
    assert agent.wait_for("tunnel ready", after=mark)["url"] == url
    assert sample(agent.metrics, "agent_reconnections_total") >= 1


# Stopped and cut off ---------------------------------------------------------------------------------------------


def test_agent_that_stands_still(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(*HEARTBEAT), start_service()
    agent = start_agent(core, service.url, "-subdomain=app", *HEARTBEAT)
    assert ask(core, "GET /echo").status == 200
    mark = agent.mark()
    agent.stop()
    try:
        asking = Asking(core, "GET /echo")
        answer = asking.result()
        assert (answer.status, answer.outcome) == (502, "link_lost")
        assert asking.took < 2
        core.wait_for("agent disconnected", reason="no heartbeat for 1 s", timeout=2)
        assert ask(core, "GET /echo").outcome == "no_agent"
    finally:
        agent.cont()
    wait_served(core, 5)
    assert agent.wait_for("link ended", after=mark)
    assert core.wait_for("agent connected", after=core.mark() - 20)


def test_core_that_stands_still(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(*HEARTBEAT), start_service()
    agent = start_agent(core, service.url, "-subdomain=app", *HEARTBEAT)
    core.stop()
    try:
        stopped = time.monotonic()
        agent.wait_for("link ended", reason="no heartbeat for 1 s", timeout=5)
        assert time.monotonic() - stopped < 2.2
        assert get(agent.metrics, "/readyz")[0] == 503
    finally:
        core.cont()
    wait_served(core, 5)
    poll(lambda: get(agent.metrics, "/readyz")[0] == 200, "the agent is ready")


def test_black_hole_is_noticed_by_both(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(*HEARTBEAT), start_service()
    with Relay(core.agents) as relay:
        server = f"-server=127.0.0.1:{relay.address[1]}"
        agent = start_agent(core, service.url, "-subdomain=app", server, *HEARTBEAT)
        assert ask(core, "GET /echo").status == 200
        asking = Asking(core)
        service.wait_request("/hang")
        held = time.monotonic()
        relay.hold()
        answer = asking.result()
        assert (answer.status, answer.outcome) == (502, "link_lost")
        core.wait_for("agent disconnected", timeout=2)
        agent.wait_for("link ended", timeout=2)
        assert time.monotonic() - held < 2.2
        service.wait_closed("/hang")
        relay.release()
        wait_served(core, 5)


def test_local_service_down_and_up(start_core: Start, start_agent: StartAgent, ending: ExitStack) -> None:
    core, service = start_core(), Service()
    ending.callback(service.close)
    agent = start_agent(core, service.url, "-subdomain=app")
    assert ask(core, "GET /echo").status == 200
    service.close()
    answer = ask(core, "GET /echo", "Accept: application/json")
    assert (answer.status, answer.outcome) == (502, "local_refused")
    assert b"local service" in answer.body and str(service.port).encode() in answer.body
    record = core.wait_for("request", outcome="local_refused")
    assert str(service.port) in record["error"]
    assert agent.is_running and not agent.find("link ended")
    again = Service(service.port)
    ending.callback(again.close)
    assert ask(core, "GET /echo").status == 200


# Drained ---------------------------------------------------------------------------------------------------------


class Client(threading.Thread):
    """Keeps a connection and asks again and again until nobody accepts it any more.

    answered: statuses of whole answers. broken: requests whose answer began and broke off. unanswered: requests on a
    kept connection that the core closed without a byte, which HTTP lets it do at any time (RFC 9112, 9.3.1).
    """

    def __init__(self, core: RunningCore, line: str) -> None:
        super().__init__(daemon=True)
        self._core, self._line = core, line
        self.answered: list[int] = []
        self.broken: list[str] = []
        self.unanswered = 0
        self.start()

    def run(self) -> None:
        visitor: Connection | None = None
        while True:
            fresh = visitor is None
            try:
                if visitor is None:
                    visitor = Connection(self._core.public, "app.localhost")
            except ConnectionError:
                return
            try:
                answer = visitor.ask(self._line)
            except (Broken, ConnectionError) as exc:
                if visitor.buffer or (isinstance(exc, Broken) and exc.partial):
                    self.broken.append(repr(exc))
                self.unanswered += 1
                visitor.close()
                if fresh:  # it was in the listener's backlog: nobody had accepted it
                    return
                visitor = None
                continue
            self.answered.append(answer.status)
            if answer["connection"].lower() == "close":
                visitor.close()
                visitor = None


def test_drain_under_load_fails_no_accepted_request(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core("-drain-delay=1s"), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    clients = [Client(core, "GET /echo") for _ in range(8)]
    slow = [Client(core, "GET /slow?ms=900") for _ in range(4)]
    poll(lambda: all(client.answered for client in clients + slow), "every client has an answer")
    core.terminate()
    began = time.monotonic()
    core.wait_for("draining")
    status, text = get(core.metrics, "/readyz")
    assert status == 503 and "shutting down" in text
    assert time.monotonic() - began < 0.5
    assert get(core.metrics, "/healthz")[0] == 200
    # Within the delay new connections are still taken.
    assert ask(core, "GET /echo").status == 200
    poll(lambda: not any(client.is_alive() for client in clients + slow), "the clients have ended", 10)
    assert core.wait(10) == 0
    assert time.monotonic() - began < 5
    for client in clients + slow:
        assert not client.broken
        assert set(client.answered) == {200}
        # At most one of its connections was closed while its next request was on the way, and one not accepted.
        assert client.unanswered <= 2
    # Whatever the core has begun, the visitor has got.
    records = core.find("request")
    assert {record["outcome"] for record in records} == {"ok"}
    assert len(records) == 1 + sum(len(client.answered) for client in clients + slow)
    assert agent.wait_for("the core sends us away")
    assert core.records[-1]["msg"] == "stopped"


def test_drain_deadline(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core("-drain-timeout=500ms"), start_service()
    start_agent(core, service.url, "-subdomain=app")
    asking = Asking(core)
    service.wait_request("/hang")
    core.terminate()
    answer = asking.result()
    assert (answer.status, answer.outcome) == (503, "draining")
    assert 0.4 < asking.took < 3
    assert core.wait(5) == 0
    assert core.find("drain deadline reached")
    assert core.find("request", outcome="draining", status=503)
    assert service.wait_closed("/hang")


def test_second_signal_ends_now(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    asking = Asking(core)
    service.wait_request("/hang")
    core.terminate()
    core.wait_for("draining")
    assert core.is_running
    began = time.monotonic()
    core.terminate()
    core.wait(5)
    assert time.monotonic() - began < 2
    asking.join(2)
    assert asking.answer is not None
    agent.terminate()  # it dials in vain: nothing to wait for
    began = time.monotonic()
    assert agent.wait(5) == 0
    assert time.monotonic() - began < 2


def test_agent_finishes_its_requests(start_core: Start, start_agent: StartAgent, start_service: StartService) -> None:
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url, "-subdomain=app")
    asking = Asking(core, "GET /hold")
    service.wait_request("/hold")
    agent.terminate()
    poll(lambda: get(agent.metrics, "/readyz")[0] == 503, "the agent says that it stops", 2)
    poll(lambda: _status(core, "app.localhost") == 503, "no new requests for it", 2)
    service.release.set()
    answer = asking.result()
    assert (answer.status, answer.body) == (200, b"held")
    assert agent.wait(5) == 0
    assert core.wait_for("agent disconnected")


def test_agent_with_a_request_that_never_ends(
    start_core: Start, start_agent: StartAgent, start_service: StartService
) -> None:
    core, service = start_core(), start_service()
    agent = start_agent(core, service.url, "-subdomain=app", "-drain-timeout=300ms")
    asking = Asking(core)
    service.wait_request("/hang")
    agent.terminate()
    assert agent.wait(5) == 0
    answer = asking.result()
    assert (answer.status, answer.outcome) == (502, "link_lost")


# Many ------------------------------------------------------------------------------------------------------------


def test_two_hundred_agents_return(start_core: Start, start_service: StartService, ending: ExitStack) -> None:
    from running import Program

    core, service = start_core(), start_service()
    script = Path(__file__).with_name("manyagents.py")
    many = Program(
        "agents",
        [str(script), str(core.agents[1]), core.fingerprint, service.url, "200"],
        {"AGENT_TOKEN": core.token},
    )
    ending.callback(many.close)

    def active(core: RunningCore) -> float:
        return sample(core.metrics, "tunnel_connections_active")

    poll(lambda: active(core) == 200, "200 agents", 40, 0.1)
    core.kill()
    again = core.again()
    ending.callback(again.close)
    began = time.monotonic()
    slowest = 0.0

    def back() -> bool:
        nonlocal slowest
        asked = time.monotonic()
        assert get(again.metrics, "/healthz")[0] == 200
        slowest = max(slowest, time.monotonic() - asked)
        return active(again) == 200

    poll(back, "all 200 agents are back", 10, 0.1)
    assert time.monotonic() - began < 10
    assert slowest < 1
    assert ask(again, "GET /echo", host="many7.localhost").status == 200
    assert ask(again, "GET /echo", host="many199.localhost").status == 200
