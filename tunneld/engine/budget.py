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
from typing import Final, Protocol

from tunneld.engine.failures import report_failure

MIN_SHARE: Final = 32
"""Units: enough to make progress in each turn, however many owners there are."""


class DeferredHandler(Protocol):
    """A handler that can be continued in the next turn."""

    def on_turn(self) -> None:
        """Go on: the share is not used up."""

    def on_failure(self, error: Exception) -> None:
        """`on_turn` raised: a bug."""


class TurnBudget:
    """The cost of one turn of a pump, and the handlers that wait for the next."""

    __slots__ = ("_request_turn", "_size", "active", "deferred", "in_turn", "share", "turn", "visitors")

    def __init__(self, size: int, request_turn: Callable[[], None] = lambda: None) -> None:
        """`size` is the cost of a turn, in units. `request_turn` is called when a handler is deferred between turns."""
        self.turn = 0  # the number of the current one
        self.share = size  # of each owner in this turn
        self.active: list[CostShare] = []  # owners that have done something in it, or are still to repay
        self.deferred: list[tuple[CostShare, DeferredHandler]] = []  # the next turn must follow without sleep then
        self.in_turn = False  # the next one follows by itself if a handler is deferred
        self._request_turn = request_turn
        self._size = size
        self.visitors = CostShare(self)  # of all that visitors send before it is known for which owner

    def begin_turn(self) -> None:
        """A new turn begins: every owner has its share again."""
        self.turn += 1
        self.in_turn = True
        active = self.active
        if not active:
            self.share = max(MIN_SHARE, self._size)
            return
        self.active = []
        self.share = max(MIN_SHARE, self._size // len(active))
        for owner in active:
            left = owner.left = self.share + min(owner.left, 0)  # what was used too much is repaid
            owner.is_active = left <= 0
            if left <= 0:
                self.active.append(owner)

    def defer(self, share: CostShare, handler: DeferredHandler) -> None:
        """Call `handler.on_turn` in the next turn, or in the first one after that in which `share` is not used up."""
        self.deferred.append((share, handler))
        if not self.in_turn:
            self._request_turn()

    def continue_deferred(self) -> None:
        """Continue the deferred handlers, oldest first, as far as their shares go."""
        deferred, self.deferred = self.deferred, []
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
        self.deferred = waiting + self.deferred


class CostShare:
    """One owner's part of each turn."""

    __slots__ = ("_budget", "is_active", "left")

    def __init__(self, budget: TurnBudget) -> None:
        self.left = budget.share  # units that may be used in this turn; 0 or less: the owner's handlers must stop
        self._budget = budget
        self.is_active = False  # it is in `TurnBudget.active`

    def use(self, cost: int) -> None:
        """Account for work that was done, in units."""
        self.left -= cost
        if not self.is_active:
            self.activate()

    def activate(self) -> None:
        """The owner has done something in this turn. For a caller that subtracts from `left` itself."""
        self.is_active = True
        self._budget.active.append(self)
