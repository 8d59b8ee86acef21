"""Receive windows: delivered bytes are granted again, and granted bytes can be buffered."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tunneld.mux.window import GROWTH_ROUND_TRIPS, GROWTH_SLACK, ReceiveWindow, WindowBudget

INITIAL, MAX_SIZE = 64, 1024
ROUND_TRIP = 0.1
STEPS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 200), st.booleans()), max_size=200)


@dataclass
class NetworkPath:
    """A network path with a round trip of `ROUND_TRIP` seconds, and a clock."""

    time: float = 0.0

    def now(self) -> float:
        return self.time

    def round_trip(self) -> float:
        return ROUND_TRIP


def budget_of(size: int, path: NetworkPath | None = None) -> WindowBudget:
    path = path or NetworkPath()
    return WindowBudget(size, path.now, path.round_trip)


def window(budget: WindowBudget) -> ReceiveWindow:
    return ReceiveWindow(INITIAL, MAX_SIZE, budget)


def deliver_window(window: ReceiveWindow, path: NetworkPath, seconds: float) -> None:
    """Deliver a whole window in quarters, within `seconds`."""
    for _ in range(4):
        path.time += seconds / 4
        window.delivered(window.size // 4, 0)


@given(st.integers(0, 4000), STEPS)
def test_credit_never_exceeds_the_windows_nor_the_windows_the_budget(
    memory: int, steps: list[tuple[int, int, bool]]
) -> None:
    budget = budget_of(memory)
    windows = [window(budget) for _ in range(3)]
    unread = [0, 0, 0]  # bytes buffered at the receiver
    credit = [INITIAL] * 3
    for which, size, reads in steps:
        one = windows[which]
        arriving = min(size, credit[which])
        credit[which] -= arriving
        unread[which] += arriving
        taken = min(size, unread[which]) if reads else 0
        unread[which] -= taken
        if taken:
            credit[which] += one.delivered(taken, unread[which])
        assert unread[which] + credit[which] + one.ungranted == one.size
        assert INITIAL <= one.size <= MAX_SIZE
        assert sum(each.size - INITIAL for each in windows) + budget.available == memory
    for one in windows:
        one.close()
        one.close()
    assert budget.available == memory


def test_a_sender_whose_reader_keeps_up_never_stalls_and_gets_the_largest_window() -> None:
    one, credit = window(budget_of(10_000)), INITIAL
    for _ in range(1000):
        assert credit > 0
        chunk = min(credit, 16)
        credit += one.delivered(chunk, 0) - chunk
    assert one.size == MAX_SIZE


def test_a_window_shrinks_to_its_initial_size_while_its_reader_is_slow() -> None:
    budget = budget_of(10_000)
    one = window(budget)
    while one.size < MAX_SIZE:
        one.delivered(INITIAL, 0)
    unread = MAX_SIZE
    while one.size > INITIAL:
        one.delivered(8, unread)
        unread -= 8
        assert unread > 0, "the window should shrink before the reader has caught up"
    assert budget.available == 10_000


def test_without_budget_nothing_grows() -> None:
    one = window(budget_of(INITIAL - 1))
    for _ in range(100):
        one.delivered(INITIAL, 0)
    assert one.size == INITIAL


def test_a_window_grows_only_if_it_is_delivered_within_the_round_trips() -> None:
    path = NetworkPath()
    one = window(budget_of(10_000, path))
    limit = GROWTH_ROUND_TRIPS * ROUND_TRIP + GROWTH_SLACK
    deliver_window(one, path, limit - 0.001)
    assert one.size == 2 * INITIAL
    for _ in range(10):
        deliver_window(one, path, limit + 0.001)
    assert one.size == 2 * INITIAL, "it took longer, so a larger window would only fill queues"
    deliver_window(one, path, limit - 0.001)
    assert one.size == 4 * INITIAL, "the queue is empty again"


def test_a_pause_delays_growth_by_one_window_only() -> None:
    path = NetworkPath()
    one = window(budget_of(10_000, path))
    path.time += 3600
    deliver_window(one, path, ROUND_TRIP)
    deliver_window(one, path, ROUND_TRIP)
    assert one.size == 2 * INITIAL


def test_credit_is_granted_in_quarters() -> None:
    one = window(budget_of(0))
    assert (one.delivered(INITIAL // 4 - 1, 0), one.delivered(1, 0)) == (0, INITIAL // 4)


def test_a_window_does_not_grow_while_anything_of_it_is_unread() -> None:
    path = NetworkPath()
    one = window(budget_of(MAX_SIZE, path))
    for _ in range(8):
        one.delivered(INITIAL // 4, 1)
    assert one.size == INITIAL
    deliver_window(one, path, 0)
    assert one.size > INITIAL
