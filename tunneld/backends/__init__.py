"""Server sides: what stands between a tunnel and its hidden server.

A backend says what *dial* means: take the next parked TCP connection, open a channel on a carrier. Nothing above
this floor asks which backend it is; a new one is a file here and a line in `BACKENDS`.
"""

import sys

from tunneld.backends.base import Host, ServerConnection, ServerSide, ServerSideFactory
from tunneld.backends.tcp import Tcp

BACKENDS: dict[str, ServerSideFactory] = {"tcp": Tcp}
"""Backend names as openTunnel takes them."""

if sys.platform == "linux":  # carriers live in the pump
    from tunneld.backends.webmux import WebMux

    BACKENDS["webmux"] = WebMux

__all__ = ["BACKENDS", "Host", "ServerConnection", "ServerSide", "ServerSideFactory"]
