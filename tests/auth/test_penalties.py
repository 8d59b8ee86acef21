"""Penalties: their growth, their end, and which sources are evicted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.auth.penalties import (
    FREE_FAILURES,
    MAX_CLAIMS_PER_SOURCE,
    MAX_COUNTED_FAILURES,
    Claim,
    Penalties,
    PenaltyReport,
    PenaltyTable,
)
from tunneld.auth.preauth import MAX_KNOWN_CLAIMS, KnownSources
from tunneld.config.schema import ControlSettings

PENALTY, MAX_PENALTY = ControlSettings().penalty, ControlSettings().max_penalty


def failed(penalties: Penalties[int], source: int, now: float, times: int = 1) -> None:
    for _ in range(times):
        penalties.add(source, now, PENALTY, MAX_PENALTY)


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 0), (2, 0), (3, 5), (4, 10), (5, 20), (9, 320), (10, 600), (11, 600), (10_000, 600)]
)
def test_a_penalty_doubles_up_to_the_maximum(failures: int, seconds: float) -> None:
    penalties = Penalties[int]()
    failed(penalties, 7, 100.0, failures)
    assert penalties.remaining(7, 100.0) == seconds
    assert penalties.remaining(8, 100.0) == 0
    assert penalties.active(100.0) == ([7] if seconds > 0 else [])


def test_it_doubles_up_to_the_longest_configurable_penalty() -> None:
    penalties, shortest, year = Penalties[int](), 0.001, 365 * 24 * 3600.0
    for _ in range(MAX_COUNTED_FAILURES):
        penalties.add(7, 0.0, shortest, year)
    assert penalties.remaining(7, 0.0) == year


def test_it_ends_and_is_later_forgiven_completely() -> None:
    penalties = Penalties[int]()
    failed(penalties, 7, 100.0, 3)
    assert penalties.remaining(7, 104.0) == 1.0
    assert penalties.remaining(7, 105.0) == 0.0
    failed(penalties, 7, 105.0 + MAX_PENALTY - 1)
    assert penalties.remaining(7, 105.0 + MAX_PENALTY - 1) == 10.0
    failed(penalties, 7, 104.0 + MAX_PENALTY + 10 + MAX_PENALTY)
    assert penalties.remaining(7, 114.0 + 2 * MAX_PENALTY) == 0.0
    assert len(penalties) == 1


def test_the_best_timing_allows_as_many_guesses_as_documented() -> None:
    """Guess until the penalties grow too long, wait to be forgiven, start again."""
    best = 0.0
    for guesses in range(1, 30):
        penalties, now, made = Penalties[int](), 0.0, 0
        for _ in range(50):
            for _ in range(guesses):
                failed(penalties, 7, now)
                made += 1
                now += penalties.remaining(7, now)
            now += MAX_PENALTY
        best = max(best, made * 3600 / now)
    assert 33 < best < 34


def test_a_flood_of_new_sources_does_not_evict_one_that_failed_more() -> None:
    penalties = Penalties[int](max_entries=10)
    failed(penalties, 7, 0.0, 3)
    for source in range(100, 1000):
        failed(penalties, source, 1.0)
        assert len(penalties) <= 10
    assert penalties.remaining(7, 1.0) == 4.0
    failed(penalties, 7, 2.0)
    assert penalties.remaining(7, 2.0) == 10.0


def test_among_equals_the_oldest_failure_is_evicted() -> None:
    penalties = Penalties[int](max_entries=2)
    failed(penalties, 1, 0.0, 3)
    failed(penalties, 2, 1.0, 3)
    failed(penalties, 3, 2.0)
    assert [penalties.remaining(source, 2.0) for source in (1, 2)] == [0.0, 4.0]


def test_a_forgiven_source_takes_no_memory() -> None:
    penalties = Penalties[int]()
    for source in range(1000):
        failed(penalties, source, 0.0, 1 + source % 5)
    failed(penalties, 7, 1000 * MAX_PENALTY)
    assert len(penalties) == 1


STEPS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0, 5.0, 40.0, 600.0, 700.0])), max_size=60)


@given(STEPS)
def test_sources_are_independent(steps: list[tuple[int, float]]) -> None:
    """Compared with a simple model of one source without a limit on memory."""
    penalties, now = Penalties[int](), 0.0
    model = dict.fromkeys(range(6), (0, 0.0, 0.0))  # failures, refused until, forgiven at
    for source, pause in steps:
        now += pause
        failed(penalties, source, now)
        failures, _, forgiven_at = model[source]
        failures = 1 if now >= forgiven_at else failures + 1
        until = now + (
            min(PENALTY * 2 ** (failures - FREE_FAILURES - 1), MAX_PENALTY) if failures > FREE_FAILURES else 0
        )
        model[source] = failures, until, until + MAX_PENALTY
        for one, (_, until, _) in model.items():
            assert penalties.remaining(one, now) == max(0.0, until - now)


@given(STEPS, st.integers(1, 4))
def test_memory_is_bounded_and_eviction_never_adds_a_penalty(steps: list[tuple[int, float]], max_sources: int) -> None:
    bounded, free = Penalties[int](max_sources), Penalties[int]()
    times = itertools.accumulate(pause for _, pause in steps)
    for (source, _), now in zip(steps, times, strict=True):
        failed(bounded, source, now)
        failed(free, source, now)
        assert len(bounded) <= max_sources
        assert all(bounded.remaining(one, now) <= free.remaining(one, now) for one in range(6))


# Sources and claims

ALICE, KEY = Claim("name", b"alice"), Claim("key", b"wrong")


def table(**keys: Any) -> PenaltyTable:
    settings = ControlSettings(**keys)
    return PenaltyTable(lambda: settings)


def test_a_claim_counts_against_its_source_once() -> None:
    penalties = table()
    for _ in range(20):
        penalties.fail(7, 0.0, ALICE)
    assert penalties.claim_penalty(7, ALICE, 0.0) == MAX_PENALTY
    assert penalties.source_penalty(7, 0.0) == 0.0
    assert penalties.claim_penalty(8, ALICE, 0.0) == 0.0
    penalties.fail(7, 0.0, Claim("name", b"bob"))
    penalties.fail(7, 0.0, KEY)
    assert penalties.source_penalty(7, 0.0) == PENALTY


def test_failures_without_a_claim_count_against_the_source() -> None:
    penalties = table()
    for _ in range(3):
        penalties.fail(7, 0.0)
    assert penalties.source_penalty(7, 0.0) == PENALTY
    assert penalties.claim_penalty(7, ALICE, 0.0) == 0.0


def test_claims_beyond_the_limit_of_a_source_count_against_it_each_time() -> None:
    penalties = table(max_penalty=1e6)
    for number in range(MAX_CLAIMS_PER_SOURCE):
        penalties.fail(7, 0.0, Claim("name", b"%d" % number))
    assert penalties.source_penalty(7, 0.0) == PENALTY * 2 ** (MAX_CLAIMS_PER_SOURCE - FREE_FAILURES - 1)
    for _ in range(2):
        penalties.fail(7, 0.0, ALICE)
    assert penalties.source_penalty(7, 0.0) == PENALTY * 2 ** (MAX_CLAIMS_PER_SOURCE + 2 - FREE_FAILURES - 1)
    assert penalties.claim_penalty(7, ALICE, 0.0) == 0.0


def test_claims_that_have_logged_in_before_do_not_count_against_their_source() -> None:
    penalties = table()
    for number in range(20):
        for _ in range(3):
            penalties.fail(7, float(number), Claim("name", b"%d" % number), is_known=True)
    assert penalties.source_penalty(7, 20.0) == 0.0
    assert penalties.claim_penalty(7, Claim("name", b"19"), 19.0) == PENALTY


def test_abandoned_handshakes_are_failures_beyond_their_rate() -> None:
    penalties = table(abandoned_handshakes="30/m")
    for _ in range(30 + FREE_FAILURES):
        penalties.abandon(7, 0.0)
    assert penalties.source_penalty(7, 0.0) == 0.0
    penalties.abandon(7, 0.0)
    assert penalties.source_penalty(7, 0.0) == PENALTY
    penalties.abandon(8, 0.0)
    assert penalties.source_penalty(8, 0.0) == 0.0
    for second in range(0, 3600, 2):
        penalties.abandon(9, float(second))
    assert penalties.source_penalty(9, 3600.0) == 0.0


def test_the_same_wrong_key_again_and_again_is_as_cheap_as_abandoned_handshakes() -> None:
    penalties = table(abandoned_handshakes="30/m")
    for _ in range(1 + 30 + 1):
        penalties.fail(7, 0.0, KEY)
    assert penalties.source_penalty(7, 0.0) == 0.0
    penalties.fail(7, 0.0, KEY)
    assert penalties.source_penalty(7, 0.0) == PENALTY


def test_the_report_and_a_pardon() -> None:
    penalties = table()
    for claim in (ALICE, ALICE, ALICE, KEY, KEY, KEY, None):
        penalties.fail(7, 0.0, claim)
    assert list(penalties.report(1.0)) == [
        PenaltyReport(7, None, 3, PENALTY - 1.0),
        PenaltyReport(7, ALICE, 3, PENALTY - 1.0),
    ]
    assert penalties.pardon(7)
    assert list(penalties.report(1.0)) == []
    assert not penalties.pardon(7)
    for _ in range(FREE_FAILURES):
        penalties.fail(7, 1.0)
    assert penalties.source_penalty(7, 1.0) == 0.0


CLAIMS = st.sampled_from([None, *(Claim("name", b"%d" % number) for number in range(12))])


@given(st.lists(st.tuples(st.integers(0, 5), CLAIMS, st.sampled_from([0.0, 1.0, 40.0, 700.0])), max_size=80))
def test_the_memory_of_both_tables_is_bounded(steps: list[tuple[int, Claim | None, float]]) -> None:
    settings = ControlSettings()
    penalties, now = PenaltyTable(lambda: settings, max_sources=3), 0.0
    for source, claim, pause in steps:
        now += pause
        penalties.fail(source, now, claim)
        assert len(penalties._of_source) <= 3
        assert len(penalties._of_claim) <= 3
        kept = {(source, claim) for source, claims in penalties._claims.items() for claim in claims}
        assert kept == set(penalties._of_claim._failures)


# Known sources


def test_the_memory_of_known_sources_is_bounded() -> None:
    known = KnownSources(lambda: 10.0, max_sources=2)
    for source in (1, 2, 1, 3):
        known.add(source, 0.0, ALICE)
    assert len(known) == 2
    assert [known.has(source, 0.0) for source in (1, 2, 3)] == [True, False, True]
    for number in range(MAX_KNOWN_CLAIMS):
        known.add(1, 0.0, Claim("name", b"%d" % number))
    assert not known.has_claim(1, ALICE, 0.0)
    assert known.has_claim(1, Claim("name", b"0"), 9.9)
    assert not known.has_claim(1, Claim("name", b"0"), 10.0)
    assert not known.has(1, 10.0)
