"""Helpers of the engine tests: engines, connected sockets, and a recorder for `on_end`.

Of each connection, the test holds the far socket and the engine the near one.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from tunneld.engine import new_engine
from tunneld.engine.engine import Cause, Engine, Limiter, Relay, RelayEnd
from tunneld.engine.limits import EngineLimits
from tunneld.engine.portable import PortableEngine

ENGINES: dict[str, Callable[[], Engine]] = {
    "native": new_engine,
    "native without pipes": lambda: new_engine(max_pipes=0),
    "native with tiny buffers": lambda: new_engine(buffer_size=512, pipe_size=4096, turn_size=1, accept_batch=1),
    "portable": lambda: PortableEngine(EngineLimits()),
}

NOISE = random.Random(7).randbytes(1 << 20)


def open_descriptors() -> int:
    """The number of descriptors that this process has open."""
    return sum(1 for _ in Path("/dev/fd").iterdir())


def tcp_pair(**options: int) -> tuple[socket.socket, socket.socket]:
    """A connected pair of non-blocking TCP sockets, far and near, both with these socket options (`SO_RCVBUF=4096`)."""
    with socket.socket() as listener, socket.socket() as client:
        for name, value in options.items():
            listener.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
            client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        near, _ = listener.accept()
        far = socket.socket(fileno=client.detach())
    far.setblocking(False)
    near.setblocking(False)
    return far, near


def stream(connection: socket.socket) -> trio.SocketStream:
    """A Trio stream around a socket."""
    return trio.SocketStream(trio.socket.from_stdlib_socket(connection))


def reset(far: trio.SocketStream) -> None:
    """Close the socket with a reset."""
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.socket.close()


async def flood(far: trio.SocketStream) -> None:
    """Send without end, until the connection breaks or is closed."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            await far.send_all(NOISE)


async def read_all(far: trio.abc.ReceiveStream) -> bytes:
    """Read up to the end of file."""
    return b"".join([bytes(chunk) async for chunk in far])


async def wait_reset(far: trio.abc.ReceiveStream) -> None:
    """Read until the connection is reset; a clean end fails the test."""
    try:
        while await far.receive_some():
            pass
    except trio.BrokenResourceError:
        return
    raise AssertionError("the stream ended cleanly")


async def read_exactly(far: trio.abc.ReceiveStream, count: int) -> bytes:
    """Read `count` bytes, or fewer if the stream ends before."""
    data = b""
    while len(data) < count:
        chunk = await far.receive_some(count - len(data))
        if not chunk:
            break
        data += chunk
    return data


@dataclass
class Ends:
    """Records how relays ended; `note` is an `on_end` callback."""

    told: list[tuple[Relay, RelayEnd]] = field(default_factory=list)
    _event: trio.Event = field(default_factory=trio.Event)

    def note(self, relay: Relay, end: RelayEnd) -> None:
        self.told.append((relay, end))
        self._event.set()

    async def one(self) -> RelayEnd:
        """Wait until the only relay has ended and return how."""
        await self._event.wait()
        assert len(self.told) == 1
        return self.told[0][1]

    @property
    def causes(self) -> list[Cause]:
        return [end.cause for _, end in self.told]


@dataclass
class RelayBetweenSockets:
    """A relay between two TCP connections, and their far sockets as streams."""

    relay: Relay
    ends: Ends
    visitor: trio.SocketStream
    server: trio.SocketStream


def no_failure(error: Exception) -> None:
    """An `on_failure` callback that must not be called."""
    raise AssertionError(f"unexpected failure: {error!r}")


@dataclass
class Bench:
    """One running engine, and the sockets of one test, which the fixture closes."""

    engine: Engine
    nursery: trio.Nursery
    stop: trio.CancelScope
    sockets: list[socket.socket] = field(default_factory=list)

    def tcp(self, **options: int) -> tuple[trio.SocketStream, socket.socket]:
        """A new connection: the far socket as a stream, and the near socket."""
        far, near = tcp_pair(**options)
        self.sockets += [far, near]
        return stream(far), near

    def listener(self) -> socket.socket:
        """A listening socket on a free port."""
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        self.sockets.append(listener)
        return listener

    def dialled(self, address: Any) -> socket.socket:
        """A socket that may still be connecting."""
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(address)
        self.sockets.append(connection)
        return connection

    def join(self, *, linger: float = 30, throttle: Limiter | None = None, **options: int) -> RelayBetweenSockets:
        """Relay between two new connections."""
        visitor, near_visitor = self.tcp(**options)
        server, near_server = self.tcp(**options)
        ends = Ends()
        relay = self.engine.join(near_visitor, near_server, linger=linger, on_end=ends.note, throttle=throttle)
        return RelayBetweenSockets(relay, ends, visitor, server)

    async def check_still_works(self) -> None:
        """Check that the engine still relays, from start to end."""
        joined = self.join()
        await joined.visitor.send_all(b"ping")
        await joined.visitor.send_eof()
        assert await read_all(joined.server) == b"ping"
        await joined.server.send_all(b"pong")
        await joined.server.send_eof()
        assert await read_all(joined.visitor) == b"pong"
        assert (await joined.ends.one()).cause is Cause.FINISHED
