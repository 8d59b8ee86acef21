"""Exposures over EGTP: they end in order, pause and go on, and keep their visitors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from tests.agent.support import (
    PATIENCE,
    RecordingReporter,
    RelayHere,
    agent,
    echo,
    exposed,
    local_server,
    relay_here,
    using_backend,
)
from tests.agent.test_expose import address, ask
from tests.support.peers import connect, read_exactly
from tunneld.agent.associations import Associations
from tunneld.agent.expose import Exposure
from tunneld.agent.request import TunnelRequest
from tunneld.backends.egtp import EgtpServerSide
from tunneld.egtp.handshake import NodeConnection
from tunneld.errors import RelayUnreachableError
from tunneld.tls.identity import Identity
from tunneld.tunnel.tunnel import Phase

REQUEST = TunnelRequest({"name": "the-one"}, backend="egtp", identity=Identity.from_seed(b"\x01" * 32))


@pytest.fixture(autouse=True)
def _egtp() -> Iterator[None]:
    with using_backend("egtp"):
        yield


@asynccontextmanager
async def serving(
    patience: float = PATIENCE, request: TunnelRequest = REQUEST
) -> AsyncIterator[tuple[RelayHere, RecordingReporter, Exposure]]:
    """An exposure of an echo server."""
    reporter = RecordingReporter()
    with trio.fail_after(patience):
        async with (
            local_server(echo) as target,
            relay_here() as relay,
            exposed(target, relay.access, reporter, request) as exposure,
        ):
            yield relay, reporter, exposure


def source_of(exposure: Exposure) -> Associations:
    assert exposure.session is not None
    source = exposure.session.source
    assert isinstance(source, Associations)
    return source


def side_of(relay: RelayHere) -> EgtpServerSide:
    (tunnel,) = relay.service.tunnels()
    assert isinstance(tunnel.server_side, EgtpServerSide)
    return tunnel.server_side


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


async def test_visitors_finish_when_the_agent_is_stopped() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            local_server(echo) as target,
            relay_here() as relay,
            agent(target, relay.access, reporter, REQUEST) as exposure,
            trio.open_nursery() as nursery,
        ):
            ended = trio.Event()

            async def run() -> None:
                await exposure.run()
                ended.set()

            nursery.start_soon(run)
            await reporter.wait_for("opened")
            visitor = await connect(address(reporter))
            await visitor.send_all(b"before")
            assert await read_exactly(visitor, 6) == b"before"
            exposure.drain("the test", PATIENCE)
            await until(lambda: not any(each.server_side.live_connections for each in relay.service.tunnels()))
            await visitor.send_all(b"after")
            assert await read_exactly(visitor, 5) == b"after"
            await visitor.aclose()
            await ended.wait()
            assert relay.service.tunnels() == []


async def test_an_exposure_that_paused_takes_visitors_again_and_keeps_those_it_had() -> None:
    async with serving() as (relay, reporter, exposure):
        visitor = await connect(address(reporter))
        await visitor.send_all(b"before")
        assert await read_exactly(visitor, 6) == b"before"
        source = source_of(exposure)
        source.withdraw()
        await source.wait_withdrawn()
        assert source.parked == 0
        await until(lambda: side_of(relay).live_connections == 0)
        source.resume()
        assert await ask(address(reporter), b"new") == b"new"
        assert len(side_of(relay).associations) == 2
        await visitor.send_all(b"still")
        assert await read_exactly(visitor, 5) == b"still"
        await visitor.aclose()
        await until(lambda: len(side_of(relay).associations) == 1)
        assert source.parked == 1


async def test_a_retired_association_gets_another_link_for_its_visitors() -> None:
    async with serving() as (relay, reporter, exposure):
        visitor = await connect(address(reporter))
        await visitor.send_all(b"before")
        assert await read_exactly(visitor, 6) == b"before"
        source = source_of(exposure)
        source.withdraw()
        await source.wait_withdrawn()
        (carrier,) = side_of(relay).associations.values()
        assert carrier.attachment.output.link is not None
        carrier.attachment.output.link._end("cut by the test")
        await visitor.send_all(b"after")
        assert await read_exactly(visitor, 5) == b"after"
        await visitor.aclose()
        await source.wait_closed()


async def test_a_change_of_address_replaces_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as (relay, reporter, exposure):
        visitor = await connect(address(reporter))
        await visitor.send_all(b"before")
        assert await read_exactly(visitor, 6) == b"before"
        (carrier,) = side_of(relay).associations.values()
        former = carrier.attachment.output.link
        monkeypatch.setattr("tunneld.agent.association.is_local_address", lambda _address: False)
        source_of(exposure).probe()
        await until(lambda: carrier.attachment.output.link not in {former, None})
        await visitor.send_all(b"after")
        assert await read_exactly(visitor, 5) == b"after"
        await visitor.aclose()
        assert reporter.all("trouble") == []


async def test_a_tunnel_that_drains_still_gets_another_link_for_its_visitors() -> None:
    async with serving() as (relay, reporter, exposure):
        visitor = await connect(address(reporter))
        await visitor.send_all(b"before")
        assert await read_exactly(visitor, 6) == b"before"
        (carrier,), former = side_of(relay).associations.values(), relay.tunnel
        exposure.drain("the test", PATIENCE)
        await until(lambda: former.phase is Phase.DRAINING)
        assert carrier.attachment.output.link is not None
        carrier.attachment.output.link._end("cut by the test")
        await visitor.send_all(b"after")
        assert await read_exactly(visitor, 5) == b"after"
        await visitor.aclose()
        await until(lambda: former.phase is Phase.CLOSED)
        assert isinstance(former.server_side, EgtpServerSide)
        assert former.server_side._registry.find_all(former.server_side.key) == []


def unreachable_for(seconds: float, monkeypatch: pytest.MonkeyPatch, relay: RelayHere) -> None:
    """Have the relay be out of the agent's reach, now and for that long: links are cut, and dialling fails."""
    until_then, connect_to = trio.current_time() + seconds, Associations._connect

    async def dial(self: Associations) -> NodeConnection:
        if trio.current_time() < until_then:
            raise RelayUnreachableError("no route to host")
        return await connect_to(self)

    monkeypatch.setattr(Associations, "_connect", dial)
    (carrier,) = side_of(relay).associations.values()
    assert carrier.attachment.output.link is not None
    carrier.attachment.output.link._end("cut by the test")


