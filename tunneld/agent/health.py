"""Whether the local server is well, judged from one look after another. Pure.

                     `unhealthy_after` failures in a row
        healthy ─────────────────────────────────────────► unhealthy
                ◄─────────────────────────────────────────
                     `healthy_after` successes in a row

It counts as healthy until shown otherwise: an agent that starts is of use at once, and a server that is not there yet
refuses its first visitors by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

INTERVAL = 10.0
"""Seconds between two looks: with three failures half a minute until it shows, as the balancers of this field do."""
TIMEOUT = 5.0
"""Seconds for an answer: a healthy server on the same machine takes milliseconds, one that swaps takes seconds."""
UNHEALTHY_AFTER = 3
"""Failures in a row: one is a restart."""
HEALTHY_AFTER = 2
"""Successes in a row: one can be luck."""
MAX_CHECKS = 100
"""For either of the two; with the shortest useful interval that is minutes."""
PATH = "/"
"""What is asked for over HTTP."""

How = Literal["tcp", "http"]


class UnhealthyPolicy(Enum):
    """What to do with visitors while the local server is unhealthy."""

    ANSWER = "answer"  # say so, where the visitor speaks HTTP; otherwise close at once
    WITHDRAW = "withdraw"  # take none: the relay has others of the same tunnel, or the visitor waits
    TELL = "tell"  # as ever


@dataclass(frozen=True, slots=True)
class Check:
    """How the local server is looked at, and what follows. Times in seconds, `unhealthy_after` and `healthy_after` as
    counts of looks.
    """

    how: How
    path: str = PATH
    interval: float = INTERVAL
    timeout: float = TIMEOUT
    unhealthy_after: int = UNHEALTHY_AFTER
    healthy_after: int = HEALTHY_AFTER
    conduct: UnhealthyPolicy = UnhealthyPolicy.ANSWER


class HealthState:
    """What all looks so far amount to."""

    def __init__(self, check: Check) -> None:
        self.healthy = True
        self._needed = {True: check.unhealthy_after, False: check.healthy_after}  # by what it is now
        self._against = 0  # looks in a row that speak against what it is now

    def look(self, *, passed: bool) -> bool:
        """One more look; tells whether it changed what the local server counts as."""
        self._against = 0 if passed is self.healthy else self._against + 1
        if self._against < self._needed[self.healthy]:
            return False
        self.healthy, self._against = passed, 0
        return True
