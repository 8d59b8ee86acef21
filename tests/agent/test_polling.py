"""Agents that poll instead of holding a connection."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from tests.agent import test_associations
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
from tests.support.peers import connect, read_all, read_exactly
from tunneld.agent.associations import Associations
from tunneld.agent.expose import Exposure
from tunneld.agent.request import TunnelRequest
from tunneld.backends.egtp import EgtpServerSide
from tunneld.config.schema import EgtpSettings
from tunneld.egtp.carrier import EgtpCarrier
from tunneld.tls.identity import Identity

POLL = 20
"""Seconds between polls, on a virtual clock."""
LONG = 50 * PATIENCE
"""Seconds of virtual time."""
REQUEST = TunnelRequest({"name": "the-one"}, backend="egtp", identity=Identity.from_seed(b"\x01" * 32), poll=POLL)


@pytest.fixture(autouse=True)
def _egtp() -> Iterator[None]:
    with using_backend("egtp"):
        yield


@asynccontextmanager
async def serving(request: TunnelRequest = REQUEST) -> AsyncIterator[tuple[RelayHere, RecordingReporter, Exposure]]:
    """An exposure of an echo server, which has polled once."""
    async with test_associations.serving(LONG, request) as (relay, reporter, exposure):
        await until(lambda: relay.tunnel.server_side.live_connections == 1)
        await hung_up(relay)
        yield relay, reporter, exposure


def carrier_of(relay: RelayHere) -> EgtpCarrier:
    side = relay.tunnel.server_side
    assert isinstance(side, EgtpServerSide)
    (carrier,) = side.associations.values()
    return carrier


def source_of(exposure: Exposure) -> Associations:
    assert exposure.session is not None
    source = exposure.session.source
    assert isinstance(source, Associations)
    return source


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        with trio.move_on_after(0.05):  # of virtual time
            await trio.sleep_forever()


async def hung_up(relay: RelayHere) -> None:
    """Wait until the agent has no connection for visitors."""
    await until(lambda: carrier_of(relay).attachment._polling is None)


async def test_a_visitor_is_served_at_the_next_poll(autojump_clock: MockClock) -> None:
    async with serving() as (relay, reporter, _):
        began = trio.current_time()
        assert await ask(address(reporter), b"hello") == b"hello"
        assert 1 < trio.current_time() - began < POLL + 1
        assert relay.tunnel.parked  # it is ready for the next visitor
        await hung_up(relay)
        assert reporter.all("trouble") == reporter.all("reconnecting") == []


async def test_a_visitor_who_stays_is_served_without_delay(autojump_clock: MockClock) -> None:
    async with serving() as (_, reporter, _):
        visitor = await connect(address(reporter))
        await visitor.send_all(b"first")
        assert await read_exactly(visitor, 5) == b"first"
        began = trio.current_time()
        for number in range(5):
            await visitor.send_all(b"next %d" % number)
            assert await read_exactly(visitor, 6) == b"next %d" % number
        assert trio.current_time() - began < 2
        await visitor.aclose()


async def test_what_the_local_server_sends_does_not_wait(autojump_clock: MockClock) -> None:
    """The agent connects as soon as it has something to send."""
    answer = trio.Event()

    async def late(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await answer.wait()
        await stream.send_all(b"at last")

    reporter = RecordingReporter()
    with trio.fail_after(LONG):
        async with (
            local_server(late) as target,
            relay_here() as relay,
            exposed(target, relay.access, reporter, REQUEST),
        ):
            visitor = await connect(address(reporter))
            await visitor.send_all(b"question")
            await until(lambda: relay.tunnel.octets[0] > 0)
            await trio.sleep(5)
            await hung_up(relay)
            began = trio.current_time()
            answer.set()
            assert await read_exactly(visitor, 7) == b"at last"
            assert trio.current_time() - began < 1
            await visitor.aclose()


async def test_large_transfers_in_both_directions(autojump_clock: MockClock) -> None:
    data = os.urandom(3 << 20)
    async with serving() as (_, reporter, _):
        visitor = await connect(address(reporter))
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await visitor.send_all(data)
                await visitor.send_eof()

            nursery.start_soon(send)
            assert await read_all(visitor) == data
        await visitor.aclose()


async def test_nothing_is_lost_with_a_connection(autojump_clock: MockClock) -> None:
    data = os.urandom(1 << 20)
    async with serving() as (_, reporter, exposure):
        visitor = await connect(address(reporter))

        async def cut() -> None:
            for _ in range(4):
                (association,) = source_of(exposure)._all
                await until(partial(getattr, association.carrier.attachment, "attached"))
                link = association.carrier.attachment.output.link
                assert link is not None
                link._end("cut by the test")

        async def send() -> None:
            for start in range(0, len(data), 1 << 18):
                await visitor.send_all(data[start : start + (1 << 18)])
                await trio.sleep(1)
            await visitor.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            nursery.start_soon(send)
            assert await read_all(visitor) == data
        await visitor.aclose()


@pytest.mark.interpreted
async def test_a_node_that_polls_no_more_is_given_up(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as (relay, reporter, _):
        visitor = await connect(address(reporter))
        await visitor.send_all(b"before")
        assert await read_exactly(visitor, 6) == b"before"
        await hung_up(relay)

        async def unreachable(self: Associations, _association: object) -> None:
            await trio.sleep(1)

        carrier = carrier_of(relay)
        monkeypatch.setattr(Associations, "_dial", unreachable)
        began = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
        assert 2 * POLL < trio.current_time() - began < 2 * POLL + 20
        assert carrier.over


async def test_the_control_connection_is_not_held_either(autojump_clock: MockClock) -> None:
    async with serving() as (_, reporter, exposure):
        relay = exposure._relay
        await until(lambda: relay._client is None)
        await trio.sleep(100)
        assert relay._client is None
        assert await ask(address(reporter), b"hello") == b"hello"
        await until(lambda: relay._client is not None)  # to see whether the tunnel is still open
        await until(lambda: relay._client is None)
        assert reporter.all("reconnecting") == reporter.all("resumed") == []


async def test_a_tunnel_that_was_closed_meanwhile_is_opened_again(autojump_clock: MockClock) -> None:
    async with serving() as (relay, reporter, exposure):
        await until(lambda: exposure._relay._client is None)
        relay.tunnel.close("closed by the test")
        await reporter.wait_for("opened", 2)
        assert await ask(address(reporter), b"hello") == b"hello"


async def test_an_agent_that_is_stopped_says_so_with_a_poll(autojump_clock: MockClock) -> None:
    reporter = RecordingReporter()
    with trio.fail_after(LONG):
        async with (
            local_server(echo) as target,
            relay_here() as relay,
            agent(target, relay.access, reporter, REQUEST) as exposure,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(exposure.run)
            await reporter.wait_for("opened")
            visitor = await connect(address(reporter))
            await visitor.send_all(b"before")
            assert await read_exactly(visitor, 6) == b"before"
            await until(lambda: exposure._relay._client is None)
            exposure.drain("the test", 10 * POLL)
            await until(lambda: relay.tunnel.server_side.live_connections == 0)
            await visitor.send_all(b"after")
            assert await read_exactly(visitor, 5) == b"after"
            await visitor.aclose()
    assert relay.service.tunnels() == []


async def test_an_exposure_that_paused_takes_visitors_again_and_keeps_those_it_had(autojump_clock: MockClock) -> None:
    async with serving() as (relay, reporter, exposure):
        visitor = await connect(address(reporter))
        await visitor.send_all(b"before")
        assert await read_exactly(visitor, 6) == b"before"
        await hung_up(relay)
        source = source_of(exposure)
        source.withdraw()
        await source.wait_withdrawn()
        assert (source.parked, relay.tunnel.server_side.live_connections) == (0, 0)
        source.resume()
        assert await ask(address(reporter), b"new") == b"new"
        await visitor.send_all(b"still")
        assert await read_exactly(visitor, 5) == b"still"
        await visitor.aclose()
        await until(lambda: len(source._all) == 1)


async def test_the_relay_limits_the_interval(autojump_clock: MockClock) -> None:
    reporter = RecordingReporter()
    with trio.fail_after(LONG):
        async with local_server(echo) as target, relay_here() as relay:
            for longest in (POLL, POLL - 1):
                assert reporter.all("trouble") == []
                relay.settings = relay.settings.model_copy(update={"egtp": EgtpSettings(max_poll=longest)})
                async with exposed(target, relay.access, reporter, REQUEST):
                    if longest == POLL:
                        assert await ask(address(reporter), b"hello") == b"hello"
                    else:
                        await reporter.wait_for("trouble")
    assert reporter.all("trouble")[0]["reason"] == "node polls every 20 s; the limit is 19 s (egtp.max_poll)"


async def test_visitors_who_find_no_room_wait_for_the_next_poll(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as (relay, reporter, _):
        carrier = carrier_of(relay)
        monkeypatch.setattr(carrier, "limits", carrier.limits.__class__(pause_at=60))
        visitors = [await connect(address(reporter)) for _ in range(3)]
        for visitor in visitors:
            await visitor.send_all(b"hello")
        await until(lambda: relay.tunnel.waiting == 1)
        assert carrier.channels_left == 0
        for visitor in visitors:
            assert await read_exactly(visitor, 5) == b"hello"
            await visitor.aclose()
