"""A deadline that moves often: twice for each request, but it rarely passes."""

from __future__ import annotations

import math
from collections.abc import Callable

from tunneld.engine.scheduler import Scheduler


class Deadline:
    """Calls back once, unless it is moved before. Moving it back costs a comparison: the timers are told when the old
    time has come.
    """

    __slots__ = ("_callback", "_due", "_engine", "_watched", "deadline")

    def __init__(self, engine: Scheduler, callback: Callable[[], None]) -> None:
        self.deadline = math.inf  # what the timers know
        self._due = math.inf
        self._engine = engine
        self._callback = callback
        self._watched = False

    def set(self, seconds: float) -> None:
        """Call back in this many seconds; 0: never."""
        if not seconds:
            self._due = math.inf
            return
        self._due = self._engine.now() + seconds
        if not self._watched or self._due < self.deadline:
            self._watch()

    def stop(self) -> None:
        """Do not call back, unless it is set again."""
        self._due = math.inf
        self._engine.timers.forget(self)
        self._watched = False

    def close(self) -> None:
        """The owner needs it no more. It is forgotten, so no reference cycle is left for the garbage collector."""
        self.stop()
        self._callback = _ignore

    def on_deadline(self) -> None:
        """Called by the timers."""
        self._watched = False
        if self._due <= self._engine.now():
            self._due = math.inf
            self._callback()
        elif self._due != math.inf:
            self._watch()

    def _watch(self) -> None:
        self.deadline = self._due
        self._watched = True
        self._engine.timers.watch(self)


def _ignore() -> None:
    """The callback of a deadline that is not needed any more."""
