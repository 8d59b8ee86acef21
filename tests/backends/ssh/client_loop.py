"""An asyncssh client under Trio: the server's event loop, with a transport over a Trio stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

import asyncssh
import trio

from tunneld.backends.ssh.loop import TrioEventLoop, start_loop

T = TypeVar("T")


class StreamTransport(asyncio.Transport):
    """asyncio's transport interface over a Trio stream; `run` copies until either side is closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stream: trio.SocketStream, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._loop = loop
        self._stream = stream
        self._protocol = protocol
        self._outgoing = bytearray()
        self._is_closed = False
        self._changed = trio.Event()

    async def run(self) -> None:
        """Copy in both directions; ends with the connection."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            try:
                async for data in self._stream:
                    self._loop.call_soon(self._protocol.data_received, bytes(data))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            nursery.cancel_scope.cancel()
        self._loop.call_soon(self._protocol.connection_lost, None)

    async def _send(self) -> None:
        while self._outgoing or not self._is_closed:
            await self._changed.wait()
            self._changed = trio.Event()
            data = bytes(self._outgoing)
            self._outgoing.clear()
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
        await self._stream.aclose()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._outgoing += data
        self._changed.set()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        addresses = {"peername": self._stream.socket.getpeername, "sockname": self._stream.socket.getsockname}
        return addresses[name]() if name in addresses else default

    def is_closing(self) -> bool:
        return self._is_closed

    def abort(self) -> None:
        self._is_closed = True
        self._changed.set()

    close = abort


class ClientLoop(TrioEventLoop):
    """A loop that can also connect, with a Trio stream in place of a socket."""

    async def create_connection(self, protocol_factory: Any, *_: Any, sock: Any = None, **__: Any) -> Any:
        protocol = protocol_factory()
        transport = StreamTransport(self, sock, protocol)
        self.call_soon(protocol.connection_made, transport)
        self._nursery.start_soon(transport.run)
        return transport, protocol


async def wait(connection: asyncssh.SSHClientConnection, awaitable: Awaitable[T]) -> T:
    """Await something of asyncio's that belongs to a connection, from Trio code."""
    return await run_asyncio(connection._loop, awaitable)


async def run_asyncio(loop: asyncio.AbstractEventLoop, awaitable: Awaitable[T]) -> T:
    """Await something of asyncio's from Trio code."""

    async def call() -> T:
        return await awaitable

    done = trio.Event()
    task = loop.create_task(call())
    task.add_done_callback(lambda _: done.set())
    try:
        await done.wait()
    except trio.Cancelled:
        task.cancel()
        raise
    return task.result()


@asynccontextmanager
async def open_client(host: str, port: int, **options: Any) -> AsyncIterator[asyncssh.SSHClientConnection]:
    """A connection that has logged in, for the length of a block."""
    async with trio.open_nursery() as nursery:
        loop = await start_loop(nursery, lambda _loop, _context: None, cast("type[TrioEventLoop]", ClientLoop))
        stream = await trio.open_tcp_stream(host, port)
        connection = await run_asyncio(loop, asyncssh.connect(host, port, sock=stream, **options))
        try:
            yield connection
        finally:
            connection.abort()
            await wait(connection, connection.wait_closed())
            await stream.aclose()
            nursery.cancel_scope.cancel()
