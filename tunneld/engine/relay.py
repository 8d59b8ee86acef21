"""What the relays in the pump have in common: the linger time, failures, dropping, and the call of `on_end`.

**A failed write does not end what that side has still to say.** A server that reads a little of an upload, answers and
closes makes the next write to it fail, with its answer unread in the same socket. So the failing side is read to its
end and its bytes are delivered before the relay ends.

**Whatever is cut is a reset.** A side that has not been told an end of file by the other one is reset when the relay
ends, for whatever reason; a clean end is only ever passed on. A reset discards what its receiver has not acknowledged,
so the relay waits for the acknowledgement of what it has delivered, no longer than `linger` seconds.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from tunneld.engine.engine import Cause, Relay, RelayEnd, Side
from tunneld.engine.failures import unacknowledged

if TYPE_CHECKING:
    from tunneld.engine.pump import Pump

DELIVERY_CHECK = 0.05
"""Seconds between two looks for acknowledgements before a reset: half of a usual round trip."""

log = structlog.get_logger("engine")


class PumpRelay:
    """A relay in the pump: the `Relay` that the owner holds. A subclass knows its two sides and closes them.

    It ends once, in one of four ways (`Cause`). `close` closes both sides at that moment and drops undelivered bytes;
    `on_end` is called after the batch, so that the callback may call the pump.
    """

    __slots__ = (
        "closed", "deadline", "delivering", "failure", "give_up", "linger", "lingering", "moved_before", "on_end",
        "pump",
    )  # fmt: skip

    def __init__(self, pump: Pump, linger: float, on_end: Callable[[Relay, RelayEnd], None]) -> None:
        self.pump = pump
        self.linger = linger
        self.on_end = on_end
        self.closed = False
        self.lingering = False  # one side has ended
        self.failure: RelayEnd | None = None  # one side is broken; its bytes are still being delivered
        self.delivering = False  # all of them are: waiting for their acknowledgement
        self.give_up = 0.0  # Trio time at which that waiting ends
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
        if moved != self.moved_before and not self.delivering:
            self.moved_before = moved
            self.deadline = self.pump.now() + self.linger

    def on_deadline(self) -> None:
        """No byte has moved for `linger` seconds, or it is time to look for acknowledgements again."""
        if self.delivering:
            self.close_after_delivery()
        else:
            self.close(self.failure or RelayEnd(Cause.LINGERED))

    @property
    def receiver(self) -> socket.socket:
        """The connection to which the bytes of the failed side go."""
        raise NotImplementedError

    def has_lost_eof(self, side: Side) -> bool:
        """Whether an end of file read from `side` is none, see `RelayEnd.consumed_reset_of`."""
        return self.failure is not None and self.failure.consumed_reset_of(side)

    def close_after_delivery(self) -> None:
        """Close because of `failure`, once `receiver` has acknowledged all bytes or `linger` seconds have passed."""
        assert self.failure is not None
        if self.closed or not unacknowledged(self.receiver):
            self.close(self.failure)
            return
        now = self.pump.now()
        if not self.delivering:
            self.delivering = self.lingering = True
            self.give_up = now + self.linger
        if now >= self.give_up:
            self.close(self.failure)
            return
        self.deadline = now + DELIVERY_CHECK
        self.pump.timers.watch(self)

    def on_failure(self, error: Exception) -> None:
        """A bug while serving this relay: drop the relay and nothing else."""
        log.error("relay failed: internal error", exc_info=error)
        self.close(RelayEnd(Cause.DROPPED))

    def on_stop(self) -> None:
        """The pump stops."""
        self.close(RelayEnd(Cause.DROPPED))
