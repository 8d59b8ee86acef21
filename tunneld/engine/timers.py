"""The timers of the pump: one task that sleeps until the earliest deadline.

A deadline may move back while the task sleeps (a half-closed relay that still moves bytes): the task wakes at the old
deadline, finds nothing due and sleeps again. Few objects have deadlines at one time, so each sweep looks at all of
them; sweeps keep a minimum interval so that many deadlines cannot crowd out the relayed bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Protocol

import trio

from tunneld.log import Logger

MIN_SWEEP_INTERVAL: Final = 0.05
"Seconds between two sweeps at least; so a deadline is served at most this much too late."

log = Logger("engine")


class Timed(Protocol):
    """An object with a deadline."""

    deadline: float
    "Trio's clock, in seconds."

    def on_deadline(self) -> None:
        """The deadline has passed and `Timers` has forgotten the object. Must not raise; an exception is logged as a
        bug.
        """


class Alarm:
    """Calls a function at a time, once."""

    __slots__ = ("_callback", "_timers", "deadline")

    def __init__(self, timers: Timers, callback: Callable[[], None]) -> None:
        self.deadline = 0.0
        self._timers = timers
        self._callback = callback

    def set(self, seconds: float) -> None:
        """Call the function in that many seconds; a call that was to come before does not."""
        self.deadline = trio.current_time() + seconds
        self._timers.watch(self)

    def cancel(self) -> None:
        """Do not call it. Harmless when repeated."""
        self._timers.forget(self)

    def on_deadline(self) -> None:
        """Called by the timers."""
        self._callback()


class Timers:
    """The deadlines of one pump."""

    def __init__(self, on_wake: Callable[[], None]) -> None:
        """`on_wake` is called in the task of `run`, after each sweep and after each `wake_soon`."""
        self._on_wake = on_wake
        self._timed: set[Timed] = set()
        self._sleep = trio.CancelScope()
        self._wakes_at = math.inf  # its deadline, which takes long to ask for

    def watch(self, timed: Timed) -> None:
        """Call `on_deadline` once its deadline has passed."""
        self._timed.add(timed)
        if timed.deadline < self._wakes_at:
            self._wakes_at = self._sleep.deadline = timed.deadline

    def forget(self, timed: Timed) -> None:
        """Do not call `on_deadline`. Does nothing if the object is not watched."""
        self._timed.discard(timed)

    def wake_soon(self) -> None:
        """Call `on_wake` soon, in the task of `run`."""
        self._wakes_at = self._sleep.deadline = -math.inf

    async def run(self) -> None:
        """Serve deadlines until cancelled."""
        while True:
            with self._sleep:
                await trio.sleep_forever()
            self._sweep(trio.current_time())
            self._on_wake()
            await trio.lowlevel.checkpoint()

    def _sweep(self, now: float) -> None:
        """Serve every deadline that has passed, then sleep until the next one."""
        for timed in [timed for timed in self._timed if timed.deadline <= now]:
            self._timed.discard(timed)
            try:
                timed.on_deadline()
            except Exception as error:
                log.exception("on_deadline callback failed: internal error", exc_info=error)
        earliest = min((timed.deadline for timed in self._timed), default=math.inf)
        self._wakes_at = max(earliest, now + MIN_SWEEP_INTERVAL)
        self._sleep = trio.CancelScope(deadline=self._wakes_at)
