"""Server sides: what stands between a tunnel and its hidden server.

A backend says what *dial* means: take the next parked TCP connection, open a channel on a carrier. Nothing above
this floor asks which backend it is; a new one is a file here and a line in `BACKENDS`.
"""

import sys

from tunneld.backends.base import (
    NO_SERVICES,
    Backend,
    BackendServices,
    Handshakes,
    ServerConnection,
    ServerSide,
    ServerSideSnapshot,
    TunnelContext,
)
from tunneld.backends.tcp import TcpServerSide
from tunneld.errors import UsageError

BACKENDS: dict[str, Backend] = {"tcp": TcpServerSide}
"""Backend names as openTunnel takes them."""

if sys.platform == "linux":  # carriers live in the pump
    from tunneld.backends.ssh import SshServerSide
    from tunneld.backends.webmux import WebMuxServerSide

    BACKENDS["webmux"] = WebMuxServerSide
    BACKENDS["ssh"] = SshServerSide


def backend_of(name: str) -> Backend:
    """Raises `UsageError` for one that this relay does not have."""
    backend = BACKENDS.get(name)
    if backend is None:
        raise UsageError(f"unrecognized backend {name!r}: this relay has {', '.join(BACKENDS)}")
    return backend


__all__ = [
    "BACKENDS",
    "NO_SERVICES",
    "Backend",
    "BackendServices",
    "Handshakes",
    "ServerConnection",
    "ServerSide",
    "ServerSideSnapshot",
    "TunnelContext",
    "backend_of",
]
