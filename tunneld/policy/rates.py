"""How often something may happen, kept for each of many sources. Pure: time is an argument.

A rate is a bucket of tokens, kept as one number: the time at which the bucket is full again (the generic cell rate
algorithm, ITU-T I.371). What happens moves that time by one interval into the future, and may happen while it lies no
further ahead than the whole bucket. Nanoseconds in integers, so the law is exact:

    never more from one source, in any window of t seconds, than burst + rate * t

A source whose bucket is full has nothing that must be remembered, and no other is ever forgotten. Forgetting goes by
generations, without a search: what was not touched for the time that an empty bucket takes to fill. Where more than
`max_sources` are to be remembered, newcomers share one bucket until there is room, and whoever is remembered later
starts with what that one holds. So a flood from countless sources can keep newcomers out, but nobody gets more than
the law says, nobody known loses anything, and memory stays what it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SECOND = 1_000_000_000
"""Nanoseconds."""
MAX_COUNT = 1_000_000
"""In a second, a minute or an hour: more visitors than a machine accepts in a second, and an interval of 1 µs."""

_RATE = re.compile(r"([1-9][0-9]{0,6})(?:/([smh]))?")
_PERIODS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Rate:
    """So many new visitors in a period of seconds; as many may come at once."""

    count: int
    period: int

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read `10` or `10/s`, `30/m`, `100/h`. Raises `ValueError`."""
        match = _RATE.fullmatch(text)
        if match is None or int(match[1]) > MAX_COUNT:
            raise ValueError(f"not a rate: N, N/s, N/m or N/h with N between 1 and {MAX_COUNT}")
        return cls(int(match[1]), _PERIODS[match[2] or "s"])

    def within(self, ceiling: Rate) -> bool:
        """Whether it allows no more than `ceiling` does, neither at once nor in the long run."""
        return self.count <= ceiling.count and self.count * ceiling.period <= ceiling.count * self.period

    @property
    def interval(self) -> int:
        """Nanoseconds in which one token comes, rounded up: rounding never lets more visitors in."""
        return -(-self.period * SECOND // self.count)

    def __str__(self) -> str:
        unit = next(unit for unit, period in _PERIODS.items() if period == self.period)
        return f"{self.count}/{unit}"


class Buckets:
    """A bucket of tokens for each source; see the module for what is remembered and what is forgotten."""

    def __init__(self, rate: Rate, max_sources: int) -> None:
        self._interval = rate.interval
        self._size = rate.count * rate.interval  # nanoseconds from empty to full
        self._max_sources = max_sources
        self._recent: dict[int, int] = {}  # source: when its bucket is full
        self._older: dict[int, int] = {}  # the same, for those that took nothing since the last turn
        self._turned_at = 0
        self._newcomers = 0  # when the bucket is full that newcomers share while there is no room for one of their own

    def __len__(self) -> int:
        return len(self._recent) + len(self._older)

    def take(self, source: int, now: float) -> bool:
        """Take a token of `source` at `now` (seconds); False where it has none, and then nothing changes."""
        at = int(now * SECOND)
        self._turn(at)
        known = self._recent.get(source) or self._older.get(source)
        full_at = max(at, self._newcomers if known is None else known) + self._interval
        if full_at - at > self._size:
            return False
        if known is None and len(self) >= self._max_sources:
            self._newcomers = full_at
        else:
            self._older.pop(source, None)
            self._recent[source] = full_at
        return True

    def _turn(self, at: int) -> None:
        """Forget the sources that took nothing for as long as a bucket takes to fill: theirs are full."""
        if at - self._turned_at >= self._size:
            self._older = self._recent if at - self._turned_at < 2 * self._size else {}
            self._recent = {}
            self._turned_at = at


class LogLimiter:
    """Lets some of many like things through, and counts the others."""

    def __init__(self, rate: Rate) -> None:
        self._bucket = Buckets(rate, 1)
        self._left_out = 0

    def passes(self, now: float) -> int | None:
        """None: leave this one out. Otherwise let it through, and say that so many were left out before it."""
        if not self._bucket.take(0, now):
            self._left_out += 1
            return None
        left_out, self._left_out = self._left_out, 0
        return left_out
