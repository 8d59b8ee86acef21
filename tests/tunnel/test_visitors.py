"""Visitors over real sockets: limits, PROXY headers, events and data. See conftest.py for the kinds of tunnels."""

from __future__ import annotations

import hashlib
import random

import pytest
import trio

from tests.support.peers import is_dropped, read_all, read_exactly
from tests.support.visitors import until_parked, until_waiting
from tests.tunnel.support import connect, joined, open_tunnel
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.directory.service import TunnelService
from tunneld.net.endpoint import Endpoint
from tunneld.wire.lines import Item


@pytest.fixture
def service(each_way: TunnelService) -> TunnelService:
    return each_way


class TestTheProxyHeader:
    async def test_the_proxy_header_comes_first(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, persist="yes", proxy_protocol="v1")
        server = await connect(tunnel.server_uri)
        await until_parked(tunnel, 1)
        visitor = await connect(tunnel.client_uri)
        await visitor.send_all(b"hello")
        host, port = visitor.socket.getsockname()
        expected = f"PROXY TCP4 {host} 127.0.0.1 {port} {tunnel.client_uri.port}\r\nhello".encode()
        assert await read_exactly(server, len(expected)) == expected

    @pytest.mark.parametrize("host", ["0.0.0.0", ""])
    async def test_the_proxy_header_has_the_address_that_the_visitor_connected_to(
        self, service: TunnelService, host: str
    ) -> None:
        service.settings = lambda: Settings(tunnels=TunnelSettings(ports="0", host=host))
        tunnel = await open_tunnel(service, persist="yes", proxy_protocol="v1")
        for destination in ("127.0.0.1", "127.0.0.2"):
            server = await connect(tunnel.server_uri)
            await until_parked(tunnel, 1)
            visitor = await connect(Endpoint("tcp", destination, tunnel.client_uri.port))
            source, port = visitor.socket.getsockname()
            expected = f"PROXY TCP4 {source} {destination} {port} {tunnel.client_uri.port}\r\n".encode()
            assert await read_exactly(server, len(expected)) == expected


class TestLimits:
    @pytest.fixture
    def tunnel_settings(self) -> TunnelSettings:
        return TunnelSettings(ports="0", max_tunnels=2, max_visitors=1, max_waiting=1, max_parked=2)

    async def test_max_visitors(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, persist="yes")
        _server, visitor = await joined(tunnel)
        assert await is_dropped(await connect(tunnel.client_uri))
        await visitor.send_all(b"x")

    async def test_max_waiting(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, persist="yes")
        await connect(tunnel.client_uri)
        await until_waiting(tunnel, 1)
        assert await is_dropped(await connect(tunnel.client_uri))
        assert tunnel.waiting == 1

    async def test_max_parked(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, persist="yes")
        for count in (1, 2):
            await connect(tunnel.server_uri)
            await until_parked(tunnel, count)
        assert await is_dropped(await connect(tunnel.server_uri))
        assert tunnel.parked == 2


async def test_watchers_get_all_events_of_a_tunnel(service: TunnelService) -> None:
    seen: list[Item] = []
    async with service.events.watch(100) as watcher:
        tunnel = await open_tunnel(service)
        server, visitor = await joined(tunnel)
        await visitor.send_all(b"12345")
        await read_exactly(server, 5)
        await visitor.aclose()
        await server.aclose()
        async for events in watcher:
            seen += events
            if seen[-1]["event"] == "closed":
                break
    assert [event["event"] for event in seen] == ["opened", "attached", "visitor", "left", "closed"]
    assert seen[-1]["up"] == 5
    assert seen[-1]["reason"] == "both sides finished"


async def test_a_closed_tunnel_publishes_no_more_events(service: TunnelService) -> None:
    async with service.events.watch(100) as watcher:
        tunnel = await open_tunnel(service, persist="yes")
        await joined(tunnel)
        await service.close(tunnel.id)
        while tunnel.visitors:  # their ends are reported after the batch
            await trio.lowlevel.checkpoint()
        service.events.publish("last")
        seen: list[object] = []
        async for events in watcher:
            seen += [event["event"] for event in events]
            if seen[-1] == "last":
                break
    assert seen == ["opened", "attached", "visitor", "closed", "last"]


async def test_a_mebibyte_each_way_arrives_as_sent(service: TunnelService) -> None:
    tunnel = await open_tunnel(service)
    server, visitor = await joined(tunnel)
    payload = random.Random(7).randbytes(8 << 20)
    digests: list[str] = []

    async def send(stream: trio.SocketStream) -> None:
        await stream.send_all(payload)
        await stream.send_eof()

    async def receive(stream: trio.SocketStream) -> None:
        digests.append(hashlib.sha256(await read_all(stream)).hexdigest())

    async with trio.open_nursery() as nursery:
        for stream in (server, visitor):
            nursery.start_soon(send, stream)
            nursery.start_soon(receive, stream)
    assert digests == [hashlib.sha256(payload).hexdigest()] * 2
