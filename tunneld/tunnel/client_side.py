"""The half of a tunnel that clients connect to: a listener, and the visitors that wait for a server connection.

A visitor that finds a server connection parked is paired inside the engine's callback and never has a task. One that
finds none waits in a task of the tunnel's nursery, until a server connection comes, `pairing_timeout` is over, or
the visitor leaves. One that a trusted proxy brings has a task until the proxy has said who it is; nobody else waits
for that.

Who a trusted proxy says a visitor is: the PROXY protocol header, taken off the socket and not one octet more.

Where it ends is not known before it was seen, and what stands behind it belongs to the hidden server. So look first
(MSG_PEEK): as long as the header is not whole, all that has come is part of it and may be taken; once it is, exactly
the rest of it is. The kernel keeps the visitor's octets for the relay.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Container
from typing import Any

import trio

from tunneld.config.schema import TunnelSettings
from tunneld.engine.acceptor import peer_closed
from tunneld.engine.engine import Engine, FailureCallback, Registration
from tunneld.errors import RemoteProtocolError, UsageError, reason_of
from tunneld.net.endpoint import Endpoint, is_wildcard, parse_network
from tunneld.net.sockets import bind_in_range, taken_out
from tunneld.policy.admission import AdmissionRefusal, RefusalKind
from tunneld.policy.networks import NetworkSet, read_address
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.limits import EffectiveLimits
from tunneld.tunnel.server_side import ServerConnection, ServerSide
from tunneld.tunnel.snapshot import ClientSideSnapshot, WaitingVisitor
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitors import VisitorRelays
from tunneld.wire.proxy_protocol import MAX_V2, Address, ProxyHeader, decode_v1, decode_v2


class ClientSide:
    """A listener for clients. Bound when made, listening from `listen`, gone after `close`."""

    def __init__(self, opening: TunnelSpec, terms: EffectiveLimits, legacy: ClientSideSnapshot | None = None) -> None:
        """Bind the port asked for, or any of the range that is not reserved; or take over the `legacy` of another
        process.

        Raises `ListenError`, `LimitReachedError`, `ShortageError` or, where the port is outside the range,
        `UsageError`.
        """
        self._settings = settings = opening.settings
        self._terms = terms
        self._proxies = NetworkSet(map(parse_network, settings.trusted_proxies))
        self._hearing = 0  # visitors of whom a proxy has not told yet
        legacy = legacy or ClientSideSnapshot(0, _bind(settings, opening.options, opening.reserved))
        self._listener = legacy.listener
        self._closed = self._listener is None
        place = ("", legacy.port) if self._listener is None else self._listener.getsockname()
        self._place = None if is_wildcard(place[0]) else place  # the one address that visitors reach, if it is one
        self.uri = Endpoint("tcp", opening.advertised_host, place[1])
        self._left_waiting = legacy.waiting
        self._line: dict[socket.socket, tuple[Any, Any, float]] = {}  # who waits; until when, in Trio's time
        self._accepting: Registration | None = None
        self._engine: Engine
        self._server_side: ServerSide
        self._visitors: VisitorRelays
        self._nursery: trio.Nursery
        self._failed: FailureCallback

    def listen(
        self,
        engine: Engine,
        server_side: ServerSide,
        visitors: VisitorRelays,
        nursery: trio.Nursery,
        failed: FailureCallback,
    ) -> None:
        """Take visitors from now on. `nursery` owns those that wait; `failed` hears of bugs."""
        self._engine, self._server_side, self._visitors = engine, server_side, visitors
        self._nursery, self._failed = nursery, failed
        arrive = self._arrive if self._proxies else self._visit
        if self._listener is not None:
            self._accepting = engine.listen(self._listener, arrive, failed)
        for one in self._left_waiting:
            self._wait(one.visitor, one.peer, one.reached, one.patience)
        self._left_waiting = ()

    @property
    def waiting(self) -> int:
        """Visitors that have no server connection yet."""
        return len(self._line)

    def pause(self) -> None:
        """Accept nobody for now; whoever comes stands in the listener's queue."""
        if self._accepting is not None:
            self._accepting.release()

    def export(self) -> ClientSideSnapshot:
        """Let go of the listener and of everybody who waits, closing nothing. Then `close`, as ever."""
        self.pause()
        now = trio.current_time()
        line, self._line = self._line, {}
        waiting = [
            WaitingVisitor(taken_out(visitor), peer, reached, max(0.0, deadline - now))
            for visitor, (peer, reached, deadline) in line.items()
        ]
        listener = taken_out(self._listener) if self._listener is not None and not self._closed else None
        return ClientSideSnapshot(self.uri.port, listener, waiting)

    def close(self) -> None:
        """Take nobody new. Harmless when repeated."""
        self._closed = True
        if self._accepting is not None:
            self._accepting.release()
        if self._listener is not None:
            self._listener.close()

    def _arrive(self, visitor: socket.socket, peer: Any) -> None:
        """A client connected, or a proxy for one: hear who it is first."""
        most = self._terms.max_waiting
        if read_address(peer[0]) not in self._proxies:
            self._visit(visitor, peer)
        elif self.waiting + self._hearing >= most:
            self._refuse(
                visitor, peer, AdmissionRefusal(RefusalKind.FULL, f"{most} visitors wait already (tunnels.max_waiting)")
            )
        else:
            self._hearing += 1
            self._nursery.start_soon(self._hear_proxy, visitor, peer)

    async def _hear_proxy(self, visitor: socket.socket, proxy: Any) -> None:
        """Hold one visitor until a proxy has said who it is, or `proxy_header_timeout` is over."""
        timeout = self._settings.proxy_header_timeout
        reason = f"no PROXY protocol header came in {timeout:g} s (tunnels.proxy_header_timeout)"
        header = None
        try:
            with trio.move_on_after(timeout):
                header = await receive_header(visitor)
        except RemoteProtocolError as error:
            reason = str(error)
        except OSError as error:
            reason = f"it broke off before its PROXY protocol header: {reason_of(error)}"
        finally:
            self._hearing -= 1
            if header is None:
                visitor.close()
        if header is None:
            self._visitors.refused(proxy, AdmissionRefusal(RefusalKind.HEADER, reason))
        elif self._closed:
            self._refuse(
                visitor, header.source or proxy, AdmissionRefusal(RefusalKind.UNSERVED, "the tunnel takes nobody new")
            )
        else:
            self._visit(visitor, header.source or proxy, header.destination)

    def _refuse(self, visitor: socket.socket, peer: Any, refusal: AdmissionRefusal) -> None:
        visitor.close()
        self._visitors.refused(peer, refusal)

    def _visit(self, visitor: socket.socket, peer: Any, reached: Any = None) -> None:
        """A client is here: pair it at once where a server connection is at hand, otherwise let it wait.

        `reached` is the address that it connected to, where a proxy took the connection for us.
        """
        if (refusal := self._visitors.admit(peer, len(self._line))) is not None:
            self._refuse(visitor, peer, refusal)
            return
        try:
            server = self._server_side.dial_nowait()
        except trio.WouldBlock:
            self._wait(visitor, peer, reached, self._terms.pairing_timeout)
        else:
            self._visitors.relay(visitor, server, peer, reached or self._place)

    def _wait(self, visitor: socket.socket, peer: Any, reached: Any, patience: float) -> None:
        deadline = trio.current_time() + patience
        self._line[visitor] = (peer, reached, deadline)
        self._nursery.start_soon(self._wait_for_server, visitor, peer, reached, deadline)

    async def _wait_for_server(self, visitor: socket.socket, peer: Any, reached: Any, deadline: float) -> None:
        """Hold one visitor until a server connection comes, the visitor leaves, or `pairing_timeout` is over."""
        reason = f"no server connection came in {self._terms.pairing_timeout:g} s (pairing_timeout)"
        server: ServerConnection | None = None

        def look() -> None:
            nonlocal reason
            if peer_closed(visitor):
                reason = "it left before a server connection came"
                scope.cancel()

        watching = self._engine.watch(visitor, look, self._failed)
        try:
            with trio.move_on_at(deadline) as scope:
                server = await self._server_side.dial()
        except trio.ClosedResourceError:
            reason = "the tunnel takes nobody new"
        finally:
            self._line.pop(visitor, None)
            watching.release()
            if server is None:
                visitor.close()
        if server is None:
            self._visitors.pairing_failed(peer, reason)
        else:
            self._visitors.relay(visitor, server, peer, reached or self._place)


