"""Pending output of a carrier, and the one place that writes it to the connection.

It writes after everything that was ready has been served, so all frames of a wake-up leave in one write; or as soon as
there is enough for a write of its own, while the bytes are still in the processor's cache; or when the rest of the
batch takes longer than `CarrierLimits.coalesce`, since the peer could already be working on the first frames. What the
connection does not accept stays in the codec's buffer, or encrypted in the TLS connection. While pending output leaves
less than `MIN_CAPACITY` of `CarrierLimits.pause_at`, channels wait, and are resumed in the order in which they asked.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Final, Protocol

from tunneld.engine.pump import Pump
from tunneld.errors import reason_of
from tunneld.mux.limits import CarrierLimits

if TYPE_CHECKING:
    from tunneld.mux.channel import Channel

FLUSH_SIZE: Final = 64 * 1024
"""Bytes of pending output that are written at once: four TLS records, and as much as leaves the kernel in one piece.
Larger buffers come from malloc as fresh pages every time, which costs as much as encrypting them.
"""
MAX_CAPACITY: Final = FLUSH_SIZE - 4
"""Bytes that a channel may write at once: with the header of its frame, that size."""
MIN_CAPACITY: Final = 4096
"""Bytes: with less space than this a visitor waits, rather than being read in small pieces."""


class FrameOutput(Protocol):
    """Where a send buffer writes to: a `mux.connection.Connection`, or messages of other nodes (`egtp.output`)."""

    @property
    def pending_output(self) -> int:
        """Bytes that `write` accepted and the kernel did not."""

    def write(self, outgoing: bytearray, /) -> bool:
        """Write from the front of `outgoing` and remove what was accepted. Returns whether the kernel took everything;
        if not, `SendBuffer.unblock` must be called once it may accept more. Raises OSError if the connection is broken.
        """


class SendBuffer:
    """Moves the codec's `outgoing` bytes into the connection and makes channels wait while it is full."""

    __slots__ = (
        "_closed", "_coalesce", "_connection", "_flush_at", "_flush_size", "_on_lost", "_outgoing", "_pause_at",
        "_paused", "_pump", "_scheduled", "blocked",
    )  # fmt: skip

    def __init__(
        self,
        pump: Pump,
        connection: FrameOutput,
        outgoing: bytearray,
        limits: CarrierLimits,
        on_lost: Callable[[str], None],
        flush_size: int = FLUSH_SIZE,
    ) -> None:
        """`outgoing` stays shared with the codec, which appends to it. `on_lost` is called with the reason when a write
        fails. `flush_size` bytes of pending output are written at once.
        """
        self.blocked = False  # the connection accepts nothing until it is writable
        self._pump = pump
        self._connection = connection
        self._outgoing = outgoing
        self._pause_at = limits.pause_at
        self._coalesce = limits.coalesce
        self._on_lost = on_lost
        self._flush_size = flush_size
        self._paused: dict[Channel, None] = {}  # an ordered set; a channel that asks again keeps its place
        self._scheduled = False  # a flush comes after the batch
        self._flush_at = 0.0  # the latest time for it
        self._closed = False

    def schedule_flush(self) -> None:
        """Write `outgoing` after the current batch of events, or now. Call it after every append."""
        if self.blocked:
            return
        now = perf_counter()
        if not self._scheduled:
            self._scheduled = True
            self._flush_at = now + self._coalesce
            self._pump.call_after_batch(self.flush)
        if len(self._outgoing) >= self._flush_size or now >= self._flush_at:
            self.flush()

    def send_capacity(self, channel: Channel) -> int:
        """Bytes that `channel` may write now. After 0, `Channel.notify_writable` is called once there is space, in the
        order in which channels asked.
        """
        space = self._pause_at - (self._pending() if self.blocked else len(self._outgoing))
        if space < MIN_CAPACITY and not self.blocked:
            self.flush()
            space = self._pause_at - self._pending()
        if space >= MAX_CAPACITY:
            return MAX_CAPACITY
        if space >= MIN_CAPACITY:
            return space
        self._paused[channel] = None
        return 0

    def flush(self) -> None:
        """Write pending output now; if the connection does not accept all of it, wait until it is writable."""
        self._scheduled = False
        if self._closed or self.blocked:
            return
        try:
            self.blocked = not self._connection.write(self._outgoing)
        except OSError as error:
            self._on_lost(f"connection lost: {reason_of(error)}")
            return
        if self._paused and 2 * self._pending() <= self._pause_at:
            paused, self._paused = self._paused, {}
            for channel in paused:
                channel.notify_writable()

    def _pending(self) -> int:
        return len(self._outgoing) + self._connection.pending_output if self.blocked else len(self._outgoing)

    def unblock(self) -> None:
        """The connection is writable again."""
        if self.blocked:
            self.blocked = False
            self.flush()

    def close(self) -> None:
        """Write nothing more and resume no channel."""
        self._closed = True
        self._paused.clear()
