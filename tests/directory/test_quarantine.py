"""A freed port is kept from other owners for a while; see also policy/test_ports.py."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from tests.directory.test_reservations import ALICE, BOB, few_ports, open_as
from tests.support.peers import connect
from tests.support.visitors import until_parked
from tunneld.config.schema import TunnelSettings
from tunneld.directory.service import TunnelService
from tunneld.errors import LimitReachedError
from tunneld.policy.access import EVERYBODY


@pytest.fixture
def tunnel_settings() -> TunnelSettings:
    """A range with the ports of three tunnels."""
    return few_ports(6)


async def test_a_freed_port_is_refused_to_another_owner_for_a_minute(
    service: TunnelService, mock_clock: MockClock
) -> None:
    first = await open_as(service, ALICE)
    await service.close(first.id)
    for port in (first.client_uri.port, first.server_uri.port):
        with pytest.raises(LimitReachedError, match=rf"port {port} was freed .* in 60 s, or .*tunnels.port_quarantine"):
            await open_as(service, BOB, client_port=str(port))
    again = await open_as(service, ALICE, client_port=str(first.client_uri.port))
    await service.close(again.id)
    mock_clock.jump(60)
    await open_as(service, BOB, client_port=str(first.client_uri.port))


async def test_a_released_reservation_does_not_end_the_quarantine(
    service: TunnelService, mock_clock: MockClock
) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    await service.reservations.release("blog", ALICE)
    with pytest.raises(LimitReachedError, match="was freed by another owner"):
        await open_as(service, BOB, client_port=str(first.client_uri.port))
    mock_clock.jump(60)
    await open_as(service, BOB, client_port=str(first.client_uri.port))


async def test_ports_in_quarantine_are_given_to_another_owner_only_when_the_range_is_exhausted(
    service: TunnelService,
) -> None:
    freed = []
    for _ in range(2):
        tunnel = await open_as(service, ALICE)
        freed.append({tunnel.client_uri.port, tunnel.server_uri.port})
        await service.close(tunnel.id)
        await trio.lowlevel.checkpoint()
    others = [await open_as(service, BOB) for _ in range(3)]
    ports = [{tunnel.client_uri.port, tunnel.server_uri.port} for tunnel in others]
    assert not ports[0] & (freed[0] | freed[1])
    assert ports[1:] == freed, "the ones freed longest ago come first"


async def test_without_credentials_the_address_of_the_requester_is_the_owner(service: TunnelService) -> None:
    first = await open_as(service, EVERYBODY, "192.0.2.1")
    await service.close(first.id)
    port = str(first.client_uri.port)
    with pytest.raises(LimitReachedError, match="was freed by another owner"):
        await open_as(service, EVERYBODY, "192.0.2.2", client_port=port)
    await open_as(service, EVERYBODY, "192.0.2.1", client_port=port)


async def test_the_port_of_a_draining_tunnel_is_kept_from_other_owners(service: TunnelService) -> None:
    first = await open_as(service, ALICE, persist="yes")
    server = await connect(first.server_uri)
    await until_parked(first, 1)
    visitor = await connect(first.client_uri)
    while not first.visitors:
        await trio.lowlevel.checkpoint()
    first.drain()
    port = str(first.client_uri.port)
    with pytest.raises(LimitReachedError, match="no port is free in"):
        await open_as(service, BOB, client_port=port)
    await open_as(service, ALICE, client_port=port)
    await visitor.aclose()
    await server.aclose()
