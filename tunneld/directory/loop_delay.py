"""How late the event loop is: the time by which a task wakes up after the moment that it asked for. Every visitor waits
as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

INTERVAL = 0.5
"""Seconds between two measurements: two wake-ups a second are not noticed, and a minute has enough of them."""
BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Seconds: from what nobody notices to what makes connections fail."""


class LoopDelay:
    """A histogram of delays."""

    def __init__(self) -> None:
        self.total = 0.0  # seconds, of all delays
        self._counts = [0] * (len(BOUNDS) + 1)  # the last one: above all bounds

    @property
    def buckets(self) -> Sequence[tuple[str, float]]:
        """How many delays were within each bound, as Prometheus has it."""
        sums, within = [], 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self._counts, strict=True):
            within += count
            sums.append((bound, float(within)))
        return sums

    def note(self, seconds: float) -> None:
        """The loop was late by so many seconds."""
        self.total += seconds
        self._counts[sum(seconds > bound for bound in BOUNDS)] += 1

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            due = trio.current_time() + INTERVAL
            await trio.sleep_until(due)
            self.note(max(0.0, trio.current_time() - due))
