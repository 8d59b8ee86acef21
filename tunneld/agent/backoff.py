"""How long to wait before trying again. Pure: the dice are an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator

FIRST = 1.0
"""Seconds: a daemon that is restarted is back in less."""
LONGEST = 60.0
"""Seconds: what a person who mended the network is willing to wait."""


def delays(dice: Callable[[], float], *, first: float = FIRST, longest: float = LONGEST) -> Iterator[float]:
    """Yield seconds for ever: a random half to whole of 1, 2, 4, 8, ... 60, 60, 60, ...

    `dice` returns a float in [0, 1). Half of each step is fixed, so that nobody hammers; half is chance, so that
    a thousand agents whose relay came back do not all come in the same instant.
    """
    step = min(first, longest)
    while True:
        yield step * (0.5 + 0.5 * dice())
        step = min(2 * step, longest)
