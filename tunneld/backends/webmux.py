"""The WebMUX backend: one connection from the hidden server carries all of its visitors.

    Endpoints                       the shared port's book: which server side has which key
    └─ WebMux ×tunnel               a server URI with a key; its carriers, the least loaded of which takes a visitor
       └─ Carrier ×N                a connection that the hidden server made; see session/

The hidden server connects to the shared port and says by InternAtom and DefineEndpoint (draft-gettys-webmux-00) that it
is to be called back as the server URI, key included: who knows the key is the hidden server. From then on we open a
session for each visitor, with the client side's port as the protocol id.
"""

from __future__ import annotations

from typing import ClassVar

from tunneld.backends.mux_side import MuxServerSide
from tunneld.errors import NoSuchTunnelError, UsageError
from tunneld.net.endpoint import Endpoint
from tunneld.tunnel.keys import KeyRegistry


class WebMuxServerSide(MuxServerSide):
    """The carriers of one tunnel, at `webmux://HOST:PORT/KEY`, or `webmuxs://` where the shared port speaks TLS."""

    backend: ClassVar[str] = "webmux"


def find_side(endpoints: KeyRegistry, uri: str | None) -> WebMuxServerSide:
    """Who is called back as this URI. Only the key counts: the relay's name may differ from where it is seen.

    Raises `NoSuchTunnelError`, which does not tell a wrong key from one that is no more. Nobody guesses a key, and the
    agents of a relay that was started again have them from before: that is no failure to prove something.
    """
    try:
        key = Endpoint.parse(uri or "").key
    except UsageError:
        key = ""
    side = endpoints.find(key)
    if not isinstance(side, WebMuxServerSide):
        raise NoSuchTunnelError("no open tunnel has the server URI that it defines")
    return side
