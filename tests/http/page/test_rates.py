"""Rates from counters."""

from __future__ import annotations

from tunneld.http.page.rates import Rates


def test_the_first_look_has_no_rate() -> None:
    assert Rates().of("t1", 5000, 7000, 10.0) == (0, 0)


def test_a_steady_rate_is_approached_and_a_pause_ends_it() -> None:
    rates = Rates()
    seen = [rates.of("t1", 1000 * second, 0, second)[0] for second in range(20)]
    assert seen[1] == 500
    assert seen == sorted(seen)
    assert seen[-1] == 1000
    ended = [rates.of("t1", 19000, 0, second)[0] for second in range(20, 40)]
    assert (ended[0], ended[-1]) == (500, 0)


def test_two_looks_at_once_do_not_divide_by_zero() -> None:
    rates = Rates()
    rates.of("t1", 0, 0, 1.0)
    before = rates.of("t1", 1000, 0, 2.0)
    assert rates.of("t1", 2000, 0, 2.0) == before


def test_a_counter_that_starts_again_is_no_negative_rate() -> None:
    rates = Rates()
    rates.of("t1", 5000, 0, 1.0)
    assert rates.of("t1", 0, 0, 2.0) == (0, 0)


def test_what_is_gone_begins_anew() -> None:
    rates = Rates()
    for name in ("t1", "t2", "t3"):
        rates.of(name, 0, 0, 1.0)
    rates.retain({"t1"})
    rates.forget("t1")
    assert [rates.of(name, 9000, 0, 2.0) for name in ("t1", "t2", "t3")] == [(0, 0)] * 3
