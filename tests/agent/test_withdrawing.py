"""Visitors who are on their way while an agent wants no more: none is lost, whatever the relay was about to do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
import trio

from tests.agent.support import PATIENCE, RelayHere, Told, agent, echo, exposed, local_server, relay_here
from tests.agent.test_expose import address, ask
from tests.support.people import connect, is_dropped, read_exactly
from tunneld.agent import session
from tunneld.agent.access import RelayAccess
from tunneld.agent.expose import Exposure
from tunneld.agent.health import Check, UnhealthyPolicy
from tunneld.agent.pool import PoolLimits
from tunneld.agent.request import TunnelRequest
from tunneld.backends.webmux import WebMuxServerSide
from tunneld.config.schema import ControlSettings
from tunneld.control.reply import Reply
from tunneld.control.server import serve_lines
from tunneld.directory.requester import Requester
from tunneld.mux.carrier import Carrier
from tunneld.net import sockets
from tunneld.net.listeners import ReloadableListener
from tunneld.tunnel.tunnel import Phase, Tunnel
from tunneld.wire.lines import Request
from tunneld.wire.proxy_protocol import encode_v2

HEADER = encode_v2(("192.0.2.1", 4242), ("192.0.2.2", 80))
WITHDRAW = Check("tcp", conduct=UnhealthyPolicy.WITHDRAW)


class SlowRelay:
    """A relay with one tcp tunnel, whose parked connections the test holds, and which trims none before it is let."""

    def __init__(self, parked: trio.SocketListener) -> None:
        self.parked = parked
        self.trims = 0
        self.asked = trio.Event()
        self.answers = trio.Event()
        self.looked_after = trio.Event()

    async def __call__(self, request: Request, _caller: Requester) -> Reply:
        port = self.parked.socket.getsockname()[1]
        match request.verb:
            case "opentunnel":
                return Reply(f"tcp://127.0.0.1:{port}")
            case "show":
                return Reply(items=[{"id": "t1", "client": "tcp://127.0.0.1:1", "age": 0, "phase": "ready"}])
            case "trim":
                self.trims += 1
                self.asked.set()
                await self.answers.wait()
            case "gettunneladdress":
                self.looked_after.set()
        return Reply()


@asynccontextmanager
async def one_parked() -> AsyncIterator[tuple[SlowRelay, Exposure, trio.SocketStream, Told]]:
    """An agent of such a relay, which has parked one connection."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    relay, door, told = SlowRelay(listener), ReloadableListener("control", sockets.bind_tcp("127.0.0.1", 0)), Told()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery, listener:
            await nursery.start(serve_lines, door, ControlSettings, lambda: None, relay)
            access, wish = RelayAccess(f"127.0.0.1:{door.port}"), TunnelRequest(limits=PoolLimits(1, 1), backend="tcp")
            async with (
                local_server(echo) as target,
                exposed(target, access, told, wish) as exposure,
                await listener.accept() as parked,
            ):
                yield relay, exposure, parked, told
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def withdrawn() -> AsyncIterator[tuple[SlowRelay, Exposure, trio.SocketStream]]:
    """The same, and it wants that back from now on."""
    async with one_parked() as (relay, exposure, parked, _):
        exposure.heed(WITHDRAW, healthy=False)
        await relay.asked.wait()
        yield relay, exposure, parked


async def test_a_connection_that_the_relay_had_paired_before_it_heard_is_served() -> None:
    async with withdrawn() as (relay, exposure, paired):
        await paired.send_all(HEADER + b"hello")
        assert await read_exactly(paired, 5) == b"hello"
        relay.answers.set()
        assert (exposure.figures.now, exposure.figures.failed) == (1, 0)


async def test_nothing_is_parked_until_the_server_is_well_again() -> None:
    async with withdrawn() as (relay, exposure, parked):
        await parked.aclose()
        relay.answers.set()
        while exposure.figures.parked:
            await trio.lowlevel.checkpoint()
        exposure.heed(WITHDRAW, healthy=False)
        exposure.heed(WITHDRAW, healthy=True)
        async with await relay.parked.accept() as again:
            await again.send_all(HEADER + b"hello")
            assert await read_exactly(again, 5) == b"hello"
            assert relay.trims == 1


async def test_who_is_well_again_before_the_relay_has_answered_keeps_what_is_parked() -> None:
    async with withdrawn() as (relay, exposure, parked):
        exposure.heed(WITHDRAW, healthy=True)
        relay.answers.set()
        await parked.send_all(HEADER + b"hello")
        assert await read_exactly(parked, 5) == b"hello"
        assert relay.trims == 1


async def test_what_was_lost_just_before_is_not_dialled_again() -> None:
    async with one_parked() as (relay, exposure, parked, told):
        await parked.aclose()
        await told.wait_for("trouble")
        exposure.heed(WITHDRAW, healthy=False)
        await relay.looked_after.wait()
        assert (relay.trims, exposure.figures.parked) == (0, 0)


async def test_what_the_relay_never_lets_go_of_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SETTLE", 0.001)
    async with withdrawn() as (relay, exposure, parked):
        relay.answers.set()
        assert await is_dropped(parked)
        assert (relay.trims, exposure.figures.parked) == (session.ROUNDS, 0)


async def test_who_is_withdrawn_without_a_control_connection_stays_so_when_it_has_one_again(each_backend: str) -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, told) as exposure:
            while not relay.tunnel.parked:
                await trio.lowlevel.checkpoint()
            relay.hang_up()
            exposure.heed(WITHDRAW, healthy=False)
            exposure.hurry()
            await told.wait_for("resumed")
            while relay.tunnel.parked:
                await trio.lowlevel.checkpoint()
            exposure.heed(WITHDRAW, healthy=True)
            assert await ask(address(told), b"well") == b"well"
            assert len(told.all("opened")) == 1


# The last word


def full(relay: RelayHere) -> None:
    """From now on the control port takes nobody new."""
    control = relay.settings.control.model_copy(update={"max_connections": 0})
    relay.settings = relay.settings.model_copy(update={"control": control})


async def test_an_agent_that_is_cut_closes_its_tunnel_over_the_connection_that_it_has(each_backend: str) -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            async with exposed(target, relay.access, told):
                full(relay)
            assert list(relay.service.tunnels()) == []


@contextmanager
def asleep(tunnel: Tunnel) -> Iterator[None]:
    """The relay's ends of its carriers read nothing for the length of the block."""
    side = tunnel.server_side
    assert isinstance(side, WebMuxServerSide)
    carriers = [carrier for carrier in side.carriers if isinstance(carrier, Carrier)]
    for carrier in carriers:
        carrier.pump.detach(carrier._fd, carrier)
    yield
    for carrier in carriers:
        carrier.pump.attach(carrier._fd, carrier)


@pytest.mark.parametrize("each_backend", ["webmux"], indirect=True)
async def test_a_carrier_that_leads_nowhere_does_not_keep_the_relay_from_hearing_that_the_agent_goes(
    each_backend: str,
) -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            agent(target, relay.access, told) as exposure,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(exposure.run)
            await told.wait_for("opened")
            visitor = await connect(address(told))
            await visitor.send_all(b"before")
            assert await read_exactly(visitor, 6) == b"before"
            with asleep(relay.tunnel):
                exposure.drain("told to stop", PATIENCE)
                while relay.tunnel.phase is not Phase.DRAINING:
                    await trio.lowlevel.checkpoint()
                assert not told.all("draining"), "it waits for the carrier still"
            await told.wait_for("draining")
            await visitor.aclose()
