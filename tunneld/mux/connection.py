"""The connection below a carrier: a plain or a TLS socket, read and written without blocking.

For TLS, OpenSSL works on memory buffers (`tunneld.tls.connection`) and one system call moves many records:
`ssl.SSLSocket` makes two system calls to read a record of 16 KiB and one to write it, and each write wakes the peer for
that little. Bulk transfers and small requests both need about an eighth less processor time this way.
"""

from __future__ import annotations

import math
import socket
import sys
from typing import Final

from tunneld.engine.failures import TcpSocket
from tunneld.engine.pump import Pump
from tunneld.mux.transport import CarrierInput, CarrierTransport
from tunneld.net.dial import TCP_RTO_MAX_MS
from tunneld.tls.connection import TlsSocket

TCP_NOTSENT_LOWAT: Final = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
"""Linux's number; Python's `socket` does not name it everywhere."""
TCP_USER_TIMEOUT: Final = 18
"""Linux's number."""
MAX_USER_TIMEOUT: Final = (1 << 31) - 1
"""Milliseconds, the largest TCP_USER_TIMEOUT: 24 days."""
TCPI_MIN_RTT: Final = 148
"""Offset of tcpi_min_rtt in Linux's `struct tcp_info`: the shortest recent round trip, in microseconds."""
TCPI_LAST_DATA_RECV: Final = 52
"""Offset of tcpi_last_data_recv: milliseconds since data arrived."""
TLS_RECORD_SIZE: Final = 16 * 1024
"""Most plaintext bytes in a TLS record (RFC 8446 §5.1): a read may complete a record begun by the one before."""


class Connection(CarrierTransport):
    """A connected non-blocking stream socket, which it owns and closes."""

    __slots__ = ("_fd", "_handler", "_pump", "connection")

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self.connection = connection
        self._fd = connection.fileno()
        self._pump: Pump | None = None
        self._handler: CarrierInput | None = None

    def attach(self, pump: Pump, handler: CarrierInput) -> None:
        """See `CarrierTransport.attach`."""
        self._pump, self._handler = pump, handler
        pump.attach(self._fd, handler)

    def rearm(self) -> None:
        """See `CarrierTransport.rearm`."""
        if self._pump is not None:
            self._pump.rearm(self._fd)

    def receive_into(self, buffer: memoryview) -> int:
        """See `CarrierTransport.receive_into`."""
        count = self.connection.recv_into(buffer)
        self.drained = count < len(buffer)
        return count

    def write(self, outgoing: bytearray) -> bool:
        """See `CarrierTransport.write`."""
        sent = 0
        try:
            with memoryview(outgoing) as view:
                while sent < len(view):
                    sent += self.connection.send(view[sent:])
        except BlockingIOError:
            return False
        finally:
            del outgoing[:sent]
        return True

    def round_trip(self) -> float:
        """The shortest recent round trip in seconds, measured by the kernel (TCP_INFO, tcp(7)); infinite if unknown."""
        microseconds = self._tcp_info(TCPI_MIN_RTT)
        return math.inf if microseconds is None else microseconds / 1e6

    def idle_seconds(self) -> float:
        """Seconds since data arrived; 0 if unknown."""
        milliseconds = self._tcp_info(TCPI_LAST_DATA_RECV)
        return 0.0 if milliseconds is None else milliseconds / 1e3

    def _tcp_info(self, offset: int) -> int | None:
        """A 32-bit number of `struct tcp_info`; None if the kernel has none."""
        try:
            info = self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, offset + 4)
        except OSError:
            return None  # not TCP: a socket pair
        return int.from_bytes(info[offset:], sys.byteorder) if len(info) == offset + 4 else None

    def keep_unsent_below(self, size: int) -> None:
        """See `CarrierTransport.keep_unsent_below`."""
        keep_unsent_below(self.connection, size)

    def limit_retransmission(self, max_rto: float, user_timeout: float) -> None:
        """See `CarrierTransport.limit_retransmission`."""
        limit_retransmission(self.connection, max_rto, user_timeout)

    def close(self) -> None:
        """Close the socket, without a TLS close_notify: every channel has an end of its own in the codec."""
        if self._pump is not None and self._handler is not None:
            self._pump.remove(self._fd, self._handler)
            self._pump = self._handler = None
        self.connection.close()


class TlsConnection(Connection):
    """A connection in TLS, after the handshake."""

    __slots__ = ("_tls",)

    def __init__(self, tls: TlsSocket) -> None:
        super().__init__(tls.connection)
        self._tls = tls

    @property
    def has_buffered_input(self) -> bool:
        """See `CarrierTransport.has_buffered_input`."""
        return self._tls.has_buffered_input

    @property
    def pending_output(self) -> int:
        """See `CarrierTransport.pending_output`: at most one `outgoing`, encrypted, and OpenSSL's own messages."""
        return self._tls.pending_output

    def receive_into(self, buffer: memoryview) -> int:
        """See `CarrierTransport.receive_into`. OpenSSL copies its input, so `buffer` holds first the records and then
        the plaintext.
        """
        tls = self._tls
        while not tls.ended:
            if not tls.has_buffered_input:
                space = len(buffer) - TLS_RECORD_SIZE
                count = self.connection.recv_into(buffer, space)
                self.drained = count < space
                if not count:
                    return 0
                tls.feed(buffer[:count])
            if count := tls.decrypt(buffer):
                self.wants_write = tls.pending_output > 0
                self.drained &= not tls.ended  # epoll does not report the close_notify again: the caller reads on
                return count
        return 0

    def write(self, outgoing: bytearray) -> bool:
        """See `CarrierTransport.write`. All of it is encrypted, but only once the kernel has what was before."""
        tls = self._tls
        if not tls.flush():
            return False
        with memoryview(outgoing) as view:
            tls.write(view)
        outgoing.clear()
        return tls.flush()


def keep_unsent_below(connection: TcpSocket, size: int) -> None:
    """Set TCP_NOTSENT_LOWAT, see `CarrierTransport`, and send small frames at once."""
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, size)
    except OSError:
        return  # not TCP: a socket pair


def limit_retransmission(connection: TcpSocket, max_rto: float, user_timeout: float) -> None:
    """Set TCP_RTO_MAX and TCP_USER_TIMEOUT, see `CarrierTransport`. Times in seconds."""
    timeout = min(round(1000 * user_timeout), MAX_USER_TIMEOUT)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, round(1000 * max_rto))
        connection.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, timeout)
    except OSError:
        return


def connection_over(connection: socket.socket | TlsSocket) -> Connection:
    """A `Connection` over a plain or a TLS socket, which it owns from now on."""
    return TlsConnection(connection) if isinstance(connection, TlsSocket) else Connection(connection)
