"""An address stays its holder's while the tunnel is away, and is nobody else's meanwhile."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from tests.support.people import connect, is_refused
from tests.support.visitors import until_parked
from tunneld.backends import BACKENDS
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.directory.reservations import ReservationView
from tunneld.directory.service import Requester, TunnelService
from tunneld.engine.engine import Engine
from tunneld.errors import LimitReachedError, NoSuchTunnelError, UsageError
from tunneld.policy.access import EVERYBODY, Grant, Role
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.tunnel import Phase, Tunnel

ALICE, BOB, ROOT = Grant("alice"), Grant("bob"), Grant("root", Role.ADMIN)
HOUR = 3600.0


@pytest.fixture
def tunnel_settings() -> TunnelSettings:
    """As many ports as two tunnels have."""
    return few_ports(4)


def few_ports(count: int, **keys: float) -> TunnelSettings:
    """A range of so many ports that were free just now."""
    for first in range(21_000, 29_000, 50):
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return TunnelSettings.model_validate({"ports": f"{first}-{first + count - 1}", "reservation": HOUR, **keys})
    raise AssertionError("no free ports")


async def open_as(service: TunnelService, grant: Grant, host: str = "127.0.0.1", **words: str) -> Tunnel:
    asker = Requester(host=host, owner=f"{host}:9", local_host="127.0.0.1", grant=grant)
    return await service.open_tunnel("tcp", TunnelOptions.parse(words), asker)


def address(tunnel: Tunnel) -> tuple[str, str]:
    return str(tunnel.client_uri), str(tunnel.server_uri)


async def test_who_comes_back_finds_both_ports_as_they_were(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    assert address(await open_as(service, ALICE, name="blog")) == address(first)


async def test_from_another_address_too_if_it_is_the_same_credential(service: TunnelService) -> None:
    first = await open_as(service, ALICE, "192.0.2.1", name="blog")
    await service.close(first.id, keep=True)
    assert address(await open_as(service, ALICE, "192.0.2.2", name="blog")) == address(first)


async def test_one_that_is_served_is_not_replaced_by_who_asks_for_that(
    service: TunnelService, mock_clock: MockClock
) -> None:
    first = await open_as(service, ALICE, name="blog", persist="yes")
    with pytest.raises(LimitReachedError, match=r"another agent serves 'blog' now, .* with t1"):
        await open_as(service, ALICE, name="blog", replace="no")  # its hidden server is about to connect
    mock_clock.jump(10)
    await connect(first.server_uri)
    await until_parked(first, 1)
    with pytest.raises(LimitReachedError, match=r"another agent serves 'blog' now"):
        await open_as(service, ALICE, name="blog", replace="no")
    await open_as(service, BOB, name="blog", replace="no")
    assert address(await open_as(service, ALICE, name="blog")) == address(first)


async def test_one_that_nobody_serves_is_replaced_by_who_would_not_otherwise(
    service: TunnelService, mock_clock: MockClock
) -> None:
    first = await open_as(service, ALICE, name="blog")
    mock_clock.jump(10)
    assert address(await open_as(service, ALICE, name="blog", replace="no")) == address(first)
    assert first.phase is Phase.CLOSED


async def test_nobody_else_gets_its_ports_by_chance(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    other = await open_as(service, BOB)
    mine, others = ({tunnel.client_uri.port, tunnel.server_uri.port} for tunnel in (first, other))
    assert not mine & others
    with pytest.raises(LimitReachedError, match=r"no port is free in .*; 2 are reserved for named tunnels"):
        await open_as(service, BOB)


async def test_nobody_else_gets_them_by_asking(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    for port in (first.client_uri.port, first.server_uri.port):
        for name in ({}, {"name": "blog"}):
            with pytest.raises(LimitReachedError, match=f"port {port} is reserved for another tunnel, which is away"):
                await open_as(service, BOB, client_port=str(port), **name)
    with pytest.raises(LimitReachedError, match=r"is reserved for tunnel 'blog' of alice, .*; release .* gives it up"):
        await open_as(service, ROOT, client_port=str(first.client_uri.port))


async def test_after_its_time_they_are_anybodys(service: TunnelService, mock_clock: MockClock) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    mock_clock.jump(HOUR)
    other = await open_as(service, BOB, client_port=str(first.client_uri.port))
    assert other.client_uri == first.client_uri


@asynccontextmanager
async def visited(tunnel: Tunnel) -> AsyncIterator[trio.SocketStream]:
    """A visitor of the tunnel who is served, by nobody who says anything."""
    server = await connect(tunnel.server_uri)
    await until_parked(tunnel, 1)
    async with server, await connect(tunnel.client_uri) as visitor:
        while not tunnel.visitors:
            await trio.lowlevel.checkpoint()
        yield visitor


async def test_an_address_means_the_tunnel_that_took_it_over_from_one_that_is_drained(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog", persist="yes")
    async with visited(first):
        first.drain()
        second = await open_as(service, ALICE, name="blog", persist="yes")
        assert address(second) == address(first)
        for reference in (*address(first), str(first.client_uri.port)):
            assert service.find(reference, ALICE) is second
        assert service.find(first.id, ALICE) is first
        assert service.get_tunnel_address(str(first.server_uri), ALICE) == second.client_uri
        assert first.visitors, "and nobody was cut"


async def test_one_that_is_drained_does_not_use_up_what_a_credential_may_open(service: TunnelService) -> None:
    """Otherwise its successor could not come before the last visitor has left. More than one does."""
    only_one = Grant("alice", max_tunnels=1)
    first = await open_as(service, only_one, name="blog", persist="yes")
    async with visited(first):
        first.drain()
        second = await open_as(service, only_one, name="blog", persist="yes")
        third = await open_as(service, only_one, name="blog", persist="yes")
        assert second.phase is Phase.CLOSED
        with pytest.raises(LimitReachedError, match="its max_tunnels"):
            await open_as(service, only_one, name="other")
        async with visited(third):
            third.drain()
            with pytest.raises(LimitReachedError, match="its max_tunnels"):
                await open_as(service, only_one, name="blog")


async def test_what_is_closed_on_purpose_is_given_up(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id)
    assert not service.reservations.kept(ROOT)
    await open_as(service, BOB, client_port=str(first.client_uri.port))


async def test_a_tunnel_without_a_name_leaves_nothing(service: TunnelService) -> None:
    first = await open_as(service, ALICE)
    await service.close(first.id, keep=True)
    assert not service.reservations.kept(ROOT)


async def test_a_tunnel_that_was_drained_or_whose_time_was_over_keeps_its_address(service: TunnelService) -> None:
    for words in ({}, {"ttl": "0.01"}):
        first = await open_as(service, ALICE, name="blog", **words)
        if not words:
            first.drain()
        await first.wait_closed()
        again = await open_as(service, ALICE, name="blog")
        assert address(again) == address(first)
        await service.close(again.id)


async def test_who_asks_for_another_port_has_that_from_then_on(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    ports = service._settings().tunnels.port_range
    free = next(port for port in ports if port not in {first.client_uri.port, first.server_uri.port})
    second = await open_as(service, ALICE, name="blog", client_port=str(free))
    await service.close(second.id, keep=True)
    assert (await open_as(service, ALICE, name="blog")).client_uri.port == free


async def test_a_port_that_another_program_took_meanwhile_is_told_and_another_one_used(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    await service.close(first.id, keep=True)
    with socket.create_server(("127.0.0.1", first.client_uri.port)), capture_logs() as logs:
        second = await open_as(service, ALICE, name="blog")
    assert second.client_uri.port != first.client_uri.port
    (told,) = [line for line in logs if line["event"] == "tunnel has another address than before"]
    assert (told["was"], told["now"]) == (first.client_uri.port, second.client_uri.port)
    assert f"no port is free in {first.client_uri.port}" in told["reason"]


async def test_a_port_that_was_asked_for_and_another_program_has_is_refused(service: TunnelService) -> None:
    port = service._settings().tunnels.port_range[0]
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(LimitReachedError, match=f"no port is free in {port}"),
    ):
        await open_as(service, ALICE, name="blog", client_port=str(port))
    assert not service.reservations.kept(ROOT)


async def test_newcomers_of_one_name_at_once_leave_one_tunnel_at_the_address(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    opened: list[Tunnel] = []

    async def open_one() -> None:
        opened.append(await open_as(service, ALICE, name="blog"))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(open_one)
    assert {address(tunnel) for tunnel in opened} == {address(first)}
    assert len(service.tunnels()) == 1


async def test_one_that_is_evicted_drops_what_is_parked_and_the_newcomer_is_served(service: TunnelService) -> None:
    """The backend for each visitor a connection: the old ones lead nowhere any more."""
    first = await open_as(service, ALICE, name="blog", persist="yes")
    stale = await connect(first.server_uri)
    await until_parked(first, 1)
    second = await open_as(service, ALICE, name="blog", persist="yes")
    assert await stale.receive_some(1) == b""
    assert second.parked == 0
    assert address(second) == address(first)


class TestWithoutCredentials:
    async def test_the_address_tells_people_apart(self, service: TunnelService) -> None:
        first = await open_as(service, EVERYBODY, "192.0.2.1", name="blog")
        await service.close(first.id, keep=True)
        other = await open_as(service, EVERYBODY, "192.0.2.2", name="blog")
        assert other.client_uri != first.client_uri
        await service.close(other.id)
        assert address(await open_as(service, EVERYBODY, "192.0.2.1", name="blog")) == address(first)

    async def test_who_knows_name_and_port_may_have_moved(self, service: TunnelService) -> None:
        first = await open_as(service, EVERYBODY, "192.0.2.1", name="blog")
        await service.close(first.id, keep=True)
        port = str(first.client_uri.port)
        with pytest.raises(LimitReachedError):
            await open_as(service, EVERYBODY, "192.0.2.2", name="shop", client_port=port)
        moved = await open_as(service, EVERYBODY, "192.0.2.2", name="blog", client_port=port)
        assert moved.client_uri == first.client_uri
        assert [kept.record.holder.host for kept in service.reservations.kept(EVERYBODY)] == ["192.0.2.2"]

    async def test_but_an_open_tunnel_is_not_taken_from_another_address(self, service: TunnelService) -> None:
        first = await open_as(service, EVERYBODY, "192.0.2.1", name="blog")
        with pytest.raises(LimitReachedError, match="no port is free"):
            await open_as(service, EVERYBODY, "192.0.2.2", name="blog", client_port=str(first.client_uri.port))
        assert list(service.tunnels()) == [first]


class TestWhatPeopleAsk:
    async def test_who_has_a_port(self, service: TunnelService, mock_clock: MockClock) -> None:
        first = await open_as(service, ALICE, name="blog")
        second = await open_as(service, BOB, name="shop")
        await service.close(second.id, keep=True)
        mock_clock.jump(600)

        def told(found: list[ReservationView]) -> list[tuple[str, str | None, float | None]]:
            return [(each.record.holder.name, each.tunnel, each.left) for each in found]

        addresses = service.reservations
        assert told([*addresses.find(str(second.client_uri.port), ROOT)]) == [("shop", None, HOUR - 600)]
        assert told([*addresses.find(str(first.server_uri.port), ROOT)]) == [("blog", first.id, None)]
        assert told([*addresses.kept(ALICE)]) == [("blog", first.id, None)]
        with pytest.raises(NoSuchTunnelError):
            addresses.find("shop", ALICE)

    async def test_a_tunnel_can_be_named_by_the_port_of_its_clients(self, service: TunnelService) -> None:
        first = await open_as(service, ALICE, name="blog")
        assert service.find(str(first.client_uri.port)) is first
        with pytest.raises(NoSuchTunnelError):
            service.find(str(first.client_uri.port), BOB)

    async def test_a_reservation_is_released_and_an_open_tunnels_is_not(self, service: TunnelService) -> None:
        first = await open_as(service, ALICE, name="blog")
        with pytest.raises(UsageError, match=f"tunnel {first.id} is open at port .*: close {first.id} first"):
            await service.reservations.release("blog", ROOT)
        await service.close(first.id, keep=True)
        with pytest.raises(NoSuchTunnelError):
            await service.reservations.release("blog", BOB)
        await service.reservations.release(str(first.client_uri.port), ROOT)
        await open_as(service, BOB, client_port=str(first.client_uri.port))

    async def test_of_two_that_are_called_alike_the_port_says_which(self, service: TunnelService) -> None:
        for grant in (ALICE, BOB):
            await service.close((await open_as(service, grant, name="blog")).id, keep=True)
        with pytest.raises(UsageError, match="2 reservations are called 'blog': say which by its port"):
            await service.reservations.release("blog", ROOT)
        await service.reservations.release("blog", ALICE)


async def test_a_removed_credential_leaves_nothing_behind(service: TunnelService) -> None:
    first = await open_as(service, ALICE, name="blog")
    second = await open_as(service, ALICE, name="shop")
    await service.close(second.id, keep=True)
    service.drain_revoked({"bob"})
    await first.wait_closed()
    await open_as(service, BOB, client_port=str(second.client_uri.port))


async def test_whether_it_is_drained_or_stopped_what_was_open_is_there_in_the_next_life(
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


async def test_with_a_reservation_of_nothing_a_newcomer_still_evicts_and_nothing_is_kept(engine: Engine) -> None:
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


async def test_a_system_that_gives_any_port_is_asked_again_where_it_gave_a_reserved_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(tunnels=TunnelSettings(ports="0"))
    async with trio.open_nursery() as nursery:
        service = TunnelService(lambda: settings, engine, BACKENDS)
        await nursery.start(service.run)
        given: list[int] = []

        class Suspicious:
            def __contains__(self, port: object) -> bool:
                assert isinstance(port, int)
                given.append(port)
                return len(given) <= 3

        monkeypatch.setattr(service.reservations, "table", Suspicious())
        monkeypatch.setattr(service.reservations, "recall", lambda *_: None)
        tunnel = await open_as(service, ALICE)
        assert tunnel.client_uri.port == given[3]
        assert tunnel.client_uri.port not in given[:3]
        nursery.cancel_scope.cancel()
