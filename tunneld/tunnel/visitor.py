"""A visitor: one connection of a client, on its way from an ingress to the hidden server."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from tunneld.engine.failures import reset_on_close
from tunneld.net.address import HostName
from tunneld.net.endpoint import Peer

VisitorEnd = socket.socket
"""The end of a visitor, which the engine relays. A connection whose TLS the relay terminates, or a request on a shared
HTTP connection, would be an engine `End`: `Visitor.refuse`, `WaitingVisitors` and the handover then know both kinds.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Visitor:
    """What is known of a visitor when it arrives. Its holder owns the end."""

    end: VisitorEnd
    peer: Peer  # the client's address; behind a trusted proxy, that in the PROXY header
    reached: Peer | None = None  # the address that it connected to; None: that of its end
    host: HostName | None = None  # the host name that it requested; None on a port
    credential: str | None = None  # the name of the credential that it presented
    early: bytes = b""  # read from `end` already: delivered to the hidden server first

    def refuse(self) -> None:
        """Close its end with a reset. It was served nothing, and an end of file would look like an empty answer."""
        reset_on_close(self.end)
        self.end.close()
