"""What the agent reports about itself: events, and how each is limited.

    opened       the tunnel is open; with several public ports, also ports   address uri id
    inspecting   the inspector listens; the link to its page                 url
    visitor      a visitor arrived, and the local server is dialled          visitor
    admitted     a visitor of a private tunnel has proved its key            visitor peer id
    connected    `tunnel visit` has a session with the host of the tunnel    peer id
    idle         it has ended that session, which nothing used              peer seconds
    broken       something arrived in it that the other end has not sent     peer reason
    visiting     a client of `tunnel visit` has reached the tunnel           visitor peer id
    left         that visitor's connection ended                             visitor up down reason
    failed       a visitor could not be served                               visitor reason repeated
    trouble      connections to the relay were lost or could not be made     reason repeated
    reconnecting the tunnel or the relay was lost; retried after `delay`     reason delay
    resumed      the control connection is back, the tunnel is still open    address id
    unhealthy    the local server fails its health checks                    reason
    healthy      it passes them again
    certified    with https_here: a certificate was obtained, or renewed     host
    uncertified  none could be, here or by the relay; it is tried again      host reason
    draining     told to stop: no new visitors, `delay` for the present ones id visitors delay
    ended        this exposure failed permanently, the other ones continue   reason
    closed       the end                                                     id reason served failed up down

`repeated` is the number of similar events that were left out since the last one reported. `delay` is in seconds, `up`
(to the local server) and `down` (to visitors) in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tunneld.policy.rates import Rate

Field = str | int | float
"""A value of an event."""


class Reporter(Protocol):
    """Receives events. Must neither block nor raise, because the engine's callbacks call it."""

    @property
    def wants_visitors(self) -> bool:
        """Whether to report `visitor` and `left`, which cost time for each visitor."""

    def report(self, event: str, /, **fields: Field) -> None:
        """Report one event with its fields."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of one exposure: visitors `now`, `served` and `failed`, `parked` connections, bytes `up` and `down`."""

    now: int = 0
    served: int = 0
    failed: int = 0
    parked: int = 0
    up: int = 0
    down: int = 0


@dataclass(slots=True)
class LatestVisitor:
    """A visitor of one exposure that is connected, or has left a while ago. Times are in `trio.current_time`."""

    visitor: str
    since: float
    up: int
    down: int
    left_at: float | None = None
    reason: str = ""  # why it has left


@dataclass(frozen=True, slots=True)
class Activity:
    """What an exposure does, for a view of it. `latency` is that of the relay, in seconds."""

    stats: Stats = field(default_factory=Stats)
    latest: Sequence[LatestVisitor] = ()  # the latest visitors, newest first
    latency: float | None = None


MAX_LATEST = 20
"""Visitors that `Activity` has: as many as a screen shows."""

FAILURE_REPORTS = Rate(1, 5)
"""Reports of the same failure: one in 5 seconds shows that it lasts, and leaves the others readable."""
MAX_MESSAGES = 100
"""Kinds of failure remembered. Reasons come from a short list; this only bounds what an unexpected one can cost."""
