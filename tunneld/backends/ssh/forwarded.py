"""The end of a forwarded channel. The protocol state of the channel is in channel.py; this part is compiled (setup.py),
like the other ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunneld.mux.channel import Channel
from tunneld.mux.window import ReceiveWindow

if TYPE_CHECKING:
    from tunneld.backends.ssh.carrier import SshCarrier


class ForwardedChannel(Channel):
    """A channel of an `SshCarrier`."""

    __slots__ = ("_carrier",)

    def __init__(self, carrier: SshCarrier, number: int, window: ReceiveWindow) -> None:
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
