"""How long to wait before trying again. Pure: the dice are an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator

FIRST_DELAY = 0.2
"""Seconds: what only hiccuped is back by then, and nobody notices the gap."""
GROWTH = 2.5
"""0.2, 0.5, 1.25, 3.1, ...: a daemon that is restarted meets the second or third try, the eighth is a minute apart."""
MAX_DELAY = 60.0
"""Seconds: what a person who mended the network is willing to wait."""
LASTING = 30.0
"""Seconds for which a connection must have lasted to count as a success. One that is lost at once, again and again, is
tried ever more slowly, like one that cannot be made.
"""


def delays(dice: Callable[[], float], *, first: float = FIRST_DELAY, longest: float = MAX_DELAY) -> Iterator[float]:
    """Yield seconds for ever: a random half to whole of 0.2, 0.5, 1.25, 3.125, ... 48.8, 60, 60, 60, ...

    `dice` returns a float in [0, 1). Half of each step is fixed, so that nobody hammers; half is chance, so that
    a thousand agents whose relay came back do not all come in the same instant.
    """
    step = min(first, longest)
    while True:
        yield step * (0.5 + 0.5 * dice())
        step = min(GROWTH * step, longest)


class Backoff:
    """The waits of one thing that is lost and sought again."""

    def __init__(self, dice: Callable[[], float]) -> None:
        self._dice = dice
        self._waits = delays(dice)

    def after(self, lasted: float) -> float:
        """Seconds to wait now that it is lost; it had `lasted` so many, 0 where it could not even be made."""
        if lasted >= LASTING:
            self.forget()
        return next(self._waits)

    def forget(self) -> None:
        """Begin with the short waits again: the reason for the long ones may be gone."""
        self._waits = delays(self._dice)
