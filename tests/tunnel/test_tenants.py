"""What the tunnels of one owner share: visitors, bandwidth, the engine's time."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.support.credentials import credential
from tests.support.peers import connect, is_dropped, reset
from tunneld.backends import BACKENDS
from tunneld.config.schema import ControlSettings, Settings, TunnelSettings
from tunneld.directory import service as service_module
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine
from tunneld.errors import LimitReachedError
from tunneld.policy.access import Grant
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.tenants import DESCRIPTORS_PER_VISITOR, Tenants
from tunneld.tunnel.tunnel import Tunnel


def settings_with(*, share: float = 0.5, ports: str = "0", max_tunnels: int = 1000, **keys: Any) -> Settings:
    """Two users, `home` with these keys, and an admin."""
    return Settings(
        control=ControlSettings(credential_share=share),
        tunnels=TunnelSettings(ports=ports, max_tunnels=max_tunnels),
        credential=(credential("home", **keys), credential("work"), credential("root", role="admin")),
    )


async def serving(settings: Settings, engine: Engine, nursery: trio.Nursery) -> TunnelService:
    service = TunnelService(lambda: settings, engine, BACKENDS)
    await nursery.start(service.run)
    return service


def grant_of(service: TunnelService, name: str) -> Grant:
    return next(one.grant for one in service.settings().credential if one.name == name)


async def opened(service: TunnelService, credential_name: str, /, **words: str) -> Tunnel:
    requester = Requester(
        "127.0.0.1", f"{credential_name}@127.0.0.1:9", "127.0.0.1", grant_of(service, credential_name)
    )
    return await service.open_tunnel("tcp", TunnelOptions.parse({"persist": "yes", **words}), requester)


async def joined(tunnel: Tunnel) -> tuple[trio.SocketStream, trio.SocketStream]:
    before = tunnel.served
    pair = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    while tunnel.served == before:
        await trio.lowlevel.checkpoint()
    return pair


async def test_visitors_of_all_tunnels_of_a_credential_count_together(engine: Engine, nursery: trio.Nursery) -> None:
    service = await serving(settings_with(max_total_visitors=2), engine, nursery)
    one, two, other = await opened(service, "home"), await opened(service, "home"), await opened(service, "work")
    (server, visitor), _ = await joined(one), await joined(two)
    assert await is_dropped(await connect(two.client_uri))
    await joined(other)
    await visitor.aclose()
    await server.aclose()
    while one.visitors.relays:
        await trio.lowlevel.checkpoint()
    await joined(two)


async def test_a_waiting_visitor_counts_until_it_leaves(engine: Engine, nursery: trio.Nursery) -> None:
    service = await serving(settings_with(max_total_visitors=1), engine, nursery)
    one, two = await opened(service, "home"), await opened(service, "home")
    waiting = await connect(one.client_uri)
    while not one.waiting:
        await trio.lowlevel.checkpoint()
    assert await is_dropped(await connect(two.client_uri))
    reset(waiting)
    while one.waiting:
        await trio.lowlevel.checkpoint()
    await joined(two)


def test_a_credential_without_a_limit_has_its_share_of_what_the_process_can_hold() -> None:
    settings = settings_with(share=0.25)
    tenants = Tenants(8 * DESCRIPTORS_PER_VISITOR)
    tenants.apply(settings)
    home, root = tenants.of("home", "192.0.2.1"), tenants.of("root", "192.0.2.1")
    home.visitors = root.visitors = 1
    assert home.refuse_visitor() is None
    home.visitors = root.visitors = 2
    refusal = home.refuse_visitor()
    assert refusal is not None
    assert refusal.reason == "limit reached: its owner's tunnels have 2 visitors (control.credential_share)"
    assert root.refuse_visitor() is None


def test_a_reload_changes_the_limits_of_tenants() -> None:
    settings = settings_with(max_total_visitors=1)
    tenants = Tenants(1000)
    tenants.apply(settings)
    home = tenants.of("home", "")
    home.visitors = 1
    assert home.refuse_visitor() is not None
    tenants.apply(settings_with(max_total_visitors=2))
    assert home.refuse_visitor() is None


def test_without_credentials_an_address_is_a_tenant_without_limits() -> None:
    tenants = Tenants(1000)
    tenants.apply(Settings())
    one = tenants.of("", "192.0.2.1")
    one.visitors = 10**6
    assert one.refuse_visitor() is None
    assert tenants.of("", "192.0.2.1") is one
    assert tenants.of("", "192.0.2.2") is not one
    assert one.bucket is None


def test_all_tunnels_of_a_tenant_have_one_bucket() -> None:
    settings = settings_with(total_bandwidth=1000)
    tenants = Tenants(1000)
    tenants.apply(settings)
    home = tenants.of("home", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trio, "current_time", lambda: 0.0)
        bucket = home.bucket
        assert bucket is not None
        assert bucket.rate == 1000
        assert home.bucket is bucket


async def test_no_credential_opens_more_tunnels_than_its_share(engine: Engine, nursery: trio.Nursery) -> None:
    service = await serving(settings_with(max_tunnels=4), engine, nursery)
    for _ in range(2):
        await opened(service, "home")
    with pytest.raises(LimitReachedError, match=r"tunnel limit reached: credential 'home' may have 2 of 4 \(control"):
        await opened(service, "home")
    await opened(service, "work")
    await opened(service, "root")


async def test_a_limit_of_its_own_replaces_the_share_of_tunnels(engine: Engine, nursery: trio.Nursery) -> None:
    service = await serving(settings_with(max_tunnels=4), engine, nursery)
    one = settings_with(max_tunnels=4)
    home = one.credential[0].model_copy(update={"max_tunnels": 3})
    changed = one.model_copy(update={"credential": (home, *one.credential[1:])})
    service.settings = lambda: changed
    service.apply_settings()
    for _ in range(3):
        await opened(service, "home")
    with pytest.raises(LimitReachedError, match="3 of 3 open"):
        await opened(service, "home")


async def test_no_credential_takes_more_ports_than_its_share_open_or_reserved(
    engine: Engine, nursery: trio.Nursery
) -> None:
    service = await serving(settings_with(ports="20700-20711"), engine, nursery)  # two ports each
    for name in ("a", "b", "c"):
        tunnel = await opened(service, "home", name=name)
    await service.close(tunnel.id, grant_of(service, "home"), keep=True)
    with pytest.raises(LimitReachedError, match=r"port limit reached: credential 'home' may have 6 of 12"):
        await opened(service, "home")
    await opened(service, "home", name="c")  # its own reservation
    await opened(service, "work")


async def test_idle_server_connections_of_all_tunnels_of_a_credential_count_together(
    engine: Engine, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "descriptors_for_tunnels", lambda: 4 * DESCRIPTORS_PER_VISITOR)
    service = await serving(settings_with(), engine, nursery)
    one, two, other = await opened(service, "home"), await opened(service, "home"), await opened(service, "work")
    parked = [await connect(tunnel.server_uri) for tunnel in (one, two)]
    while one.parked + two.parked < 2:
        await trio.lowlevel.checkpoint()
    assert await is_dropped(await connect(one.server_uri))
    await connect(other.server_uri)
    while not other.parked:
        await trio.lowlevel.checkpoint()
    await parked[0].aclose()
    while one.parked:
        await trio.lowlevel.checkpoint()
    await connect(two.server_uri)
    while two.parked < 2:
        await trio.lowlevel.checkpoint()
    await service.close(two.id)
    assert service.tenant_of("home", "").server_connections_left == 2
