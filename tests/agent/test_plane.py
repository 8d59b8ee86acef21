"""One engine under all exposures of a process: whoever ends takes along what is its own, and no other notices."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
import trio

from tests.agent.support import PATIENCE, RelayHere, Told, echo, local_server, relay_here
from tests.agent.test_expose import address
from tests.agent.test_exposures import Harbour, harbour, hears, saying
from tests.agent.test_withdrawing import asleep
from tests.support.people import connect, is_dropped, read_exactly
from tunneld.agent import backoff, session, shutdown
from tunneld.agent.config import ExposureConfig
from tunneld.agent.exposures import ExposureSpec
from tunneld.agent.health import Check
from tunneld.agent.request import TunnelRequest
from tunneld.backends.webmux import WebMuxServerSide
from tunneld.engine.pump import Pump
from tunneld.net import sockets
from tunneld.net.endpoint import Target
from tunneld.tunnel.tunnel import Phase, Tunnel

pytestmark = pytest.mark.usefixtures("each_backend")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff.delays, "__kwdefaults__", {"first": 0.01, "longest": 0.02})


Held = Mapping[str, int]
"""What there is, by kind."""


def held(here: Harbour) -> Held:
    """Owners in the agents' engine, descriptors of the process, tasks."""
    engine = here.fleet._engine
    assert isinstance(engine, Pump)
    return {
        "owners": sum(handler is not None for handler in engine.handlers.values()),
        "descriptors": sockets.open_descriptors(),
        "tasks": trio.lowlevel.current_statistics().tasks_living,
    }


async def until_held(here: Harbour, before: Held) -> None:
    """Until it is as it was; the other ends of what was dropped need a moment."""
    with trio.move_on_after(PATIENCE / 2):
        while held(here) != before:
            await trio.lowlevel.checkpoint()
    assert held(here) == before


def tunnel_of(relay: RelayHere, name: str) -> Tunnel:
    (tunnel,) = (
        tunnel
        for tunnel in relay.service.tunnels()
        if tunnel.spec.options.name == name and tunnel.phase is not Phase.DRAINING
    )
    return tunnel


def expected(tunnel: Tunnel) -> int:
    """Owners in the agents' engine: what is parked and two sockets a visitor, or a carrier and one socket a visitor."""
    visitors = len(tunnel.visitors)
    return 1 + visitors if tunnel.spec.backend == "webmux" else 8 + 2 * visitors


async def until_ready(relay: RelayHere, here: Harbour, *names: str) -> None:
    """Until these are open, and all that they and others need stands."""
    for name in names:
        await here.of(name).wait_for("opened")
    while not all(here.figures[name]().parked for name in names):
        await trio.lowlevel.checkpoint()
    while held(here)["owners"] != sum(map(expected, relay.service.tunnels())):
        await trio.lowlevel.checkpoint()


class Bystander:
    """A visitor of another exposure, who talks all the time and hears everything back."""

    def __init__(self) -> None:
        self.rounds = 0
        self.leaves = False
        self.gone = trio.Event()

    async def run(self, told: Told) -> None:
        async with await connect(address(told)) as stream:
            while not self.leaves:
                words = os.urandom(50_000)
                await stream.send_all(words)
                assert await read_exactly(stream, len(words)) == words
                self.rounds += 1
        self.gone.set()

    async def goes_on(self) -> None:
        """Two rounds more, so at least one that began from now on."""
        enough = self.rounds + 2
        while self.rounds < enough:
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def two(goes: ExposureSpec, stays: ExposureSpec, relay: RelayHere) -> AsyncIterator[tuple[Harbour, Bystander]]:
    """Two exposures, and a visitor of the one that stays, who must not notice what becomes of the other. When the block
    ends, all is as it was before that came.
    """
    async with harbour(stays=stays) as here, trio.open_nursery() as nursery:
        bystander = Bystander()
        await until_ready(relay, here, "stays")
        nursery.start_soon(bystander.run, here.of("stays"))
        await bystander.goes_on()
        await until_ready(relay, here, "stays")
        before = held(here)
        here.fleet.apply({"stays": stays, "goes": goes})
        await until_ready(relay, here, "goes")
        yield here, bystander
        await until_held(here, before)
        await bystander.goes_on()
        bystander.leaves = True
        await bystander.gone.wait()
        assert [event for event, _ in here.of("stays").events if event not in {"visitor", "left"}] == ["opened"]


