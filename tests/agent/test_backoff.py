"""Waiting times: longer and longer, never all at once, never too long."""

from __future__ import annotations

import random
from itertools import islice, pairwise

from hypothesis import given
from hypothesis import strategies as st

from tunneld.agent.backoff import FIRST_DELAY, GROWTH, LASTING, MAX_DELAY, Backoff, delays


@given(st.randoms(use_true_random=False))
def test_every_delay_lies_between_half_its_step_and_its_step(chance: random.Random) -> None:
    step = FIRST_DELAY
    for delay in islice(delays(chance.random), 20):
        assert step / 2 <= delay <= step
        step = min(GROWTH * step, MAX_DELAY)


def test_the_steps_grow_until_a_minute() -> None:
    steps = list(islice(delays(lambda: 1.0), 9))
    assert steps[:3] == [0.2, 0.5, 1.25]
    assert steps[-2:] == [60, 60]
    assert all(later >= sooner for sooner, later in pairwise(steps))


def test_only_a_connection_that_lasted_makes_the_waits_short_again() -> None:
    backoff = Backoff(lambda: 1.0)
    waits = [backoff.after(LASTING - 0.1) for _ in range(4)]
    assert waits == sorted(waits)
    assert waits[-1] > FIRST_DELAY
    assert backoff.after(LASTING) == FIRST_DELAY
    backoff.after(0)
    backoff.forget()
    assert backoff.after(0) == FIRST_DELAY


def test_two_agents_do_not_come_back_in_step() -> None:
    assert next(delays(lambda: 0.0)) != next(delays(lambda: 0.9))
