"""Delays between attempts: they grow, are random, and never exceed the maximum."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tunneld.agent.backoff import FIRST_DELAY, GROWTH, MAX_DELAY, MIN_UPTIME, Backoff


@given(st.randoms(use_true_random=False))
def test_each_delay_is_between_half_its_step_and_its_step(dice: random.Random) -> None:
    backoff, step = Backoff(dice.random), FIRST_DELAY
    for _ in range(20):
        assert step / 2 <= backoff.next_delay() <= step
        step = min(GROWTH * step, MAX_DELAY)


def test_the_steps_grow_up_to_a_minute() -> None:
    backoff = Backoff(lambda: 1.0)
    steps = [backoff.next_delay() for _ in range(9)]
    assert steps[:3] == [0.2, 0.5, 1.25]
    assert steps[-2:] == [60, 60]
    assert all(later >= sooner for sooner, later in pairwise(steps))


def test_the_first_step_is_no_longer_than_the_longest() -> None:
    backoff = Backoff(lambda: 1.0, first=0.25, longest=0.1)
    assert [backoff.next_delay() for _ in range(3)] == [0.1] * 3


def test_only_a_connection_that_lasted_makes_the_delays_short_again() -> None:
    backoff = Backoff(lambda: 1.0)
    delays = [backoff.delay_after(MIN_UPTIME - 0.1) for _ in range(4)]
    assert delays == sorted(delays)
    assert delays[-1] > FIRST_DELAY
    assert backoff.delay_after(MIN_UPTIME) == FIRST_DELAY
    backoff.delay_after(0)
    backoff.reset()
    assert backoff.delay_after(0) == FIRST_DELAY


def test_two_agents_do_not_retry_in_step() -> None:
    assert Backoff(lambda: 0.0).next_delay() != Backoff(lambda: 0.9).next_delay()
