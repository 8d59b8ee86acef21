"""One byte stream of a carrier, and the interfaces between a carrier, its channels and its owner.

Bytes that the channel's handler does not take at once are buffered, bounded by the window, and credit is granted only
for bytes that were taken. The send capacity is 0 while the peer has granted no credit or the carrier's send buffer is
full.
"""

from __future__ import annotations

import errno
from typing import Protocol

from tunneld.engine.end import NO_HANDLER, BufferedEnd, EndHandler
from tunneld.engine.pump import Pump
from tunneld.mux.limits import CarrierLimits
from tunneld.mux.window import ReceiveWindow
from tunneld.net.endpoint import Peer

__all__ = ["NO_HANDLER", "Channel", "ChannelTransport", "EndHandler"]


class ChannelTransport(Protocol):
    """What a channel needs from its carrier, whatever protocol it speaks. `sid` identifies the channel there."""

    @property
    def pump(self) -> Pump:
        """The pump that serves the carrier."""

    @property
    def limits(self) -> CarrierLimits:
        """The carrier's limits."""

    def accept(self, channel: Channel) -> None:
        """Accept a channel that the peer opened."""

    def set_originator(self, channel: Channel, visitor: Peer | None) -> None:
        """Tell the peer that the channel is for the visitor from this address; None hides the address."""

    def write(self, sid: int, data: memoryview) -> int:
        """Write `data`. Returns how many bytes were accepted: all within `send_capacity`, else what credit allows."""

    def grant_credit(self, sid: int, size: int) -> None:
        """Allow the peer to send that many more bytes."""

    def finish(self, channel: Channel) -> None:
        """End our direction."""

    def reset(self, channel: Channel, reason: str) -> None:
        """End both directions now."""


class Channel(BufferedEnd):
    """One byte stream. The carrier creates it and removes it when both directions are over.

    Each protocol has a subclass with `send_capacity` and `write`, which every byte passes. After a capacity of 0,
    `notify_writable` is called when the peer grants credit or, if the carrier itself is full, once it has space, in the
    order in which channels asked.
    """

    __slots__ = ("_taken", "_unsent_header", "carrier", "sid", "window")

    def __init__(self, carrier: ChannelTransport, sid: int, window: ReceiveWindow) -> None:
        """`sid` is the carrier's id for this channel; it may be used again once the channel is over."""
        super().__init__(carrier.pump)
        self.quantum = carrier.limits.quantum
        self.carrier = carrier
        self.sid = sid
        self.window = window
        self._taken = 0  # bytes that the handler has taken and the window does not know of yet
        self._unsent_header = b""  # bytes of `send` that the peer has granted no credit for yet

    # Called by the owner and by the relay

    @property
    def end(self) -> Channel:
        """A channel is a `ServerConnection`, too, and the end of it."""
        return self

    def accept(self) -> None:
        """Accept a channel that the peer opened; the alternative is `reset`."""
        self.carrier.accept(self)

    def set_originator(self, visitor: Peer | None) -> None:
        """Tell the peer which visitor the channel is for, before anything else is sent on it."""
        self.carrier.set_originator(self, visitor)

    def send(self, data: bytes) -> None:
        """See `BufferedEnd.send`. Raises `ConnectionResetError` if the channel is over."""
        if self.closed:  # another channel may have its sid by now
            raise ConnectionResetError(errno.ECONNRESET, "the channel was lost")
        self._unsent_header += data
        self._send_header()

    def finish(self) -> None:
        """See `End.finish`."""
        if not self.eof_sent and not self.closed:
            self.eof_sent = True
            self.carrier.finish(self)

    def reset(self, reason: str) -> None:
        """See `End.reset`."""
        if not self.closed:
            self._discard()
            self.carrier.reset(self, reason)

    def unacknowledged(self) -> int:
        """See `End.unacknowledged`: in a carrier everything that was written is in front of the reset."""
        return len(self._unsent_header)

    def release_window(self) -> None:
        """The peer sends no more: return the window's growth to the carrier's budget, once nothing is buffered."""
        if not self.buffered:
            self.window.close()

    # Internal

    def _discard(self) -> None:
        super()._discard()
        self.window.close()

    def _consumed(self, count: int) -> None:
        self._taken += count
        if self.eof_received:
            self.release_window()
        elif 4 * self._taken >= self.window.size and not self.closed:
            taken, self._taken = self._taken, 0
            if credit := self.window.delivered(taken, len(self.buffered)):
                self.carrier.grant_credit(self.sid, credit)

    def _send_header(self) -> bool:
        """Write as much of the header as credit allows; returns whether that was all."""
        with memoryview(self._unsent_header) as view:
            sent = self.carrier.write(self.sid, view)
        self._unsent_header = self._unsent_header[sent:]
        return not self._unsent_header


class CarrierEvents(Protocol):
    """The callbacks of a carrier's owner, called in the pump's task. An exception closes the carrier."""

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """The peer opened a channel: `accept` or `reset` it before this returns."""

    def on_endpoint(self, uri: str | None) -> None:
        """The peer can be called back at this URI; None if it named something that is no URI."""

    def on_capacity(self) -> None:
        """The peer answered a channel, so `can_open` may be true again."""

    def on_over(self, channel: Channel) -> None:
        """A channel ended, so `can_open` may be true again. Its id may be used for another one from now on."""

    def on_pong(self) -> None:
        """The peer answered a ping, so it has read everything that was sent before the ping."""

    def on_unresponsive(self) -> None:
        """The peer does not answer; the carrier may be about to be lost."""

    def on_closed(self, reason: str) -> None:
        """The carrier is closed, and so are its channels."""
