"""When certificates are due, when failed orders are tried again, how many orders there may be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.acme.schedule import JITTER, ROUNDING, OrderLimits, renewal_at, retry_delay, spread
from tunneld.config.certificates import AcmeSettings
from tunneld.policy.rates import Rate

DAY = 86400.0
NAMES = st.from_regex(r"[a-z]{1,10}\.example\.org", fullmatch=True)


@given(NAMES, st.floats(1, 400 * DAY), st.none() | st.floats(-400 * DAY, 800 * DAY))
def test_a_certificate_is_renewed_while_half_of_its_margin_is_left(
    name: str, life: float, suggestion: float | None
) -> None:
    settings = AcmeSettings()
    begin = 1e9
    at = renewal_at(settings, name, begin, begin + life, None if suggestion is None else begin + suggestion)
    left = life * (0.5 if life < 10 * DAY else 0.33)
    assert at <= begin + life - left / 2 + 1e-3
    if suggestion is None:
        assert begin + life - left - 1e-3 <= at <= begin + life - left * (1 - JITTER) + 1e-3


@pytest.mark.parametrize(
    ("days", "earliest", "latest"),
    [(90, 60.3, 63.3), (10, 6.7, 7.03), (9.99, 4.99, 5.5), (6, 3, 3.3)],
    ids=["90 days", "ten days is not short", "just below", "6 days"],
)
def test_the_edges_of_a_short_life(days: float, earliest: float, latest: float) -> None:
    for number in range(100):
        at = renewal_at(AcmeSettings(), f"{number}.example.org", 0, days * DAY)
        assert earliest * DAY <= at <= latest * DAY


def test_a_suggestion_of_the_authority_is_followed() -> None:
    assert renewal_at(AcmeSettings(), "a.example.org", 0, 90 * DAY, 3 * DAY) == 3 * DAY
    assert renewal_at(AcmeSettings(), "a.example.org", 0, 90 * DAY, -1) == -1  # it has revoked the certificate


def test_the_spread_of_a_name_is_the_same_after_a_restart() -> None:
    assert spread("a.example.org") == spread("a.example.org") != spread("b.example.org")
    assert 0 <= min(spread(f"{number}") for number in range(1000)) < 0.01


def test_retries_double_up_to_a_day() -> None:
    assert [retry_delay(count, 300, DAY) for count in (1, 2, 3, 9, 10)] == [300, 600, 1200, 76800, DAY]
    assert retry_delay(10**6, 300, DAY) == DAY


@given(st.lists(st.tuples(st.sampled_from(["", "alice", "bob"]), st.floats(0, 5000)), max_size=120))
def test_no_window_has_more_orders_than_the_limits_say(attempts: list[tuple[str, float]]) -> None:
    limits, now = OrderLimits(Rate(5, 3600), Rate(3, 7200)), 1e9
    placed: list[tuple[str, float]] = []
    for owner, pause in attempts:
        now += pause
        wait, limit = limits.take(owner, now)
        if wait:
            assert limit in {"max_orders", "max_orders_per_owner"}
            later, _ = limits.take(owner, now + wait)
            assert later == 0  # it said when
            placed.append((owner, now + wait))
            now += wait
        else:
            placed.append((owner, now))
    times = [when for _, when in placed]
    for first, last in itertools.combinations(range(len(times)), 2):
        assert last - first + 1 <= 5 + (times[last] - times[first]) * 5 / 3600 + 1e-3
    for name in ("alice", "bob"):
        own = [when for owner, when in placed if owner == name]
        for first, last in itertools.combinations(range(len(own)), 2):
            assert last - first + 1 <= 3 + (own[last] - own[first]) * 3 / 7200 + 1e-3


def test_a_refused_order_of_one_owner_costs_the_relay_nothing() -> None:
    limits = OrderLimits(Rate(3, 3600), Rate(1, 7 * 86400))
    assert limits.take("alice", 0.0) == (0.0, "")
    for _ in range(10):
        wait, limit = limits.take("alice", 0.0)
        assert (wait, limit) == (7 * 86400 + ROUNDING, "max_orders_per_owner")
    assert limits.take("bob", 0.0) == (0.0, "")
    assert limits.take("", 0.0) == (0.0, "")  # the relay itself has no owner's limit
    assert limits.take("", 0.0) == (1200.0 + ROUNDING, "max_orders")
