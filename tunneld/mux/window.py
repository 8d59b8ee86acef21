"""Receive windows: how many bytes a channel may receive before the peer has to wait for credit. Pure.

All granted credit may have to be buffered, when the visitor reads nothing. A stream needs a window as large as its
bandwidth-delay product, or it waits for credit; a thousand idle streams need next to nothing. So windows start small
and follow the reader, as TCP's do:

    grows     doubles, when a whole window was delivered within `GROWTH_ROUND_TRIPS` round trips while the reader kept
              up, if the carrier's budget allows
    shrinks   towards the initial size, by the bytes delivered while more than half of the window is unread

A window that takes longer than that is as large as the path can use: more of it would stand in queues, in front of the
small requests of all other channels of the carrier. (TCP has the same problem, and no remedy in the receiver; BBR's is
in the sender: it keeps the data in flight at twice what the rate fills in the shortest round trip.)

Credit is granted in quarters of the window: one AddCredit for many frames, and early enough that the sender never
stalls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

GROWTH_ROUND_TRIPS: Final = 2.0
"""A window grows if a whole window is delivered within this many round trips: one for the path, one for reading it."""
GROWTH_SLACK: Final = 0.002
"""Seconds added to these round trips: some turns of two busy pumps. On a path without delay this alone bounds the
window, at 1.5 MiB for a stream of 6 Gbit/s."""


class WindowBudget:
    """What the windows of one carrier share: the bytes by which they may exceed their initial sizes, a clock, and the
    round trip time.
    """

    __slots__ = ("available", "now", "round_trip")

    def __init__(self, size: int, now: Callable[[], float], round_trip: Callable[[], float]) -> None:
        """`size` is in bytes. `now` is a clock and `round_trip` returns the shortest recent round trip, both in
        seconds; infinite if it is not known.
        """
        self.available = size
        self.now = now
        self.round_trip = round_trip

    def reserve(self, size: int) -> bool:
        """Take `size` bytes from the budget, all or nothing. Returns whether they were available."""
        if size > self.available:
            return False
        self.available -= size
        return True

    def release(self, size: int) -> None:
        """Give `size` reserved bytes back."""
        self.available += size


class ReceiveWindow:
    """The receive window of one channel; all numbers are bytes.

    Invariant: bytes unread + credit the peer still has + `ungranted` == `size`.
    """

    __slots__ = ("_budget", "_delivered", "_initial_size", "_max_size", "_started", "size", "ungranted")

    def __init__(self, initial_size: int, max_size: int, budget: WindowBudget) -> None:
        """The peer may send `initial_size` bytes from the start; the window never grows above `max_size`."""
        self.size = self._initial_size = initial_size
        self.ungranted = 0  # delivered, and not yet granted again
        self._max_size = max_size
        self._budget = budget
        self._started = budget.now()  # when the current round began
        self._delivered = 0  # bytes in the current round

    def delivered(self, size: int, unread: int) -> int:
        """Account for `size` bytes that the reader took; `unread` are still buffered.

        Returns the credit in bytes that the caller must grant now, often 0.
        """
        self.ungranted += size
        self._delivered += size
        if 2 * unread > self.size:
            self._shrink()
        if 4 * self.ungranted < self.size:
            return 0
        credit, self.ungranted = self.ungranted, 0
        round_is_over = self._delivered >= self.size <= self._max_size // 2
        if round_is_over and self._was_fast() and not unread and self._budget.reserve(self.size):
            credit += self.size
            self.size *= 2
        return credit

    def close(self) -> None:
        """Return to the budget what the window had grown by. Harmless when repeated."""
        self._budget.release(self.size - self._initial_size)
        self.size = self._initial_size

    def _shrink(self) -> None:
        surplus = min(self.ungranted, self.size - self._initial_size)
        self.ungranted -= surplus
        self.size -= surplus
        self._start_round(self._budget.now())
        self._budget.release(surplus)

    def _was_fast(self) -> bool:
        """End the round: was a whole window delivered so fast that a larger window would help?"""
        now = self._budget.now()
        elapsed = now - self._started
        self._start_round(now)
        return elapsed <= GROWTH_ROUND_TRIPS * self._budget.round_trip() + GROWTH_SLACK

    def _start_round(self, now: float) -> None:
        self._started = now
        self._delivered = 0
