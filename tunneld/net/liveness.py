"""Whether the peer of a silent TCP connection is still there, asked of the kernel. Nothing is read or written.

A NAT or a firewall that forgets a connection tells neither end. TCP keepalive finds out, by probes that the peer's
kernel answers: `heard_ago` tells when the last answer came, and `probe` makes the kernel send a probe now.

Only Linux tells when it has heard from a peer; elsewhere every peer counts as alive until its connection fails.
"""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Container

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
TCP_CLOSE, TCP_CLOSE_WAIT = 7, 8
"""States of a connection that has failed, and of one whose peer has ended; see linux/tcp_states.h."""
_IDLE: int = getattr(socket, "TCP_KEEPIDLE", 0)  # the last to be set, since it restarts the kernel's timer
_INTERVAL: int = getattr(socket, "TCP_KEEPINTVL", 0)
_COUNT: int = getattr(socket, "TCP_KEEPCNT", 0)
_INFO_BYTES = 60
_LAST_ACK_RECEIVED = 56  # offset of tcpi_last_ack_recv, milliseconds, in the struct tcp_info of linux/tcp.h


def heard_ago(connection: socket.socket, ended: Container[int] = (TCP_CLOSE,)) -> float:
    """Seconds since a segment of the peer arrived, be it an answer to a probe. Infinite where the connection is in one
    of the states `ended`, 0 where the system does not tell.
    """
    if sys.platform != "linux":
        return 0.0
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:  # no TCP connection, or none any more: `watch` reports that
        return 0.0
    return math.inf if info[0] in ended else int.from_bytes(info[_LAST_ACK_RECEIVED:], sys.byteorder) / 1000


def probe(connection: socket.socket) -> None:
    """Have the kernel send a keepalive probe now if the connection has been silent for `PROBE_SECONDS`, otherwise as
    soon as it has; and again every `PROBE_SECONDS`, until `set_keepalive`.
    """
    set_keepalive(connection, PROBE_SECONDS)


def set_keepalive(connection: socket.socket, seconds: float) -> None:
    """Have the kernel probe the peer after this long without a sign of life. The connection has SO_KEEPALIVE, as all
    that one of our listeners has accepted. Does nothing on one that has failed.
    """
    idle = min(max(1, round(seconds)), MAX_KEEPALIVE_SECONDS)
    try:
        for option, value in ((_INTERVAL, max(1, idle // KEEPALIVE_PROBES)), (_COUNT, KEEPALIVE_PROBES), (_IDLE, idle)):
            if option:  # not every system has all three
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
    except OSError:
        return
