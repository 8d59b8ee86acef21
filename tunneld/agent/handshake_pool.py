"""The pool of a tunnel whose server side requires the tunnel's key. Unlike in `Pool`, a task makes each connection.

    dialled ──► TLS, if the server URI says so ──► KEY ──► OK: parked ──► a visitor's header: handed over

Only a few are made at once. Until it has presented its key, a connection is unauthenticated, and the relay limits
unauthenticated connections per address.
"""

from __future__ import annotations

import socket
import ssl

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.end_visitor import TlsParked
from tunneld.agent.pool import Parked, PlainParked, Pool, PoolLimits
from tunneld.agent.source import SourceEvents
from tunneld.engine.engine import Engine
from tunneld.errors import ShortageError, TunneldError
from tunneld.net.endpoint import Endpoint


class HandshakePool(Pool):
    """A pool whose connections present the tunnel's key. Implements `ConnectionSource`."""

    def __init__(
        self,
        engine: Engine,
        relay: RelayAccess,
        uri: Endpoint,
        limits: PoolLimits,
        events: SourceEvents,
        nursery: trio.Nursery,
        *,
        keep_header: bool,
    ) -> None:
        """`uri` is the server URI, `nursery` runs the tasks that dial. For the rest see `Pool`."""
        super().__init__(engine, (socket.AF_UNSPEC, None), limits, events, keep_header=keep_header)
        self.relay = relay
        self.uri = uri
        self.nursery = nursery
        self.tls_session: ssl.SSLSession | None = None  # for the next connection to resume

    def _start_dial(self) -> Parked:
        return _Handshake(self)


class _Handshake:
    """One connection of the pool, and its key there. A task makes it until the relay has said OK."""

    def __init__(self, pool: HandshakePool) -> None:
        self._pool = pool
        self._scope = trio.CancelScope()
        self._parked: Parked | None = None
        pool.nursery.start_soon(self._connect)

    async def _connect(self) -> None:
        pool = self._pool
        try:
            with self._scope:
                async with pool.relay.dialing:
                    connection, received = await pool.relay.dial_keyed(
                        pool.uri, pool.limits.keepalive, pool.tls_session
                    )
                if self._scope.cancel_called:  # at the moment in which the dial succeeded: too late to cancel it
                    connection.close()
                elif isinstance(connection, socket.socket):
                    self._parked = PlainParked(pool, connection, self)
                    self._parked.check()
                else:
                    pool.tls_session = connection.session(pool.tls_session)
                    self._parked = TlsParked(pool, connection, received, self)
        except (TunneldError, OSError) as error:
            pool.on_lost(self, str(error), shortage=isinstance(error, ShortageError))

    def check(self) -> None:
        """See `Parked.check`."""
        if self._parked is not None:
            self._parked.check()

    def close(self) -> None:
        """See `Parked.close`."""
        self._scope.cancel()
        if self._parked is not None:
            self._parked.close()
