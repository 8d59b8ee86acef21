"""A relay's service as hidden servers and visitors of tunnels see it, for each way in which a hidden server may show
who it is: not at all, by a key, by a key in TLS.
"""

from __future__ import annotations

from contextvars import ContextVar

import trio

from tests.support import people
from tests.support.keyed import connect_hidden
from tests.support.papers import Papers
from tunneld.directory.service import Requester, TunnelService
from tunneld.net.endpoint import Endpoint
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.tunnel import Tunnel

ME = Requester(host="127.0.0.1", owner="127.0.0.1:9", local_host="127.0.0.1")
SECURE = ContextVar("SECURE", default="no")
"""How the hidden servers of a test show who they are; see conftest.py."""
PAPERS: ContextVar[Papers] = ContextVar("PAPERS")


async def open_tunnel(service: TunnelService, **words: str) -> Tunnel:
    return await service.open_tunnel("tcp", TunnelOptions.parse({"secure": SECURE.get(), **words}), ME)


async def connect(endpoint: Endpoint) -> trio.SocketStream:
    """Connect as a visitor, or as the hidden server does to this URI."""
    return await connect_hidden(endpoint, PAPERS.get()) if endpoint.key else await people.connect(endpoint)


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
