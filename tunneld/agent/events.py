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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tunneld.policy.rates import Rate

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


FAILURE_REPORTS = Rate(1, 5)
"""Reports of the same failure: one in 5 seconds shows that it lasts, and leaves the others readable."""
MAX_MESSAGES = 100
"""Kinds of failure remembered. Reasons come from a short list; this only bounds what an unexpected one can cost."""
