"""One byte stream of a carrier.

What its user does not take at once is held, bounded by the window, and credit is granted only for what was taken. There
is no room while the peer gives no credit or the carrier is full.

Whom a carrier tells.
"""

from __future__ import annotations

import errno
from typing import Any, Protocol

from tunneld.engine.end import NO_HANDLER, End, EndHandler
from tunneld.engine.pump import Pump
from tunneld.mux.limits import CarrierLimits
from tunneld.mux.window import ReceiveWindow

__all__ = ["NO_HANDLER", "Channel", "ChannelTransport", "EndHandler"]


class ChannelTransport(Protocol):
    """What a channel asks of the connection that carries it, whatever is spoken there. `sid` is its name for one."""

    @property
    def pump(self) -> Pump:
        """Where it is served."""

    @property
    def limits(self) -> CarrierLimits:
        """What it may use."""

    def accept(self, channel: Channel) -> None:
        """Answer the peer, who opened it."""

    def set_originator(self, channel: Channel, visitor: Any | None) -> None:
        """The channel is for this visitor (an address; None: the peer is not to know)."""

    def send_capacity(self, channel: Channel) -> int:
        """Octets that may be put on the carrier for this channel now. 0: the channel hears of room when its peer gives
        credit, or, where the carrier itself is full, after those that waited longer.
        """

    def write(self, sid: int, data: memoryview) -> int:
        """Put octets on the carrier; returns how many were taken: all, where there was `room`, else by credit."""

    def grant_credit(self, sid: int, octets: int) -> None:
        """Let the peer send so many octets more."""

    def finish(self, channel: Channel) -> None:
        """We send no more."""

    def reset(self, channel: Channel, reason: str) -> None:
        """Both directions end now."""


class Channel(End):
    """One byte stream; made by its carrier, which also tells the codec what is said on it."""

    __slots__ = ("_first", "carrier", "sid", "window")

    def __init__(self, carrier: ChannelTransport, sid: int, window: ReceiveWindow) -> None:
        """`sid` is the codec's name for it."""
        super().__init__()
        self.carrier = carrier
        self.sid = sid
        self.window = window
        self._first = b""  # octets of ours for which there was no credit yet

    @property
    def pump(self) -> Pump:
        """That of the carrier."""
        return self.carrier.pump

    @property
    def quantum(self) -> int:
        """See `CarrierLimits.share`."""
        return self.carrier.limits.quantum

    # What its user does

    def accept(self) -> None:
        """Answer the peer who opened it. Otherwise `reset` it."""
        self.carrier.accept(self)

    def set_originator(self, visitor: Any | None) -> None:
        """Say whom the channel is for, before anything else is said on it."""
        self.carrier.set_originator(self, visitor)

    def send(self, data: bytes) -> None:
        """See `End.send`."""
        if self.closed:  # its number may be another's by now
            raise ConnectionResetError(errno.ECONNRESET, "the channel was lost")
        self._first += data
        self._send_first()

    def send_capacity(self) -> int:
        """See `End.room`."""
        if self._first and not self._send_first():
            return 0
        room = self.carrier.send_capacity(self)  # it may write, and find the connection broken
        return 0 if self.closed else room

    def write(self, data: memoryview) -> None:
        """See `End.put`."""
        self.carrier.write(self.sid, data)

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

    def release_window(self) -> None:
        """The peer sends no more: what the window has grown by is another's as soon as nothing of it is held."""
        if not self.buffered:
            self.window.close()

    # Inside

    def _discard(self) -> None:
        super()._discard()
        self.window.close()

    def _consumed(self, octets: int) -> None:
        grant = self.window.delivered(octets, len(self.buffered))
        if self.eof_received:
            self.release_window()
        elif grant and not self.closed:
            self.carrier.grant_credit(self.sid, grant)

    def _send_first(self) -> bool:
        with memoryview(self._first) as view:
            taken = self.carrier.write(self.sid, view)
        self._first = self._first[taken:]
        return not self._first


class CarrierEvents(Protocol):
    """Called in the pump's task; an exception costs the carrier."""

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """The peer opened a channel: `accept` or `reset` it before this returns."""

    def on_endpoint(self, uri: str | None) -> None:
        """The peer can be called back as this URI; None: it named something that is none."""

    def on_capacity(self) -> None:
        """A channel ended, so `can_open` may be true again."""

    def on_pong(self) -> None:
        """The peer gave a sign of life, and so has read everything that we said before we asked for it."""

    def on_unresponsive(self) -> None:
        """The peer does not answer: perhaps it is about to be lost."""

    def on_closed(self, reason: str) -> None:
        """The carrier is gone, and so are its channels."""
