"""One byte stream of a carrier.

What its user does not take at once is held, bounded by the window, and credit is granted only for what was taken. There
is no room while the peer gives no credit or the carrier is full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunneld.relay.pump import Pump
from tunneld.session.duct import UNUSED, Duct, User
from tunneld.session.window import Window

if TYPE_CHECKING:
    from tunneld.session.carrier import Carrier

__all__ = ["UNUSED", "Channel", "User"]


class Channel(Duct):
    """One byte stream; made by its carrier, which also tells the codec what is said on it."""

    __slots__ = ("_first", "carrier", "sid", "window")

    def __init__(self, carrier: Carrier, sid: int, window: Window) -> None:
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
    def share(self) -> int:
        """See `CarrierLimits.share`."""
        return self.carrier.limits.share

    # What its user does

    def accept(self) -> None:
        """Answer the peer who opened it. Otherwise `reset` it."""
        self.carrier.mux.accept(self.sid)
        self.carrier.touch()

    def send(self, data: bytes) -> None:
        """See `Duct.send`."""
        self._first += data
        self._send_first()

    def room(self) -> int:
        """See `Duct.room`."""
        if self._first and not self._send_first():
            return 0
        room = self.carrier.room(self)
        return min(room, self.carrier.mux.credit(self.sid)) if room and not self.over else 0

    def put(self, data: memoryview) -> None:
        """See `Duct.put`."""
        self.carrier.put(self.sid, data)

    def finish(self) -> None:
        """See `Duct.finish`."""
        if not self.finishing and not self.over:
            self.finishing = True
            self.carrier.finish(self)

    def reset(self, reason: str) -> None:
        """See `Duct.reset`."""
        if not self.over:
            self._forget()
            self.carrier.reset(self, reason)

    # Inside

    def _forget(self) -> None:
        super()._forget()
        self.window.close()

    def _taken(self, octets: int) -> None:
        grant = self.window.delivered(octets, len(self.held))
        if grant and not self.ended and not self.over:
            self.carrier.grant(self.sid, grant)

    def _send_first(self) -> bool:
        with memoryview(self._first) as view:
            taken = self.carrier.put(self.sid, view[: self.carrier.mux.credit(self.sid)])
        self._first = self._first[taken:]
        return not self._first
