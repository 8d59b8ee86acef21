"""The same report again and again is told once, and then counted."""

from __future__ import annotations

from tunneld.agent.events import MAX_MESSAGES, RepeatLimiter


def test_like_reports_are_kept_back_and_counted_until_the_time_is_over() -> None:
    repeats = RepeatLimiter(every=5)
    assert [repeats.admit("refused", now) for now in (0, 1, 4.9, 5, 6, 20)] == [0, None, None, 2, None, 1]


def test_another_reason_is_told_at_once() -> None:
    repeats = RepeatLimiter(every=5)
    assert repeats.admit("refused", 0) == 0
    assert repeats.admit("timed out", 0) == 0


def test_what_is_remembered_is_bounded() -> None:
    repeats = RepeatLimiter(every=5)
    for number in range(10 * MAX_MESSAGES):
        repeats.admit(number, 0)
    assert len(repeats._seen) <= MAX_MESSAGES
