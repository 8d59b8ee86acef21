"""A channel of a WebMUX carrier: where every byte of a visitor enters the codec, and so as short as it can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunneld.mux.channel import Channel
from tunneld.mux.window import ReceiveWindow
from tunneld.net.endpoint import Peer
from tunneld.wire.webmux.header import MAX_FRAGMENTS

if TYPE_CHECKING:
    from tunneld.mux.carrier import Carrier


class WebMuxChannel(Channel):
    """A channel of a `Carrier`: a WebMUX session."""

    __slots__ = ("_carrier", "_session")

    def __init__(self, carrier: Carrier, sid: int, window: ReceiveWindow) -> None:
        super().__init__(carrier, sid, window)
        self._carrier = carrier
        self._session = carrier.mux.session(sid)

    def send_capacity(self) -> int:
        """See `BufferedEnd.send_capacity`: limited by the send buffer, the credit that the peer granted, the peer's
        MSS, and the owner's share of this turn.
        """
        if self._unsent_header and not self._send_header():
            return 0
        carrier, session = self._carrier, self._session
        capacity = carrier.send_buffer.send_capacity(self)
        if session.credit < capacity:
            capacity = session.credit
        if capacity <= 0 or self.closed or not session.state.sending:  # the send buffer may have lost the connection
            return 0
        left = carrier.turns.share.left
        if left <= 0:
            carrier.turns.serve_later(self)
            return 0
        if capacity <= carrier.max_fragment:
            return capacity
        return min(capacity, carrier.max_fragment * min(left, MAX_FRAGMENTS))

    def set_originator(self, visitor: Peer | None) -> None:
        """See `Channel.set_originator`. WebMUX has no message for it."""

    def write(self, data: memoryview) -> None:
        """See `BufferedEnd.write`."""
        carrier = self._carrier
        sent = carrier.mux.send(self.sid, data)
        share = carrier.turns.share
        share.left -= 1 + sent // carrier.max_fragment
        if not share.is_active:
            share.activate()
        carrier.schedule_flush()
