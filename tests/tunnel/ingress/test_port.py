"""Connections of trusted proxies: their header is read in a task, then the visitor in it is accepted or refused."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.peers import PATIENCE, connect, is_dropped, is_refused, read_exactly, reset
from tests.support.visitors import connect_from, open_tunnel, refused, until_served, until_waiting
from tunneld.config.schema import TunnelSettings
from tunneld.directory.service import TunnelService
from tunneld.policy.admission import RefusalKind
from tunneld.tunnel.ingress.port import PortIngress
from tunneld.tunnel.tunnel import Tunnel
from tunneld.wire.proxy_protocol import encode_v1, encode_v2

PROXIED = TunnelSettings(ports="0", trusted_proxies=("127.0.0.1",), max_waiting=2)


def pending_headers(tunnel: Tunnel) -> int:
    (ingress,) = tunnel.ingresses
    assert isinstance(ingress, PortIngress)
    return ingress.pending_headers


class TestTrustedProxies:
    @pytest.fixture
    def tunnel_settings(self) -> TunnelSettings:
        return PROXIED

    async def test_the_visitor_is_the_one_in_the_header(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, proxy_protocol="v1")
        server = await connect(tunnel.server_uri)
        proxy = await connect(tunnel.client_uri)
        header = encode_v2(("2001:db8::1", 4), ("2001:db8::7", 443))
        await proxy.send_all(header + b"hello")
        expected = b"PROXY TCP6 2001:db8::1 2001:db8::7 4 443\r\nhello"
        assert await read_exactly(server, len(expected)) == expected
        assert [visitor.peer for visitor in tunnel.visitors.relays.values()] == [("2001:db8::1", 4)]

    @pytest.mark.parametrize("header", [b"PROXY UNKNOWN\r\n", encode_v2(None, None)])
    async def test_a_proxy_whose_header_names_no_visitor_is_the_visitor(
        self, service: TunnelService, header: bytes
    ) -> None:
        tunnel = await open_tunnel(service, proxy_protocol="v1")
        server = await connect(tunnel.server_uri)
        proxy = await connect(tunnel.client_uri)
        await proxy.send_all(header)
        expected = encode_v1(proxy.socket.getsockname(), proxy.socket.getpeername())
        assert await read_exactly(server, len(expected)) == expected

    async def test_limits_apply_to_the_visitor_not_to_the_proxy(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, deny_from="192.0.2.0/24", max_per_source="1")
        for count, source in enumerate(["198.51.100.1", "198.51.100.2"], start=1):
            await (await connect(tunnel.client_uri)).send_all(encode_v1((source, 4), ("203.0.113.1", 80)))
            await until_waiting(tunnel, count)
        await connect(tunnel.server_uri)
        await until_served(tunnel, 1)
        for source in ("192.0.2.1", "::ffff:192.0.2.1", "198.51.100.2", "198.51.100.1"):
            proxy = await connect(tunnel.client_uri)
            destination = "::ffff:203.0.113.1" if ":" in source else "203.0.113.1"
            await proxy.send_all(encode_v2((source, 4), (destination, 80)))
            assert await is_dropped(proxy)
        assert refused(tunnel) == {"address": 2, "per_source": 2}

    async def test_other_peers_need_no_header(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        server = await connect(tunnel.server_uri)
        async with await connect_from("127.0.0.2", tunnel) as visitor:
            line = encode_v1(("192.0.2.1", 4), ("203.0.113.1", 80))
            await visitor.send_all(line)
            assert await read_exactly(server, len(line)) == line
            assert [visitor.peer for visitor in tunnel.visitors.relays.values()] == [visitor.socket.getsockname()]

    async def test_a_header_that_arrives_while_the_tunnel_drains_is_refused(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, pairing_timeout="3600")
        servers = [await connect(tunnel.server_uri) for _ in range(2)]
        served, late = [await connect(tunnel.client_uri) for _ in range(2)]
        await served.send_all(b"PROXY UNKNOWN\r\n")
        await until_served(tunnel, 1)
        tunnel.drain()
        await late.send_all(b"PROXY UNKNOWN\r\n")
        with trio.fail_after(PATIENCE):
            assert await is_dropped(late)
        assert (refused(tunnel), tunnel.served, len(servers)) == ({"unserved": 1}, 1, 2)

    async def test_a_slow_proxy_delays_no_other_visitor_and_times_out(
        self, service: TunnelService, mock_clock: MockClock
    ) -> None:
        tunnel = await open_tunnel(service)
        slow = await connect(tunnel.client_uri)
        await slow.send_all(b"PROXY TCP4 ")
        await wait_all_tasks_blocked()
        quick = await connect(tunnel.client_uri)
        await quick.send_all(b"PROXY UNKNOWN\r\n")
        await until_waiting(tunnel, 1)
        mock_clock.jump(PROXIED.proxy_header_timeout - 0.1)
        await wait_all_tasks_blocked()
        assert not tunnel.refusals
        mock_clock.jump(0.2)
        assert await is_dropped(slow)
        assert refused(tunnel) == {"header": 1}
        assert tunnel.waiting == 1

    async def test_a_missing_or_wrong_header_or_a_reset_is_closed_and_counted(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        for data in (b"GET / HTTP/1.1\r\n", b"PROXY TCP4 nobody\r\n"):
            proxy = await connect(tunnel.client_uri)
            await proxy.send_all(data)
            assert await is_dropped(proxy)
        reset(await connect(tunnel.client_uri))
        await (await connect(tunnel.client_uri)).send_eof()
        while tunnel.refusals[RefusalKind.HEADER] < 4:
            await trio.lowlevel.checkpoint()

    async def test_pending_headers_count_against_max_waiting(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        silent = [await connect(tunnel.client_uri) for _ in range(2)]
        while pending_headers(tunnel) < 2:
            await trio.lowlevel.checkpoint()
        assert await is_dropped(await connect(tunnel.client_uri))
        assert refused(tunnel) == {"full": 1}
        await silent[0].aclose()
        while pending_headers(tunnel) > 1:
            await trio.lowlevel.checkpoint()
        await (await connect(tunnel.client_uri)).send_all(b"PROXY UNKNOWN\r\n")
        await until_waiting(tunnel, 1)

    async def test_a_visitor_named_after_the_tunnel_drains_is_refused(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        server = await connect(tunnel.server_uri)
        relayed = await connect(tunnel.client_uri)
        await relayed.send_all(b"PROXY UNKNOWN\r\n")
        await until_served(tunnel, 1)
        late = await connect(tunnel.client_uri)
        while not pending_headers(tunnel):
            await trio.lowlevel.checkpoint()
        tunnel.drain()
        await late.send_all(b"PROXY UNKNOWN\r\n")
        assert await is_dropped(late)
        assert await is_refused(tunnel.client_uri)
        await relayed.send_all(b"x")
        assert await read_exactly(server, 1) == b"x"

    async def test_closing_drops_connections_with_a_pending_header(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        silent = await connect(tunnel.client_uri)
        while not pending_headers(tunnel):
            await trio.lowlevel.checkpoint()
        await service.close(tunnel.id)
        assert await is_dropped(silent)
