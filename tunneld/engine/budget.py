"""How much of the pump's time each owner may take: a budget of cost per turn, shared by all owners with work.

A turn is what the pump does between two visits to Trio's scheduler. Cost is counted in units of some microseconds each:
a frame that was parsed, a channel that was woken, a fragment that was written. Every owner has a `CostShare`; all
handlers of one owner, however many connections it has, use the same. A handler whose share is used up stops and is
*deferred*: it goes on in the next turn, after every other owner has been served.

    turn ──► deferred handlers, oldest first ──► ready handlers ──► Trio's scheduler ──► next turn
                  ▲                                   │ share used up
                  └───────────────────────────────────┘

The budget is divided by the number of owners that had work in the last turn, so that many of them together do not make
a turn longer. An owner that exceeded its share repays that from the next ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tunneld.engine.failures import report_failure

MIN_SHARE = 32
"""Units: enough to make progress in each turn, however many owners there are."""


class DeferredHandler(Protocol):
    """A handler that can be continued in the next turn."""

    def on_turn(self) -> None:
        """Go on: the share is not used up."""

    def on_failure(self, error: Exception) -> None:
        """`on_turn` raised: a bug."""


class TurnBudget:
    """The cost of one turn of a pump, and the handlers that wait for the next."""

    __slots__ = ("_deferred", "_request_turn", "_size", "active", "in_turn", "share", "turn")

    def __init__(self, size: int, request_turn: Callable[[], None] = lambda: None) -> None:
        """`size` is the cost of a turn, in units. `request_turn` is called when a handler is deferred between turns."""
        self.turn = 0  # the number of the current one
        self.share = size  # of each owner in this turn
        self.active = 0  # owners that have done something in it
        self.in_turn = False  # the next one follows by itself if a handler is deferred
        self._request_turn = request_turn
        self._size = size
        self._deferred: list[tuple[CostShare, DeferredHandler]] = []

    @property
    def has_deferred(self) -> bool:
        """Whether a handler waits for the next turn, which must follow without sleep then."""
        return len(self._deferred) > 0

    def begin_turn(self) -> None:
        """A new turn begins: every owner has its share again."""
        self.turn += 1
        self.share = max(MIN_SHARE, self._size // max(self.active, 1))
        self.active = 0
        self.in_turn = True

    def end_turn(self) -> None:
        """The turn is over."""
        self.in_turn = False

    def defer(self, share: CostShare, handler: DeferredHandler) -> None:
        """Call `handler.on_turn` in the next turn, or in the first one after that in which `share` is not used up."""
        self._deferred.append((share, handler))
        if not self.in_turn:
            self._request_turn()

    def continue_deferred(self) -> None:
        """Continue the deferred handlers, oldest first, as far as their shares go."""
        deferred, self._deferred = self._deferred, []
        waiting = []
        for entry in deferred:
            share, handler = entry
            if share.left <= 0:
                waiting.append(entry)
                continue
            try:
                handler.on_turn()
            except Exception as error:
                report_failure(handler.on_failure, error)
        self._deferred = waiting + self._deferred


class CostShare:
    """One owner's part of each turn."""

    __slots__ = ("_budget", "_left", "_turn")

    def __init__(self, budget: TurnBudget) -> None:
        self._budget = budget
        self._turn = -1
        self._left = 0

    @property
    def left(self) -> int:
        """Units that the owner may use in this turn; 0 or less: its handlers must stop."""
        budget = self._budget
        if self._turn != budget.turn:
            self._turn = budget.turn
            self._left = budget.share + min(self._left, 0)
            budget.active += 1
        return self._left

    def use(self, cost: int) -> None:
        """Account for work that was done, in units."""
        self._left = self.left - cost