@pytest.mark.interpreted
async def test_visitors_survive_a_relay_that_is_out_of_reach_for_a_while(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as (relay, reporter, _):
        visitor = await connect(address(reporter))
        await visitor.send_all(b"before")
        assert await read_exactly(visitor, 6) == b"before"
        unreachable_for(12, monkeypatch, relay)
        began = trio.current_time()
        await visitor.send_all(b"after")
        assert await read_exactly(visitor, 5) == b"after"
        assert 12 <= trio.current_time() - began < 15
        await visitor.aclose()


@pytest.mark.interpreted
async def test_after_a_minute_visitors_are_cut_and_the_next_are_served_at_the_same_address(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(4 * PATIENCE) as (relay, reporter, _):
        visitor, server = await connect(address(reporter)), relay.tunnel.server_uri
        await visitor.send_all(b"before")
        assert await read_exactly(visitor, 6) == b"before"
        unreachable_for(60, monkeypatch, relay)
        began = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
        assert 15 <= trio.current_time() - began < 16  # egtp.resume_timeout
        with trio.move_on_at(began + 45):
            await trio.sleep_forever()
        assert await ask(address(reporter), b"new") == b"new"  # it has waited for the agent
        assert relay.tunnel.server_uri == server
        assert len(side_of(relay).associations) == 1
