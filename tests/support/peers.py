"""Connections of a test over real sockets, of visitors and hidden servers."""

from __future__ import annotations

import os
import socket
import struct

import trio

from tunneld.net.endpoint import Endpoint

PATIENCE = 20.0
"""Seconds of real time after which a test that waits for a peer fails."""


_connected: list[trio.SocketStream] = []


async def connect(endpoint: Endpoint, source: str | None = None) -> trio.SocketStream:
    """Connect as a visitor, from the address `source` if given. The connection is closed when the test ends, if the
    test did not.

    The call blocks: on loopback the kernel connects at once, while a non-blocking connect would report the reset of a
    visitor that is refused at once as its own failure.
    """
    await trio.lowlevel.checkpoint()
    address = (source, 0) if source is not None else None
    connection = socket.create_connection((endpoint.host, endpoint.port), source_address=address)
    connection.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
    _connected.append(stream)
    for _ in range(5):  # a relay in this process accepts it before the next one comes, so visitors wait in order
        await trio.lowlevel.checkpoint()
    return stream


def keep(stream: trio.SocketStream) -> trio.SocketStream:
    """Close this connection when the test ends, if the test does not."""
    _connected.append(stream)
    return stream


def close_connections() -> None:
    """Close the connections that the test left open."""
    while _connected:
        descriptor = _connected.pop().socket.detach()
        if descriptor >= 0:
            os.close(descriptor)  # Trio's close needs a running event loop, and that of the test has ended


async def read_exactly(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    """Read `count` bytes; fewer only if the stream ends."""
    received = bytearray()
    while len(received) < count and (chunk := await stream.receive_some(count - len(received))):
        received += chunk
    return bytes(received)


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Read until EOF."""
    received = bytearray()
    async for chunk in stream:
        received += chunk
    return bytes(received)


async def is_dropped(stream: trio.SocketStream) -> bool:
    """Whether the connection ends, by end of file or reset, without another byte."""
    try:
        return await stream.receive_some(1) == b""
    except trio.BrokenResourceError:
        return True


async def is_refused(endpoint: Endpoint) -> bool:
    """Whether a connection to `endpoint` fails."""
    try:
        await (await connect(endpoint)).aclose()
    except OSError:
        return True
    return False


def reset(stream: trio.SocketStream) -> None:
    """Close with a reset (RST), as after a crash of the peer."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()
