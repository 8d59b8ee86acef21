"""The contracts of the shared ports: with the tunnels behind their names, and with what has or obtains certificates."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tunneld.net.endpoint import Peer
from tunneld.sites.fields import HostRewrite, Origin, Passage
from tunneld.sites.stream import RequestStream
from tunneld.wire.http1 import RequestHead


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way."""

    head: RequestHead
    is_secure: bool  # it came in TLS
    client: Peer  # the visitor's address; without its port behind a proxy
    identity: bytes
    keep_alive: bool  # the visitor's connection may stay open behind the response


Verdict = bytes | Passage | None
"""Of a site about a request: it passes as it is (None) or changed, or the relay answers it, such as by a redirection,
401 or 403.
"""

OnVerdict = Callable[[Verdict], None]


class Site(Protocol):
    """Where the requests for a name go: an ingress of a tunnel."""

    @property
    def tunnel(self) -> str:
        """The id of its tunnel, for the access log."""

    @property
    def rewrite(self) -> HostRewrite | None:
        """The host that the hidden server expects, if it is not the public one."""

    @property
    def keeps_tls(self) -> bool:
        """Whether TLS connections for its names go to the hidden server as they are."""

    def open_connection(self, connection: socket.socket, peer: Peer, reached: Peer | None, server_name: str) -> None:
        """Relay a TLS connection as it is; nothing was read from it. The callee owns it. Only if `keeps_tls`.
        `reached` is the address that the visitor connected to, where that is not the address of the socket.
        """

    def examine(self, request: Request, on_verdict: OnVerdict) -> None:
        """Decide whether a request may pass, and call `on_verdict`, at once or later."""

    def open(self, stream: RequestStream, client: Peer, origin: Origin) -> None:
        """Relay `stream`, of the visitor at the address `client`, to the hidden server. The callee owns the stream, and
        refuses or resets it if it has no connection for it.
        """

    def on_failed(self, reason: str) -> None:
        """A request got an error page because of the hidden server; `reason` is for the owner of the tunnel."""


class Certificates(Protocol):
    """The certificates by name: `tls.store.CertificateStore`."""

    def context_for(self, server_name: str, /) -> ssl.SSLContext | None:
        """The context for a handshake in which the client asked for this name."""


class PortOrders(Protocol):
    """The orders of certificates, and the answers to challenges of their authority: `acme.manager`."""

    def is_ordered(self, name: str, /) -> bool:
        """Whether a certificate for this name is on its way."""

    async def order_over(self) -> None:
        """Return when an order is over, of whichever name."""

    def http_answer(self, token: str, /) -> bytes | None:
        """The body of the file with this name below `CHALLENGE_PATH`."""

    def tls_context(self, name: str, /) -> ssl.SSLContext | None:
        """The context that answers tls-alpn-01 for this name."""
