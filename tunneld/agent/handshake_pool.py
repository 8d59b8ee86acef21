"""The pool of a tunnel whose server side asks for a key: the same, but a connection is made in a task.

    dialled ──► TLS, if the server URI says so ──► KEY ──► OK: parked ──► a visitor's header: taken

Few are made at once, because until it has shown its key each is a stranger to the relay, and it takes only so many
strangers from one address.
"""

from __future__ import annotations

import socket
import ssl

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.end_visitor import TlsParked
from tunneld.agent.pool import Parked, PlainParked, Pool, PoolLimits
from tunneld.agent.source import MAX_DIALS_AT_ONCE, SourceEvents
from tunneld.engine.engine import Engine
from tunneld.errors import TunneldError
from tunneld.net.endpoint import Endpoint


class HandshakePool(Pool):
    """See `Supply`."""

    def __init__(
        self,
        engine: Engine,
        relay: RelayAccess,
        uri: Endpoint,
        limits: PoolLimits,
        owner: SourceEvents,
        nursery: trio.Nursery,
        *,
        keep_header: bool,
    ) -> None:
        """`uri` is the server URI, `nursery` owns the tasks that dial. See `Pool`."""
        super().__init__(engine, (socket.AF_UNSPEC, None), limits, owner, keep_header=keep_header)
        self.relay = relay
        self.uri = uri
        self.nursery = nursery
        self.session: ssl.SSLSession | None = None  # for the next connection
        self.dialling = trio.CapacityLimiter(MAX_DIALS_AT_ONCE)

    def _begin(self) -> Parked:
        return _Handshake(self)


class _Handshake:
    """One connection: a task until the relay has said OK."""

    def __init__(self, pool: HandshakePool) -> None:
        self._pool = pool
        self._scope = trio.CancelScope()
        self._parked: Parked | None = None
        pool.nursery.start_soon(self._knock)

    async def _knock(self) -> None:
        pool = self._pool
        try:
            with self._scope:
                async with pool.dialling:
                    way, ahead = await pool.relay.dial_keyed(pool.uri, pool.session)
                if self._scope.cancel_called:  # when all was done, which cancels nothing any more
                    way.close()
                elif isinstance(way, socket.socket):
                    self._parked = PlainParked(pool, way, self)
                    self._parked.look()
                else:
                    pool.session = way.session(pool.session)
                    self._parked = TlsParked(pool, way, ahead, self)
        except TunneldError as error:
            pool.lost(self, str(error))
        except OSError as error:
            pool.lost(self, str(error))

    def look(self) -> None:
        """See `Parked`."""
        if self._parked is not None:
            self._parked.look()

    def close(self) -> None:
        """See `Parked`."""
        self._scope.cancel()
        if self._parked is not None:
            self._parked.close()
