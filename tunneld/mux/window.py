"""How much a channel may receive before it must be heard from. Pure.

Whatever is granted may have to be held, when the visitor reads nothing. A stream needs a window as large as what is on
its way in a round trip, or it waits for credit; a thousand idle ones need next to nothing. So windows start small and
follow the reader, as TCP's do:

    grows     doubles, after a whole window was delivered within `TRIPS` round trips of the way while the reader kept
              up, if the carrier's budget allows
    shrinks   towards the first size, by whatever is delivered while more than half of it stands unread

A window that needs longer than that to go round is as large as the way can use: more of it would stand in queues, where
the small requests of everybody else on the carrier stand behind it. (TCP has the same problem, and no remedy in the
receiver; BBR's is the sender's: what is on its way is kept at twice what the rate fills in the shortest round trip.)

Credit is given back in quarters of the window: one AddCredit for many fragments, and never so late that the sender
stands still.
"""

from __future__ import annotations

from collections.abc import Callable

TRIPS = 2.0
"""Round trips within which a window goes round while the way is not full: one, and what the reading takes."""
SLACK = 0.002
"""Seconds beside them: some turns of two busy pumps. On a way without a delay it alone bounds the window, at 1.5 MiB
for a stream of 6 Gbit/s."""


class WindowBudget:
    """What the windows of one carrier have in common: the octets by which they may exceed their first size, together,
    and how fast things go round.
    """

    __slots__ = ("left", "now", "round_trip")

    def __init__(self, octets: int, now: Callable[[], float], round_trip: Callable[[], float]) -> None:
        """In seconds, `now` is a clock and `round_trip` the shortest that the way has shown lately, infinite where that
        is not known.
        """
        self.left = octets
        self.now = now
        self.round_trip = round_trip

    def reserve(self, octets: int) -> bool:
        """Take all of it or nothing; whether it was there."""
        if octets > self.left:
            return False
        self.left -= octets
        return True

    def release(self, octets: int) -> None:
        """Give back what was taken."""
        self.left += octets


class ReceiveWindow:
    """The receiving window of one channel, in octets."""

    __slots__ = ("_budget", "_first", "_marked", "_most", "_since_mark", "owed", "size")

    def __init__(self, first: int, most: int, budget: WindowBudget) -> None:
        """`first` is what the sender may send from the start, `most` the size it never exceeds."""
        self.size = self._first = first
        self.owed = 0  # delivered, and not granted anew
        self._most = most
        self._budget = budget
        self._marked = budget.now()
        self._since_mark = 0  # octets

    def delivered(self, octets: int, unread: int) -> int:
        """So many reached the reader and `unread` are still held; how many octets to grant now, often 0."""
        self.owed += octets
        self._since_mark += octets
        if 2 * unread > self.size:
            self._shrink()
        if 4 * self.owed < self.size:
            return 0
        grant, self.owed = self.owed, 0
        round_is_over = self._since_mark >= self.size <= self._most // 2
        if round_is_over and self._went_round_fast() and not unread and self._budget.reserve(self.size):
            grant += self.size
            self.size *= 2
        return grant

    def close(self) -> None:
        """Give back what the window had grown by. Harmless when repeated."""
        self._budget.release(self.size - self._first)
        self.size = self._first

    def _shrink(self) -> None:
        surplus = min(self.owed, self.size - self._first)
        self.owed -= surplus
        self.size -= surplus
        self._mark(self._budget.now())
        self._budget.release(surplus)

    def _went_round_fast(self) -> bool:
        """A window was delivered since the mark: did it take so little time that a larger one would be of use?"""
        now = self._budget.now()
        took = now - self._marked
        self._mark(now)
        return took <= TRIPS * self._budget.round_trip() + SLACK

    def _mark(self, now: float) -> None:
        self._marked = now
        self._since_mark = 0
