"""Rates from counters."""

from __future__ import annotations

from tunneld.cli.meter import RATE_WINDOW, Meters, RateMeter


def test_a_rate_is_that_of_the_last_seconds() -> None:
    meter = RateMeter()
    assert meter.read(0.0, 0, 0) == (0, 0)
    assert meter.read(0.0, 0, 0) == (0, 0)
    assert meter.read(1.0, 100, 2000) == (100, 2000)
    for second in range(2, 10):
        rates = meter.read(float(second), 100, 2000)
    assert rates == (0, 0)
    assert meter.read(9.0 + RATE_WINDOW, 400, 2000) == (100, 0)


def test_a_counter_that_begins_again_has_no_negative_rate() -> None:
    meter = RateMeter()
    meter.read(0.0, 1000, 1000)
    assert meter.read(1.0, 0, 2000) == (0, 1000)


def test_a_thing_that_is_gone_is_forgotten() -> None:
    meters, counters = Meters(), {"a": (0, 0), "b": (0, 0)}

    def read(now: float) -> list[tuple[int, int]]:
        return meters.read(now, counters.items(), lambda item: item[0], lambda item: item[1])

    assert read(0.0) == [(0, 0), (0, 0)]
    counters["a"] = (10, 20)
    del counters["b"]
    assert read(1.0) == [(10, 20)]
    counters["b"] = (500, 500)
    assert read(2.0)[1] == (0, 0)
