"""The policy of the pool, for all loads and limits."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tunneld.agent.pool import AHEAD, PoolLimits, grown, shrunk, wanted

arrivals = st.integers(0, 100_000)


@st.composite
def limits(draw: st.DrawFn) -> PoolLimits:
    least = draw(st.integers(1, 500))
    return PoolLimits(least, draw(st.integers(least, 1000)))


@given(limits(), arrivals, st.data())
def test_a_size_stays_within_its_limits(bounds: PoolLimits, came: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(bounds.least, bounds.most))
    assert bounds.least <= grown(size, came, bounds) <= bounds.most
    assert bounds.least <= shrunk(size, came, bounds) <= bounds.most


@given(limits(), arrivals, st.data())
def test_growing_never_shrinks_and_shrinking_never_grows(bounds: PoolLimits, came: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(bounds.least, bounds.most))
    assert shrunk(size, came, bounds) <= size <= grown(size, came, bounds)


@given(limits(), arrivals)
def test_a_review_takes_nothing_that_the_busiest_window_wanted(bounds: PoolLimits, came: int) -> None:
    size = grown(bounds.least, came, bounds)
    assert shrunk(size, came, bounds) == size


@given(limits(), arrivals)
def test_a_window_finds_twice_its_visitors_parked_where_the_limits_allow(bounds: PoolLimits, came: int) -> None:
    assert wanted(came, bounds) >= min(AHEAD * came, bounds.most)


@given(limits(), arrivals)
def test_when_it_is_quiet_the_pool_is_at_its_least_after_a_few_reviews(bounds: PoolLimits, came: int) -> None:
    size = grown(bounds.least, came, bounds)
    for _ in range(math.ceil(math.log2(size)) + 1):
        size = shrunk(size, 0, bounds)
    assert size == bounds.least
