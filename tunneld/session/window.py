"""How much a channel may receive before it must be heard from. Pure.

Whatever is granted may have to be held, when the visitor reads nothing. A stream needs a window as large as what is on
its way in a round trip, or it waits for credit; a thousand idle ones need next to nothing. So windows start small and
follow the reader, as TCP's do:

    grows     doubles, after a whole window was delivered while the reader kept up, if the carrier's budget allows
    shrinks   towards the first size, by whatever is delivered while more than half of it stands unread

Credit is given back in quarters of the window: one AddCredit for many fragments, and never so late that the sender
stands still.
"""

from __future__ import annotations


class Budget:
    """Octets by which the windows of one carrier may exceed their first size, together."""

    __slots__ = ("left",)

    def __init__(self, octets: int) -> None:
        self.left = octets

    def take(self, octets: int) -> bool:
        """Take all of it or nothing; whether it was there."""
        if octets > self.left:
            return False
        self.left -= octets
        return True

    def give(self, octets: int) -> None:
        """Give back what was taken."""
        self.left += octets


class Window:
    """The receiving window of one channel, in octets."""

    __slots__ = ("_budget", "_first", "_most", "_since_growth", "owed", "size")

    def __init__(self, first: int, most: int, budget: Budget) -> None:
        """`first` is what the sender may send from the start, `most` the size it never exceeds."""
        self.size = self._first = first
        self.owed = 0  # delivered, and not granted anew
        self._most = most
        self._budget = budget
        self._since_growth = 0

    def delivered(self, octets: int, unread: int) -> int:
        """So many reached the reader and `unread` are still held; how many octets to grant now, often 0."""
        self.owed += octets
        self._since_growth += octets
        if 2 * unread > self.size:
            self._shrink()
        if 4 * self.owed < self.size:
            return 0
        grant, self.owed = self.owed, 0
        if not unread and self._since_growth >= self.size <= self._most // 2 and self._budget.take(self.size):
            grant += self.size
            self.size *= 2
            self._since_growth = 0
        return grant

    def close(self) -> None:
        """Give back what the window had grown by. Harmless when repeated."""
        self._budget.give(self.size - self._first)
        self.size = self._first

    def _shrink(self) -> None:
        surplus = min(self.owed, self.size - self._first)
        self.owed -= surplus
        self.size -= surplus
        self._since_growth = 0
        self._budget.give(surplus)
