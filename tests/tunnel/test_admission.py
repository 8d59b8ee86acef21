"""Limits on visitors, over real sockets: which are refused, what is counted and logged."""

from __future__ import annotations

import errno
import socket
from collections import Counter
from typing import Any

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.peers import connect, is_dropped, reset
from tests.support.visitors import connect_from, open_tunnel, refused, until_gone, until_served, until_waiting
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.control.describe import describe_tunnel
from tunneld.directory.service import TunnelService
from tunneld.errors import UsageError
from tunneld.policy.admission import RefusalKind
from tunneld.tunnel.visitors import REFUSAL_LOG_RATE


class TestNetworks:
    async def test_allow_from_refuses_other_addresses(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, allow_from="127.0.0.2,10.0.0.0/8")
        assert await is_dropped(await connect(tunnel.client_uri))
        async with await connect_from("127.0.0.2", tunnel):
            await until_waiting(tunnel, 1)
        assert refused(tunnel)["address"] == 1

    async def test_deny_from_wins(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, allow_from="127.0.0.0/8", deny_from="127.0.0.2")
        async with await connect_from("127.0.0.2", tunnel) as denied:
            assert await is_dropped(denied)
        await connect(tunnel.client_uri)
        await until_waiting(tunnel, 1)

    async def test_configured_networks_apply_as_well(self, service: TunnelService) -> None:
        settings = TunnelSettings(ports="0", allow_from=("127.0.0.0/8",), deny_from=("127.0.0.2",))
        service.settings = lambda: Settings(tunnels=settings)
        tunnel = await open_tunnel(service, allow_from="127.0.0.2,127.0.0.3")
        for host, accepted in (("127.0.0.1", False), ("127.0.0.2", False), ("127.0.0.3", True)):
            async with await connect_from(host, tunnel) as visitor:
                assert accepted or await is_dropped(visitor)
        assert refused(tunnel)["address"] == 2

    async def test_a_refused_visitor_costs_no_task(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, deny_from="127.0.0.0/8")
        tasks = trio.lowlevel.current_statistics().tasks_living
        visitors = [await connect(tunnel.client_uri) for _ in range(20)]
        while tunnel.refusals.total() < 20:
            assert trio.lowlevel.current_statistics().tasks_living == tasks
            await trio.lowlevel.checkpoint()
        assert all([await is_dropped(visitor) for visitor in visitors])


