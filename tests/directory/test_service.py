"""How tunnels are found, and which counters remain when they have closed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.support.peers import connect, is_dropped, read_exactly
from tests.support.visitors import ME, open_tunnel, until_gone, until_served
from tunneld.backends import BACKENDS
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.directory import local
from tunneld.directory.live import LiveTunnels
from tunneld.directory.requester import Requester
from tunneld.directory.running import METER_INTERVAL
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine
from tunneld.errors import EndedError, LimitReachedError, NoSuchTunnelError, UsageError
from tunneld.policy.access import EVERYBODY, Grant, Role
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.tunnel import Tunnel


async def test_a_tunnel_is_found_by_id_uris_and_client_port(service: TunnelService) -> None:
    other, tunnel = await open_tunnel(service), await open_tunnel(service)
    for reference in (tunnel.id.upper(), str(tunnel.server_uri), str(tunnel.client_uri), str(tunnel.client_uri.port)):
        assert await service.find_local(reference) is tunnel
    assert list(service.tunnels()) == [other, tunnel]


async def test_a_tunnel_is_found_by_its_name_unless_that_is_ambiguous(service: TunnelService) -> None:
    async def opened(credential: str) -> Tunnel:
        requester = Requester("127.0.0.1", f"{credential}@127.0.0.1:9", "127.0.0.1", Grant(credential))
        return await service.open_tunnel("tcp", TunnelOptions.parse({"name": "blog"}), requester)

    await open_tunnel(service)
    of_alice = await opened("alice")
    assert await service.find_local("blog") is of_alice
    of_bob = await opened("bob")
    assert await service.find_local("blog", Grant("bob")) is of_bob
    with pytest.raises(UsageError, match="use an id, t2, t3"):
        await service.find("blog")
    with pytest.raises(NoSuchTunnelError):
        await service.find("blog", Grant("carol"))


@pytest.mark.parametrize("reference", ["t99", "1", "tcp://127.0.0.1:1", ""])
async def test_a_reference_without_a_tunnel_is_an_error(service: TunnelService, reference: str) -> None:
    await open_tunnel(service)
    with pytest.raises(NoSuchTunnelError, match="no open tunnel"):
        await service.find(reference)


async def test_the_tunnel_of_another_credential_is_not_found(service: TunnelService) -> None:
    tunnel, other = await open_tunnel(service), Grant(name="another")
    for ask in (service.find, service.get_tunnel_address):
        with pytest.raises(NoSuchTunnelError):
            await ask(str(tunnel.server_uri), other)
    assert (list(service.tunnels(other)), service.live.is_visible_to(other, tunnel.id)) == ([], False)


async def test_counters_outlive_tunnels_and_the_process(service: TunnelService) -> None:
    tunnel = await open_tunnel(service, max_visitors="1")
    server = await connect(tunnel.server_uri)
    visitor = await connect(tunnel.client_uri)
    await until_served(tunnel, 1)
    assert await is_dropped(await connect(tunnel.client_uri))
    await visitor.send_all(b"12345")
    await visitor.aclose()
    await server.aclose()
    await until_gone(tunnel)

    def counts(live: LiveTunnels) -> tuple[int, int, tuple[int, int], int]:
        return live.opened, live.served, live.octets, live.refusals.total()

    counted = counts(service.live)
    assert counted == (1, 1, (5, 0), 1)
    await service.close(tunnel.id)
    while service.tunnels():
        await trio.lowlevel.checkpoint()
    assert counts(service.live) == counted
    successor = LiveTunnels()
    successor.continue_from(service.live.past)
    assert counts(successor) == counted


async def test_the_agent_of_a_tunnel_ended_by_request_is_told_so(service: TunnelService) -> None:
    root = Grant("root", Role.ADMIN)
    closed, drained = await open_tunnel(service), await open_tunnel(service)
    await service.close(closed.id, root)
    await service.drain_one(drained.id, root)
    while service.tunnels():
        await trio.lowlevel.checkpoint()
    for tunnel, how in ((closed, "closed"), (drained, "drained")):
        for ask in (service.find, service.get_tunnel_address):
            with pytest.raises(EndedError, match=f"^tunnel {tunnel.id} was {how} by request of root$"):
                await ask(str(tunnel.server_uri))
            with pytest.raises(NoSuchTunnelError):
                await ask(str(tunnel.server_uri), Grant("another"))


async def test_a_tunnel_that_may_be_reopened_or_was_is_not_ended_by_request(service: TunnelService) -> None:
    kept, given_up = await open_tunnel(service, name="kept"), await open_tunnel(service)
    await service.close(kept.id, keep=True)
    with pytest.raises(NoSuchTunnelError):
        await service.find(str(kept.server_uri))
    record = service.live.record_of(given_up.id)
    await service.close(given_up.id)
    await service.directory.open(record)  # a plain tcp tunnel may get the server URI of an ended one
    await service.directory.remove(record, keep=False)
    with pytest.raises(NoSuchTunnelError):
        await service.find(str(given_up.server_uri))


async def test_only_the_latest_tunnels_ended_by_request_are_remembered(
    service: TunnelService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "MAX_ENDED", 2)
    tunnels = [await open_tunnel(service) for _ in range(3)]
    for tunnel in tunnels:
        await service.close(tunnel.id)
    with pytest.raises(NoSuchTunnelError):
        await service.find(str(tunnels[0].server_uri))
    for tunnel in tunnels[1:]:
        with pytest.raises(EndedError):
            await service.find(str(tunnel.server_uri))


async def test_records_follow_a_shared_port_that_a_reload_moved_or_gave_another_scheme(service: TunnelService) -> None:
    service.keys.set_port("webmux", "webmux", 7012)
    tunnel = await service.open_tunnel("webmux", TunnelOptions(persist=True), ME)
    before = str(tunnel.server_uri)
    service.keys.set_port("webmux", "webmuxs", 7013)
    service.apply_settings()
    await trio.testing.wait_all_tasks_blocked()
    assert str(tunnel.server_uri) != before
    assert await service.find_local(str(tunnel.server_uri)) is tunnel
    assert service.live.with_key(tunnel.server_uri.key) is tunnel
    with pytest.raises(NoSuchTunnelError):
        await service.find(before)
    await service.close(str(tunnel.server_uri))


class TestLimit:
    @pytest.fixture
    def tunnel_settings(self) -> TunnelSettings:
        return TunnelSettings(ports="0", max_tunnels=2)

    async def test_max_tunnels(self, service: TunnelService) -> None:
        first, _ = await open_tunnel(service), await open_tunnel(service)
        with pytest.raises(LimitReachedError, match=r"^tunnel limit reached: .* 2 of 2 open \(tunnels.max_tunnels\)"):
            await open_tunnel(service)
        await service.close(first.id)
        await open_tunnel(service)


async def test_the_used_quota_of_an_open_tunnel_is_stored(
    nursery: trio.Nursery, engine: Engine, tmp_path: Path, mock_clock: MockClock
) -> None:
    """A relay that is killed stores nothing at its end: its file is read as it is at that moment."""
    settings = Settings(tunnels=TunnelSettings(ports="0"))
    killed = TunnelService(lambda: settings, engine, BACKENDS, state=tmp_path / "state")
    await nursery.start(killed.run)
    tunnel = await open_tunnel(killed, name="blog", persist="yes", quota="1000")
    server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    await visitor.send_all(bytes(600))
    assert len(await read_exactly(server, 600)) == 600
    mock_clock.jump(METER_INTERVAL)
    while not [kept for kept in killed.reservations.kept(EVERYBODY) if kept.record.metered == 600]:
        await trio.lowlevel.checkpoint()
    await killed.reservations.saved()
    shutil.copytree(tmp_path / "state", tmp_path / "left")
    service = TunnelService(lambda: settings, engine, BACKENDS, state=tmp_path / "left")
    await nursery.start(service.run)
    again = await open_tunnel(service, name="blog", persist="yes", quota="1000")
    assert again.spec.quota_left == 400
