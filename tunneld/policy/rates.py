"""Rate limits for many sources. Pure: time is an argument.

A rate is a bucket of tokens, stored as one number: the time at which the bucket is full again (the generic cell rate
algorithm, ITU-T I.371). Each event moves that time one interval into the future, and is allowed while it lies no
further ahead than the whole bucket. Times are integers of nanoseconds, so the limit is exact:

    never more events of one source, in any window of t seconds, than burst + rate * t

A source with a full bucket needs no memory, and no other source is ever forgotten. Sources are forgotten by
generations, without a search: a source goes once it has been idle for the time in which an empty bucket fills. Beyond
`max_sources` remembered sources, new ones share one bucket until there is space, and a source that is remembered later
starts with what that bucket holds. So a flood from countless sources can lock new sources out, but no source exceeds
its limit, no remembered source loses tokens, and memory is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass

SECOND = 1_000_000_000
"""Nanoseconds."""
MAX_RATE_COUNT = 1_000_000
"""Events in a second, minute or hour: more visitors than a machine accepts in a second, and an interval of 1 µs."""

_RATE = re.compile(r"([1-9][0-9]{0,6})(?:/(s|m|h|day|week))?")
_PERIODS = {"s": 1, "m": 60, "h": 3600, "day": 86400, "week": 7 * 86400}


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` events in a period of seconds; that many may also happen at the same moment."""

    count: int
    period: int

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read `10` or `10/s`, `30/m`, `100/h`, `50/day`, `20/week`. Raises `ValueError`."""
        match = _RATE.fullmatch(text)
        if match is None or int(match[1]) > MAX_RATE_COUNT:
            raise ValueError(f"not a rate: N, N/s, N/m, N/h, N/day or N/week with N between 1 and {MAX_RATE_COUNT}")
        return cls(int(match[1]), _PERIODS[match[2] or "s"])

    def within(self, ceiling: Rate) -> bool:
        """Whether it allows no more than `ceiling`, neither at one moment nor in the long run."""
        return self.count <= ceiling.count and self.count * ceiling.period <= ceiling.count * self.period

    @property
    def interval(self) -> int:
        """Nanoseconds per token, rounded up, so that rounding never allows more events."""
        return -(-self.period * SECOND // self.count)

    def __str__(self) -> str:
        unit = next(unit for unit, period in _PERIODS.items() if period == self.period)
        return f"{self.count}/{unit}"


class Buckets:
    """A bucket of tokens for each source. `len` is the number of remembered sources."""

    def __init__(self, rate: Rate, max_sources: int) -> None:
        self._interval = rate.interval
        self._size = rate.count * rate.interval  # nanoseconds from empty to full
        self._max_sources = max_sources
        self._recent: dict[Hashable, int] = {}  # by source: when its bucket is full
        self._older: dict[Hashable, int] = {}  # the same for sources that took no token in this generation
        self._generation_began_at = 0
        self._shared_full_at = 0  # of the bucket of all sources for which there is no space

    def __len__(self) -> int:
        return len(self._recent) + len(self._older)

    def take(self, source: Hashable, now: float) -> bool:
        """Take a token of `source` at `now` (seconds). Returns False, and changes nothing, where it has none."""
        at = int(now * SECOND)
        self._advance_generation(at)
        known = self._recent.get(source) or self._older.get(source)
        full_at = max(at, self._shared_full_at if known is None else known) + self._interval
        if full_at - at > self._size:
            return False
        if known is None and len(self) >= self._max_sources:
            self._shared_full_at = full_at
        else:
            self._older.pop(source, None)
            self._recent[source] = full_at
        return True

    def wait(self, source: Hashable, now: float) -> float:
        """Seconds from `now` until `source` has a token; 0.0: it has one."""
        at = int(now * SECOND)
        self._advance_generation(at)
        known = self._recent.get(source) or self._older.get(source)
        full_at = max(at, self._shared_full_at if known is None else known) + self._interval
        return max(0, full_at - at - self._size) / SECOND

    def _advance_generation(self, at: int) -> None:
        """Forget the sources that took nothing for as long as a bucket takes to fill: their buckets are full."""
        if at - self._generation_began_at >= self._size:
            self._older = self._recent if at - self._generation_began_at < 2 * self._size else {}
            self._recent = {}
            self._generation_began_at = at


class LogLimiter:
    """Lets some of many similar messages through and counts the suppressed ones, by kind of message.

    Beyond `max_kinds`, new kinds share one bucket, and the counts of suppressed messages start anew.
    """

    def __init__(self, rate: Rate, max_kinds: int = 1) -> None:
        self._buckets = Buckets(rate, max_kinds)
        self._max_kinds = max_kinds
        self._suppressed: dict[Hashable, int] = {}

    def __len__(self) -> int:
        """Kinds remembered, of which some have a bucket and a count: at most twice `max_kinds`."""
        return len(self._buckets) + len(self._suppressed)

    def passes(self, now: float, kind: Hashable = "") -> int | None:
        """Return None where this message is to be suppressed; otherwise the number of messages of its kind that were
        suppressed since the last that passed.
        """
        if self._buckets.take(kind, now):
            return self._suppressed.pop(kind, 0)
        if kind not in self._suppressed and len(self._suppressed) >= self._max_kinds:
            self._suppressed.clear()
        self._suppressed[kind] = self._suppressed.get(kind, 0) + 1
        return None
