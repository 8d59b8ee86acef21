"""TCP tunnels: the reference semantics, over real sockets. Time is virtual and jumps only where a test says so.

Each test runs without a key, with a key in plain text, and with a key in TLS.
"""

from __future__ import annotations

import dataclasses
import socket

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.peers import PATIENCE, is_dropped, is_refused, read_all, read_exactly, reset
from tests.support.visitors import until_parked, until_waiting
from tests.tunnel.support import ME, SECURE, connect, joined, open_tunnel, until_served
from tunneld.backends import BACKENDS
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine
from tunneld.errors import LimitReachedError, ListenError, NoSuchTunnelError, UsageError
from tunneld.net.endpoint import Endpoint
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.tunnel import Phase


@pytest.fixture
def service(each_way: TunnelService) -> TunnelService:
    return each_way


class TestOneShot:
    async def test_bytes_cross_both_ways_and_the_end_of_either_side_closes_the_tunnel(
        self, service: TunnelService
    ) -> None:
        tunnel = await open_tunnel(service)
        server, visitor = await joined(tunnel)
        await visitor.send_all(b"question")
        assert await read_exactly(server, 8) == b"question"
        await server.send_all(b"answer")
        assert await read_exactly(visitor, 6) == b"answer"
        await server.aclose()
        assert await read_all(visitor) == b""
        await visitor.aclose()
        await tunnel.wait_closed()
        assert tunnel.octets == (8, 6)
        with pytest.raises(NoSuchTunnelError):
            await service.get_tunnel_address(str(tunnel.server_uri))
        assert await is_refused(tunnel.server_uri)
        assert await is_refused(tunnel.client_uri)

    async def test_the_client_may_connect_first(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        visitor = await connect(tunnel.client_uri)
        await visitor.send_all(b"early")
        await until_waiting(tunnel, 1)
        server = await connect(tunnel.server_uri)
        assert await read_exactly(server, 5) == b"early"

    async def test_data_that_the_server_sends_first_is_not_lost(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        server = await connect(tunnel.server_uri)
        await server.send_all(b"220 hidden.example ESMTP\r\n")
        await until_parked(tunnel, 1)
        visitor = await connect(tunnel.client_uri)
        assert await read_exactly(visitor, 26) == b"220 hidden.example ESMTP\r\n"

    async def test_data_of_a_server_that_has_half_closed_is_delivered(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        server = await connect(tunnel.server_uri)
        await server.send_all(b"last words")
        await server.send_eof()
        await until_parked(tunnel, 1)
        visitor = await connect(tunnel.client_uri)
        assert await read_all(visitor) == b"last words"

    async def test_a_server_that_leaves_before_any_client_closes_the_tunnel(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        server = await connect(tunnel.server_uri)
        await until_parked(tunnel, 1)
        await server.aclose()
        with trio.fail_after(PATIENCE):
            await tunnel.wait_closed()
        assert tunnel.reason == "the server connection closed before a visitor arrived"

    async def test_a_server_that_crashes_before_any_client_closes_the_tunnel(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        server = await connect(tunnel.server_uri)
        await until_parked(tunnel, 1)
        reset(server)
        await tunnel.wait_closed()

    async def test_a_client_that_leaves_while_waiting_closes_the_tunnel(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        visitor = await connect(tunnel.client_uri)
        await until_waiting(tunnel, 1)
        reset(visitor)
        await tunnel.wait_closed()
        assert "left before a server connection arrived" in tunnel.reason

    async def test_a_client_that_only_reads_is_answered(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        visitor = await connect(tunnel.client_uri)
        await visitor.send_eof()
        await until_waiting(tunnel, 1)
        server = await connect(tunnel.server_uri)
        await server.send_all(b"page")
        assert await read_all(server) == b""
        await server.aclose()
        assert await read_all(visitor) == b"page"

    async def test_a_client_that_half_closed_after_its_request_is_answered(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        visitor = await connect(tunnel.client_uri)
        await visitor.send_all(b"GET /\r\n")
        await visitor.send_eof()
        await until_waiting(tunnel, 1)
        server = await connect(tunnel.server_uri)
        assert await read_all(server) == b"GET /\r\n"
        await server.send_all(b"page")
        await server.aclose()
        assert await read_all(visitor) == b"page"

    async def test_a_second_visitor_and_a_second_server_are_refused(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        server, visitor = await joined(tunnel)
        assert await is_dropped(await connect(tunnel.client_uri))
        assert await is_dropped(await connect(tunnel.server_uri))
        await visitor.send_all(b"still here")
        assert await read_exactly(server, 10) == b"still here"

    async def test_a_reset_crosses_as_a_reset(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        server, visitor = await joined(tunnel)
        reset(server)
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some(1)
        await tunnel.wait_closed()
        assert "connection to the server failed" in tunnel.reason


class TestPersistent:
    async def test_each_parked_connection_serves_one_visitor_the_newest_first(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, persist="yes")
        servers = []
        for number in range(3):
            servers.append(await connect(tunnel.server_uri))
            await until_parked(tunnel, number + 1)
        for number, server in enumerate(reversed(servers)):
            visitor = await connect(tunnel.client_uri)
            await visitor.send_all(b"%d" % number)
            assert await read_exactly(server, 1) == b"%d" % number
        assert (tunnel.parked, tunnel.served, len(tunnel.visitors)) == (0, 3, 3)

    async def test_it_outlives_its_relays(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, persist="yes")
        for _ in range(3):
            server, visitor = await joined(tunnel)
            await visitor.aclose()
            assert await read_all(server) == b""
            await server.aclose()
            while tunnel.visitors:
                await trio.lowlevel.checkpoint()
        assert tunnel.phase is Phase.WAITING
        assert tunnel.served == 3

    async def test_visitors_that_wait_are_served_first_come_first_served(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, persist="yes")
        visitors = []
        for number in range(3):
            visitor = await connect(tunnel.client_uri)
            await visitor.send_all(b"%d" % number)
            visitors.append(visitor)
            await until_waiting(tunnel, number + 1)
        for number in range(3):
            server = await connect(tunnel.server_uri)
            assert await read_exactly(server, 1) == b"%d" % number

    @pytest.mark.interpreted
    async def test_a_server_connection_that_arrives_while_the_visitor_starts_to_wait_serves_it(
        self, service: TunnelService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both arrive in one wake-up of the engine: the visitor finds none parked, one parks, then its task runs."""
        tunnel = await open_tunnel(service, persist="yes")
        server = await connect(tunnel.server_uri)
        await until_parked(tunnel, 1)

        def too_early() -> socket.socket:
            raise trio.WouldBlock

        with monkeypatch.context() as patch:
            patch.setattr(tunnel.server_side, "dial_nowait", too_early)
            visitor = await connect(tunnel.client_uri)
            await visitor.send_all(b"x")
            assert await read_exactly(server, 1) == b"x"
        await connect(tunnel.server_uri)
        await until_parked(tunnel, 1)
        await connect(tunnel.client_uri)
        await until_served(tunnel, 2)

    async def test_the_phase_tells_whether_a_hidden_server_is_connected(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, persist="yes")
        phases = [tunnel.phase]
        server = await connect(tunnel.server_uri)
        await until_parked(tunnel, 1)
        phases.append(tunnel.phase)
        await server.aclose()
        await until_parked(tunnel, 0)
        phases.append(tunnel.phase)
        assert phases == [Phase.WAITING, Phase.READY, Phase.WAITING]

    async def test_trim_closes_surplus_parked_connections_and_no_relay(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, persist="yes")
        server, visitor = await joined(tunnel)
        first = await connect(tunnel.server_uri)
        await until_parked(tunnel, 1)
        await connect(tunnel.server_uri)
        await until_parked(tunnel, 2)
        assert tunnel.trim(1, "127.0.0.1") == 1
        assert await is_dropped(first)
        await visitor.send_all(b"x")
        assert await read_exactly(server, 1) == b"x"

    async def test_trimming_a_shared_tunnel_spares_the_connections_of_other_agents(
        self, service: TunnelService
    ) -> None:
        options = {"persist": "yes", "share": "yes", "name": "web", "secure": SECURE.get()}
        near, far = (Requester(host, f"{host}:9", host, at_end=lambda *_: None) for host in ("127.0.0.1", "127.0.0.2"))
        tunnel = await service.open_tunnel("tcp", TunnelOptions.parse(options), near)
        await service.join(tunnel.id, far)
        parked = []
        for number in range(3):
            parked.append(await connect(tunnel.server_uri))
            await until_parked(tunnel, number + 1)
        assert tunnel.trim(0, "127.0.0.2") == 0
        assert tunnel.trim(2, "127.0.0.1") == 1
        assert await is_dropped(parked[0])
        assert (tunnel.dismiss(far.owner), tunnel.trim(0, "127.0.0.2")) == (False, 0)
        assert tunnel.parked == 2
        assert tunnel.trim(0, "127.0.0.1") == 2

    async def test_drain_lets_relays_finish_and_closes_waiting_visitors(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, persist="yes")
        server, visitor = await joined(tunnel)
        waiting = await connect(tunnel.client_uri)
        await until_waiting(tunnel, 1)
        tunnel.drain()
        assert await is_dropped(waiting)
        assert await is_refused(tunnel.client_uri)
        await visitor.send_all(b"more")
        assert await read_exactly(server, 4) == b"more"
        await visitor.aclose()
        await server.aclose()
        await tunnel.wait_closed()
        assert tunnel.reason == "drained"

    async def test_close_drops_every_connection_before_it_returns(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, persist="yes")
        server, visitor = await joined(tunnel)
        parked = await connect(tunnel.server_uri)
        await until_parked(tunnel, 1)
        await service.close(tunnel.id)
        assert await is_refused(tunnel.server_uri)
        for stream in (server, visitor, parked):
            assert await is_dropped(stream)
        assert not service.tunnels()


class TestTime:
    async def test_a_waiting_visitor_is_closed_after_pairing_timeout(
        self, service: TunnelService, mock_clock: MockClock
    ) -> None:
        tunnel = await open_tunnel(service, persist="yes", pairing_timeout="7")
        visitor = await connect(tunnel.client_uri)
        await until_waiting(tunnel, 1)
        await wait_all_tasks_blocked()
        mock_clock.jump(6.9)
        await wait_all_tasks_blocked()
        assert tunnel.waiting == 1
        mock_clock.jump(0.2)
        assert await is_dropped(visitor)
        assert tunnel.waiting == 0

    async def test_an_unused_tunnel_closes(self, service: TunnelService, mock_clock: MockClock) -> None:
        tunnel = await open_tunnel(service)
        await wait_all_tasks_blocked()
        mock_clock.jump(300)
        await tunnel.wait_closed()
        assert "open_timeout" in tunnel.reason

    async def test_a_parked_server_connection_counts_as_use(
        self, service: TunnelService, mock_clock: MockClock
    ) -> None:
        tunnel = await open_tunnel(service)
        await connect(tunnel.server_uri)
        await until_parked(tunnel, 1)
        await wait_all_tasks_blocked()
        mock_clock.jump(300)
        await wait_all_tasks_blocked()
        assert tunnel.phase is Phase.READY

    async def test_ttl_ends_a_tunnel_in_use(self, service: TunnelService, mock_clock: MockClock) -> None:
        tunnel = await open_tunnel(service, persist="yes", ttl="60")
        _server, visitor = await joined(tunnel)
        await wait_all_tasks_blocked()
        mock_clock.jump(60)
        assert await is_dropped(visitor)
        await tunnel.wait_closed()
        assert "ttl" in tunnel.reason


class TestServerSources:
    async def test_only_the_requester_may_connect_as_the_hidden_server(self, service: TunnelService) -> None:
        elsewhere = dataclasses.replace(ME, host="192.0.2.1")
        tunnel = await service.open_tunnel("tcp", TunnelOptions(), elsewhere)
        assert await is_dropped(await connect(tunnel.server_uri))
        assert tunnel.parked == 0

    @pytest.mark.parametrize("sources", ["127.0.0.0/8", "any", "127.0.0.1"])
    async def test_server_from_permits_more(self, service: TunnelService, sources: str) -> None:
        elsewhere = dataclasses.replace(ME, host="192.0.2.1")
        tunnel = await service.open_tunnel("tcp", TunnelOptions.parse({"server_from": sources}), elsewhere)
        await connect(tunnel.server_uri)
        await until_parked(tunnel, 1)


class TestLimits:
    @pytest.fixture
    def tunnel_settings(self) -> TunnelSettings:
        return TunnelSettings(ports="0", max_tunnels=2)

    async def test_max_tunnels(self, service: TunnelService) -> None:
        first = await open_tunnel(service)
        await open_tunnel(service)
        with pytest.raises(LimitReachedError, match="max_tunnels"):
            await open_tunnel(service)
        await service.close(first.id)
        await open_tunnel(service)


class TestPorts:
    async def test_a_port_outside_the_range_is_refused(self, service: TunnelService) -> None:
        service.settings = lambda: Settings(tunnels=TunnelSettings(ports="20000-20010"))
        with pytest.raises(UsageError, match="client_port"):
            await open_tunnel(service, client_port="8080")

    async def test_a_port_in_use_is_an_error_that_leaves_nothing_open(self, service: TunnelService) -> None:
        first = await open_tunnel(service)
        with pytest.raises((ListenError, LimitReachedError), match=str(first.client_uri.port)):
            await open_tunnel(service, client_port=str(first.client_uri.port))
        assert list(service.tunnels()) == [first]


async def test_a_stopped_service_is_the_reason_of_its_tunnels(engine: Engine) -> None:
    async with trio.open_nursery() as nursery:
        service = TunnelService(lambda: Settings(tunnels=TunnelSettings(ports="0")), engine, BACKENDS)
        await nursery.start(service.run)
        tunnel = await open_tunnel(service)
        _server, visitor = await joined(tunnel)
        nursery.cancel_scope.cancel()
    assert await is_dropped(visitor)
    assert tunnel.reason == "the relay stopped"
    assert await is_refused(tunnel.client_uri)


@pytest.mark.interpreted
async def test_a_bug_in_one_tunnel_closes_that_tunnel_alone(
    service: TunnelService, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = await open_tunnel(service, persist="yes")
    bystander = await open_tunnel(service, persist="yes")
    server, visitor = await joined(bystander)

    def boom(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(broken.visitors, "admit", boom)
    assert await is_dropped(await connect(broken.client_uri))
    await broken.wait_closed()
    assert broken.reason == "internal error"
    await visitor.send_all(b"alive")
    assert await read_exactly(server, 5) == b"alive"


def test_uris_of_a_tunnel_are_endpoints() -> None:
    assert str(Endpoint("tcp", "::1", 1)) == "tcp://[::1]:1"
