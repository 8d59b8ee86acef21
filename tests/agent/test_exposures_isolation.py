"""All exposures of a process share one engine: one that ends removes what it has there and disturbs no other."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
import trio

from tests.agent.support import PATIENCE, RecordingReporter, RelayHere, echo, local_server, relay_here
from tests.agent.test_expose import address
from tests.agent.test_exposures import RecordedExposures, gets_reply, replying, running
from tests.agent.test_session import not_reading
from tests.support.peers import connect, is_dropped, read_exactly
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
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(backoff, "MAX_DELAY", 0.02)


Resources = Mapping[str, int]
"""Counts by kind of resource."""


def resources(here: RecordedExposures) -> Resources:
    """Handlers in the agents' engine, descriptors of the process, tasks."""
    engine = here.exposures.engine
    assert isinstance(engine, Pump)
    return {
        "handlers": sum(handler is not None for handler in engine.handlers.values()),
        "descriptors": sockets.open_descriptors(),
        "tasks": trio.lowlevel.current_statistics().tasks_living,
    }


async def until_resources(here: RecordedExposures, before: Resources) -> None:
    """Wait until the resources are as before; the peers of dropped connections need a moment."""
    with trio.move_on_after(PATIENCE / 2):
        while resources(here) != before:
            await trio.lowlevel.checkpoint()
    assert resources(here) == before


def tunnel_of(relay: RelayHere, name: str) -> Tunnel:
    (tunnel,) = (
        tunnel
        for tunnel in relay.service.tunnels()
        if tunnel.spec.options.name == name and tunnel.phase is not Phase.DRAINING
    )
    return tunnel


def expected_handlers(tunnel: Tunnel) -> int:
    """Handlers in the agents' engine: parked connections and two per visitor, or a carrier and one per visitor."""
    visitors = len(tunnel.visitors)
    return 1 + visitors if tunnel.spec.backend == "webmux" else 8 + 2 * visitors


async def until_ready(relay: RelayHere, here: RecordedExposures, *names: str) -> None:
    """Wait until these exposures are open, and all tunnels have their connections."""
    for name in names:
        await here.reporter(name).wait_for("opened")
    while not all(here.activities[name]().stats.parked for name in names):
        await trio.lowlevel.checkpoint()
    while resources(here)["handlers"] != sum(map(expected_handlers, relay.service.tunnels())):
        await trio.lowlevel.checkpoint()


class Bystander:
    """A visitor of another exposure, which sends all the time and checks the echo."""

    def __init__(self) -> None:
        self.rounds = 0
        self.must_leave = False
        self.left = trio.Event()

    async def run(self, reporter: RecordingReporter) -> None:
        async with await connect(address(reporter)) as stream:
            while not self.must_leave:
                data = os.urandom(50_000)
                await stream.send_all(data)
                assert await read_exactly(stream, len(data)) == data
                self.rounds += 1
        self.left.set()

    async def keeps_going(self) -> None:
        """Wait for two more rounds, so for at least one that started after this call."""
        enough = self.rounds + 2
        while self.rounds < enough:
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def beside_a_bystander(
    goes: ExposureSpec, stays: ExposureSpec, relay: RelayHere
) -> AsyncIterator[tuple[RecordedExposures, Bystander]]:
    """Run two exposures, and a visitor of `stays`, which must not notice what happens to `goes`. After the block, no
    resource of `goes` may be left.
    """
    async with running(stays=stays) as here, trio.open_nursery() as nursery:
        bystander = Bystander()
        await until_ready(relay, here, "stays")
        nursery.start_soon(bystander.run, here.reporter("stays"))
        await bystander.keeps_going()
        await until_ready(relay, here, "stays")
        before = resources(here)
        here.exposures.apply({"stays": stays, "goes": goes})
        await until_ready(relay, here, "goes")
        yield here, bystander
        await until_resources(here, before)
        await bystander.keeps_going()
        bystander.must_leave = True
        await bystander.left.wait()
        assert [event for event, _ in here.reporter("stays").events if event not in {"visitor", "left"}] == ["opened"]


