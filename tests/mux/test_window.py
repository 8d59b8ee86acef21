"""The window: what is delivered is granted, what is granted can be held."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tunneld.mux.window import SLACK, TRIPS, ReceiveWindow, WindowBudget

FIRST, MOST = 64, 1024
ROUND_TRIP = 0.1
STEPS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 200), st.booleans()), max_size=200)


@dataclass
class Way:
    """A way with a round trip of `ROUND_TRIP` seconds, and a clock."""

    time: float = 0.0

    def now(self) -> float:
        return self.time

    def round_trip(self) -> float:
        return ROUND_TRIP


def budget_of(octets: int, way: Way | None = None) -> WindowBudget:
    way = way or Way()
    return WindowBudget(octets, way.now, way.round_trip)


def window(budget: WindowBudget) -> ReceiveWindow:
    return ReceiveWindow(FIRST, MOST, budget)


def carry(window: ReceiveWindow, way: Way, seconds: float) -> None:
    """Deliver what fits into the window, in quarters, so that all of it takes so many seconds."""
    for _ in range(4):
        way.time += seconds / 4
        window.delivered(window.size // 4, 0)


@given(st.integers(0, 4000), STEPS)
def test_no_more_is_ever_out_than_the_windows_and_these_are_within_the_budget(
    memory: int, steps: list[tuple[int, int, bool]]
) -> None:
    budget = budget_of(memory)
    windows = [window(budget) for _ in range(3)]
    sent = [0, 0, 0]  # what stands unread at the receiver
    credit = [FIRST] * 3
    for which, octets, reads in steps:
        one = windows[which]
        arriving = min(octets, credit[which])
        credit[which] -= arriving
        sent[which] += arriving
        taken = min(octets, sent[which]) if reads else 0
        sent[which] -= taken
        if taken:
            credit[which] += one.delivered(taken, sent[which])
        assert sent[which] + credit[which] + one.owed == one.size
        assert FIRST <= one.size <= MOST
        assert sum(each.size - FIRST for each in windows) + budget.left == memory
    for one in windows:
        one.close()
        one.close()
    assert budget.left == memory


def test_a_sender_whose_reader_keeps_up_never_stands_still_and_gets_the_largest_window() -> None:
    one, credit = window(budget_of(10_000)), FIRST
    for _ in range(1000):
        assert credit > 0
        chunk = min(credit, 16)
        credit += one.delivered(chunk, 0) - chunk
    assert one.size == MOST


def test_a_window_goes_back_to_the_first_size_while_its_reader_is_slow() -> None:
    budget = budget_of(10_000)
    one = window(budget)
    while one.size < MOST:
        one.delivered(FIRST, 0)
    unread = MOST
    while one.size > FIRST:
        one.delivered(8, unread)
        unread -= 8
        assert unread > 0, "it should shrink before the reader is through"
    assert budget.left == 10_000


def test_without_budget_nothing_grows() -> None:
    one = window(budget_of(FIRST - 1))
    for _ in range(100):
        one.delivered(FIRST, 0)
    assert one.size == FIRST


def test_a_window_that_goes_round_as_fast_as_the_way_lets_it_grows_and_one_that_stands_in_a_queue_does_not() -> None:
    way = Way()
    one = window(budget_of(10_000, way))
    limit = TRIPS * ROUND_TRIP + SLACK
    carry(one, way, limit - 0.001)
    assert one.size == 2 * FIRST
    for _ in range(10):
        carry(one, way, limit + 0.001)
    assert one.size == 2 * FIRST, "it took longer, so more would only stand in line"
    carry(one, way, limit - 0.001)
    assert one.size == 4 * FIRST, "what stood in line is gone"


def test_a_pause_only_puts_the_growth_off_by_one_window() -> None:
    way = Way()
    one = window(budget_of(10_000, way))
    way.time += 3600
    carry(one, way, ROUND_TRIP)
    carry(one, way, ROUND_TRIP)
    assert one.size == 2 * FIRST


def test_credit_is_given_back_in_quarters() -> None:
    one = window(budget_of(0))
    assert (one.delivered(FIRST // 4 - 1, 0), one.delivered(1, 0)) == (0, FIRST // 4)


def test_a_window_does_not_grow_while_anything_of_it_is_unread() -> None:
    way = Way()
    one = window(budget_of(MOST, way))
    for _ in range(8):
        one.delivered(FIRST // 4, 1)
    assert one.size == FIRST
    carry(one, way, 0)
    assert one.size > FIRST
