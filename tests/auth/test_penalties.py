"""Penalties: how they grow, when they are forgiven, and whom memory forgets."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.auth.preauth import FREE_FAILURES, MAX_COUNTED_FAILURES, Penalties
from tunneld.config.schema import ControlSettings

PENALTY, LONGEST = ControlSettings().penalty, ControlSettings().max_penalty


def failed(penalties: Penalties, source: int, now: float, times: int = 1) -> None:
    for _ in range(times):
        penalties.add(source, now, PENALTY, LONGEST)


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 0), (2, 0), (3, 5), (4, 10), (5, 20), (9, 320), (10, 600), (11, 600), (10_000, 600)]
)
def test_a_penalty_doubles_up_to_the_longest(failures: int, seconds: float) -> None:
    penalties = Penalties()
    failed(penalties, 7, 100.0, failures)
    assert penalties.remaining(7, 100.0) == seconds
    assert penalties.remaining(8, 100.0) == 0
    assert penalties.active(100.0) == (seconds > 0)


def test_it_doubles_as_long_as_the_configuration_can_ask_for() -> None:
    penalties, shortest, year = Penalties(), 0.001, 365 * 24 * 3600.0
    for _ in range(MAX_COUNTED_FAILURES):
        penalties.add(7, 0.0, shortest, year)
    assert penalties.remaining(7, 0.0) == year


def test_it_ends_and_is_forgiven_later_at_once() -> None:
    penalties = Penalties()
    failed(penalties, 7, 100.0, 3)
    assert penalties.remaining(7, 104.0) == 1.0
    assert penalties.remaining(7, 105.0) == 0.0
    failed(penalties, 7, 105.0 + LONGEST - 1)
    assert penalties.remaining(7, 105.0 + LONGEST - 1) == 10.0
    failed(penalties, 7, 104.0 + LONGEST + 10 + LONGEST)
    assert penalties.remaining(7, 114.0 + 2 * LONGEST) == 0.0
    assert len(penalties) == 1


def test_the_best_of_timing_is_as_the_essay_says() -> None:
    """Guess until the penalties grow too long, wait to be forgiven, begin again."""
    best = 0.0
    for guesses in range(1, 30):
        penalties, now, made = Penalties(), 0.0, 0
        for _ in range(50):
            for _ in range(guesses):
                failed(penalties, 7, now)
                made += 1
                now += penalties.remaining(7, now)
            now += LONGEST
        best = max(best, made * 3600 / now)
    assert 33 < best < 34


def test_a_flood_of_fresh_sources_does_not_clear_one_that_failed_more() -> None:
    penalties = Penalties(max_sources=10)
    failed(penalties, 7, 0.0, 3)
    for source in range(100, 1000):
        failed(penalties, source, 1.0)
        assert len(penalties) <= 10
    assert penalties.remaining(7, 1.0) == 4.0
    failed(penalties, 7, 2.0)
    assert penalties.remaining(7, 2.0) == 10.0


def test_of_equals_the_one_that_failed_longest_ago_goes() -> None:
    penalties = Penalties(max_sources=2)
    failed(penalties, 1, 0.0, 3)
    failed(penalties, 2, 1.0, 3)
    failed(penalties, 3, 2.0)
    assert [penalties.remaining(source, 2.0) for source in (1, 2)] == [0.0, 4.0]


def test_what_is_forgiven_takes_no_memory() -> None:
    penalties = Penalties()
    for source in range(1000):
        failed(penalties, source, 0.0, 1 + source % 5)
    failed(penalties, 7, 1000 * LONGEST)
    assert len(penalties) == 1


STEPS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0, 5.0, 40.0, 600.0, 700.0])), max_size=60)


@given(STEPS)
def test_each_source_pays_for_itself_alone(steps: list[tuple[int, float]]) -> None:
    """Against the law, written down for one source without a thought of memory."""
    penalties, now = Penalties(), 0.0
    model = dict.fromkeys(range(6), (0, 0.0, 0.0))  # failures, refused until, forgiven at
    for source, pause in steps:
        now += pause
        failed(penalties, source, now)
        failures, _, forgiven_at = model[source]
        failures = 1 if now >= forgiven_at else failures + 1
        until = now + (min(PENALTY * 2 ** (failures - FREE_FAILURES - 1), LONGEST) if failures > FREE_FAILURES else 0)
        model[source] = failures, until, until + LONGEST
        for one, (_, until, _) in model.items():
            assert penalties.remaining(one, now) == max(0.0, until - now)


@given(STEPS, st.integers(1, 4))
def test_memory_is_bounded_and_nobody_pays_more_for_it(steps: list[tuple[int, float]], most: int) -> None:
    bounded, free = Penalties(most), Penalties()
    times = itertools.accumulate(pause for _, pause in steps)
    for (source, _), now in zip(steps, times, strict=True):
        failed(bounded, source, now)
        failed(free, source, now)
        assert len(bounded) <= most
        assert all(bounded.remaining(one, now) <= free.remaining(one, now) for one in range(6))
