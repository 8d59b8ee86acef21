"""What the relays in the pump have in common: the linger time, dropping, and the call of `on_end`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from tunneld.engine.engine import Cause, Relay, RelayEnd

if TYPE_CHECKING:
    from tunneld.engine.pump import Pump

log = structlog.get_logger("engine")


class PumpRelay:
    """A relay in the pump: the `Relay` that the owner holds. A subclass knows its two sides and closes them.

    It ends once, in one of four ways (`Cause`). `close` closes both sides at that moment and drops undelivered bytes;
    `on_end` is called after the batch, so that the callback may call the pump.
    """

    __slots__ = ("closed", "deadline", "linger", "lingering", "moved_before", "on_end", "pump")

    def __init__(self, pump: Pump, linger: float, on_end: Callable[[Relay, RelayEnd], None]) -> None:
        self.pump = pump
        self.linger = linger
        self.on_end = on_end
        self.closed = False
        self.lingering = False  # one side has ended
        self.deadline = 0.0  # Trio time at which a lingering relay ends
        self.moved_before = 0  # bytes that had moved when the deadline was set

    @property
    def up(self) -> int:
        """See `Relay.up`."""
        raise NotImplementedError

    @property
    def down(self) -> int:
        """See `Relay.down`."""
        raise NotImplementedError

    def close(self, how: RelayEnd) -> None:
        """Close both sides now, and have `on_end` called after the pump's batch. May be called again."""
        raise NotImplementedError

    def drop(self) -> None:
        """See `Relay.drop`."""
        self.close(RelayEnd(Cause.DROPPED))
        self.pump.timers.wake_soon()

    def notify_ended(self, how: RelayEnd) -> None:
        """Call `on_end`."""
        try:
            self.on_end(self, how)
        except Exception as error:
            log.exception("on_end callback failed: internal error", exc_info=error)

    def start_lingering(self) -> None:
        """One side has ended: from now on the relay ends after `linger` seconds without a byte in either direction."""
        if not self.lingering:
            self.lingering = True
            self.moved_before = self.up + self.down
            self.deadline = self.pump.now() + self.linger
            self.pump.timers.watch(self)

    def extend_deadline(self) -> None:
        """Move the deadline of a lingering relay back if bytes have moved since it was set."""
        moved = self.up + self.down
        if moved != self.moved_before:
            self.moved_before = moved
            self.deadline = self.pump.now() + self.linger

    def on_deadline(self) -> None:
        """No byte has moved for `linger` seconds."""
        self.close(RelayEnd(Cause.LINGERED))

    def on_failure(self, error: Exception) -> None:
        """A bug while serving this relay: drop the relay and nothing else."""
        log.error("relay failed: internal error", exc_info=error)
        self.close(RelayEnd(Cause.DROPPED))

    def on_stop(self) -> None:
        """The pump stops."""
        self.close(RelayEnd(Cause.DROPPED))
