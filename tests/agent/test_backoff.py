"""The bounds of the agent's waits, drawn with a source that always takes the upper or lower end."""

from hypothesis import given
from hypothesis import strategies as st

from tunnel.agent.backoff import CALM, HELD, NETWORK_CAP, REFUSAL_CAP, Backoff


def upper(low: float, high: float) -> float:
    assert low == 0.0
    return high


def test_network_errors_double_up_to_two_seconds() -> None:
    backoff = Backoff(upper)
    assert [round(backoff.after_network_error(), 6) for _ in range(7)] == [0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    assert backoff.failures == 7


def test_load_refusals_double_up_to_thirty_seconds() -> None:
    backoff = Backoff(upper)
    waits = [round(backoff.after_refusal(), 6) for _ in range(10)]
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]


def test_a_network_error_after_refusals_is_capped_low_again() -> None:
    backoff = Backoff(upper)
    for _ in range(9):
        backoff.after_refusal()
    assert backoff.after_network_error() == NETWORK_CAP


def test_a_link_that_held_starts_over() -> None:
    backoff = Backoff(upper)
    for _ in range(6):
        backoff.after_network_error()
    assert backoff.after_link(HELD) == 0.2
    assert backoff.failures == 1


def test_a_short_link_does_not_start_over() -> None:
    backoff = Backoff(upper)
    for _ in range(6):
        backoff.after_network_error()
    assert backoff.after_link(HELD / 2) == NETWORK_CAP


def test_go_away_is_answered_at_once_whatever_went_before() -> None:
    backoff = Backoff(upper)
    for _ in range(6):
        backoff.after_network_error()
    assert backoff.after_link(0.1, go_away=True) == 0.0


def test_a_core_that_sends_every_link_away_is_not_hammered() -> None:
    backoff = Backoff(upper)
    waits = [round(backoff.after_link(lasted, go_away=True), 6) for lasted in (0.01, HELD, 2 * HELD, CALM - 1)]
    assert waits == [0.0, 0.2, 0.4, 0.8]
    for _ in range(10):
        wait = backoff.after_link(HELD, go_away=True)
    assert wait == REFUSAL_CAP
    assert backoff.after_link(CALM, go_away=True) == 0.0
    assert backoff.after_link(CALM, go_away=True) == 0.0  # upgrades, each of which sends away


def test_the_default_source_is_random_within_the_bound() -> None:
    waits = {Backoff().after_network_error() for _ in range(50)}
    assert len(waits) > 1
    assert all(0 <= wait <= 0.2 for wait in waits)


@given(st.lists(st.tuples(st.sampled_from(["network", "load", "link", "away"]), st.floats(0, 3600)), max_size=200))
def test_no_history_leads_out_of_the_bounds(history: list[tuple[str, float]]) -> None:
    backoff = Backoff()
    for what, lasted in history:
        if what == "network":
            assert 0 <= backoff.after_network_error() <= NETWORK_CAP
        elif what == "load":
            assert 0 <= backoff.after_refusal() <= REFUSAL_CAP
        elif what == "away":
            assert 0 <= backoff.after_link(lasted, go_away=True) <= REFUSAL_CAP
        else:
            assert 0 <= backoff.after_link(lasted) <= NETWORK_CAP


def test_what_the_core_asks_for_comes_first() -> None:
    backoff = Backoff(lambda low, high: high)
    assert backoff.after_refusal(5) == 5.2
    assert backoff.after_network_error(3) == 3.4
    for nonsense in (-1.0, float("nan"), 0.0):
        assert Backoff(lambda low, high: high).after_refusal(nonsense) == 0.2
    assert Backoff(lambda low, high: 0.0).after_refusal(1e9) == 300
