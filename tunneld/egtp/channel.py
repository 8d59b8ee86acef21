"""A channel of an EGTP carrier: one stream, as an `engine.end.End`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunneld.mux.channel import Channel
from tunneld.mux.window import ReceiveWindow
from tunneld.net.endpoint import Peer
from tunneld.wire.egtp.streams import Stream

if TYPE_CHECKING:
    from tunneld.egtp.carrier import EgtpCarrier

FRAGMENT_COST = 16 * 1024
"""Octets that cost as much of a turn as a frame."""


class StreamChannel(Channel):
    """A channel of an `EgtpCarrier`."""

    __slots__ = ("_association", "_stream")

    def __init__(self, carrier: EgtpCarrier, stream: Stream, window: ReceiveWindow) -> None:
        super().__init__(carrier, stream.sid, window)
        self._association = carrier
        self._stream = stream

    def send_capacity(self) -> int:
        """See `BufferedEnd.send_capacity`: limited by the send buffer, the credit that the peer granted, and the
        owner's share of this turn.
        """
        if self._unsent_header and not self._send_header():
            return 0
        carrier, stream = self._association, self._stream
        capacity = min(carrier.send_buffer.send_capacity(self), stream.credit)
        if capacity <= 0 or self.closed or stream.finished:  # the send buffer may have lost the connection
            return 0
        if carrier.turns.share.left <= 0:
            carrier.turns.serve_later(self)
            return 0
        return capacity

    def set_originator(self, visitor: Peer | None) -> None:
        """See `Channel.set_originator`. A stream has no frame for it."""

    def write(self, data: memoryview) -> None:
        """See `BufferedEnd.write`."""
        carrier = self._association
        sent = carrier.streams.send(self._stream, data)
        carrier.turns.share.use(1 + sent // FRAGMENT_COST)
        carrier.schedule_flush()
