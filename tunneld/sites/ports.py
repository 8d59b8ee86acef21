"""The shared ports for HTTP and TLS: visitors of many tunnels, told apart by the name that they ask for.

    http     every request is routed by its Host                                           HttpConnection
    https    ClientHello, not consumed ──► an agent, by ALPN: its control or carrier connection
                                       ──► a site that keeps its own TLS: passed on as it is
                                       ──► a challenge of a certificate authority: answered
                                       ──► a name with a certificate: TLS ends here, then as http
                                       ──► anything else: the alert unrecognized_name

There is no default certificate: it would tell every scanner one of the relay's names.

    serve_sites
    └─ TLS handshake ×N       a task each, for at most `head_timeout`; everything else runs in the engine
"""

from __future__ import annotations

import socket
import ssl
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Protocol

import structlog
import trio

from tunneld.engine.plain_transport import PlainTransport
from tunneld.engine.pump import Pump
from tunneld.engine.tls_end import TlsEnd
from tunneld.errors import reason_of
from tunneld.net.accept import local_address
from tunneld.net.endpoint import Peer, is_loopback, parse_network
from tunneld.policy.limits import HttpLimits
from tunneld.policy.networks import NetworkSet, read_address
from tunneld.sites.access_log import AccessLog
from tunneld.sites.connection import HttpConnection
from tunneld.sites.fields import Origin
from tunneld.sites.hello import HelloReader
from tunneld.sites.names import SharedNames
from tunneld.sites.pages import error_page, plain_response
from tunneld.sites.site import Request, Site
from tunneld.tls.connection import TlsSocket, shake_hands
from tunneld.wire.client_hello import NO_APPLICATION_PROTOCOL, UNRECOGNIZED_NAME, ClientHello, encode_alert

log: structlog.stdlib.BoundLogger = structlog.get_logger("sites")

CHALLENGE_PROTOCOL = b"acme-tls/1"
CHALLENGE_PATH = b"/.well-known/acme-challenge/"

IDLE_SEARCH = 32
"""Connections that are looked at to find an idle one: where none is idle, a crowd must not make each further connection
expensive. The ones that were looked at are the last to be looked at again.
"""


AgentCallback = Callable[[socket.socket, Peer], bool]
"""Takes over the connection of an agent, from which nothing was read. False: the relay does not serve it."""


class SiteSettings(Protocol):
    """What the ports read from `[names]`, for each new connection."""

    @property
    def limits(self) -> HttpLimits: ...
    @property
    def trusted_proxies(self) -> tuple[str, ...]: ...
    @property
    def max_connections(self) -> int: ...
    @property
    def max_connections_per_source(self) -> int: ...


class Certificates(Protocol):
    """The certificates by name: `tls.store.CertificateStore`."""

    def context_for(self, server_name: str, /) -> ssl.SSLContext | None:
        """The context for a handshake in which the client asked for this name."""


class Challenges(Protocol):
    """The answers to challenges of a certificate authority."""

    def http_answer(self, token: str, /) -> bytes | None:
        """The body of the file with this name below `CHALLENGE_PATH`."""

    def tls_context(self, name: str, /) -> ssl.SSLContext | None:
        """The context that answers tls-alpn-01 for this name."""


