"""Repetitions of the same report are left out and counted."""

from __future__ import annotations

from tunneld.agent.events import MAX_MESSAGES, RepeatLimiter


def test_repetitions_are_left_out_and_counted_until_the_interval_is_over() -> None:
    repeats = RepeatLimiter(every=5)
    assert [repeats.admit("refused", now) for now in (0, 1, 4.9, 5, 6, 20)] == [0, None, None, 2, None, 1]


def test_another_reason_is_reported_at_once() -> None:
    repeats = RepeatLimiter(every=5)
    assert repeats.admit("refused", 0) == 0
    assert repeats.admit("timed out", 0) == 0


def test_the_memory_is_bounded() -> None:
    repeats = RepeatLimiter(every=5)
    for number in range(10 * MAX_MESSAGES):
        repeats.admit(number, 0)
    assert len(repeats._seen) <= MAX_MESSAGES
