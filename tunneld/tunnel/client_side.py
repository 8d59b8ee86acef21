"""The half of a tunnel that clients connect to: a listener, and the visitors that wait for a server connection.

A visitor that finds a server connection parked is joined to it inside the engine's callback and never has a task. One
that finds none waits in a task of the tunnel's nursery until a server connection arrives, `pairing_timeout` is over, or
the visitor disconnects. A connection of a trusted proxy has a task until its PROXY protocol header has arrived; no
other visitor is held up by that.

The header of a trusted proxy is taken off the socket to the byte. Where it ends is unknown until it has been seen, and
what follows belongs to the hidden server. So the socket is read with MSG_PEEK first: while the header is incomplete,
all that has arrived is part of it and may be consumed; once it is complete, exactly its rest is consumed. The kernel
keeps the visitor's own bytes for the relay.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import Any

import trio

from tunneld.config.schema import TunnelSettings
from tunneld.engine.acceptor import peer_closed
from tunneld.engine.engine import Engine, FailureCallback, Registration
from tunneld.errors import RemoteProtocolError, UsageError, reason_of
from tunneld.net.address import Address, Port
from tunneld.net.endpoint import Endpoint, is_wildcard, parse_network
from tunneld.net.sockets import bind_in_range, bind_port, taken_out
from tunneld.policy.admission import AdmissionRefusal, RefusalKind
from tunneld.policy.limits import EffectiveLimits
from tunneld.policy.networks import NetworkSet, read_address
from tunneld.tunnel.server_side import ServerConnection, ServerSide
from tunneld.tunnel.snapshot import ClientSideSnapshot, WaitingVisitor
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitors import VisitorRelays
from tunneld.wire.proxy_protocol import MAX_V2, ProxyHeader, decode_v1, decode_v2
from tunneld.wire.proxy_protocol import Address as HostAndPort


class ClientSide:
    """A listener for clients. Bound by its constructor, listening from `listen`, closed by `close`."""

    def __init__(
        self,
        spec: TunnelSpec,
        limits: EffectiveLimits,
        snapshot: ClientSideSnapshot | None = None,
        held: Sequence[socket.socket] = (),
    ) -> None:
        """Bind the requested port, or any port that the tunnel may get; or continue from the `snapshot` of another
        process. `held` are listeners that the tunnel will replace.

        Raises `ListenError`, `LimitReachedError`, `ShortageError` or, where the port is outside the range,
        `UsageError`.
        """
        self.pending_headers = 0  # connections of trusted proxies before their PROXY protocol header
        self._settings = settings = spec.settings
        self._limits = limits
        self._proxies = NetworkSet(map(parse_network, settings.trusted_proxies))
        snapshot = snapshot or ClientSideSnapshot(0, _bind(settings, spec, held))
        self._listener = snapshot.listener
        self._closed = self._listener is None
        bound = ("", snapshot.port) if self._listener is None else self._listener.getsockname()
        self._address = None if is_wildcard(bound[0]) else bound  # that visitors connect to, where it is only one
        self.uri = Endpoint("tcp", spec.advertised_host, bound[1])
        self._adopted = snapshot.waiting
        self._waiting: dict[socket.socket, tuple[Any, Any, float]] = {}  # peer, destination, deadline in Trio's time
        self._accepting: Registration | None = None
        self._engine: Engine
        self._server_side: ServerSide
        self._visitors: VisitorRelays
        self._nursery: trio.Nursery
        self._failed: FailureCallback

    @property
    def listeners(self) -> list[socket.socket]:
        """Its listener, while it is open."""
        return [self._listener] if self._listener is not None and not self._closed else []

    @property
    def address(self) -> Address:
        """The address that visitors connect to."""
        return Port(self.uri.port)

    def listen(
        self,
        engine: Engine,
        server_side: ServerSide,
        visitors: VisitorRelays,
        nursery: trio.Nursery,
        failed: FailureCallback,
    ) -> None:
        """Accept visitors from now on. `nursery` owns the tasks of waiting ones; `failed` is called with bugs."""
        self._engine, self._server_side, self._visitors = engine, server_side, visitors
        self._nursery, self._failed = nursery, failed
        on_connection = self._on_connection if self._proxies else self._on_visitor
        if self._listener is not None:
            self._accepting = engine.listen(self._listener, on_connection, failed)
        for one in self._adopted:
            self._wait(one.visitor, one.peer, one.destination, one.seconds_left)
        self._adopted = ()

    @property
    def waiting(self) -> int:
        """Visitors that have no server connection yet."""
        return len(self._waiting)

    def pause(self) -> None:
        """Accept no visitor for now; new connections stay in the listener's queue."""
        if self._accepting is not None:
            self._accepting.release()

    def export(self) -> ClientSideSnapshot:
        """Hand over the listener and the waiting visitors, without closing any of them. The caller owns their sockets,
        and calls `close` afterwards as usual.
        """
        self.pause()
        now = trio.current_time()
        waiting, self._waiting = self._waiting, {}
        visitors = [
            WaitingVisitor(taken_out(visitor), peer, destination, max(0.0, deadline - now))
            for visitor, (peer, destination, deadline) in waiting.items()
        ]
        listener = taken_out(self._listener) if self._listener is not None and not self._closed else None
        return ClientSideSnapshot(self.uri.port, listener, visitors)

    def close(self) -> None:
        """Stop listening. Waiting visitors stay until their tasks end. Idempotent."""
        self._closed = True
        if self._accepting is not None:
            self._accepting.release()
        if self._listener is not None:
            self._listener.close()

    def _on_connection(self, visitor: socket.socket, peer: Any) -> None:
        """The engine accepted a client, or a trusted proxy, and then the header has to be read first."""
        max_waiting = self._limits.max_waiting
        if read_address(peer[0]) not in self._proxies:
            self._on_visitor(visitor, peer)
        elif self.waiting + self.pending_headers >= max_waiting:
            self._refuse(
                visitor,
                peer,
                AdmissionRefusal(
                    RefusalKind.FULL, f"limit reached: {max_waiting} visitors are waiting (tunnels.max_waiting)"
                ),
            )
        else:
            self.pending_headers += 1
            self._nursery.start_soon(self._read_proxy_header, visitor, peer)

    async def _read_proxy_header(self, visitor: socket.socket, proxy: Any) -> None:
        """Read the header of a trusted proxy, for at most `proxy_header_timeout`, and accept the visitor in it."""
        timeout = self._settings.proxy_header_timeout
        reason = f"no PROXY protocol header within {timeout:g} s (tunnels.proxy_header_timeout)"
        header = None
        try:
            with trio.move_on_after(timeout):
                header = await receive_header(visitor)
        except RemoteProtocolError as error:
            reason = str(error)
        except OSError as error:
            reason = f"connection failed before its PROXY protocol header was complete: {reason_of(error)}"
        finally:
            self.pending_headers -= 1
            if header is None:
                visitor.close()
        if header is None:
            self._visitors.refused(proxy, AdmissionRefusal(RefusalKind.HEADER, reason))
        elif self._closed:
            self._refuse(
                visitor,
                header.source or proxy,
                AdmissionRefusal(RefusalKind.UNSERVED, "the tunnel accepts no new visitors"),
            )
        else:
            self._on_visitor(visitor, header.source or proxy, header.destination)

    def _refuse(self, visitor: socket.socket, peer: Any, refusal: AdmissionRefusal) -> None:
        visitor.close()
        self._visitors.refused(peer, refusal)

    def _on_visitor(self, visitor: socket.socket, peer: Any, destination: Any = None) -> None:
        """Join a new visitor to a parked server connection, or let it wait for one.

        `destination` is the address that it connected to, where a proxy accepted the connection.
        """
        if (refusal := self._visitors.admit(peer, len(self._waiting))) is not None:
            self._refuse(visitor, peer, refusal)
            return
        try:
            server = self._server_side.dial_nowait()
        except trio.WouldBlock:
            self._wait(visitor, peer, destination, self._limits.pairing_timeout)
        else:
            self._visitors.relay(visitor, server, peer, destination or self._address)

    def _wait(self, visitor: socket.socket, peer: Any, destination: Any, seconds: float) -> None:
        deadline = trio.current_time() + seconds
        self._waiting[visitor] = (peer, destination, deadline)
        self._nursery.start_soon(self._wait_for_server, visitor, peer, destination, deadline)

    async def _wait_for_server(self, visitor: socket.socket, peer: Any, destination: Any, deadline: float) -> None:
        """Hold one visitor until a server connection arrives, the visitor disconnects, or the deadline is over."""
        reason = f"no server connection within {self._limits.pairing_timeout:g} s (pairing_timeout)"
        server: ServerConnection | None = None

        def on_readable() -> None:
            nonlocal reason
            if peer_closed(visitor):
                reason = "the visitor left before a server connection arrived"
                scope.cancel()

        watching = self._engine.watch(visitor, on_readable, self._failed)
        try:
            with trio.move_on_at(deadline) as scope:
                server = await self._server_side.dial()
        except trio.ClosedResourceError:
            reason = "the tunnel accepts no new visitors"
        finally:
            self._waiting.pop(visitor, None)
            watching.release()
            if server is None:
                visitor.close()
        if server is None:
            self._visitors.pairing_failed(peer, reason)
        else:
            self._visitors.relay(visitor, server, peer, destination or self._address)


