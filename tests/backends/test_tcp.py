"""Parked connections of the tcp backend: which are dropped, and which are kept for the next visitor."""

from __future__ import annotations

import trio

from tests.support.peers import connect, is_dropped, read_all, read_exactly
from tests.tunnel.support import open_tunnel
from tunneld.directory.service import TunnelService
from tunneld.tunnel.tunnel import Tunnel


async def until_parked(tunnel: Tunnel, count: int) -> None:
    with trio.fail_after(10):
        while tunnel.parked != count:
            await trio.lowlevel.checkpoint()


async def test_a_persistent_tunnel_drops_a_parked_connection_that_has_ended_behind_a_greeting(
    service: TunnelService,
) -> None:
    """A server that greets and gives up on a silent client, sshd or MySQL, has nothing to say to the next visitor."""
    tunnel = await open_tunnel(service, persist="yes")
    greeter = await connect(tunnel.server_uri)
    await greeter.send_all(b"SSH-2.0-server\r\n")
    await until_parked(tunnel, 1)
    await greeter.send_eof()
    await until_parked(tunnel, 0)
    server = await connect(tunnel.server_uri)
    await until_parked(tunnel, 1)
    visitor = await connect(tunnel.client_uri)
    await server.send_all(b"SSH-2.0-server\r\n")
    assert await read_exactly(visitor, 16) == b"SSH-2.0-server\r\n"


async def test_a_persistent_tunnel_keeps_a_parked_connection_that_has_greeted(service: TunnelService) -> None:
    tunnel = await open_tunnel(service, persist="yes")
    greeter = await connect(tunnel.server_uri)
    await greeter.send_all(b"hello")
    await until_parked(tunnel, 1)
    for _ in range(10):
        await trio.lowlevel.checkpoint()
    assert tunnel.parked == 1
    visitor = await connect(tunnel.client_uri)
    assert await read_exactly(visitor, 5) == b"hello"


async def test_a_one_shot_tunnel_keeps_what_its_hidden_server_said_before_it_ended(service: TunnelService) -> None:
    tunnel = await open_tunnel(service)
    server = await connect(tunnel.server_uri)
    await server.send_all(b"all there is")
    await server.send_eof()
    await until_parked(tunnel, 1)
    visitor = await connect(tunnel.client_uri)
    await visitor.send_eof()
    assert await read_all(visitor) == b"all there is"
    assert await is_dropped(server)