def _bind(settings: TunnelSettings, options: TunnelOptions, reserved: Container[int]) -> socket.socket:
    unless = reserved if options.client_port is None else ()
    return bind_in_range(settings.host, _ports(settings, options), keepalive=settings.keepalive, reserved=unless)


def _ports(settings: TunnelSettings, options: TunnelOptions) -> range:
    ports, wanted = settings.port_range, options.client_port
    if wanted is None:
        return ports
    if wanted not in ports and ports[0] != 0:
        raise UsageError(f"option client_port={wanted}: this relay's tunnels listen on {settings.ports}")
    return range(wanted, wanted + 1)


async def receive_header(connection: socket.socket) -> ProxyHeader:
    """Take the header of version 1 or 2 that `connection` (non-blocking) starts with.

    IPv4-mapped addresses in it come out as IPv4. Raises `RemoteProtocolError` where there is none, `OSError` where the
    connection breaks. Cancelled, it may have taken part of the header: then the connection is of no more use.
    """
    taken = b""
    while True:
        await trio.lowlevel.wait_readable(connection)
        try:
            seen = connection.recv(MAX_V2, socket.MSG_PEEK)
        except BlockingIOError:
            continue
        if not seen:
            raise RemoteProtocolError("it ended before its PROXY protocol header did")
        found = decode(taken + seen)
        if found is None:
            taken += connection.recv(len(seen))
        else:
            header, size = found
            connection.recv(size - len(taken))
            return ProxyHeader(_plain(header.source), _plain(header.destination))


def decode(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Read a header of either version; see `decode_v1`. They differ in their first octet."""
    return decode_v2(data) if data.startswith(b"\r") else decode_v1(data)


def _plain(address: Address | None) -> Address | None:
    if address is None:
        return None
    host = ipaddress.ip_address(address[0])
    mapped = host.ipv4_mapped if isinstance(host, ipaddress.IPv6Address) else None
    return str(mapped or host), address[1]
