"""A request that surely reached no local service may go to another link; one that may have is never sent twice."""

import pytest
from inprocess import Core, body_of, core, head, respond

from tunnel.core.exchange import TRIES
from tunnel.link.stream import Stream

pytestmark = pytest.mark.usefixtures("way")


class Agents:
    """refusing: how many links refuse before they hand on; arrived: what links handed to their service."""

    def __init__(self, outcome: str) -> None:
        self.outcome = outcome
        self.refused = 0
        self.arrived: list[bytes] = []

    async def refuse(self, stream: Stream) -> None:
        self.refused += 1
        stream.reset(self.outcome, "no luck here")

    async def serve(self, stream: Stream) -> None:
        self.arrived.append(await body_of(stream))
        respond(stream, b"served")


async def make(made: Core, outcome: str) -> Agents:
    """Two links of one name; the one whose turn is first refuses."""
    agents = Agents(outcome)
    await made.agent(agents.refuse)
    await made.agent(agents.serve)
    return agents


@pytest.mark.parametrize("outcome", ["local_refused", "overloaded"])
async def test_another_link_serves_what_the_first_did_not_hand_on(outcome: str) -> None:
    async with core() as made:
        agents = await make(made, outcome)
        answer = await made.visitor().get()
        assert (answer.status, answer.body) == (200, b"served")
        assert (agents.refused, len(agents.arrived)) == (1, 1)
        request = await made.finished()
        assert (request.outcome, request.agent_id) == ("ok", "agent-1")
        assert [stream.outcome for stream in made.streams] == [outcome, "ok"]
        assert made.account.requests == 1


async def test_a_body_that_is_held_goes_along_and_counts_once() -> None:
    async with core() as made:
        agents = await make(made, "local_refused")
        visitor = made.visitor()
        await visitor.send(head("PUT", "/", "app.example.com", "Content-Length: 5") + b"12345")
        assert (await visitor.answer("PUT")).status == 200
        assert agents.arrived == [b"12345"]
        assert (made.account.bytes_in, (await made.finished()).bytes_in) == (5, 5)


@pytest.mark.parametrize("outcome", ["local_broken", "link_lost", "timeout"])
async def test_what_may_have_reached_the_service_stays_with_its_failure(outcome: str) -> None:
    async with core() as made:
        agents = await make(made, outcome)
        answer = await made.visitor().get()
        assert (answer.outcome, agents.refused, agents.arrived) == (outcome, 1, [])


@pytest.mark.parametrize("method", ["POST", "PATCH", "LOCK"])
async def test_other_methods_are_not_tried_again(method: str) -> None:
    async with core() as made:
        agents = await make(made, "local_refused")
        visitor = made.visitor()
        await visitor.send(head(method, "/", "app.example.com", "Content-Length: 1") + b"x")
        assert (await visitor.answer(method)).outcome == "local_refused"
        assert agents.arrived == []


async def test_a_body_still_coming_in_is_not_tried_again() -> None:
    async with core() as made:
        agents = await make(made, "local_refused")
        visitor = made.visitor()
        await visitor.send(head("PUT", "/", "app.example.com", "Content-Length: 5") + b"1")
        assert (await visitor.answer("PUT")).outcome == "local_refused"
        assert agents.arrived == []


async def test_tries_are_bounded_and_the_last_failure_is_told() -> None:
    async with core() as made:
        agents = Agents("local_refused")
        for _ in range(TRIES + 2):
            await made.agent(agents.refuse)
        assert (await made.visitor().get()).outcome == "local_refused"
        assert agents.refused == TRIES


async def test_a_link_that_ends_before_the_open_left_costs_nothing() -> None:
    async with core() as made:
        agents = Agents("")
        first = await made.agent(agents.serve)
        await made.agent(agents.serve)
        first.link.session._on_queued = lambda: None  # its writer is stuck in a send that makes no way
        opened = first.link.session.open

        def open_and_end(*arguments: object) -> object:
            stream = opened(*arguments)  # type: ignore[arg-type]
            first.link.end("cut before the writer ran")
            return stream

        first.link.session.open = open_and_end  # type: ignore[assignment,method-assign]
        answer = await made.visitor().get()
        assert (answer.status, len(agents.arrived)) == (200, 1)
        assert [stream.outcome for stream in made.streams] == ["link_lost", "ok"]


async def test_a_link_that_ends_later_is_told() -> None:
    async with core() as made:
        agents = Agents("")

        async def take_and_end(stream: Stream) -> None:
            agents.refused += 1
            first.link.end("cut with the request under way")

        first = await made.agent(take_and_end)
        await made.agent(agents.serve)
        answer = await made.visitor().get()
        assert (answer.outcome, agents.refused, agents.arrived) == ("link_lost", 1, [])
