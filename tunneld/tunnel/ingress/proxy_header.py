"""The PROXY protocol header that a trusted proxy sends ahead of a visitor's bytes.

It is taken off the socket to the byte. Where it ends is unknown until it has been seen, and what follows belongs to the
hidden server. So the socket is read with MSG_PEEK first: while the header is incomplete, all that has arrived is part
of it and may be consumed; once it is complete, exactly its rest is consumed. The kernel keeps the visitor's own bytes
for the relay.
"""

from __future__ import annotations

import socket

import trio

from tunneld.errors import RemoteProtocolError
from tunneld.wire.proxy_protocol import MAX_V2, ProxyHeader, decode


async def receive_header(connection: socket.socket) -> ProxyHeader:
    """Read the PROXY protocol header, version 1 or 2, at the start of the non-blocking `connection`, and not a byte
    more. IPv4-mapped addresses in it are returned as IPv4.

    Raises `RemoteProtocolError` where there is no header, `OSError` where the connection fails. A cancelled call may
    have consumed part of the header; the caller must close the connection then.
    """
    consumed = b""
    while True:
        await trio.lowlevel.wait_readable(connection)
        try:
            seen = connection.recv(MAX_V2, socket.MSG_PEEK)
        except BlockingIOError:
            continue
        if not seen:
            raise RemoteProtocolError("connection ended before its PROXY protocol header was complete")
        found = decode(consumed + seen)
        if found is None:
            consumed += connection.recv(len(seen))
        else:
            header, size = found
            connection.recv(size - len(consumed))
            return header
