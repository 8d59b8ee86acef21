"""Whether the peer of a silent TCP connection is still there, asked of the kernel. Nothing is read or written.

A NAT or a firewall that forgets a connection tells neither end. TCP keepalive finds out, by probes that the peer's
kernel answers: `heard_ago` tells when the last answer came, and `probe` makes the kernel send a probe now.

Only Linux tells when it has heard from a peer; elsewhere every peer counts as alive until its connection fails.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress

KEEPALIVE_PROBES = 4
"""Probes without an answer until the kernel drops a connection. They are a quarter of the idle time apart, so that a
vanished peer is noticed after twice the idle time.
"""
PROBE_SECONDS = 1
"""Seconds between the probes of `probe`: the kernel's least. Without an answer, a connection is dropped after about
four.
"""
MAX_KEEPALIVE_SECONDS = 32767
"""Linux's MAX_TCP_KEEPIDLE."""
_INFO_BYTES = 60
_LAST_ACK_RECEIVED = 56  # offset of tcpi_last_ack_recv, milliseconds, in the struct tcp_info of linux/tcp.h


def heard_ago(connection: socket.socket) -> float:
    """Seconds since a segment of the peer arrived, be it an answer to a probe. 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0.0
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:  # no TCP connection, or none any more: `watch` reports that
        return 0.0
    return int.from_bytes(info[_LAST_ACK_RECEIVED:], sys.byteorder) / 1000


def probe(connection: socket.socket) -> None:
    """Have the kernel send a keepalive probe now if the connection has been silent for `PROBE_SECONDS`, otherwise as
    soon as it has; and again every `PROBE_SECONDS`, until `set_keepalive`.
    """
    set_keepalive(connection, PROBE_SECONDS)


def set_keepalive(connection: socket.socket, seconds: float) -> None:
    """Have the kernel probe the peer of a connection, or of all connections that a listener accepts, after this long
    without a sign of life. Does nothing on a connection that has failed.
    """
    idle = min(max(1, round(seconds)), MAX_KEEPALIVE_SECONDS)
    options = {
        "TCP_KEEPCNT": KEEPALIVE_PROBES,
        "TCP_KEEPINTVL": max(1, idle // KEEPALIVE_PROBES),
        "TCP_KEEPIDLE": idle,  # the last, since it restarts the kernel's timer
    }
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):  # not every system has all three
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