class TestCounts:
    async def test_max_per_source_counts_connected_and_waiting_visitors(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, max_per_source="2")
        server = await connect(tunnel.server_uri)
        relayed = await connect(tunnel.client_uri)
        await until_served(tunnel, 1)
        await connect(tunnel.client_uri)
        await until_waiting(tunnel, 1)
        assert await is_dropped(await connect(tunnel.client_uri))
        other = await connect_from("127.0.0.2", tunnel)
        await until_waiting(tunnel, 2)
        reset(other)
        await until_waiting(tunnel, 1)
        await relayed.aclose()
        await server.aclose()
        await until_gone(tunnel)
        await until_waiting(tunnel, 1)
        await connect(tunnel.client_uri)
        await until_waiting(tunnel, 2)
        assert refused(tunnel) == {"per_source": 1, "unserved": 1}

    async def test_a_visitor_that_waited_in_vain_no_longer_counts(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, max_per_source="1")
        for number in range(3):
            visitor = await connect(tunnel.client_uri)
            await until_waiting(tunnel, 1)
            reset(visitor)
            await until_waiting(tunnel, 0)
            assert refused(tunnel) == {"unserved": number + 1}

    @pytest.mark.interpreted
    async def test_a_visitor_whose_server_connection_fails_no_longer_counts(
        self, service: TunnelService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Broken(socket.socket):
            def set_originator(self, _visitor: Any) -> None:
                pass

            def send(self, *_: Any) -> int:
                raise OSError(errno.EPIPE, "broken pipe")

        tunnel = await open_tunnel(service, max_per_source="1", proxy_protocol="v1")
        monkeypatch.setattr(tunnel.server_side, "dial_nowait", Broken)
        for _ in range(2):
            assert await is_dropped(await connect(tunnel.client_uri))
        assert refused(tunnel) == {"unserved": 2}

    async def test_visitor_rate_limits_new_visitors_of_a_source(
        self, service: TunnelService, mock_clock: MockClock
    ) -> None:
        tunnel = await open_tunnel(service, visitor_rate="2/m")
        for count in (1, 2):
            await connect(tunnel.client_uri)
            await until_waiting(tunnel, count)
        assert await is_dropped(await connect(tunnel.client_uri))
        await wait_all_tasks_blocked()
        mock_clock.jump(29)
        assert await is_dropped(await connect(tunnel.client_uri))
        mock_clock.jump(1)
        visitor = await connect(tunnel.client_uri)
        while tunnel.refusals[RefusalKind.RATE] != 2 or tunnel.waiting + tunnel.refusals[RefusalKind.UNSERVED] != 3:
            await trio.lowlevel.checkpoint()
        await visitor.aclose()

    async def test_max_visitors_of_a_tunnel(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, max_visitors="1")
        await connect(tunnel.server_uri)
        await connect(tunnel.client_uri)
        await until_served(tunnel, 1)
        assert await is_dropped(await connect(tunnel.client_uri))
        assert refused(tunnel) == {"full": 1}


class TestCeilings:
    @pytest.fixture
    def tunnel_settings(self) -> TunnelSettings:
        return TunnelSettings(ports="0", max_visitors=100, max_per_source=10, visitor_rate="5/s")

    @pytest.mark.parametrize(
        ("option", "highest", "beyond"),
        [
            ("max_visitors", "100", "101"),
            ("max_per_source", "10", "11"),
            ("visitor_rate", "5/s", "6/s"),
            ("visitor_rate", "5/m", "6/m"),
        ],
    )
    async def test_an_option_may_not_exceed_the_configured_limit(
        self, service: TunnelService, option: str, highest: str, beyond: str
    ) -> None:
        tunnel = await open_tunnel(service, **{option: highest})
        assert str(describe_tunnel(tunnel)[option]) == highest
        with pytest.raises(UsageError, match=f"{option}={beyond}.*this relay"):
            await open_tunnel(service, **{option: beyond})
        assert list(service.tunnels()) == [tunnel]

    async def test_without_options_the_configured_limits_hold(self, service: TunnelService) -> None:
        shown = describe_tunnel(await open_tunnel(service))
        assert (shown["max_visitors"], shown["max_per_source"], shown["visitor_rate"]) == (100, 10, "5/s")
        assert (shown["allow_from"], shown["refused"]) == (None, 0)


class TestReports:
    async def test_all_refusals_of_a_flood_are_counted_and_some_are_logged(
        self, service: TunnelService, mock_clock: MockClock
    ) -> None:
        with structlog.testing.capture_logs() as log:
            tunnel = await open_tunnel(service, deny_from="127.0.0.0/8")
            flood = REFUSAL_LOG_RATE.count + 40
            for _ in range(flood):
                assert await is_dropped(await connect(tunnel.client_uri))
            mock_clock.jump(1)
            assert await is_dropped(await connect(tunnel.client_uri))
        lines = [line for line in log if line["event"] == "connection refused"]
        assert [line["left_out"] for line in lines] == [0] * REFUSAL_LOG_RATE.count + [40]
        assert describe_tunnel(tunnel)["refused"] == flood + 1

    async def test_totals_include_closed_tunnels(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, deny_from="127.0.0.0/8")
        assert await is_dropped(await connect(tunnel.client_uri))
        assert service.live.refusals == Counter({RefusalKind.ADDRESS: 1})
        await service.close(tunnel.id)
        assert service.live.refusals == Counter({RefusalKind.ADDRESS: 1})


async def test_an_option_above_its_limit_leaves_the_open_tunnel_of_that_name_alone(service: TunnelService) -> None:
    tunnel = await open_tunnel(service, name="blog")
    with pytest.raises(UsageError, match="max_visitors"):
        await open_tunnel(service, name="blog", max_visitors="1000000")
    assert list(service.tunnels()) == [tunnel]
