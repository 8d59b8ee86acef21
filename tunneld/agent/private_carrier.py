"""The carrier inside the TLS of a private tunnel: what the sessions of both ends have in common.

visitor ──► channel ─┐                               ┌─► channel ──► local server
visitor ──► channel ─┴─ Carrier ── TLS 1.3 ── Carrier ┴─► channel ──► local server

The relay passes records on: it cannot tell the channels apart, nor count them.
"""

from __future__ import annotations

import math
import ssl

import trio

from tunneld.engine.pump import Pump
from tunneld.engine.tls_over_end import TlsOverEnd
from tunneld.mux.carrier import Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.end_connection import EndConnection
from tunneld.mux.limits import CarrierLimits

STREAM_PROTOCOL = 1
"""The protocol id of a stream to the local server. 0 is that of a ping, see `mux.ping`."""
RETIRED = "tunneld-private:retired"
"""The endpoint that a host defines when it takes no more streams in this session."""
LIMITS = CarrierLimits()
"""Those of every carrier: a session may buffer 40 MiB if 127 readers of this end all stop."""


class PrivateCarrier:
    """One end of a session. Implements `CarrierEvents`; a subclass adds what its side does."""

    def __init__(self, engine: Pump, tls: TlsOverEnd, *, initiator: bool, leave_tls: bool) -> None:
        """Owns `tls`, whose handshake is done. `leave_tls`: the connection to the relay goes on without a TLS of its
        own. Raises OSError where `tls` is closed already.
        """
        self.closed = trio.Event()
        self.reason = ""  # why it is closed
        if leave_tls:
            tls.leave_tls_below()
        self._connection = EndConnection(tls)
        self._pinged_at = math.nan  # until the answer
        self.carrier = Carrier(engine, self._connection, self, initiator=initiator, limits=LIMITS)
        self._pinged_at = trio.current_time()
        self.carrier.heartbeat.ping_now()

    @property
    def is_broken(self) -> bool:
        """Whether it ended because something arrived that the other end has not sent: the path changed it."""
        return isinstance(self._connection.failure, ssl.SSLError)

    # The carrier's events

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """See `CarrierEvents.on_opened`."""
        raise NotImplementedError

    def on_endpoint(self, uri: str | None) -> None:
        """See `CarrierEvents.on_endpoint`."""

    def on_capacity(self) -> None:
        """See `CarrierEvents.on_capacity`."""

    def on_over(self, channel: Channel) -> None:
        """See `CarrierEvents.on_over`."""

    def on_pong(self) -> None:
        """The first one tells how long the path is, which windows need to know: they shall be as large, no larger."""
        if not math.isnan(self._pinged_at):
            self._connection.measured_round_trip = trio.current_time() - self._pinged_at
            self._pinged_at = math.nan

    def on_unresponsive(self) -> None:
        """See `CarrierEvents.on_unresponsive`."""

    def on_closed(self, reason: str) -> None:
        """See `CarrierEvents.on_closed`."""
        self.reason = reason
        self.closed.set()
