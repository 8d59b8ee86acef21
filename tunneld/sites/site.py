"""The contract between the shared HTTP ports and the tunnels behind their names."""

from __future__ import annotations

import socket
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

    def open_connection(self, connection: socket.socket, peer: Peer, server_name: str) -> None:
        """Relay a TLS connection as it is; nothing was read from it. The callee owns it. Only if `keeps_tls`."""

    def examine(self, request: Request, on_verdict: OnVerdict) -> None:
        """Decide whether a request may pass, and call `on_verdict`, at once or later."""

    def open(self, stream: RequestStream, client: Peer, origin: Origin) -> None:
        """Relay `stream`, of the visitor at the address `client`, to the hidden server. The callee owns the stream, and
        refuses or resets it if it has no connection for it.
        """

    def on_failed(self, reason: str) -> None:
        """A request got an error page because of the hidden server; `reason` is for the owner of the tunnel."""
