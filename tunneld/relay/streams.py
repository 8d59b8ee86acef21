"""`relay`: join any two Trio streams, on the fastest way there is for them."""

from __future__ import annotations

import socket

import trio
from trio.abc import HalfCloseableStream

from .copy import StreamCopier
from .engine import Engine, Relay, RelayEnd


async def relay(
    visitor_stream: HalfCloseableStream,
    server_stream: HalfCloseableStream,
    *,
    linger: float,
    engine: Engine | None = None,
) -> RelayEnd:
    """Relay between two streams until both directions ended, and close both; how it ended.

    Two plain `trio.SocketStream`s go to `engine`, where one is given; all else is copied by two tasks. Cancelling
    drops both connections. See `Engine.join` for `linger` (seconds) and for how ends and resets are passed on.
    """
    if engine is not None and type(visitor_stream) is trio.SocketStream and type(server_stream) is trio.SocketStream:
        return await _relay_in_engine(visitor_stream, server_stream, linger, engine)
    return await StreamCopier(visitor_stream, server_stream, linger=linger).run()


async def _relay_in_engine(
    visitor_stream: trio.SocketStream, server_stream: trio.SocketStream, linger: float, engine: Engine
) -> RelayEnd:
    """Hand the sockets inside two streams to the engine, and sleep until it is done with them."""
    over = trio.Event()
    ends: list[RelayEnd] = []

    def on_end(_relay: Relay, end: RelayEnd) -> None:
        ends.append(end)
        over.set()

    visitor, server = detach(visitor_stream), detach(server_stream)
    try:
        joined = engine.join(visitor, server, linger=linger, on_end=on_end)
    except BaseException:
        visitor.close()
        server.close()
        raise
    try:
        await over.wait()
    finally:
        joined.drop()
    return ends[0]


def detach(stream: trio.SocketStream) -> socket.socket:
    """Take the socket out of a stream, which is closed by that. Raises OSError on a stream that was closed before."""
    inner = stream.socket
    connection = socket.socket(inner.family, inner.type, inner.proto, fileno=inner.detach())
    connection.setblocking(False)
    return connection
