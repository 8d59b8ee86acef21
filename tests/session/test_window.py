"""The window: what is delivered is granted, what is granted can be held."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tunneld.session.window import Budget, Window

FIRST, MOST = 64, 1024
STEPS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 200), st.booleans()), max_size=200)


@given(st.integers(0, 4000), STEPS)
def test_no_more_is_ever_out_than_the_windows_and_these_are_within_the_budget(
    memory: int, steps: list[tuple[int, int, bool]]
) -> None:
    budget = Budget(memory)
    windows = [Window(FIRST, MOST, budget) for _ in range(3)]
    sent = [0, 0, 0]  # what stands unread at the receiver
    credit = [FIRST] * 3
    for which, octets, reads in steps:
        window = windows[which]
        arriving = min(octets, credit[which])
        credit[which] -= arriving
        sent[which] += arriving
        taken = min(octets, sent[which]) if reads else 0
        sent[which] -= taken
        if taken:
            credit[which] += window.delivered(taken, sent[which])
        assert sent[which] + credit[which] + window.owed == window.size
        assert FIRST <= window.size <= MOST
        assert sum(each.size - FIRST for each in windows) + budget.left == memory
    for window in windows:
        window.close()
        window.close()
    assert budget.left == memory


def test_a_sender_whose_reader_keeps_up_never_stands_still_and_gets_the_largest_window() -> None:
    window, credit = Window(FIRST, MOST, Budget(10_000)), FIRST
    for _ in range(1000):
        assert credit > 0
        chunk = min(credit, 16)
        credit += window.delivered(chunk, 0) - chunk
    assert window.size == MOST


def test_a_window_goes_back_to_the_first_size_while_its_reader_is_slow() -> None:
    budget = Budget(10_000)
    window = Window(FIRST, MOST, budget)
    while window.size < MOST:
        window.delivered(FIRST, 0)
    unread = MOST
    while window.size > FIRST:
        window.delivered(8, unread)
        unread -= 8
        assert unread > 0, "it should shrink before the reader is through"
    assert budget.left == 10_000


def test_without_budget_nothing_grows() -> None:
    window = Window(FIRST, MOST, Budget(FIRST - 1))
    for _ in range(100):
        window.delivered(FIRST, 0)
    assert window.size == FIRST
