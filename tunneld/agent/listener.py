"""Serve visitors inside a Trio program: a tunnel as a `trio.abc.Listener`.

    async with tunneld.connect("relay.example.org:7010") as client:
        async with tunneld.open_listener(client) as listener:
            print("listening at", listener.address)
            await trio.serve_listeners(handler, [listener])

It uses the agent's pool of connections. The nursery of `open_listener` has two tasks: the engine, which watches the
pool, and the session, which keeps the tunnel open. Visitors wait in a queue until they are accepted. When the queue is
as long as `backlog`, the pool pauses, and further visitors wait at the relay.
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
from tunneld.agent.visitors import visitor_address
from tunneld.client import Client
from tunneld.client.client import check_trio
from tunneld.engine import new_engine
from tunneld.errors import TunneldError
from tunneld.wire.lines import Value

CLOSE_TIMEOUT = 3.0
"""Seconds for the relay to close the tunnel when the block ends."""


@asynccontextmanager
async def open_listener(
    client: Client, *, pool: int = 8, max_pool: int = 200, backlog: int = 128, **options: Value
) -> AsyncIterator[TunnelListener]:
    """Open a tunnel and listen for its visitors, for the length of the block; then the tunnel is closed.

    `options` are those of openTunnel (`name`, `ttl`, `client_port`, ...). `pool` and `max_pool` bound the idle
    connections at the relay, `backlog` the visitors that wait to be accepted. `client` can be used for other calls
    meanwhile.

    Raises what `Client.open_tunnel` raises.

        async with tunneld.open_listener(client, name="echo") as listener:
            await trio.serve_listeners(handler, [listener])
    """
    check_trio()
    async with trio.open_nursery() as nursery:
        engine = new_engine()
        await nursery.start(engine.run)
        listener = TunnelListener(backlog)
        request = TunnelRequest(options, PoolLimits(pool, max_pool), backend="tcp")
        context = AgentContext(engine, nursery, RelayAccess(str(client.relay), client.tls), _NoReporter())
        session = await TunnelSession.start(
            client, context, request, on_visitor=listener._take, on_failure=listener._fail
        )
        listener._attach(session)
        nursery.start_soon(listener._keep, client)
        try:
            yield listener
        finally:
            await listener.aclose()
            with trio.move_on_after(CLOSE_TIMEOUT, shield=True), suppress(TunneldError):
                await client.close(session.tunnel.id)
            session.source.close()
            nursery.cancel_scope.cancel()


class VisitorStream(trio.abc.HalfCloseableStream):
    """The connection of one visitor: a stream with the attribute `visitor`, the visitor's address."""

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
    """The visitors of a tunnel, one by one. Made by `open_listener`."""

    def __init__(self, backlog: int) -> None:
        self._backlog = backlog
        self._queue: deque[tuple[VisitorConnection, bytes]] = deque()
        self._accepting = trio.lowlevel.ParkingLot()
        self._error: BaseException | None = None  # raised by `accept` once the queue is empty
        self._session: TunnelSession

    @property
    def address(self) -> str:
        """The tunnel's public address, as a URI."""
        return str(self._session.tunnel.client)

    async def accept(self) -> VisitorStream:
        """Wait for the next visitor; the caller owns the stream.

        Raises `TunneldError` once the tunnel or the relay is gone, and `trio.ClosedResourceError` after `aclose`.
        """
        await trio.lowlevel.checkpoint()
        while not self._queue:
            if self._error is not None:
                raise self._error
            await self._accepting.park()
        visitor, header = self._queue.popleft()
        if len(self._queue) == self._backlog - 1 and self._error is None:
            self._session.source.resume()
        return VisitorStream(visitor.stream(), visitor_address(header))

    async def aclose(self) -> None:
        """Take no new visitors, and drop the ones that were not accepted. Accepted streams stay open."""
        self._end(trio.ClosedResourceError("this listener was closed"))
        self._session.source.pause()
        while self._queue:
            self._queue.popleft()[0].close("the listener was closed")
        await trio.lowlevel.checkpoint()

    # Called by `open_listener`, the pool and the session

    def _attach(self, session: TunnelSession) -> None:
        """Start to take visitors of this tunnel. Called once, by `open_listener`."""
        self._session = session
        session.resume()

    def _take(self, visitor: VisitorConnection, header: bytes) -> None:
        """Queue a visitor that arrived with this PROXY header."""
        if isinstance(self._error, trio.ClosedResourceError):
            visitor.close("the listener was closed")
            return
        self._queue.append((visitor, header))
        self._accepting.unpark()
        if len(self._queue) >= self._backlog:
            self._session.source.pause()

    def _fail(self, error: Exception) -> None:
        """Called after a bug in a callback: `accept` raises that error."""
        self._end(error)

    async def _keep(self, client: Client) -> None:
        """Keep the tunnel until it is lost; `accept` raises the reason."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wake_when_lost, client)
            try:
                await self._session.keep(client)
            except TunneldError as error:
                self._session.source.close()
                self._end(error)
            nursery.cancel_scope.cancel()

    async def _wake_when_lost(self, client: Client) -> None:
        """Notice a lost control connection at once, not only at the next request."""
        await client.wait_lost()
        self._session.wake()

    def _end(self, error: BaseException) -> None:
        self._error = self._error or error
        self._accepting.unpark_all()


class _NoReporter:
    """A reporter that discards everything: the program has its own ways to report."""

    wants_visitors = False

    def report(self, event: str, /, **fields: Field) -> None:
        """Discard the event."""
