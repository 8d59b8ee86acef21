"""Rates from counters: bytes per second between two looks. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

SMOOTHING = 0.5
"""The weight of the latest interval: a burst is seen at once, and is gone after some intervals."""


@dataclass(slots=True)
class _Counters:
    up: int
    down: int
    time: float
    rate_up: float = 0.0
    rate_down: float = 0.0


class Rates:
    """The rates of many things, each with two counters of bytes."""

    def __init__(self) -> None:
        self._last: dict[str, _Counters] = {}

    def of(self, name: str, up: int, down: int, now: float) -> tuple[int, int]:
        """Note the counters at this time. Returns bytes per second, up and down; 0 at the first look."""
        last = self._last.get(name)
        if last is None:
            self._last[name] = _Counters(up, down, now)
            return 0, 0
        seconds = now - last.time
        if seconds <= 0:
            return round(last.rate_up), round(last.rate_down)
        last.rate_up = _smooth(last.rate_up, (up - last.up) / seconds)
        last.rate_down = _smooth(last.rate_down, (down - last.down) / seconds)
        last.up, last.down, last.time = up, down, now
        return round(last.rate_up), round(last.rate_down)

    def forget(self, name: str) -> None:
        """Something is gone."""
        self._last.pop(name, None)

    def retain(self, names: Collection[str]) -> None:
        """Everything but these is gone."""
        if len(self._last) > len(names):
            self._last = {name: last for name, last in self._last.items() if name in names}


def _smooth(before: float, now: float) -> float:
    after = before + SMOOTHING * (max(0.0, now) - before)
    return 0.0 if after < 1 else after
