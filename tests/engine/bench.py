"""What the tests of the data plane have in common: engines, sockets with a far and a near end, a recorder of ends."""

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
    "native in small sips": lambda: new_engine(buffer_size=512, pipe_size=4096, turn_size=1, accept_batch=1),
    "portable": lambda: PortableEngine(EngineLimits()),
}

NOISE = random.Random(7).randbytes(1 << 20)


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return sum(1 for _ in Path("/dev/fd").iterdir())


def tcp_pair(**options: int) -> tuple[socket.socket, socket.socket]:
    """A connected pair of non-blocking TCP sockets; options are socket options (`SO_RCVBUF=4096`) of both."""
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
    """Close with a reset."""
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.socket.close()


async def flood(far: trio.SocketStream) -> None:
    """Send without end, until the connection breaks or is closed."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            await far.send_all(NOISE)


async def read_all(far: trio.abc.ReceiveStream) -> bytes:
    """Everything up to the end."""
    return b"".join([bytes(chunk) async for chunk in far])


async def read_exactly(far: trio.abc.ReceiveStream, count: int) -> bytes:
    """So many bytes; fewer where the stream ends before."""
    data = b""
    while len(data) < count:
        chunk = await far.receive_some(count - len(data))
        if not chunk:
            break
        data += chunk
    return data


@dataclass
class Ends:
    """Records the ends of relays; its `note` is an `on_end`."""

    told: list[tuple[Relay, RelayEnd]] = field(default_factory=list)
    _event: trio.Event = field(default_factory=trio.Event)

    def note(self, relay: Relay, end: RelayEnd) -> None:
        self.told.append((relay, end))
        self._event.set()

    async def one(self) -> RelayEnd:
        """The end of the only relay."""
        await self._event.wait()
        assert len(self.told) == 1
        return self.told[0][1]

    @property
    def causes(self) -> list[Cause]:
        return [end.cause for _, end in self.told]


@dataclass
class Joined:
    """A relay between two TCP connections, and their far ends."""

    relay: Relay
    ends: Ends
    visitor: trio.SocketStream
    server: trio.SocketStream


def no_failure(error: Exception) -> None:
    """An `on_failure` for where none is expected."""
    raise AssertionError(f"unexpected failure: {error!r}")


@dataclass
class Bench:
    """One running engine and the sockets of one test, which are closed after it."""

    engine: Engine
    nursery: trio.Nursery
    stop: trio.CancelScope
    sockets: list[socket.socket] = field(default_factory=list)

    def tcp(self, **options: int) -> tuple[trio.SocketStream, socket.socket]:
        """The far end, as a stream, and the near end of a new connection."""
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

    def join(self, *, linger: float = 30, throttle: Limiter | None = None, **options: int) -> Joined:
        """A relay between two new connections."""
        visitor, near_visitor = self.tcp(**options)
        server, near_server = self.tcp(**options)
        ends = Ends()
        relay = self.engine.join(near_visitor, near_server, linger=linger, on_end=ends.note, throttle=throttle)
        return Joined(relay, ends, visitor, server)

    async def check(self) -> None:
        """A bystander's relay works, start to end."""
        joined = self.join()
        await joined.visitor.send_all(b"ping")
        await joined.visitor.send_eof()
        assert await read_all(joined.server) == b"ping"
        await joined.server.send_all(b"pong")
        await joined.server.send_eof()
        assert await read_all(joined.visitor) == b"pong"
        assert (await joined.ends.one()).cause is Cause.FINISHED
