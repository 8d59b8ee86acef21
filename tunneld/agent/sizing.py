"""How many connections to keep parked at the relay. Pure.

A visitor who finds a parked connection is served at once; one who finds none waits a round trip until a new one has
been dialled. While connections are being replaced the visitors of one round trip must find others, so the pool holds
what arrives in half a second: enough for a relay on the other side of the world, and for bursts.

    it grows      at once, inside the burst           whatever arrived in this window wants twice as many
    it shrinks    by half per review, when quiet      never below what the busiest window since the last review wants
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = 0.25
"""Seconds over which arrivals are counted: a long round trip."""
RESIZE_INTERVAL = 15.0
"""Seconds between looks at whether the pool is larger than it needs to be; parked connections cost next to nothing."""
AHEAD = 2
"""Windows of arrivals that the pool holds: one is being replaced while the other is used."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """The pool's least and most, in connections; 1 <= least <= most."""

    least: int = 8
    most: int = 200

    def clamp(self, size: int) -> int:
        """The nearest size that is allowed."""
        return max(self.least, min(size, self.most))


def wanted(arrivals: int, limits: PoolLimits) -> int:
    """The size that so many visitors in one window want."""
    return limits.clamp(AHEAD * arrivals)


def grown(size: int, arrivals: int, limits: PoolLimits) -> int:
    """The size from now on, when the window has seen `arrivals` so far: never less than before."""
    return max(size, wanted(arrivals, limits))


def shrunk(size: int, busiest: int, limits: PoolLimits) -> int:
    """The size after a review, when the busiest window since the last one saw `busiest` visitors: never more."""
    return min(size, max(wanted(busiest, limits), size // 2))
