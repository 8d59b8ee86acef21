"""What a carrier has said and not written yet: the one place that writes.

It writes after everything that was ready has been served, so all frames of a wake-up leave in one write; or as soon as
there is enough for a write of its own, while the processor has it at hand; or when serving the others takes longer than
`gather`, since the peer could be at work on the first of it meanwhile. What the connection does not take stays in
the codec's buffer, or enciphered in the link; while that leaves less than `LEAST_ROOM` of `CarrierLimits.pause_at`,
channels wait, and are told of room in the order in which they asked.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

from tunneld.engine.pump import Pump
from tunneld.errors import reason_of
from tunneld.mux.connection import Connection
from tunneld.mux.limits import CarrierLimits

if TYPE_CHECKING:
    from tunneld.mux.channel import Channel

ENOUGH = 64 * 1024
"""Octets that are written at once: four TLS records, and as much as leaves the kernel in one piece. Larger buffers than
this come from malloc as fresh pages every time, which costs as much as enciphering them.
"""
HEADER = 4
"""Octets in front of a fragment of that size."""
LEAST_ROOM = 4096
"""Octets: with less room than this a visitor waits, rather than being read in crumbs."""


class SendBuffer:
    """The codec's outgoing octets on their way into the link."""

    __slots__ = (
        "_closed", "_due", "_gather", "_link", "_on_lost", "_outgoing", "_pause_at", "_paused", "_pump", "_touched",
        "blocked",
    )  # fmt: skip

    def __init__(
        self, pump: Pump, link: Connection, outgoing: bytearray, limits: CarrierLimits, on_lost: Callable[[str], None]
    ) -> None:
        """`on_lost` is told why the connection broke."""
        self.blocked = False  # the connection takes nothing now
        self._pump = pump
        self._link = link
        self._outgoing = outgoing
        self._pause_at = limits.pause_at
        self._gather = limits.gather
        self._on_lost = on_lost
        self._paused: dict[Channel, None] = {}  # in the order in which they asked; who asks again keeps their place
        self._touched = False  # a flush comes after the batch
        self._due = 0.0  # when it comes at the latest
        self._closed = False

    def schedule_flush(self) -> None:
        """Something was said: write it after the batch, or now."""
        if self.blocked:
            return
        now = perf_counter()
        if not self._touched:
            self._touched = True
            self._due = now + self._gather
            self._pump.call_after_batch(self.flush)
        if len(self._outgoing) >= ENOUGH or now >= self._due:
            self.flush()

    def send_capacity(self, channel: Channel) -> int:
        """Octets that may be said now; 0: the channel hears of room, after those that waited longer."""
        room = self._pause_at - self._waiting()
        if room < LEAST_ROOM and not self.blocked:
            self.flush()
            room = self._pause_at - self._waiting()
        if room >= LEAST_ROOM:
            return min(room, ENOUGH - HEADER)
        self._paused[channel] = None
        return 0

    def flush(self) -> None:
        """Write what was said; where the connection takes no more, wait for it."""
        self._touched = False
        if self._closed or self.blocked:
            return
        try:
            self.blocked = not self._link.write(self._outgoing)
        except OSError as error:
            self._on_lost(f"its connection broke: {reason_of(error)}")
            return
        if self._paused and 2 * self._waiting() <= self._pause_at:
            paused, self._paused = self._paused, {}
            for channel in paused:
                channel.notify_writable()

    def _waiting(self) -> int:
        return len(self._outgoing) + self._link.pending_output if self.blocked else len(self._outgoing)

    def unblock(self) -> None:
        """The connection may take octets again."""
        if self.blocked:
            self.blocked = False
            self.flush()

    def close(self) -> None:
        """The carrier is gone: nothing is written, nobody waits."""
        self._closed = True
        self._paused.clear()
