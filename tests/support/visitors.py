"""Visitors of persistent tunnels, with chosen source addresses, and waiting for counts of the relay."""

from __future__ import annotations

import trio

from tests.support.peers import connect
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.tunnel import Tunnel

ME = Requester(host="127.0.0.1", owner="127.0.0.1:9", local_host="127.0.0.1")


async def open_tunnel(service: TunnelService, **words: str) -> Tunnel:
    return await service.open_tunnel("tcp", TunnelOptions.parse({"persist": "yes", **words}), ME)


async def connect_from(host: str, tunnel: Tunnel) -> trio.SocketStream:
    """Connect from another address of loopback."""
    return await connect(tunnel.client_uri, host)


async def until_parked(tunnel: Tunnel, count: int) -> None:
    """Wait until the relay has parked this many server connections."""
    while tunnel.parked != count:
        await trio.lowlevel.checkpoint()


async def until_waiting(tunnel: Tunnel, count: int) -> None:
    while tunnel.waiting != count:
        await trio.lowlevel.checkpoint()


async def until_served(tunnel: Tunnel, count: int) -> None:
    while tunnel.served != count:
        await trio.lowlevel.checkpoint()


async def until_gone(tunnel: Tunnel) -> None:
    while tunnel.visitors:
        await trio.lowlevel.checkpoint()


def refused(tunnel: Tunnel) -> dict[str, int]:
    return {kind.value: number for kind, number in tunnel.refusals.items()}
