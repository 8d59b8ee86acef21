"""What the pump does by the clock: one task, asleep until the earliest deadline of whatever waits for one.

Deadlines may move back while the task sleeps (a lingering relay that still moves bytes); it wakes at the old one,
looks, and sleeps again. Only few things have deadlines at a time, so a plain set is swept; sweeps keep a distance so
that many cannot crowd out the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import structlog
import trio

SWEEP_SPACING = 0.05
"Seconds between two sweeps at least, and so the most by which something can overstay."

log = structlog.get_logger("relay")


class Timed(Protocol):
    """Something with a deadline."""

    deadline: float
    "Trio time, seconds."

    def on_deadline(self) -> None:
        """The deadline has passed, and `Timers` has forgotten the object. An exception is a bug: it is logged, and
        nobody else notices.
        """


class Timers:
    """The deadlines of one pump."""

    def __init__(self, on_ring: Callable[[], None]) -> None:
        """`on_ring` is called from this task after every sweep and every `ring`."""
        self._on_ring = on_ring
        self._timed: set[Timed] = set()
        self._sleep = trio.CancelScope()

    def watch(self, timed: Timed) -> None:
        """Call `on_deadline` when its deadline has passed."""
        self._timed.add(timed)
        if timed.deadline < self._sleep.deadline:
            self._sleep.deadline = timed.deadline

    def forget(self, timed: Timed) -> None:
        """Call no more. Harmless when repeated."""
        self._timed.discard(timed)

    def wake_soon(self) -> None:
        """Call `on_ring` soon, from the engine's own task."""
        self._sleep.deadline = -math.inf

    async def run(self) -> None:
        """Sweep for ever."""
        while True:
            with self._sleep:
                await trio.sleep_forever()
            self._sweep(trio.current_time())
            self._on_ring()
            await trio.lowlevel.checkpoint()

    def _sweep(self, now: float) -> None:
        """Serve whose deadline has passed, then set the clock for the next."""
        for timed in [timed for timed in self._timed if timed.deadline <= now]:
            self._timed.discard(timed)
            try:
                timed.on_deadline()
            except Exception as error:
                log.exception("could not do what was due: a bug", exc_info=error)
        earliest = min((timed.deadline for timed in self._timed), default=math.inf)
        self._sleep = trio.CancelScope(deadline=max(earliest, now + SWEEP_SPACING))