def named(name: str, target: Target, relay: RelayHere, drain_timeout: float = PATIENCE) -> ExposureSpec:
    return ExposureSpec(
        ExposureConfig(target, TunnelRequest({"name": name}), drain_timeout=drain_timeout), relay.access
    )


async def guest_of(here: Harbour, word: bytes) -> trio.SocketStream:
    guest = await connect(address(here.of("goes")))
    assert await read_exactly(guest, len(word)) == word
    return guest


async def test_one_that_is_removed_at_once_drops_its_visitors_and_nobody_elses() -> None:
    async with relay_here() as relay, local_server(saying(b"word")) as target, local_server(echo) as other:
        stays = named("stays", other, relay)
        async with two(named("goes", target, relay, drain_timeout=0), stays, relay) as (here, _):
            guests = [await guest_of(here, b"word") for _ in range(5)]
            here.fleet.apply({"stays": stays})
            for guest in guests:
                assert await is_dropped(guest)
                await guest.aclose()
            told = here.of("goes")
            closed = await told.wait_for("closed")
            assert (closed["served"], closed["down"]) == (5, 20)
            assert len(told.all("left")) == 5
            assert told.events[-1][0] == "closed", "whoever left was told before"


async def test_visitors_of_one_that_is_removed_finish_and_nothing_of_it_is_left() -> None:
    async with relay_here() as relay, local_server(saying(b"word")) as target, local_server(echo) as other:
        stays = named("stays", other, relay)
        async with two(named("goes", target, relay), stays, relay) as (here, bystander):
            guest = await guest_of(here, b"word")
            here.fleet.apply({"stays": stays})
            await here.of("goes").wait_for("draining")
            await bystander.goes_on()
            assert await hears(guest, b"word")
            await guest.aclose()
            await here.of("goes").wait_for("closed")


async def test_visitors_of_its_former_tunnels_are_dropped_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not on the tunnel that it closes."""
    monkeypatch.setattr(session, "RESIZE_INTERVAL", 0.02)
    async with relay_here() as relay, local_server(saying(b"word")) as target, local_server(echo) as other:
        stays = named("stays", other, relay)
        async with two(named("goes", target, relay, drain_timeout=0), stays, relay) as (here, _):
            guests = []
            for count in range(2, 4):
                guests.append(await guest_of(here, b"word"))
                tunnel_of(relay, "goes").drain()
                await here.of("goes").wait_for("opened", count)
            guests.append(await guest_of(here, b"word"))
            assert [await hears(guest, b"word") for guest in guests] == [True] * 3
            here.fleet.apply({"stays": stays})
            for guest in guests:
                assert await is_dropped(guest)
                await guest.aclose()
            assert len(here.of("goes").all("left")) == 3


async def test_one_that_loses_everything_on_its_way_to_the_relay_has_it_again_and_no_other_notices() -> None:
    async with relay_here() as relay, local_server(saying(b"word")) as target, local_server(echo) as other:
        stays = named("stays", other, relay)
        async with two(named("goes", target, relay), stays, relay) as (here, bystander):
            guest = await guest_of(here, b"word")
            break_off(tunnel_of(relay, "goes"))
            assert await is_dropped(guest)
            await guest.aclose()
            await bystander.goes_on()
            assert await ask_once(here) == b"word"
            here.fleet.apply({"stays": stays})
            await here.of("goes").wait_for("closed")


@pytest.mark.parametrize("each_backend", ["webmux"], indirect=True)
async def test_carriers_that_lead_nowhere_are_cut(each_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody at their other end says that they have gone."""
    monkeypatch.setattr(shutdown, "CLOSE_WITHIN", 0.5)
    async with relay_here() as relay, local_server(saying(b"word")) as target, local_server(echo) as other:
        stays = named("stays", other, relay)
        async with two(named("goes", target, relay, drain_timeout=0), stays, relay) as (here, bystander):
            guest = await guest_of(here, b"word")
            with asleep(tunnel_of(relay, "goes")):
                here.fleet.apply({"stays": stays})
                await here.of("goes").wait_for("closed")
                while held(here)["owners"] != expected(tunnel_of(relay, "stays")):
                    await trio.lowlevel.checkpoint()
                await bystander.goes_on()
            assert await is_dropped(guest)
            await guest.aclose()