class SitePorts:
    """Both ports. It owns their connections."""

    def __init__(
        self,
        engine: Pump,
        names: SharedNames,
        settings: Callable[[], SiteSettings],
        certificates: Certificates,
        challenges: Challenges,
        access_log: AccessLog | None = None,
        agents: Mapping[bytes, AgentCallback] | None = None,
    ) -> None:
        """`settings` is called for every connection, so that a reload applies to the next one. `agents` get the
        connections that ask for these protocols (ALPN).
        """
        self._agents = agents or {}
        self._names = names
        self.connections: dict[HttpConnection, int] = {}  # with their sources; the oldest first, see `IDLE_SEARCH`
        self._engine = engine
        self._settings = settings
        self._certificates = certificates
        self._challenges = challenges
        self._access_log = access_log
        self._hellos: set[HelloReader] = set()
        self._handshakes = 0
        self._by_source: Counter[int] = Counter()  # connections that are not passed on
        self._beginning = trio.StrictFIFOLock()  # of handshakes
        self._proxies = NetworkSet(())
        self._proxy_texts: tuple[str, ...] = ()
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the TLS handshakes until cancelled; then close all connections."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            for hello in list(self._hellos):
                hello.stop()
                hello.connection.close()
            for connection in list(self.connections):
                connection.close_if_idle()  # in order: a browser opens another connection for its next request
            for connection in list(self.connections):
                connection.drop("the relay stopped")

    def __len__(self) -> int:
        """Connections on both ports that are not passed on."""
        return len(self.connections) + len(self._hellos) + self._handshakes

    # Accepted connections

    def on_http(self, connection: socket.socket, peer: Peer) -> None:
        """A connection to the HTTP port."""
        if self._enter(connection, peer):
            self._start(PlainTransport(connection), self._origin(connection, peer, b"http"), "")

    def on_https(self, connection: socket.socket, peer: Peer) -> None:
        """A connection to the TLS port."""
        if self._enter(connection, peer):
            timeout = self._settings().limits.head_timeout
            HelloReader(
                self._engine, connection, timeout, partial(self._on_hello, peer), partial(self._on_refused, peer),
                partial(self._on_bug, connection), self._hellos,
            )  # fmt: skip

    def _enter(self, connection: socket.socket, peer: Peer) -> bool:
        """Count one more connection; or close it where there is no place, and no idle connection that can be closed."""
        settings, source = self._settings(), read_address(peer[0]).source
        is_full = len(self) >= settings.max_connections and not self._close_idle()
        if not is_full and self._by_source[source] >= settings.max_connections_per_source:
            is_full = not (is_loopback(peer[0]) or self._is_trusted(peer) or self._close_idle(source))
        if is_full:
            connection.close()
            return False
        self._by_source[source] += 1
        return True

    def _leave(self, source: int) -> None:
        """A connection from this source is closed, or passed on."""
        self._by_source[source] -= 1
        if not self._by_source[source]:
            del self._by_source[source]

    def _close_idle(self, source: int | None = None) -> bool:
        """Close a connection that is without a request, of this source if one is given. Returns whether there was one
        among the ones that were looked at.
        """
        for connection, its_source in list(islice(self.connections.items(), IDLE_SEARCH)):
            if connection.is_idle and source in {None, its_source}:
                connection.close_if_idle()
                return True
            del self.connections[connection]
            self.connections[connection] = its_source
        return False

    def _is_trusted(self, peer: Peer) -> bool:
        """Whether the peer is one of `trusted_proxies`."""
        texts = self._settings().trusted_proxies
        if texts is not self._proxy_texts:
            self._proxy_texts = texts
            self._proxies = NetworkSet(map(parse_network, texts))
        return bool(self._proxies) and read_address(peer[0]) in self._proxies

    def _origin(self, connection: socket.socket, peer: Peer, scheme: bytes) -> Origin:
        is_trusted = self._is_trusted(peer)
        return Origin(peer, scheme, local_address(connection), self._proxies if is_trusted else None)

    def _start(self, transport: TlsSocket | PlainTransport, origin: Origin, server_name: str) -> None:
        """Serve requests on a connection; in TLS for the name `server_name`."""
        end = TlsEnd(self._engine, transport)
        find, limits = partial(self._find, server_name), self._settings().limits
        access_log = self._access_log if self._access_log is not None and self._access_log.is_on else None
        connection = HttpConnection(end, origin, find, limits, self._on_over, access_log)
        self.connections[connection] = read_address(origin.peer[0]).source
        connection.start()

    def _on_over(self, connection: HttpConnection) -> None:
        self._leave(self.connections.pop(connection))

    # TLS

    def _on_hello(self, peer: Peer, hello: HelloReader, asked: ClientHello) -> None:
        """The client's first message is complete, and still unread."""
        connection, name, source = hello.connection, asked.server_name, read_address(peer[0]).source
        self._leave(source)
        for protocol in self._agents.keys() & set(asked.protocols):
            if not self._agents[protocol](connection, peer):
                _send_alert(connection, NO_APPLICATION_PROTOCOL)
            return
        sites = self._names.sites
        is_away = not sites.has_host(name) and self._names.is_reserved(name)
        site = sites.find(name) if name and not is_away else None
        if site is not None and site.keeps_tls:
            site.open_connection(connection, peer, name)
            return
        is_challenge = CHALLENGE_PROTOCOL in asked.protocols
        context = self._challenges.tls_context(name) if is_challenge else self._certificates.context_for(name)
        if context is None:
            _send_alert(connection, UNRECOGNIZED_NAME)
            log.debug("tls connection refused", peer=peer[0], name=name, reason="no certificate has this name")
            return
        self._handshakes += 1
        self._by_source[source] += 1
        self._nursery.start_soon(
            self._shake_hands, connection, context, self._origin(connection, peer, b"https"), name, is_challenge
        )

    async def _shake_hands(
        self, connection: socket.socket, context: ssl.SSLContext, origin: Origin, name: str, is_challenge: bool
    ) -> None:
        """Do one handshake; after one for a challenge there is nothing to say."""
        is_served = False
        try:
            with trio.move_on_after(self._settings().limits.head_timeout) as late:
                tls = await self._shake_hands_in_turn(connection, context)
            if late.cancelled_caught:
                return
            if is_challenge:
                tls.finish()
                tls.flush_if_possible()
                tls.close()
            else:
                is_served = True
                self._start(tls, origin, name)
        except OSError as error:
            log.debug("tls connection failed", peer=origin.address, name=name, reason=reason_of(error))
        finally:
            self._handshakes -= 1
            if not is_served:
                self._leave(read_address(origin.peer[0]).source)

    async def _shake_hands_in_turn(self, connection: socket.socket, context: ssl.SSLContext) -> TlsSocket:
        """Begin one handshake in each turn of Trio's scheduler, for one costs up to a millisecond. A flood of them
        delays further handshakes, and nothing else. The connection is closed on errors.
        """
        try:
            async with self._beginning:
                await trio.lowlevel.checkpoint()
        except BaseException:
            connection.close()
            raise
        return await shake_hands(connection, context, server_side=True)

    def _on_refused(self, peer: Peer, hello: HelloReader, reason: str) -> None:
        self._leave(read_address(peer[0]).source)
        log.debug("tls connection refused", peer=peer[0], reason=reason)
        hello.connection.close()

    def _on_bug(self, connection: socket.socket, error: Exception) -> None:
        log.error("connection to a shared port failed: internal error", exc_info=error)
        connection.close()

    # Requests

    def _find(self, server_name: str, request: Request) -> Site | bytes:
        """Where a request goes, or the relay's own response."""
        head = request.head
        host = head.host
        if server_name:
            if host != server_name:
                return error_page(421, head, request.identity, keep_alive=request.keep_alive)
        elif head.target.startswith(CHALLENGE_PATH):
            answer = self._challenges.http_answer(head.target[len(CHALLENGE_PATH) :].decode("latin-1"))
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


def _send_alert(connection: socket.socket, alert: int) -> None:
    """Tell a client why, and close. What it sent is read first: closing a socket with unread bytes is a reset, which
    may overtake the alert.
    """
    try:
        connection.send(encode_alert(alert))
        connection.recv(65536)
    except OSError:
        pass
    connection.close()
