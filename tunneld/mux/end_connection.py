"""Another end below a carrier: the TLS of a visit to a private tunnel, whose channels the relay cannot tell apart."""

from __future__ import annotations

import errno
import math

from tunneld.engine.end import NO_HANDLER, BufferedEnd
from tunneld.engine.pump import Pump
from tunneld.errors import reason_of
from tunneld.mux.connection import keep_unsent_below, limit_retransmission
from tunneld.mux.transport import CarrierInput, CarrierTransport
from tunneld.tls.connection import PEER_CLOSED


class EndConnection(CarrierTransport):
    """A carrier's connection over `end`, which it owns and whose handler it is once attached."""

    __slots__ = ("_end", "_handler", "_is_reading", "_last_input", "failure", "measured_round_trip")

    def __init__(self, end: BufferedEnd) -> None:
        super().__init__()
        self.failure: OSError | None = None  # with which the end was lost
        self.measured_round_trip = math.inf  # seconds, see `round_trip`: the owner measures it
        self._end = end
        self._handler: CarrierInput | None = None
        self._is_reading = False  # an end of file that comes now is behind the bytes that are being read
        self._last_input = end.engine.now()

    # Called by the carrier

    def attach(self, pump: Pump, handler: CarrierInput) -> None:
        """See `CarrierTransport.attach`. What has arrived is read in a later turn."""
        if self._end.closed:
            raise ConnectionResetError(errno.ECONNRESET, PEER_CLOSED)
        self._handler = handler
        self._end.handler = self
        pump.call_after_batch(self.rearm)

    def rearm(self) -> None:
        """See `CarrierTransport.rearm`."""
        if self._handler is not None:
            self._end.deliver_buffered()

    def receive_into(self, buffer: memoryview) -> int:
        """See `CarrierTransport.receive_into`: what was not taken when it came."""
        buffered = self._end.buffered
        count = min(len(buffered), len(buffer))
        if not count:
            if self._end.eof_received:
                return 0
            raise BlockingIOError
        self.drained = count == len(buffered) and not self._end.eof_received
        buffer[:count] = buffered[:count]
        self._is_reading = True
        self._end.consume(count)
        self._is_reading = False
        return count

    def write(self, outgoing: bytearray) -> bool:
        """See `CarrierTransport.write`."""
        end = self._end
        while outgoing:
            count = min(end.send_capacity(), len(outgoing))
            if not count:
                if end.closed:
                    raise ConnectionResetError(errno.ECONNRESET, PEER_CLOSED)
                return False
            with memoryview(outgoing) as view:
                end.write(view[:count])
            del outgoing[:count]
        return True

    def round_trip(self) -> float:
        """See `CarrierTransport.round_trip`. The kernel knows that to the relay only, so the owner measures pings."""
        return self.measured_round_trip

    def idle_seconds(self) -> float:
        """See `CarrierTransport.idle_seconds`."""
        return self._end.engine.now() - self._last_input

    def keep_unsent_below(self, size: int) -> None:
        """See `CarrierTransport.keep_unsent_below`. A channel of another carrier has none of its own."""
        if (connection := self._end.tcp_connection) is not None:
            keep_unsent_below(connection, size)

    def limit_retransmission(self, max_rto: float, user_timeout: float) -> None:
        """See `CarrierTransport.limit_retransmission`."""
        if (connection := self._end.tcp_connection) is not None:
            limit_retransmission(connection, max_rto, user_timeout)

    def close(self) -> None:
        """See `CarrierTransport.close`."""
        self._handler = None
        if not self._end.closed:
            self._end.handler = NO_HANDLER
            self._end.close("the visit is over")

    # The handler of the end

    def on_data(self, data: memoryview) -> int:
        """Bytes for the carrier."""
        self._last_input = self._end.engine.now()
        return len(data) if self._handler is None else self._handler.on_input(data)

    def on_writable(self) -> None:
        """There is space again."""
        if self._handler is not None:
            self._handler.on_writable()

    def on_eof(self) -> None:
        """The peer sends no more, so it answers no more."""
        if not self._is_reading:
            self._lost(PEER_CLOSED)

    def on_write_failed(self, error: OSError) -> None:
        """The peer takes no more."""
        self.on_reset(error)

    def on_reset(self, error: OSError) -> None:
        """The end is gone."""
        self.failure = error
        self._lost(f"connection lost: {reason_of(error)}")

    def on_internal_error(self, error: Exception) -> None:
        """A bug."""
        if self._handler is not None:
            self._handler.on_failure(error)

    def _lost(self, reason: str) -> None:
        if self._handler is not None:
            self._handler.on_lost(reason)
