"""The shared ports for HTTP and TLS: visitors of many tunnels, told apart by the name that they ask for.

    http     every request is routed by its Host                                           HttpConnection
    https    ClientHello, not consumed ──► an agent, by ALPN: its control or carrier connection
                                       ──► a site that keeps its own TLS: passed on as it is
                                       ──► a challenge of a certificate authority: answered
                                       ──► a name with a certificate: TLS ends here, then as http
                                       ──► anything else: the alert unrecognized_name
             the version of an SSH client  ──► the ssh port
             plain HTTP                    ──► a redirection to https, or an error page

There is no default certificate: it would tell every scanner one of the relay's names.

A proxy in front that does not speak HTTP sends a PROXY protocol header ahead of the bytes of each visitor. It is taken
off first, and from then on the connection is the visitor's: all limits are the ones of its address.

    serve_sites
    ├─ TLS handshake ×N       see handshakes.py
    └─ HTTP/2 connection ×N   see http2.py; everything else runs in the engine
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import structlog
import trio

from tunneld.config.names import HTTP2
from tunneld.engine.plain_transport import PlainTransport
from tunneld.engine.pump import Pump
from tunneld.engine.tls_end import TlsEnd
from tunneld.errors import RemoteProtocolError, reason_of
from tunneld.net.accept import local_address
from tunneld.net.endpoint import Peer
from tunneld.policy.networks import ConfiguredNetworks, read_address
from tunneld.sites.access_log import AccessLog
from tunneld.sites.connection import HttpConnection
from tunneld.sites.fields import Origin
from tunneld.sites.handshakes import HandshakeSettings, NewConnection, SiteHandshakes
from tunneld.sites.names import SharedNames
from tunneld.sites.pages import PLAIN_HTTP, error_page, https_redirect, plain_response
from tunneld.sites.peek import PeekReader
from tunneld.sites.port_places import PlacedConnection, PlaceSettings, PortPlaces
from tunneld.sites.site import Certificates, PortOrders, Request, Site
from tunneld.tls.connection import TlsSocket
from tunneld.wire.client_hello import NO_APPLICATION_PROTOCOL, UNRECOGNIZED_NAME, ClientHello, HelloError, encode_alert
from tunneld.wire.first_bytes import PlainProtocol, read_first_bytes
from tunneld.wire.proxy_protocol import ProxyHeader, decode

if TYPE_CHECKING:
    from tunneld.sites.http2 import Http2Connection

log: structlog.stdlib.BoundLogger = structlog.get_logger("sites")

CHALLENGE_PROTOCOL = b"acme-tls/1"
CHALLENGE_PATH = b"/.well-known/acme-challenge/"


ServiceCallback = Callable[[socket.socket, Peer], bool]
"""Takes over a connection for another service of the relay, from which nothing was read. False: the relay does not
serve it.
"""


class SiteSettings(PlaceSettings, HandshakeSettings, Protocol):
    """What the ports read from `[names]`, for each new connection."""

    @property
    def trusted_proxies(self) -> tuple[str, ...]: ...
    @property
    def proxy_protocol(self) -> tuple[str, ...]: ...


class SitePorts:
    """Both ports. It owns their connections."""

    def __init__(
        self,
        engine: Pump,
        names: SharedNames,
        settings: Callable[[], SiteSettings],
        certificates: Certificates,
        orders: PortOrders,
        access_log: AccessLog | None = None,
        agents: Mapping[bytes, ServiceCallback] | None = None,
        on_ssh: ServiceCallback | None = None,
    ) -> None:
        """`settings` is called for every connection, so that a reload applies to the next one. `agents` get the
        connections that ask for these protocols (ALPN), `on_ssh` those of SSH clients.
        """
        self.places = PortPlaces(settings)
        self.handshakes = SiteHandshakes(engine, settings, certificates, orders, self._on_tls)
        self._agents = agents or {}
        self._on_ssh = on_ssh
        self._names = names
        self._engine = engine
        self._settings = settings
        self._orders = orders
        self._access_log = access_log
        self._nursery: trio.Nursery
        self._peeking: set[PeekReader[Any]] = set()
        self._http2: set[Http2Connection] = set()
        names.on_draining = self._retire
        self._http_proxies = ConfiguredNetworks(lambda: settings().trusted_proxies)
        self._header_senders = ConfiguredNetworks(lambda: settings().proxy_protocol)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the connections until cancelled; then close all of them."""
        try:
            async with trio.open_nursery() as self._nursery:
                await self._nursery.start(self.handshakes.run)
                task_status.started()
        finally:
            for peeking in list(self._peeking):
                peeking.refuse(RemoteProtocolError("the relay stopped"))
            for connection in list(self.places.connections):
                connection.close_if_idle()  # in order: a browser opens another connection for its next request
            for connection in list(self.places.connections):
                connection.drop("the relay stopped")

    def __len__(self) -> int:
        """Connections on both ports that are not passed on."""
        return len(self.places)

    # Accepted connections

    def on_http(self, connection: socket.socket, peer: Peer) -> None:
        """A connection to the HTTP port."""
        self._accept(connection, peer, self._serve_http)

    def on_https(self, connection: socket.socket, peer: Peer) -> None:
        """A connection to the TLS port."""
        self._accept(connection, peer, self._serve_https)

    def _accept(self, connection: socket.socket, peer: Peer, serve: Callable[[NewConnection], None]) -> None:
        """Serve an accepted connection, once a PROXY protocol header is off it; or close it, where there is no place
        for it.
        """
        sends_header = peer[0] in self._header_senders
        deadline = self._engine.now() + self._settings().limits.head_timeout
        new = self._enter(connection, peer, None, deadline, is_exempt=sends_header)
        if new is not None and sends_header:
            self._peek(new, decode, partial(self._on_header, new, serve))
        elif new is not None:
            serve(new)

    def _enter(
        self, connection: socket.socket, peer: Peer, reached: Peer | None, deadline: float, *, is_exempt: bool = False
    ) -> NewConnection | None:
        """Count one more connection; or close it, where there is no place."""
        host = str(peer[0])
        is_exempt = is_exempt or read_address(host).is_loopback or host in self._http_proxies
        place = self.places.enter(host, is_exempt=is_exempt)
        if place is None:
            connection.close()
            return None
        return NewConnection(connection, peer, reached, deadline, place)

    def _on_header(
        self, new: NewConnection, serve: Callable[[NewConnection], None], found: tuple[ProxyHeader, int]
    ) -> None:
        """The PROXY protocol header of a connection is complete: from here on, it is the visitor's."""
        header, size = found
        new.socket.recv(size)
        new.place.leave()
        visitor = self._enter(new.socket, header.source or new.peer, header.destination, new.deadline)
        if visitor is not None:
            serve(visitor)

    def _peek(self, new: NewConnection, parse: Callable[[bytes], Any], on_found: Callable[[Any], None]) -> None:
        """Wait for the first bytes of a connection."""
        on_refused, on_bug = partial(self._on_refused, new), partial(self._on_bug, new)
        PeekReader(self._engine, new.socket, new.deadline, parse, on_found, on_refused, on_bug, self._peeking)

    def _on_refused(self, new: NewConnection, error: Exception | None) -> None:
        """The first bytes of a connection are late, or none that can be served."""
        if error is None:
            timeout = self._settings().limits.head_timeout
            reason = f"its first bytes were not complete within {timeout:g} s (names.head_timeout)"
        else:
            reason = reason_of(error) if isinstance(error, OSError) else str(error)
        log.debug("connection to a shared port refused", peer=new.peer[0], reason=reason)
        if isinstance(error, HelloError):
            _send(new.socket, encode_alert(error.alert))
        new.close()

    def _on_bug(self, new: NewConnection, error: Exception) -> None:
        log.error("connection to a shared port failed: internal error", exc_info=error)
        new.close()

    # Each protocol

    def _serve_http(self, new: NewConnection) -> None:
        self._start(new, PlainTransport(new.socket), b"http", partial(self._find, ""))

    def _serve_https(self, new: NewConnection) -> None:
        self._peek(new, read_first_bytes, partial(self._on_first_bytes, new))

    def _on_first_bytes(self, new: NewConnection, found: ClientHello | PlainProtocol) -> None:
        """It is known what a connection to the HTTPS port is for. Nothing was read from it."""
        if isinstance(found, ClientHello):
            self._on_hello(new, found)
        elif found is PlainProtocol.HTTP:
            self._start(new, PlainTransport(new.socket), b"http", self._answer_plain_http)
        elif self._on_ssh is not None and self._on_ssh(new.socket, new.peer):
            new.place.leave()
        else:
            log.debug("ssh client refused", peer=new.peer[0], reason="SSH is not served on this port (names.ssh)")
            new.close()

    def _on_hello(self, new: NewConnection, asked: ClientHello) -> None:
        """The first message of a TLS client is complete."""
        name = asked.server_name
        for protocol in self._agents.keys() & set(asked.protocols):
            if self._agents[protocol](new.socket, new.peer):
                new.place.leave()
            else:
                new.refuse(NO_APPLICATION_PROTOCOL)
            return
        sites = self._names.sites
        is_away = not sites.has_host(name) and self._names.is_reserved(name)
        site = sites.find(name) if name and not is_away else None
        if site is not None and site.keeps_tls:
            new.place.leave()
            site.open_connection(new.socket, new.peer, new.reached, name)
        elif CHALLENGE_PROTOCOL not in asked.protocols:
            self.handshakes.start(new, name)
        elif (context := self._orders.tls_context(name)) is not None:
            self.handshakes.start_challenge(new, name, context)
        else:
            new.refuse(UNRECOGNIZED_NAME)

    def _on_tls(self, new: NewConnection, tls: TlsSocket, name: str) -> None:
        """A TLS handshake is done."""
        if tls.protocol == HTTP2:
            self._nursery.start_soon(self._serve_http2, new, tls, name)
        else:
            self._start(new, tls, b"https", partial(self._find, name))

    async def _serve_http2(self, new: NewConnection, tls: TlsSocket, name: str) -> None:
        """Serve the streams of an HTTP/2 connection, each like a connection of its own."""
        from tunneld.sites.http2 import Http2Connection  # noqa: PLC0415  # few relays need it

        new.reached = new.reached or local_address(new.socket)
        limits = self._settings().limits
        connection = Http2Connection(
            tls, partial(self._serve_stream, new, name), limits, lambda: self._on_over(connection)
        )
        self.places.connections[connection] = new.place
        self._http2.add(connection)
        try:
            await connection.run()
        finally:
            self._http2.discard(connection)

    def _retire(self) -> None:
        """The relay drains: browsers make their next requests on other connections, which may reach another relay."""
        for connection in list(self._http2):
            connection.retire()

    def _serve_stream(self, new: NewConnection, name: str, pair: socket.socket) -> Callable[[str], None] | None:
        """See `http2.ServeCallback`."""
        stream = self._enter(pair, new.peer, new.reached, 0.0)
        if stream is None:
            return None
        return self._start(stream, PlainTransport(pair), b"https", partial(self._find, name)).drop

    def _start(
        self,
        new: NewConnection,
        transport: TlsSocket | PlainTransport,
        scheme: bytes,
        find: Callable[[Request], Site | bytes],
    ) -> HttpConnection:
        """Serve the requests on a connection. `find` is as for `HttpConnection`."""
        proxies = self._http_proxies.networks if new.peer[0] in self._http_proxies else None
        origin = Origin(new.peer, scheme, new.reached or local_address(new.socket), proxies)
        end = TlsEnd(self._engine, transport)
        access_log = self._access_log if self._access_log is not None and self._access_log.is_on else None
        connection = HttpConnection(end, origin, find, self._settings().limits, self._on_over, access_log)
        self.places.connections[connection] = new.place
        connection.start()
        return connection

    def _on_over(self, connection: PlacedConnection) -> None:
        self.places.connections.pop(connection).leave()

    # Requests

    def _find(self, server_name: str, request: Request) -> Site | bytes:
        """Where a request goes, or the relay's own response."""
        head = request.head
        host = head.host
        if server_name:
            if host != server_name:
                return error_page(421, head, request.identity, keep_alive=request.keep_alive)
        elif head.target.startswith(CHALLENGE_PATH):
            answer = self._orders.http_answer(head.target[len(CHALLENGE_PATH) :].decode("latin-1"))
            if answer is not None:
                return plain_response(answer, head, keep_alive=request.keep_alive)
        sites, status = self._names.sites, 404
        if self._names.is_draining():
            return error_page(503, head, request.identity, keep_alive=request.keep_alive)
        if (only := sites.only(host)) is not None:
            return only
        if not sites.has_host(host) and self._names.is_reserved(host):
            status = 503  # nor does a wildcard get the requests of a name whose agent is away
        elif (site := sites.find(host, head.path.decode("latin-1"))) is not None:
            return site
        return error_page(status, head, request.identity, keep_alive=request.keep_alive)

    def _answer_plain_http(self, request: Request) -> bytes:
        """The answer to a plain HTTP request on the HTTPS port: where the page is, for a name that has https."""
        head, identity, keep_alive = request.head, request.identity, request.keep_alive
        site = self._names.sites.find(head.host, head.path.decode("latin-1"))
        if site is not None and (site.keeps_tls or self._names.is_secure(head.host)):
            return https_redirect(head, self._names.https_port, identity, keep_alive=keep_alive)
        return error_page(400, head, identity, keep_alive=keep_alive, text=PLAIN_HTTP)


def _send(connection: socket.socket, data: bytes) -> None:
    """Send a few bytes, if the connection takes them."""
    with suppress(OSError):
        connection.send(data)
