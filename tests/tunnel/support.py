"""Hidden servers and visitors of a relay's service, for each way in which a hidden server presents a key: none, in
plain text, in TLS.
"""

from __future__ import annotations

from contextvars import ContextVar

import trio

from tests.support import peers
from tests.support.hidden_servers import connect_hidden
from tests.support.pki import Pki
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.net.endpoint import Endpoint
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.tunnel import Tunnel

ME = Requester(host="127.0.0.1", owner="127.0.0.1:9", local_host="127.0.0.1")
SECURE = ContextVar("SECURE", default="no")
"""The option `secure` of the tunnels of a test; see conftest.py."""
PKI: ContextVar[Pki] = ContextVar("PKI")


async def open_tunnel(service: TunnelService, **words: str) -> Tunnel:
    return await service.open_tunnel("tcp", TunnelOptions.parse({"secure": SECURE.get(), **words}), ME)


async def connect(endpoint: Endpoint) -> trio.SocketStream:
    """Connect as a visitor, or as the hidden server does to this URI."""
    return await connect_hidden(endpoint, PKI.get()) if endpoint.key else await peers.connect(endpoint)


async def until_served(tunnel: Tunnel, count: int) -> None:
    while tunnel.served != count:
        await trio.lowlevel.checkpoint()


async def joined(tunnel: Tunnel) -> tuple[trio.SocketStream, trio.SocketStream]:
    """A server connection and a visitor, relayed."""
    before = tunnel.served
    server = await connect(tunnel.server_uri)
    visitor = await connect(tunnel.client_uri)
    await until_served(tunnel, before + 1)
    return server, visitor
