"""The half of a tunnel that clients connect to: a listener, and the visitors that wait for a server connection.

A visitor that finds a server connection parked is paired inside the engine's callback and never has a task. One that
finds none waits in a task of the tunnel's nursery, until a server connection comes, `pairing_timeout` is over, or
the visitor leaves.
"""

from __future__ import annotations

import socket
from typing import Any, Protocol

import trio

from tunneld.backends import ServerSide
from tunneld.config.schema import Tunnels
from tunneld.endpoint import Endpoint
from tunneld.errors import UsageError
from tunneld.net import bind_in_range
from tunneld.options import TunnelOptions
from tunneld.relay.engine import Engine, Registration
from tunneld.relay.look import has_left


class Pairing(Protocol):
    """What a client side asks of its tunnel."""

    def full(self) -> str:
        """Why no further visitor is taken, or nothing."""

    def pair(self, visitor: socket.socket, server: socket.socket, peer: Any) -> None:
        """Relay between a visitor and a server connection; both belong to the tunnel from now on."""

    def gave_up(self, peer: Any, reason: str) -> None:
        """A visitor waited in vain and was closed."""

    def refused(self, side: str, peer: Any, reason: str) -> None:
        """A connection was turned away and closed."""

    def fail(self, error: Exception) -> None:
        """A callback raised: a bug."""


class ClientSide:
    """A listener for clients. Bound when made, listening from `listen`, gone after `close`."""

    def __init__(self, settings: Tunnels, options: TunnelOptions, advertised_host: str) -> None:
        """Bind the port asked for, or any of the range.

        Raises `ListenError`, `LimitReachedError`, `ShortageError` or, where the port is outside the range,
        `UsageError`.
        """
        self._listener = bind_in_range(settings.host, _ports(settings, options), keepalive=settings.keepalive)
        self.uri = Endpoint("tcp", advertised_host, self._listener.getsockname()[1])
        self.waiting = 0  # visitors that have no server connection yet
        self._pairing_timeout = options.pairing_timeout or settings.pairing_timeout
        self._accepting: Registration | None = None
        self._engine: Engine
        self._server_side: ServerSide
        self._tunnel: Pairing
        self._nursery: trio.Nursery

    def listen(self, engine: Engine, server_side: ServerSide, tunnel: Pairing, nursery: trio.Nursery) -> None:
        """Take visitors from now on; the tunnel's `nursery` owns those that wait."""
        self._engine, self._server_side, self._tunnel, self._nursery = engine, server_side, tunnel, nursery
        self._accepting = engine.listen(self._listener, self._visit, tunnel.fail)

    def close(self) -> None:
        """Take nobody new. Harmless when repeated."""
        if self._accepting is not None:
            self._accepting.release()
        self._listener.close()

    def _visit(self, visitor: socket.socket, peer: Any) -> None:
        """A client connected: pair it at once where a server connection is parked, otherwise let it wait."""
        reason = self._tunnel.full()
        if reason:
            visitor.close()
            self._tunnel.refused("client", peer, reason)
            return
        try:
            server = self._server_side.dial_nowait()
        except trio.WouldBlock:
            self.waiting += 1
            self._nursery.start_soon(self._wait_for_server, visitor, peer)
        else:
            self._tunnel.pair(visitor, server, peer)

    async def _wait_for_server(self, visitor: socket.socket, peer: Any) -> None:
        """Hold one visitor until a server connection comes, the visitor leaves, or `pairing_timeout` is over."""
        reason = f"no server connection came in {self._pairing_timeout:g} s (pairing_timeout)"
        server: socket.socket | None = None

        def look() -> None:
            nonlocal reason
            if has_left(visitor):
                reason = "it left before a server connection came"
                scope.cancel()

        watching = self._engine.watch(visitor, look, self._tunnel.fail)
        try:
            with trio.move_on_after(self._pairing_timeout) as scope:
                server = await self._server_side.dial()
        except trio.ClosedResourceError:
            reason = "the tunnel takes nobody new"
        finally:
            self.waiting -= 1
            watching.release()
            if server is None:
                visitor.close()
        if server is None:
            self._tunnel.gave_up(peer, reason)
        else:
            self._tunnel.pair(visitor, server, peer)


def _ports(settings: Tunnels, options: TunnelOptions) -> range:
    ports, wanted = settings.port_range, options.client_port
    if wanted is None:
        return ports
    if wanted not in ports and ports[0] != 0:
        raise UsageError(f"option client_port={wanted}: this relay's tunnels listen on {settings.ports}")
    return range(wanted, wanted + 1)
