"""The end of a forwarded channel: a `Channel` whose carrier knows how much may be sent. See channel.py for its state.

This part is compiled (setup.py), like the other ends.
"""

from __future__ import annotations

from typing import Protocol

from tunneld.mux.channel import Channel, ChannelTransport
from tunneld.mux.window import ReceiveWindow


class ForwardCarrier(ChannelTransport, Protocol):
    """What a forwarded channel needs from its carrier."""

    def send_capacity(self, channel: Channel) -> int:
        """Bytes that may be written for this channel now. After 0, see `Channel`."""


class ForwardedChannel(Channel):
    """A channel of an SSH connection."""

    __slots__ = ("_carrier",)

    def __init__(self, carrier: ForwardCarrier, number: int, window: ReceiveWindow) -> None:
        super().__init__(carrier, number, window)
        self._carrier = carrier

    def send_capacity(self) -> int:
        """See `BufferedEnd.send_capacity`."""
        if self._unsent_header and not self._send_header():
            return 0
        capacity = self._carrier.send_capacity(self)  # this may flush, and find the connection broken
        return 0 if self.closed else capacity

    def write(self, data: memoryview) -> None:
        """See `BufferedEnd.write`."""
        self._carrier.write(self.sid, data)
