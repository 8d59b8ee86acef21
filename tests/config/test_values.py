"""`control.max_startups`: its syntax, and the probability of a refusal."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tunneld.config import ControlSettings
from tunneld.config.values import MAX_PREAUTH, Startups


@pytest.mark.parametrize("text", ["1:1:1", "10:30:60", "64:100:64", f"{MAX_PREAUTH}:1:{MAX_PREAUTH}"])
def test_a_valid_value_is_unchanged(text: str) -> None:
    assert str(Startups.parse(text)) == ControlSettings(max_startups=text).max_startups == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10", "not of the form START:RATE:FULL, such as 64:30:128"),
        ("10:30", "not of the form"),
        ("-1:30:60", "not of the form"),
        ("1:30:60\n", "not of the form"),
        ("0:30:60", "not valid: START"),
        ("61:30:60", "not valid: START"),
        (f"1:30:{MAX_PREAUTH + 1}", "not valid: START"),
        ("10:0:60", "RATE is a percentage from 1 to 100"),
        ("10:101:60", "RATE is a percentage from 1 to 100"),
    ],
)
def test_an_invalid_value_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ControlSettings(max_startups=text)


@pytest.mark.parametrize(
    ("unauthenticated", "odds"), [(0, 0), (9, 0), (10, 0.3), (35, 0.65), (59, 0.986), (60, 1), (99, 1)]
)
def test_the_odds_rise_linearly_from_rate_to_one(unauthenticated: int, odds: float) -> None:
    assert Startups(10, 30, 60).odds(unauthenticated) == pytest.approx(odds)


def test_the_default_leaves_half_of_all_connections_to_authenticated_ones() -> None:
    control = ControlSettings()
    assert control.startups.full * 2 == control.max_connections
    assert control.max_startups_per_source * 8 == control.startups.full