def _bind(settings: TunnelSettings, spec: TunnelSpec, held: Sequence[socket.socket]) -> socket.socket:
    ports, requested = settings.port_range, spec.options.client_port
    if requested is None:
        return bind_in_range(settings.host, ports, keepalive=settings.keepalive, order=spec.ports)
    if requested not in ports and ports[0] != 0:
        raise UsageError(
            f"public port {requested} is outside the range of this relay: use one of {settings.ports} (client_port)"
        )
    return bind_port(settings.host, requested, keepalive=settings.keepalive, held=held)


async def receive_header(connection: socket.socket) -> ProxyHeader:
    """Read the PROXY protocol header, version 1 or 2, at the start of the non-blocking `connection`, and not a byte
    more. IPv4-mapped addresses in it are returned as IPv4.

    Raises `RemoteProtocolError` where there is no header, `OSError` where the connection fails. A cancelled call may
    have consumed part of the header; the caller must close the connection then.
    """
    consumed = b""
    while True:
        await trio.lowlevel.wait_readable(connection)
        try:
            seen = connection.recv(MAX_V2, socket.MSG_PEEK)
        except BlockingIOError:
            continue
        if not seen:
            raise RemoteProtocolError("connection ended before its PROXY protocol header was complete")
        found = decode(consumed + seen)
        if found is None:
            consumed += connection.recv(len(seen))
        else:
            header, size = found
            connection.recv(size - len(consumed))
            return ProxyHeader(_unmap_address(header.source), _unmap_address(header.destination))


def decode(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Decode a header of either version, see `decode_v1`. Their first bytes differ."""
    return decode_v2(data) if data.startswith(b"\r") else decode_v1(data)


def _unmap_address(address: HostAndPort | None) -> HostAndPort | None:
    if address is None:
        return None
    host = ipaddress.ip_address(address[0])
    mapped = host.ipv4_mapped if isinstance(host, ipaddress.IPv6Address) else None
    return str(mapped or host), address[1]
