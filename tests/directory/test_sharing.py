"""Which tunnel a request for a link means, and who may have one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from tunneld.backends import BACKENDS
from tunneld.config.names import NamesSettings
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.directory.sharing import find_site
from tunneld.engine import new_engine
from tunneld.errors import NoSuchTunnelError, UsageError
from tunneld.policy.access import Grant, Role
from tunneld.policy.options import TunnelOptions
from tunneld.sites.names import SharedNames

ALICE, BOB, ROOT = Grant("alice"), Grant("bob"), Grant("root", Role.ADMIN)


@asynccontextmanager
async def serving() -> AsyncIterator[TunnelService]:
    """A service with host names."""
    settings = Settings(tunnels=TunnelSettings(ports="0"), names=NamesSettings(domain="t.example"))
    names = SharedNames(lambda: settings.names, lambda _name: False)
    names.set_port("http", 80)
    engine = new_engine(accept_backoff=0.1)
    service = TunnelService(lambda: settings, engine, BACKENDS, names=names)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await nursery.start(service.run)
        yield service
        nursery.cancel_scope.cancel()


async def opened(service: TunnelService, grant: Grant, **words: str) -> str:
    requester = Requester("127.0.0.1", f"{grant.name}@127.0.0.1:9", "127.0.0.1", grant)
    options = TunnelOptions.parse({"persist": "yes", **words})
    return (await service.open_tunnel("tcp", options, requester)).id


async def test_a_site_is_found_by_label_host_name_and_id() -> None:
    async with serving() as service:
        tunnel = await opened(service, ALICE, host="blog,shop", name="mine", auth="link")
        for reference, name in (
            ("blog", "blog.t.example"),
            ("SHOP.t.example", "shop.t.example"),
            ("mine", "blog.t.example"),
            (tunnel, "blog.t.example"),
        ):
            site = await find_site(service, reference, ALICE)
            assert (site.tunnel.id, str(site.name), site.scope.credential) == (tunnel, name, "alice")
        link = await site.share(60)
        assert link.startswith("http://blog.t.example/?tunneld-share=")
        await site.revoke()


async def test_the_tunnels_of_others_do_not_exist_except_for_an_admin() -> None:
    async with serving() as service:
        tunnel = await opened(service, ALICE, host="blog", name="mine", auth="link")
        for reference in ("blog", "blog.t.example", "mine", tunnel, "none"):
            with pytest.raises(NoSuchTunnelError):
                await find_site(service, reference, BOB)
        assert (await find_site(service, "blog", ROOT)).scope.credential == "alice"


async def test_a_site_without_a_password_needs_no_link() -> None:
    async with serving() as service:
        await opened(service, ALICE, host="blog")
        port = await opened(service, ALICE)
        with pytest.raises(UsageError, match="needs no link"):
            await (await find_site(service, "blog", ALICE)).share(60)
        with pytest.raises(UsageError, match="no host name"):
            await find_site(service, port, ALICE)


async def test_a_wildcard_has_no_link() -> None:
    async with serving() as service:
        grant = replace(ALICE, names=("*.t.example",))
        tunnel = await opened(service, grant, host="*.t.example", auth="link")
        with pytest.raises(UsageError, match="stands for many"):
            await (await find_site(service, tunnel, grant)).share(60)


async def test_a_label_is_that_of_the_callers_own_newest_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as service:
        mine = await opened(service, ALICE, host="one", name="web", auth="link")
        theirs = await opened(service, BOB, host="two", name="web", auth="link")
        monkeypatch.setattr(service, "tunnels", lambda _grant: pytest.fail("looked through all tunnels"))
        for grant, tunnel in ((ALICE, mine), (BOB, theirs)):
            assert (await find_site(service, "web", grant)).tunnel.id == tunnel
        with pytest.raises(UsageError, match="several credentials"):
            await find_site(service, "web", ROOT)
        await service.close(theirs)
        while service.live.find(theirs) is not None:
            await trio.lowlevel.checkpoint()
        assert (await find_site(service, "web", ROOT)).tunnel.id == mine
        with pytest.raises(NoSuchTunnelError):
            await find_site(service, "web", BOB)
        assert (await find_site(service, "one", ROOT)).tunnel.id == mine
