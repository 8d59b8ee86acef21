"""Rate limits: the limit itself, which sources are remembered, when they are forgotten; the log limiter."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.policy.rates import MAX_RATE_COUNT, SECOND, Buckets, LogLimiter, Rate

RATES = st.builds(Rate, st.integers(1, 20), st.sampled_from([1, 60, 3600]))


def spread(rate: Rate) -> st.SearchStrategy[list[tuple[int, float]]]:
    """Attempts: each a source, and the seconds since the previous attempt. Most fall in the time of a few tokens."""
    pauses = st.floats(0, 3 * rate.period / rate.count) | st.just(0.0) | st.just(float(rate.period))
    return st.lists(st.tuples(st.integers(0, 7), pauses), max_size=150)


def exceeds(times: list[float], rate: Rate) -> bool:
    """Whether some window has more events than burst + rate * t."""
    nanoseconds = [int(time * SECOND) for time in times]
    return any(
        (last - first + 1 - rate.count) * rate.period * SECOND > rate.count * (nanoseconds[last] - nanoseconds[first])
        for first, last in itertools.combinations(range(len(times)), 2)
    )


def admitted(rate: Rate, max_sources: int, attempts: list[tuple[int, float]]) -> dict[int, list[float]]:
    """The times at which each source got tokens. Checks that the table stays within its size."""
    buckets, now = Buckets(rate, max_sources), 1000.0
    found: dict[int, list[float]] = {}
    for source, pause in attempts:
        now += pause
        if buckets.take(source, now):
            found.setdefault(source, []).append(now)
        assert len(buckets) <= max_sources
    return found


@given(st.data())
def test_no_source_ever_gets_more_than_burst_and_rate_allow(data: st.DataObject) -> None:
    """Also where the table is far too small, so that sources are forgotten and share a bucket."""
    rate = data.draw(RATES)
    found = admitted(rate, data.draw(st.sampled_from([1, 2, 100])), data.draw(spread(rate)))
    assert not any(exceeds(times, rate) for times in found.values())


@given(st.data())
def test_with_space_for_all_sources_each_gets_its_full_rate(data: st.DataObject) -> None:
    """A bucket for each source alone, which forgets nothing, admits the same."""
    rate = data.draw(RATES)
    attempts = data.draw(spread(rate))
    now, alone = 1000.0, {source: Buckets(rate, 1) for source in range(8)}
    expected: dict[int, list[float]] = {}
    for source, pause in attempts:
        now += pause
        if alone[source].take(0, now):
            expected.setdefault(source, []).append(now)
    assert admitted(rate, 8, attempts) == expected


def test_a_full_bucket_allows_a_burst_and_then_one_event_per_interval() -> None:
    buckets = Buckets(Rate.parse("4/s"), 10)
    assert [buckets.take(1, 100.0) for _ in range(6)] == [True] * 4 + [False] * 2
    assert not buckets.take(1, 100.249)
    assert buckets.take(1, 100.25)
    assert not buckets.take(1, 100.25)
    assert buckets.take(2, 100.25)


def test_a_refused_event_takes_no_token() -> None:
    buckets = Buckets(Rate.parse("1/s"), 10)
    assert buckets.take(1, 100.0)
    assert not any(buckets.take(1, 100.0 + step / 100) for step in range(100))
    assert buckets.take(1, 101.0)


def test_a_source_is_forgotten_when_its_bucket_is_full_and_not_before() -> None:
    buckets = Buckets(Rate.parse("2/s"), 10)
    buckets.take(1, 100.0)
    buckets.take(2, 100.9)
    buckets.take(2, 100.9)
    buckets.take(3, 101.5)
    assert not buckets.take(2, 101.3)
    buckets.take(3, 102.6)
    assert len(buckets) == 1


def test_a_late_source_is_not_forgotten_with_its_generation() -> None:
    buckets = Buckets(Rate.parse("2/s"), 10)
    for source, now in ((9, 100.0), (1, 100.45), (1, 100.45), (9, 100.5)):
        assert buckets.take(source, now)
    assert [buckets.take(1, 101.0), buckets.take(1, 101.0)] == [True, False]


def test_after_a_long_pause_all_sources_are_forgotten() -> None:
    buckets = Buckets(Rate.parse("2/s"), 10)
    buckets.take(1, 100.0)
    buckets.take(2, 103.0)
    assert len(buckets) == 1


@given(RATES)
def test_rounding_never_allows_more_events(rate: Rate) -> None:
    assert 0 <= rate.interval * rate.count - rate.period * SECOND < rate.count


def test_a_million_sources_do_not_outgrow_the_table() -> None:
    buckets = Buckets(Rate.parse("1/h"), 1000)
    allowed = sum(buckets.take(source, 100.0 + source / 100_000) for source in range(1_000_000))
    assert len(buckets) == 1000
    assert allowed == 1001  # the last of them from the bucket that new sources share
    assert not buckets.take(5, 111.0)


def test_a_remembered_source_is_unaffected_by_a_flood_of_new_ones() -> None:
    buckets = Buckets(Rate.parse("2/m"), 100)
    assert buckets.take(-1, 100.0)
    for source in range(10_000):
        buckets.take(source, 101.0)
    assert buckets.take(-1, 102.0)
    assert not buckets.take(-1, 102.0)


def test_new_sources_are_allowed_again_after_a_flood() -> None:
    buckets = Buckets(Rate.parse("10/s"), 100)
    for source in range(10_000):
        buckets.take(source, 100.0)
    assert not buckets.take(-1, 100.0)
    assert buckets.take(-1, 102.0)


def test_a_remembered_source_takes_no_more_than_its_documented_memory() -> None:
    """150 bytes: a dictionary entry and two integers."""
    buckets = Buckets(Rate.parse("1/h"), 16_384)
    for source in range(16_384):
        buckets.take(~(source << 40), 1e6)
    table = buckets._recent
    size = sys.getsizeof(table) + sum(sys.getsizeof(key) + sys.getsizeof(value) for key, value in table.items())
    assert size <= 150 * 16_384


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10", Rate(10, 1)),
        ("1/s", Rate(1, 1)),
        ("30/m", Rate(30, 60)),
        (f"{MAX_RATE_COUNT}/h", Rate(MAX_RATE_COUNT, 3600)),
    ],
)
def test_rates_are_parsed_and_printed(text: str, rate: Rate) -> None:
    assert Rate.parse(text) == rate
    assert Rate.parse(str(rate)) == rate


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5", "10/d", "10/", "/s", "10 /s", "٣", "01", str(MAX_RATE_COUNT + 1), "1/s/s"]
)
def test_invalid_rates_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a rate"):
        Rate.parse(text)


@pytest.mark.parametrize(
    ("rate", "ceiling", "within"),
    [
        ("10/s", "10/s", True),
        ("9/s", "10/s", True),
        ("11/s", "10/s", False),
        ("10/m", "10/s", True),
        ("11/m", "10/s", False),  # slower, but a larger burst
        ("10/s", "600/m", True),
        ("11/s", "600/m", False),
        ("600/m", "10/s", False),
    ],
)
def test_a_ceiling_bounds_the_burst_and_the_long_run(rate: str, ceiling: str, within: bool) -> None:
    assert Rate.parse(rate).within(Rate.parse(ceiling)) is within


def test_the_log_limiter_passes_some_messages_and_counts_the_others() -> None:
    limiter = LogLimiter(Rate.parse("2/s"))
    assert [limiter.passes(100.0) for _ in range(5)] == [0, 0, None, None, None]
    assert limiter.passes(100.5) == 3
    assert limiter.passes(103.0) == 0


def test_one_message_of_a_kind_passes_per_interval_and_reports_the_suppressed_ones() -> None:
    limiter = LogLimiter(Rate(1, 5), 100)
    assert [limiter.passes(now, "refused") for now in (0, 1, 4.9, 5, 6, 20)] == [0, None, None, 2, None, 1]


def test_each_kind_of_message_has_its_own_limit() -> None:
    limiter = LogLimiter(Rate(1, 5), 100)
    assert limiter.passes(0, "refused") == 0
    assert limiter.passes(0, "timed out") == 0


def test_the_log_limiter_remembers_a_bounded_number_of_kinds() -> None:
    limiter = LogLimiter(Rate(1, 5), 100)
    for number in range(1000):
        limiter.passes(0, number)
        limiter.passes(0, number)
    assert len(limiter) <= 200
    assert limiter.passes(20, 5) is not None
