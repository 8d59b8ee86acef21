"""The WebMUX backend: one connection of the hidden server carries all of its visitors.

    KeyRegistry                 which server side has which key
    └─ WebMuxServerSide ×tunnel a server URI with a key; a visitor goes to its least loaded carrier
       └─ Carrier ×N            a connection that the hidden server made; see tunneld/mux/

The hidden server connects to the shared port and declares with InternAtom and DefineEndpoint (draft-gettys-webmux-00)
that it can be called back as the server URI, key included. The key proves that it is the hidden server. After that, the
relay opens a WebMUX session per visitor, with the public port as the protocol id. An agent with several tunnels shares
connections among them, see webmux_shared.py.
"""

from __future__ import annotations

from typing import ClassVar

from tunneld.backends.mux_side import MuxServerSide
from tunneld.errors import NoSuchTunnelError, UsageError
from tunneld.net.endpoint import Endpoint
from tunneld.tunnel.keys import KeyRegistry


class WebMuxServerSide(MuxServerSide):
    """The carriers of one tunnel, at `webmux://HOST:PORT/KEY`, or `webmuxs://` if the shared port speaks TLS."""

    backend: ClassVar[str] = "webmux"


def find_side(registry: KeyRegistry, uri: str | None) -> WebMuxServerSide:
    """The server side with this server URI. Only the key is compared, because a relay can have several names.

    Raises `NoSuchTunnelError`, for a wrong key and for a key of a closed tunnel alike. Keys cannot be guessed, and the
    agents of a restarted relay still send old ones, so this is not an authentication failure.
    """
    try:
        key = Endpoint.parse(uri or "").key
    except UsageError:
        key = ""
    side = registry.find(key)
    if not isinstance(side, WebMuxServerSide):
        raise NoSuchTunnelError("no open tunnel has the server URI that the agent defined")
    return side
