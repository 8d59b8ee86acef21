"""How long to wait between attempts: exponential backoff with jitter. No clock and no sleep, only numbers."""

from __future__ import annotations

import random
from collections.abc import Callable

FIRST_DELAY = 0.2
"""Seconds before the first retry: a short hiccup is over by then, and users do not notice the gap."""
GROWTH = 2.5
"""0.2, 0.5, 1.25, 3.1, ...: a relay that restarts is back at the second or third attempt; from the eighth on, attempts
are a minute apart."""
MAX_DELAY = 60.0
"""Seconds: as long as a user who repaired the network is willing to wait."""
MIN_UPTIME = 30.0
"""Seconds that a connection must last to count as a success. One that is lost immediately, again and again, is retried
ever more slowly, like one that cannot be made at all.
"""


class Backoff:
    """The delays between the attempts at one thing: a random half to whole of 0.2, 0.5, 1.25, 3.125, ... 48.8, 60, 60.

    Half of each step is fixed, so that no agent hammers the relay. The other half is random, so that a thousand agents
    whose relay came back do not all reconnect at the same moment.
    """

    def __init__(
        self, dice: Callable[[], float] = random.random, *, first: float | None = None, longest: float | None = None
    ) -> None:
        """`dice` returns a float in [0, 1). `first` and `longest` are seconds; default: `FIRST_DELAY`, `MAX_DELAY`."""
        self._dice = dice
        self._longest = MAX_DELAY if longest is None else longest
        self._first = min(FIRST_DELAY if first is None else first, self._longest)
        self._step = self._first

    def next_delay(self) -> float:
        """Seconds to wait before the next attempt; each step is longer, up to the longest."""
        delay = self._step * (0.5 + 0.5 * self._dice())
        self._step = min(GROWTH * self._step, self._longest)
        return delay

    def delay_after(self, uptime: float) -> float:
        """As `next_delay`, for a connection that lasted `uptime` seconds (0: could not be made); resets after a long
        one.
        """
        if uptime >= MIN_UPTIME:
            self.reset()
        return self.next_delay()

    def reset(self) -> None:
        """Start with short delays again, after a success or when the cause of the failures may be gone."""
        self._step = self._first
