"""Rates of traffic, from counters that are read now and then. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

T = TypeVar("T")

RATE_WINDOW = 3.0
"""Seconds over which a rate is taken: shorter, and figures jump; longer, and they are late."""


class RateMeter:
    """Bytes per second in both directions, from counters that are read now and then."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int, int]] = deque()

    def read(self, now: float, up: int, down: int) -> tuple[int, int]:
        """Take a reading; returns the rates since the first one in the window."""
        while len(self._readings) > 1 and self._readings[1][0] <= now - RATE_WINDOW:
            self._readings.popleft()
        then, up_then, down_then = self._readings[0] if self._readings else (now, up, down)
        if not self._readings or now > self._readings[-1][0]:
            self._readings.append((now, up, down))
        elapsed = now - then
        if elapsed <= 0:
            return 0, 0
        return int(max(0, up - up_then) / elapsed), int(max(0, down - down_then) / elapsed)


class Meters:
    """A meter for each of several things; that of a thing that is gone is forgotten."""

    def __init__(self) -> None:
        self._meters: dict[Hashable, RateMeter] = {}

    def read(
        self, now: float, things: Iterable[T], key: Callable[[T], Hashable], moved: Callable[[T], tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """The rates of all things, of which `key` tells one from another and `moved` has the bytes up and down."""
        former, self._meters, rates = self._meters, {}, []
        for thing in things:
            name = key(thing)
            self._meters[name] = meter = former.get(name) or RateMeter()
            rates.append(meter.read(now, *moved(thing)))
        return rates