def named(name: str, target: Target, relay: RelayHere, drain_timeout: float = PATIENCE) -> ExposureSpec:
    return ExposureSpec(
        ExposureConfig(target, TunnelRequest({"name": name}), drain_timeout=drain_timeout), relay.access
    )


async def greeted_visitor(here: RecordedExposures, word: bytes) -> trio.SocketStream:
    visitor = await connect(address(here.reporter("goes")))
    assert await read_exactly(visitor, len(word)) == word
    return visitor


async def test_an_exposure_removed_at_once_drops_its_visitors_and_no_other() -> None:
    async with relay_here() as relay, local_server(replying(b"word")) as target, local_server(echo) as other:
        stays = named("stays", other, relay)
        async with beside_a_bystander(named("goes", target, relay, drain_timeout=0), stays, relay) as (here, _):
            visitors = [await greeted_visitor(here, b"word") for _ in range(5)]
            here.exposures.apply({"stays": stays})
            for visitor in visitors:
                assert await is_dropped(visitor)
                await visitor.aclose()
            reporter = here.reporter("goes")
            closed = await reporter.wait_for("closed")
            assert (closed["served"], closed["down"]) == (5, 20)
            assert len(reporter.all("left")) == 5
            assert reporter.events[-1][0] == "closed", "each visitor that left was reported before"


async def test_visitors_of_a_removed_exposure_finish_and_no_resource_is_left() -> None:
    async with relay_here() as relay, local_server(replying(b"word")) as target, local_server(echo) as other:
        stays = named("stays", other, relay)
        async with beside_a_bystander(named("goes", target, relay), stays, relay) as (here, bystander):
            visitor = await greeted_visitor(here, b"word")
            here.exposures.apply({"stays": stays})
            await here.reporter("goes").wait_for("draining")
            await bystander.keeps_going()
            assert await gets_reply(visitor, b"word")
            await visitor.aclose()
            await here.reporter("goes").wait_for("closed")


