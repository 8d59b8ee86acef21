"""Sources that failed to prove who they are, and how long each is refused. Pure: time is an argument.

    failures     1    2    3    4    5   ...
    refused      -    -    p   2p   4p   ...  max_penalty             from the last failure on

A source that has not failed for `max_penalty` since it was last refused, or since it failed, is forgiven all at once.
With the defaults, and the best of timing, that is 34 guesses an hour from one source.

Memory holds `max_sources` sources. Beyond that, the one with the fewest failures goes, of those the one whose last
failure is the oldest. To be forgotten, a source would need that many others that have failed at least as often: whoever
has those has as many fresh ones, of which each may guess anyway, and gains nothing by clearing one. Nor is anybody
refused for what others did, as with one penalty that all newcomers share: then a flood would lock everybody out.
"""

from __future__ import annotations

from dataclasses import dataclass

FREE_FAILURES = 2
"""Failures without a penalty: a person's slips, and OpenSSH's 15 s of tolerance at 5 s each."""

MAX_FAILURES = FREE_FAILURES + 36
"""Failures after which a penalty does not grow: doubled 35 times, 1 ms is more than a year, the longest there is."""

MAX_SOURCES = 16_384
"""Sources remembered, at about 250 octets each: 4 MiB. As many as `tunnels.max_sources` has for visitors."""


@dataclass(frozen=True, slots=True)
class _Record:
    until: float  # refused until then
    forgiven_at: float


class Penalties:
    """What each source has coming. Times are seconds of one clock that does not go back."""

    def __init__(self, max_sources: int = MAX_SOURCES) -> None:
        self._max_sources = max_sources
        # By failures, and there in the order of the last one, so that who goes next is always the first of a row.
        self._rows: list[dict[int, _Record]] = [{} for _ in range(MAX_FAILURES + 1)]
        self._failures: dict[int, int] = {}  # in which row a source is

    def __len__(self) -> int:
        return len(self._failures)

    def add(self, source: int, now: float, penalty: float, max_penalty: float) -> None:
        """`source` failed at `now`; `penalty` is what the first failure beyond `FREE_FAILURES` costs, in seconds."""
        self._forgive(now)
        failures = min(self._drop(source) + 1, MAX_FAILURES)
        if len(self) >= self._max_sources:
            self._evict()
        length = min(penalty * 2.0 ** (failures - FREE_FAILURES - 1), max_penalty) if failures > FREE_FAILURES else 0.0
        self._rows[failures][source] = _Record(now + length, now + length + max_penalty)
        self._failures[source] = failures

    def remaining(self, source: int, now: float) -> float:
        """For how many more seconds the source is refused; 0.0 where it is not."""
        if (failures := self._failures.get(source)) is None:
            return 0.0
        return max(0.0, self._rows[failures][source].until - now)

    def active(self, now: float) -> int:
        """How many sources are refused now. Looks at all of them: for people, and not for each connection."""
        return sum(record.until > now for row in self._rows[FREE_FAILURES + 1 :] for record in row.values())

    def _forgive(self, now: float) -> None:
        for row in self._rows:
            while row and row[first := next(iter(row))].forgiven_at <= now:
                self._drop(first)

    def _evict(self) -> None:
        row = next(row for row in self._rows if row)
        self._drop(next(iter(row)))

    def _drop(self, source: int) -> int:
        """Forget a source; returns how often it had failed."""
        failures = self._failures.pop(source, 0)
        self._rows[failures].pop(source, None)
        return failures
