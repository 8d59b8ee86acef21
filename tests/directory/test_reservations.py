"""A closed tunnel's address stays reserved for its holder, and no other tunnel gets it meanwhile."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from tests.support.peers import connect, is_refused
from tests.support.visitors import until_parked
from tunneld.backends import BACKENDS
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.directory.requester import Requester
from tunneld.directory.reservations import ReservationView
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine
from tunneld.errors import LimitReachedError, NoSuchTunnelError, UsageError
from tunneld.policy.access import EVERYBODY, Grant, Role
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.tunnel import Phase, Tunnel

ALICE, BOB, ROOT = Grant("alice"), Grant("bob"), Grant("root", Role.ADMIN)
HOUR = 3600.0


@pytest.fixture
def tunnel_settings() -> TunnelSettings:
    """A range with the ports of two tunnels, which are free for any owner as soon as they are not reserved."""
    return few_ports(4, port_quarantine=0)


def few_ports(count: int, **keys: float) -> TunnelSettings:
    """A range of `count` ports that are free now."""
    for first in range(21_000, 29_000, 50):
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return TunnelSettings.model_validate({"ports": f"{first}-{first + count - 1}", "reservation": HOUR, **keys})
    raise AssertionError("no free ports")


async def open_as(service: TunnelService, grant: Grant, host: str = "127.0.0.1", **words: str) -> Tunnel:
    requester = Requester(host=host, owner=f"{host}:9", local_host="127.0.0.1", grant=grant)
    return await service.open_tunnel("tcp", TunnelOptions.parse(words), requester)


def address(tunnel: Tunnel) -> tuple[str, str]:
    return str(tunnel.client_uri), str(tunnel.server_uri)


async def test_a_reopened_tunnel_has_both_ports_again(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    assert address(await open_as(service, ALICE, name="blog")) == address(first)


async def test_a_reservation_of_a_credential_does_not_depend_on_the_address(service: TunnelService) -> None:
    first = await open_as(service, ALICE, "192.0.2.1", name="blog")
    await service.close(first.id, keep=True)
    assert address(await open_as(service, ALICE, "192.0.2.2", name="blog")) == address(first)


async def test_replace_no_fails_while_the_open_tunnel_is_served(service: TunnelService, mock_clock: MockClock) -> None:
    first = await open_as(service, ALICE, name="blog", persist="yes")
    with pytest.raises(LimitReachedError, match=r"tunnel 'blog' is served by another agent, .* \(t1\)"):
        await open_as(service, ALICE, name="blog", replace="no")  # its hidden server is about to connect
    mock_clock.jump(10)
    await connect(first.server_uri)
    await until_parked(first, 1)
    with pytest.raises(LimitReachedError, match=r"tunnel 'blog' is served by another agent"):
        await open_as(service, ALICE, name="blog", replace="no")
    await open_as(service, BOB, name="blog", replace="no")
    assert address(await open_as(service, ALICE, name="blog")) == address(first)


async def test_replace_no_replaces_an_open_tunnel_that_no_agent_serves(
    service: TunnelService, mock_clock: MockClock
) -> None:
    first = await open_as(service, ALICE, name="blog")
    mock_clock.jump(10)
    assert address(await open_as(service, ALICE, name="blog", replace="no")) == address(first)
    assert first.phase is Phase.CLOSED


async def test_reserved_ports_are_not_assigned_to_other_tunnels(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    other = await open_as(service, BOB)
    mine, others = ({tunnel.client_uri.port, tunnel.server_uri.port} for tunnel in (first, other))
    assert not mine & others
    with pytest.raises(LimitReachedError, match=r"no port is free in .*; 2 are reserved for named tunnels"):
        await open_as(service, BOB)


async def test_reserved_ports_cannot_be_requested_by_another_credential(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    for port in (first.client_uri.port, first.server_uri.port):
        for name in ({}, {"name": "blog"}):
            with pytest.raises(LimitReachedError, match=f"port {port} is reserved for another tunnel, now closed"):
                await open_as(service, BOB, client_port=str(port), **name)
    with pytest.raises(LimitReachedError, match=r"is reserved for tunnel 'blog' of alice, .*; release .* frees it"):
        await open_as(service, ROOT, client_port=str(first.client_uri.port))


async def test_expired_reservations_free_their_ports(service: TunnelService, mock_clock: MockClock) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    mock_clock.jump(HOUR)
    other = await open_as(service, BOB, client_port=str(first.client_uri.port))
    assert other.client_uri == first.client_uri


@asynccontextmanager
async def visited(tunnel: Tunnel) -> AsyncIterator[trio.SocketStream]:
    """A visitor joined to a server connection without data."""
    server = await connect(tunnel.server_uri)
    await until_parked(tunnel, 1)
    async with server, await connect(tunnel.client_uri) as visitor:
        while not tunnel.visitors:
            await trio.lowlevel.checkpoint()
        yield visitor


async def test_an_address_refers_to_the_tunnel_that_took_it_over_from_a_draining_one(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog", persist="yes")
    async with visited(first):
        first.drain()
        second = await open_as(service, ALICE, name="blog", persist="yes")
        assert address(second) == address(first)
        for reference in (*address(first), str(first.client_uri.port)):
            assert await service.find_local(reference, ALICE) is second
        assert await service.find_local(first.id, ALICE) is first
        assert await service.get_tunnel_address(str(first.server_uri), ALICE) == second.client_uri
        assert first.visitors, "its visitors stay connected"


async def test_one_draining_tunnel_does_not_count_against_max_tunnels(service: TunnelService) -> None:
    """Otherwise it could not be replaced before its last visitor has left. More than one draining tunnel counts."""
    only_one = Grant("alice", max_tunnels=1)
    first = await open_as(service, only_one, name="blog", persist="yes")
    async with visited(first):
        first.drain()
        second = await open_as(service, only_one, name="blog", persist="yes")
        third = await open_as(service, only_one, name="blog", persist="yes")
        assert second.phase is Phase.CLOSED
        with pytest.raises(LimitReachedError, match=r"\(max_tunnels\)"):
            await open_as(service, only_one, name="other")
        async with visited(third):
            third.drain()
            with pytest.raises(LimitReachedError, match=r"\(max_tunnels\)"):
                await open_as(service, only_one, name="blog")


async def test_closing_by_request_releases_the_address(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id)
    assert not service.reservations.kept(ROOT)
    await open_as(service, BOB, client_port=str(first.client_uri.port))


async def test_a_tunnel_without_a_name_has_no_reservation(service: TunnelService) -> None:
    first = await open_as(service, ALICE)
    await service.close(first.id, keep=True)
    assert not service.reservations.kept(ROOT)


async def test_a_drained_or_expired_tunnel_keeps_its_address(service: TunnelService) -> None:
    for words in ({}, {"ttl": "0.01"}):
        first = await open_as(service, ALICE, name="blog", **words)
        if not words:
            first.drain()
        await first.wait_closed()
        again = await open_as(service, ALICE, name="blog")
        assert address(again) == address(first)
        await service.close(again.id)


async def test_a_newly_requested_port_replaces_the_reserved_one(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    ports = service.settings().tunnels.port_range
    free = next(port for port in ports if port not in {first.client_uri.port, first.server_uri.port})
    second = await open_as(service, ALICE, name="blog", client_port=str(free))
    await service.close(second.id, keep=True)
    assert (await open_as(service, ALICE, name="blog")).client_uri.port == free


async def test_a_reserved_port_taken_by_another_program_is_logged_and_replaced(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    with socket.create_server(("127.0.0.1", first.client_uri.port)), capture_logs() as logs:
        second = await open_as(service, ALICE, name="blog")
    assert second.client_uri.port != first.client_uri.port
    (line,) = [line for line in logs if line["event"] == "tunnel could not get its reserved address"]
    assert (line["was"], line["now"]) == (first.client_uri.port, second.client_uri.port)
    assert f"no port is free in {first.client_uri.port}" in line["reason"]


async def test_a_requested_port_taken_by_another_program_is_refused(service: TunnelService) -> None:
    port = service.settings().tunnels.port_range[0]
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(LimitReachedError, match=f"no port is free in {port}"),
    ):
        await open_as(service, ALICE, name="blog", client_port=str(port))
    assert not service.reservations.kept(ROOT)


async def test_concurrent_requests_for_one_name_leave_one_tunnel_at_the_address(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    opened: list[Tunnel] = []

    async def open_one() -> None:
        opened.append(await open_as(service, ALICE, name="blog"))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(open_one)
    assert {address(tunnel) for tunnel in opened} == {address(first)}
    assert len(service.tunnels()) == 1


async def test_a_replaced_tunnel_drops_its_parked_connections(service: TunnelService) -> None:
    """With the tcp backend, the parked connections of the old tunnel lead to no agent any more."""
    first = await open_as(service, ALICE, name="blog", persist="yes")
    stale = await connect(first.server_uri)
    await until_parked(first, 1)
    second = await open_as(service, ALICE, name="blog", persist="yes")
    assert await stale.receive_some(1) == b""
    assert second.parked == 0
    assert address(second) == address(first)


class TestWithoutCredentials:
    async def test_the_requesters_address_separates_owners(self, service: TunnelService) -> None:
        first = await open_as(service, EVERYBODY, "192.0.2.1", name="blog")
        await service.close(first.id, keep=True)
        other = await open_as(service, EVERYBODY, "192.0.2.2", name="blog")
        assert other.client_uri != first.client_uri
        await service.close(other.id)
        assert address(await open_as(service, EVERYBODY, "192.0.2.1", name="blog")) == address(first)

    async def test_a_requester_with_name_and_port_may_have_moved(self, service: TunnelService) -> None:
        first = await open_as(service, EVERYBODY, "192.0.2.1", name="blog")
        await service.close(first.id, keep=True)
        port = str(first.client_uri.port)
        with pytest.raises(LimitReachedError):
            await open_as(service, EVERYBODY, "192.0.2.2", name="shop", client_port=port)
        moved = await open_as(service, EVERYBODY, "192.0.2.2", name="blog", client_port=port)
        assert moved.client_uri == first.client_uri
        assert [kept.record.holder.host for kept in service.reservations.kept(EVERYBODY)] == ["192.0.2.2"]

    async def test_an_open_tunnel_is_not_taken_over_from_another_address(self, service: TunnelService) -> None:
        first = await open_as(service, EVERYBODY, "192.0.2.1", name="blog")
        with pytest.raises(LimitReachedError, match="no port is free"):
            await open_as(service, EVERYBODY, "192.0.2.2", name="blog", client_port=str(first.client_uri.port))
        assert list(service.tunnels()) == [first]


class TestRequests:
    async def test_reservations_are_found_by_port_and_visible_to_their_owner(
        self, service: TunnelService, mock_clock: MockClock
    ) -> None:
        first = await open_as(service, ALICE, name="blog")
        second = await open_as(service, BOB, name="shop")
        await service.close(second.id, keep=True)
        mock_clock.jump(600)

        def fields(found: list[ReservationView]) -> list[tuple[str, str | None, float | None]]:
            return [(each.record.holder.name, each.tunnel, each.left) for each in found]

        addresses = service.reservations
        assert fields([*addresses.find(str(second.client_uri.port), ROOT)]) == [("shop", None, HOUR - 600)]
        assert fields([*addresses.find(str(first.server_uri.port), ROOT)]) == [("blog", first.id, None)]
        assert fields([*addresses.kept(ALICE)]) == [("blog", first.id, None)]
        with pytest.raises(NoSuchTunnelError):
            addresses.find("shop", ALICE)

    async def test_a_tunnel_is_found_by_its_client_port(self, service: TunnelService) -> None:
        first = await open_as(service, ALICE, name="blog")
        assert await service.find_local(str(first.client_uri.port)) is first
        with pytest.raises(NoSuchTunnelError):
            await service.find(str(first.client_uri.port), BOB)

    async def test_a_reservation_is_released_unless_its_tunnel_is_open(self, service: TunnelService) -> None:
        first = await open_as(service, ALICE, name="blog")
        with pytest.raises(UsageError, match=f"tunnel {first.id} is open at .*: close {first.id} first"):
            await service.reservations.release("blog", ROOT)
        await service.close(first.id, keep=True)
        with pytest.raises(NoSuchTunnelError):
            await service.reservations.release("blog", BOB)
        await service.reservations.release(str(first.client_uri.port), ROOT)
        await open_as(service, BOB, client_port=str(first.client_uri.port))

    async def test_of_two_reservations_with_one_name_the_port_selects_one(self, service: TunnelService) -> None:
        for grant in (ALICE, BOB):
            await service.close((await open_as(service, grant, name="blog")).id, keep=True)
        with pytest.raises(UsageError, match="2 reservations are called 'blog': use an address"):
            await service.reservations.release("blog", ROOT)
        await service.reservations.release("blog", ALICE)


async def test_a_removed_credential_leaves_no_tunnel_and_no_reservation(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    second = await open_as(service, ALICE, name="shop")
    await service.close(second.id, keep=True)
    service.drain_revoked({"bob"})
    await first.wait_closed()
    await open_as(service, BOB, client_port=str(second.client_uri.port))


async def test_reservations_of_open_tunnels_survive_a_drain_and_a_stop_of_the_daemon(
    engine: Engine, tunnel_settings: TunnelSettings, tmp_path: Path
) -> None:
    settings = Settings(tunnels=tunnel_settings)
    before: list[tuple[str, str]] = []
    for drained in (True, False, False):
        async with trio.open_nursery() as nursery:
            service = TunnelService(lambda: settings, engine, BACKENDS, state=tmp_path)
            await nursery.start(service.run)
            tunnel = await open_as(service, EVERYBODY, name="blog")
            before.append(address(tunnel))
            assert service.reservations.place == str(tmp_path / "reservations.db")
            if drained:
                await service.drain()
            nursery.cancel_scope.cancel()
    assert len(set(before)) == 1


async def test_with_a_reservation_time_of_zero_a_tunnel_is_replaced_and_nothing_is_kept(engine: Engine) -> None:
    settings = Settings(tunnels=few_ports(6, reservation=0))
    async with trio.open_nursery() as nursery:
        service = TunnelService(lambda: settings, engine, BACKENDS)
        await nursery.start(service.run)
        first = await open_as(service, ALICE, name="blog")
        second = await open_as(service, ALICE, name="blog")
        assert address(second) == address(first)
        await service.close(second.id, keep=True)
        assert not service.reservations.kept(ROOT)
        assert await is_refused(second.client_uri)
        nursery.cancel_scope.cancel()
