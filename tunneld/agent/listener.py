"""Serve visitors in this very program: a tunnel as a `trio.abc.Listener`.

    async with tunneld.connect("relay.example.org:7010") as client:
        async with tunneld.open_listener(client) as listener:
            print("visitors come to", listener.address)
            await trio.serve_listeners(handler, [listener])

Below it is the agent's pool, and in the nursery of `open_listener` are only the engine that watches the pool and the
keeper that looks after the tunnel. Visitors that nobody has accepted yet wait in a queue; when it is as long as
`backlog` the pool rests, and further visitors wait at the relay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.events import Field
from tunneld.agent.pool import PoolLimits
from tunneld.agent.request import TunnelRequest
from tunneld.agent.session import AgentContext, TunnelSession
from tunneld.agent.source import VisitorConnection
from tunneld.agent.visitors import visitor_of
from tunneld.client import Client
from tunneld.engine import new_engine
from tunneld.errors import TunneldError
from tunneld.wire.lines import Value

CLOSE_WITHIN = 3.0
"""Seconds for the relay to close the tunnel when the block ends."""


@asynccontextmanager
async def open_listener(
    client: Client, *, pool: int = 8, max_pool: int = 200, backlog: int = 128, **options: Value
) -> AsyncIterator[TunnelListener]:
    """Open a tunnel and listen for its visitors, for the length of the block; then the tunnel closes.

    `options` are those of openTunnel (`name`, `ttl`, `client_port`, ...); `pool` and `max_pool` bound the connections
    that are parked at the relay, `backlog` the visitors that wait to be accepted. `client` may be used for other calls
    meanwhile.

    Raises what `Client.open_tunnel` raises.

        async with tunneld.open_listener(client, name="echo") as listener:
            await trio.serve_listeners(handler, [listener])
    """
    async with trio.open_nursery() as nursery:
        engine = new_engine()
        await nursery.start(engine.run)
        listener = TunnelListener(backlog)
        wish = TunnelRequest(options, PoolLimits(pool, max_pool), backend="tcp")
        ground = AgentContext(engine, nursery, RelayAccess(str(client.relay), client.tls), _NoReporter())
        keeper = await TunnelSession.start(client, ground, wish, take=listener.take, failed=listener.fail)
        listener.attach(keeper)
        nursery.start_soon(listener.keep, client)
        try:
            yield listener
        finally:
            await listener.aclose()
            with trio.move_on_after(CLOSE_WITHIN, shield=True), suppress(TunneldError):
                await client.close(keeper.tunnel.id)
            keeper.supply.close()
            nursery.cancel_scope.cancel()


class VisitorStream(trio.abc.HalfCloseableStream):
    """The connection of one visitor: a stream that also knows who it is."""

    def __init__(self, stream: trio.abc.HalfCloseableStream, visitor: str) -> None:
        """Made by `TunnelListener.accept`."""
        self.visitor = visitor
        self._stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream`."""
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See `trio.abc.ReceiveStream`."""
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()


class TunnelListener(trio.abc.Listener[VisitorStream]):
    """A tunnel's visitors, one by one. Made by `open_listener`."""

    def __init__(self, backlog: int) -> None:
        self._backlog = backlog
        self._queue: deque[tuple[VisitorConnection, bytes]] = deque()
        self._waiting = trio.lowlevel.ParkingLot()
        self._ended: BaseException | None = None
        self._keeper: TunnelSession

    @property
    def address(self) -> str:
        """The client URI: what to tell the world."""
        return str(self._keeper.tunnel.client)

    async def accept(self) -> VisitorStream:
        """Wait for the next visitor.

        Raises `TunneldError` once the tunnel or the relay is gone, and `trio.ClosedResourceError` after `aclose`.
        """
        await trio.lowlevel.checkpoint()
        while not self._queue:
            if self._ended is not None:
                raise self._ended
            await self._waiting.park()
        way, header = self._queue.popleft()
        if len(self._queue) == self._backlog - 1 and self._ended is None:
            self._keeper.supply.resume()
        return VisitorStream(way.stream(), visitor_of(header))

    async def aclose(self) -> None:
        """Take nobody new; visitors that nobody accepted are dropped. Streams that were accepted go on."""
        self._end(trio.ClosedResourceError("this listener was closed"))
        self._keeper.supply.pause()
        while self._queue:
            self._queue.popleft()[0].close("the listener was closed")
        await trio.lowlevel.checkpoint()

    # What the pool and its keeper report

    def attach(self, keeper: TunnelSession) -> None:
        """Called once by `open_listener`."""
        self._keeper = keeper
        keeper.resume()

    def take(self, way: VisitorConnection, header: bytes) -> None:
        """A visitor came."""
        if isinstance(self._ended, trio.ClosedResourceError):
            way.close("the listener was closed")
            return
        self._queue.append((way, header))
        self._waiting.unpark()
        if len(self._queue) >= self._backlog:
            self._keeper.supply.pause()

    def fail(self, error: Exception) -> None:
        """A bug in a callback."""
        self._end(error)

    async def keep(self, client: Client) -> None:
        """Look after the tunnel until it is gone; then say so to whoever accepts."""
        try:
            await self._keeper.keep(client)
        except TunneldError as error:
            self._keeper.supply.close()
            self._end(error)

    def _end(self, error: BaseException) -> None:
        self._ended = self._ended or error
        self._waiting.unpark_all()


class _NoReporter:
    """A teller for programs that have their own ways to say things."""

    wants_visitors = False

    def report(self, event: str, /, **fields: Field) -> None:
        """Nobody listens."""