def break_off(tunnel: Tunnel) -> None:
    """All that its hidden server has with it ends: carriers, or what is parked and what was."""
    side = tunnel.server_side
    if isinstance(side, WebMuxServerSide):
        for carrier in list(side.carriers):
            carrier.close("a test")
    else:
        tunnel.trim(0, "127.0.0.1")
        for relayed in list(tunnel.visitors.relays):
            relayed.drop()


async def ask_once(here: Harbour) -> bytes:
    async with await connect(address(here.of("goes"))) as stream:
        return await read_exactly(stream, 4)


async def serve_at(port: int, *, task_status: trio.TaskStatus[tuple[trio.CancelScope, Target]]) -> None:
    """A server that can be stopped."""
    (listener,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
    with trio.CancelScope() as scope:
        task_status.started((scope, Target.parse(str(listener.socket.getsockname()[1]))))
        await trio.serve_listeners(saying(b"word"), [listener])


async def test_one_whose_server_is_gone_fails_alone_and_serves_again_when_it_is_back(nursery: trio.Nursery) -> None:
    server, target = await nursery.start(serve_at, 0)
    async with relay_here() as relay, local_server(echo) as other:
        stays = named("stays", other, relay)
        async with two(named("goes", target, relay), stays, relay) as (here, bystander):
            guest = await guest_of(here, b"word")
            server.cancel()
            assert await is_dropped(guest)
            await guest.aclose()
            newcomer = await connect(address(here.of("goes")))
            assert await is_dropped(newcomer)
            await newcomer.aclose()
            assert "connection refused" in str((await here.of("goes").wait_for("failed"))["reason"])
            await bystander.goes_on()
            server, _ = await nursery.start(serve_at, target.port)
            assert await ask_once(here) == b"word"
            here.fleet.apply({"stays": stays})
            await here.of("goes").wait_for("closed")
    server.cancel()


async def test_a_visitor_who_is_being_told_that_the_server_is_unhealthy_goes_with_it() -> None:
    check = Check("http", interval=0.01, unhealthy_after=1)
    async with relay_here() as relay, local_server(saying(b"no HTTP\r\n")) as target, local_server(echo) as other:
        stays = named("stays", other, relay)
        goes = ExposureSpec(
            ExposureConfig(target, TunnelRequest({"name": "goes"}), check, drain_timeout=0), relay.access
        )
        async with two(goes, stays, relay) as (here, _):
            await here.of("goes").wait_for("unhealthy")
            guest = await connect(address(here.of("goes")))
            assert (await read_exactly(guest, 12)) == b"HTTP/1.1 503"
            here.fleet.apply({"stays": stays})
            await here.of("goes").wait_for("closed")
            while held(here)["owners"] != expected(tunnel_of(relay, "stays")):
                await trio.lowlevel.checkpoint()
            await guest.aclose()  # who had not left


async def test_a_fleet_that_is_stopped_leaves_nothing() -> None:
    async with relay_here() as relay, local_server(saying(b"word")) as target:
        before = held(Harbour())
        async with harbour(goes=named("goes", target, relay), more=named("more", target, relay)) as here:
            await until_ready(relay, here, "goes", "more")
            guest = await guest_of(here, b"word")
        assert await is_dropped(guest)
        await guest.aclose()
        await until_held(here, before)