async def test_visitors_of_former_tunnels_are_dropped_with_the_exposure(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not visitors of the tunnel that it closes."""
    monkeypatch.setattr(session, "REVIEW_INTERVAL", 0.02)
    async with relay_here() as relay, local_server(replying(b"word")) as target, local_server(echo) as other:
        stays = named("stays", other, relay)
        async with beside_a_bystander(named("goes", target, relay, drain_timeout=0), stays, relay) as (here, _):
            visitors = []
            for count in range(2, 4):
                visitors.append(await greeted_visitor(here, b"word"))
                tunnel_of(relay, "goes").drain()
                await here.reporter("goes").wait_for("opened", count)
            visitors.append(await greeted_visitor(here, b"word"))
            assert [await gets_reply(visitor, b"word") for visitor in visitors] == [True] * 3
            here.exposures.apply({"stays": stays})
            for visitor in visitors:
                assert await is_dropped(visitor)
                await visitor.aclose()
            assert len(here.reporter("goes").all("left")) == 3


async def test_an_exposure_that_loses_all_connections_to_the_relay_recovers_and_no_other_notices() -> None:
    async with relay_here() as relay, local_server(replying(b"word")) as target, local_server(echo) as other:
        stays = named("stays", other, relay)
        async with beside_a_bystander(named("goes", target, relay), stays, relay) as (here, bystander):
            visitor = await greeted_visitor(here, b"word")
            break_off(tunnel_of(relay, "goes"))
            assert await is_dropped(visitor)
            await visitor.aclose()
            await bystander.keeps_going()
            assert await first_word(here) == b"word"
            here.exposures.apply({"stays": stays})
            await here.reporter("goes").wait_for("closed")


@pytest.mark.parametrize("each_backend", ["webmux"], indirect=True)
async def test_dead_carriers_are_closed(each_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their peer does not confirm that they are retired."""
    monkeypatch.setattr(shutdown, "CLOSE_WITHIN", 0.5)
    async with relay_here() as relay, local_server(replying(b"word")) as target, local_server(echo) as other:
        stays = named("stays", other, relay)
        async with beside_a_bystander(named("goes", target, relay, drain_timeout=0), stays, relay) as (here, bystander):
            visitor = await greeted_visitor(here, b"word")
            with not_reading(tunnel_of(relay, "goes")):
                here.exposures.apply({"stays": stays})
                await here.reporter("goes").wait_for("closed")
                while resources(here)["handlers"] != expected_handlers(tunnel_of(relay, "stays")):
                    await trio.lowlevel.checkpoint()
                await bystander.keeps_going()
            assert await is_dropped(visitor)
            await visitor.aclose()


def break_off(tunnel: Tunnel) -> None:
    """Close all connections between the hidden server and the relay."""
    side = tunnel.server_side
    if isinstance(side, WebMuxServerSide):
        for carrier in list(side.carriers):
            carrier.close("a test")
    else:
        tunnel.trim(0, "127.0.0.1")
        for relayed in list(tunnel.visitors.relays):
            relayed.drop()


async def first_word(here: RecordedExposures) -> bytes:
    async with await connect(address(here.reporter("goes"))) as stream:
        return await read_exactly(stream, 4)


async def serve_at(port: int, *, task_status: trio.TaskStatus[tuple[trio.CancelScope, Target]]) -> None:
    """A server that can be stopped."""
    (listener,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
    with trio.CancelScope() as scope:
        task_status.started((scope, Target.parse(str(listener.socket.getsockname()[1]))))
        await trio.serve_listeners(replying(b"word"), [listener])


async def test_an_exposure_whose_server_is_gone_fails_alone_and_serves_again_when_it_is_back(
    nursery: trio.Nursery,
) -> None:
    server, target = await nursery.start(serve_at, 0)
    async with relay_here() as relay, local_server(echo) as other:
        stays = named("stays", other, relay)
        async with beside_a_bystander(named("goes", target, relay), stays, relay) as (here, bystander):
            visitor = await greeted_visitor(here, b"word")
            server.cancel()
            assert await is_dropped(visitor)
            await visitor.aclose()
            new_visitor = await connect(address(here.reporter("goes")))
            assert await is_dropped(new_visitor)
            await new_visitor.aclose()
            assert "connection refused" in str((await here.reporter("goes").wait_for("failed"))["reason"])
            await bystander.keeps_going()
            server, _ = await nursery.start(serve_at, target.port)
            assert await first_word(here) == b"word"
            here.exposures.apply({"stays": stays})
            await here.reporter("goes").wait_for("closed")
    server.cancel()


async def test_a_visitor_that_is_being_answered_is_dropped_with_the_exposure() -> None:
    check = Check("http", interval=0.01, unhealthy_after=1)
    async with relay_here() as relay, local_server(replying(b"no HTTP\r\n")) as target, local_server(echo) as other:
        stays = named("stays", other, relay)
        goes = ExposureSpec(
            ExposureConfig(target, TunnelRequest({"name": "goes"}), check, drain_timeout=0), relay.access
        )
        async with beside_a_bystander(goes, stays, relay) as (here, _):
            await here.reporter("goes").wait_for("unhealthy")
            visitor = await connect(address(here.reporter("goes")))
            assert (await read_exactly(visitor, 12)) == b"HTTP/1.1 503"
            here.exposures.apply({"stays": stays})
            await here.reporter("goes").wait_for("closed")
            while resources(here)["handlers"] != expected_handlers(tunnel_of(relay, "stays")):
                await trio.lowlevel.checkpoint()
            await visitor.aclose()  # it had not left before


async def test_exposures_that_are_cancelled_leave_no_resource() -> None:
    async with relay_here() as relay, local_server(replying(b"word")) as target:
        before = resources(RecordedExposures())
        async with running(goes=named("goes", target, relay), more=named("more", target, relay)) as here:
            await until_ready(relay, here, "goes", "more")
            visitor = await greeted_visitor(here, b"word")
        assert await is_dropped(visitor)
        await visitor.aclose()
        await until_resources(here, before)
