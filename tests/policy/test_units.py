"""Sizes, times and counts as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.policy.units import count, format_duration, format_size, parse_duration


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (10_240, "10 KiB"), (1_234_567, "1.2 MiB"), (2**40, "1.0 TiB")],
)
def test_sizes(number: int, text: str) -> None:
    assert format_size(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0s"), (59, "59s"), (185, "3m05s"), (7800, "2h10m"), (5 * 86400 + 3 * 3600, "5d03h")]
)
def test_durations(number: int, text: str) -> None:
    assert format_duration(number) == text


@given(st.integers(0, 2**62))
def test_no_size_needs_more_than_four_digits(number: int) -> None:
    assert len(format_size(number).partition(" ")[0].replace(".", "")) <= 4


def test_counts() -> None:
    assert [count(number, "tunnel") for number in (0, 1, 2)] == ["0 tunnels", "1 tunnel", "2 tunnels"]


@pytest.mark.parametrize(("text", "seconds"), [("1", 1), ("90s", 90), ("30m", 1800), ("2h", 7200), ("7d", 604_800)])
def test_durations_are_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5h", "2 h", "2w", "h", "1h30m", "٣"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a time"):
        parse_duration(text)
