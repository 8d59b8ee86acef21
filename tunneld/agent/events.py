"""What the agent says of itself, to whoever asked to be told.

    opened       the tunnel is open                                  address uri id
    visitor      a visitor came, and the local server is dialled     visitor
    left         that visitor's relay ended                          visitor up down reason
    failed       a visitor could not be served                       visitor reason repeated
    trouble      parked connections do not last                      reason repeated
    reconnecting tunnel or relay went; tried again after delay       reason delay
    resumed      the control connection is back, the tunnel stands   address id
    unhealthy    the local server fails its checks                   reason
    healthy      it passes them again
    draining     told to end: nobody new, visitors have delay        id visitors delay
    ended        this exposure failed for good, the others go on     reason
    closed       the end                                             id reason served failed up down

`repeated` is the number of like events that were kept back since the last one that was told. `delay` is in seconds,
`up` (to the local server) and `down` in octets.

Saying the same thing once, and later how often it was true. Pure.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

Field = str | int | float
"""A value of an event."""


class Reporter(Protocol):
    """Who is told. Must not wait and must not raise: events come from inside the engine."""

    @property
    def wants_visitors(self) -> bool:
        """Whether it wants `visitor` and `left`, which cost time for each visitor."""

    def report(self, event: str, /, **fields: Field) -> None:
        """Something happened."""


@dataclass(frozen=True, slots=True)
class Stats:
    """How an agent is doing: visitors, connections, octets."""

    now: int = 0
    served: int = 0
    failed: int = 0
    parked: int = 0
    up: int = 0
    down: int = 0


EVERY = 5.0
"""Seconds between two reports of the same failure: it is seen to last, and the rest can be read."""
MAX_MESSAGES = 100
"""Kinds of failure remembered. Reasons come from a short list; this only bounds what a strange one can cost."""


class RepeatLimiter:
    """Which of many like reports to let through."""

    def __init__(self, every: float = EVERY) -> None:
        self._every = every
        self._seen: dict[Hashable, tuple[float, int]] = {}  # when it was last let through, how many were not since

    def admit(self, kind: Hashable, now: float) -> int | None:
        """None: keep this one to yourself. Otherwise the number of like ones that were kept back since the last."""
        last, kept_back = self._seen.get(kind, (-self._every, 0))
        if now - last < self._every:
            self._seen[kind] = (last, kept_back + 1)
            return None
        if len(self._seen) >= MAX_MESSAGES:
            self._seen.clear()
        self._seen[kind] = (now, 0)
        return kept_back
