"""What ends, relays and carriers ask of the engine that serves them: the time, deadlines, callbacks, tasks.

Both engines are schedulers. Everything above one event loop is written against this class, so that it works in either.

    timers             deadlines
    now                the time
    call_after_batch   once, after everything that is ready now; carriers write then
    serve_soon         a flow again, behind everything that is ready now
    start_task         a Trio task that ends with the engine
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from tunneld.engine.budget import TurnBudget
from tunneld.engine.engine import RelayEnd
from tunneld.engine.failures import report_failure
from tunneld.engine.limits import EngineLimits
from tunneld.engine.timers import Timers
from tunneld.engine.vanished import VanishedPeers
from tunneld.log import Logger

if TYPE_CHECKING:
    from tunneld.engine.end import End
    from tunneld.engine.flow import Flow
    from tunneld.engine.relay import JoinedEnds

log = Logger("engine")


class Scheduler:
    """The relays of one engine, and what is due for them."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.buffer_size = limits.buffer_size
        self.max_quantum = max(limits.turn_size, limits.buffer_size)  # bytes that a handler may move in any batch
        self.quantum = self.max_quantum  # and in this one
        self.timers = Timers(self.on_wake)
        self.budget = TurnBudget(limits.turn_cost, self.timers.wake_soon)
        self.relays: set[JoinedEnds] = set()  # that have not ended
        self.vanished = VanishedPeers(self.timers, self.relays, limits.unacknowledged_timeout)
        self._in_batch = False
        self._batch_time: float | None = None  # Trio's time, if a handler of this batch has asked for it
        self._after_batch: list[Callable[[], None]] = []
        self._soon: list[Flow[End, End]] = []
        self._ended: list[tuple[JoinedEnds, RelayEnd]] = []
        self._nursery: trio.Nursery | None = None

    def now(self) -> float:
        """Trio's time, in seconds; within a batch it is read once, at the first call."""
        if not self._in_batch:
            return trio.current_time()
        if self._batch_time is None:
            self._batch_time = trio.current_time()
        return self._batch_time

    def call_after_batch(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, after the current batch of events. It must not raise; an exception is logged."""
        self._after_batch.append(callback)
        if not self._in_batch:
            self.timers.wake_soon()

    def serve_soon(self, flow: Flow[End, End]) -> None:
        """Call `flow.on_turn` once, behind everything that is ready now."""
        self._soon.append(flow)
        if not self._in_batch:
            self.timers.wake_soon()

    def start_task(self, run: Callable[[], Awaitable[None]]) -> None:
        """Run a task in the engine's nursery; it must not raise. Raises RuntimeError unless the engine is running."""
        if self._nursery is None:
            raise RuntimeError("the engine is not running")
        self._nursery.start_soon(run)

    def relay_started(self, relay: JoinedEnds) -> None:
        """A relay exists: it is dropped when the engine stops."""
        self.relays.add(relay)
        if not self.vanished.watching:
            self.vanished.watch()

    def set_unacknowledged_timeout(self, seconds: float) -> None:
        """See `Engine.set_unacknowledged_timeout`."""
        self.vanished.timeout = seconds
        if self.relays and not self.vanished.watching:
            self.vanished.watch()

    def relay_ended(self, relay: JoinedEnds, how: RelayEnd) -> None:
        """A relay has closed its ends: call `on_end` after the batch."""
        self.relays.discard(relay)
        self._ended.append((relay, how))
        if not self._in_batch:
            self.timers.wake_soon()

    def on_wake(self) -> None:
        """Called by the timers: serve what became due between two batches."""
        self.serve_flows()
        self.finish_batch()

    def finish_batch(self) -> None:
        """Run the callbacks of `call_after_batch`, then `on_end` of ended relays, until neither adds more."""
        while self._ended or self._after_batch:
            callbacks, self._after_batch = self._after_batch, []
            for callback in callbacks:
                try:
                    callback()
                except Exception as error:
                    log.exception("callback after a batch failed: internal error", exc_info=error)
            ended, self._ended = self._ended, []
            for relay, how in ended:
                relay.notify_ended(how)

    def serve_flows(self) -> None:
        """Give the flows of `serve_soon` their turn."""
        flows, self._soon = self._soon, []
        for flow in flows:
            try:
                flow.on_turn()
            except Exception as error:
                report_failure(flow.on_failure, error)

    def drop_relays(self) -> None:
        """The engine stops: drop every relay and call `on_end`."""
        for relay in list(self.relays):
            relay.on_stop()
        self._soon.clear()
        self.finish_batch()
