"""Who a trusted proxy says a visitor is: the PROXY protocol header, taken off the socket and not one octet more.

Where it ends is not known before it was seen, and what stands behind it belongs to the hidden server. So look first
(MSG_PEEK): as long as the header is not whole, all that has come is part of it and may be taken; once it is, exactly
the rest of it is. The kernel keeps the visitor's octets for the relay.
"""

from __future__ import annotations

import ipaddress
import socket

import trio

from tunneld.errors import RemoteProtocolError
from tunneld.wire.proxy_protocol import MAX_V2, Address, ProxyHeader, decode_v1, decode_v2


async def receive_header(connection: socket.socket) -> ProxyHeader:
    """Take the header of version 1 or 2 that `connection` (non-blocking) starts with.

    IPv4-mapped addresses in it come out as IPv4. Raises `RemoteProtocolError` where there is none, `OSError` where the
    connection breaks. Cancelled, it may have taken part of the header: then the connection is of no more use.
    """
    taken = b""
    while True:
        await trio.lowlevel.wait_readable(connection)
        try:
            seen = connection.recv(MAX_V2, socket.MSG_PEEK)
        except BlockingIOError:
            continue
        if not seen:
            raise RemoteProtocolError("it ended before its PROXY protocol header did")
        found = decode(taken + seen)
        if found is None:
            taken += connection.recv(len(seen))
        else:
            header, size = found
            connection.recv(size - len(taken))
            return ProxyHeader(_plain(header.source), _plain(header.destination))


def decode(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Read a header of either version; see `decode_v1`. They differ in their first octet."""
    return decode_v2(data) if data.startswith(b"\r") else decode_v1(data)


def _plain(address: Address | None) -> Address | None:
    if address is None:
        return None
    host = ipaddress.ip_address(address[0])
    mapped = host.ipv4_mapped if isinstance(host, ipaddress.IPv6Address) else None
    return str(mapped or host), address[1]
