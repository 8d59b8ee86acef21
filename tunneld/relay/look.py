"""What an owner can learn of a watched connection without taking a byte from it."""

from __future__ import annotations

import socket


def peer_closed(connection: socket.socket) -> bool:
    """Whether the peer ended or broke the connection with nothing left to read.

    A peer that spoke before it ended has not left yet: somebody may still want to hear it.
    """
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
