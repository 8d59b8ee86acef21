"""The exposures of one process share carriers: how many there are, and what happens to one exposure alone."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator

import pytest
import trio

from tests.agent.support import PATIENCE, RelayHere, carriers_of, echo, local_server, relay_here, using_backend
from tests.agent.test_expose import address, ask
from tests.agent.test_exposures import RecordedExposures, running, spec
from tests.support.peers import connect, is_dropped, read_exactly
from tunneld.agent import backoff
from tunneld.agent import carriers as agent_carriers
from tunneld.agent.visitors import LocalVisitors
from tunneld.control import server as control_server
from tunneld.mux.carrier import Carrier
from tunneld.tunnel.tunnel import Tunnel


@pytest.fixture(autouse=True)
def _webmux(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(backoff, "MAX_DELAY", 0.02)
    with using_backend("webmux"):
        yield


def all_carriers(relay: RelayHere) -> set[Carrier]:
    return {carrier for tunnel in relay.service.tunnels() for carrier in carriers_of(tunnel)}


async def until_served(here: RecordedExposures, *names: str) -> None:
    """Wait until the relay sends the visitors of these exposures."""
    for name in names:
        await here.reporter(name).wait_for("opened")
        while not here.activities[name]().stats.parked:
            await trio.lowlevel.checkpoint()


def events_of(here: RecordedExposures, name: str) -> list[str]:
    """What an exposure reported beside its visitors."""
    return [event for event, _ in here.reporter(name).events if event not in {"visitor", "left"}]


def tunnel_named(relay: RelayHere, name: str) -> Tunnel:
    (tunnel,) = (tunnel for tunnel in relay.service.tunnels() if tunnel.spec.options.name == name)
    return tunnel


async def test_all_exposures_of_a_process_have_one_connection_beside_the_control_connection() -> None:
    names = [f"e{number}" for number in range(20)]
    async with relay_here() as relay, local_server(echo) as target:
        access = relay.access
        async with running(**{name: spec(target, access, name=name) for name in names}) as here:
            await until_served(here, *names)
            assert len(all_carriers(relay)) == 1
            for name in names:
                assert await ask(address(here.reporter(name)), name.encode()) == name.encode()
                assert here.activities[name]().stats.served == 1, "each visitor went to its own exposure"


async def test_more_tunnels_than_a_carrier_takes_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_carriers, "MAX_TUNNELS", 3)
    names = [f"e{number}" for number in range(7)]
    async with relay_here() as relay, local_server(echo) as target:
        access = relay.access
        async with running(**{name: spec(target, access, name=name) for name in names}) as here:
            await until_served(here, *names)
            loads = Counter(carrier for tunnel in relay.service.tunnels() for carrier in carriers_of(tunnel))
            assert sorted(loads.values()) == [1, 3, 3]


async def test_at_a_relay_of_an_earlier_version_each_exposure_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "FEATURES", "opens=described")
    async with relay_here() as relay, local_server(echo) as target:
        access = relay.access
        both = {name: spec(target, access, name=name) for name in "ab"}
        async with running(**both) as here:
            await until_served(here, "a", "b")
            assert len(all_carriers(relay)) == 2
            assert await ask(address(here.reporter("a")), b"hello") == b"hello"
            here.exposures.apply({"a": both["a"]})
            await here.reporter("b").wait_for("closed")
            assert await ask(address(here.reporter("a")), b"hello") == b"hello"
            while len(all_carriers(relay)) != 1:
                await trio.lowlevel.checkpoint()


async def test_an_exposure_that_is_removed_leaves_the_connection_to_the_other_ones() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        access = relay.access
        both = {name: spec(target, access, name=name) for name in ("stays", "goes")}
        async with running(**both) as here:
            await until_served(here, *both)
            (carrier,) = all_carriers(relay)
            visitor = await connect(address(here.reporter("stays")))
            leaving = await connect(address(here.reporter("goes")))
            for stream in (visitor, leaving):
                await stream.send_all(b"hello")
                assert await read_exactly(stream, 5) == b"hello"
            here.exposures.apply({"stays": both["stays"]})
            await here.reporter("goes").wait_for("draining")
            await leaving.send_all(b"last")
            assert await read_exactly(leaving, 4) == b"last"
            await leaving.aclose()
            await here.reporter("goes").wait_for("closed")
            await visitor.send_all(b"still")
            assert await read_exactly(visitor, 5) == b"still"
            here.exposures.apply(both)
            await here.reporter("goes").wait_for("opened", 2)
            assert await ask(address(here.reporter("goes")), b"again") == b"again"
            assert all_carriers(relay) == {carrier}
            assert events_of(here, "stays") == ["opened"]
            await visitor.aclose()


async def test_a_tunnel_that_the_relay_closes_is_opened_again_and_the_others_go_on() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        access = relay.access
        async with running(**{name: spec(target, access, name=name) for name in "ab"}) as here:
            await until_served(here, "a", "b")
            (carrier,) = all_carriers(relay)
            visitor = await connect(address(here.reporter("b")))
            await visitor.send_all(b"hello")
            assert await read_exactly(visitor, 5) == b"hello"
            tunnel_named(relay, "a").close("a test")
            await here.reporter("a").wait_for("opened", 2)
            assert await ask(address(here.reporter("a")), b"again") == b"again"
            assert all_carriers(relay) == {carrier}
            await visitor.send_all(b"still")
            assert await read_exactly(visitor, 5) == b"still"
            assert events_of(here, "b") == ["opened"]
            await visitor.aclose()


async def test_all_tunnels_of_a_lost_carrier_come_back_on_one() -> None:
    names = [f"e{number}" for number in range(9)]
    async with relay_here() as relay, local_server(echo) as target:
        access = relay.access
        async with running(**{name: spec(target, access, name=name) for name in names}) as here:
            await until_served(here, *names)
            (carrier,) = all_carriers(relay)
            carrier.close("a test")
            for name in names:
                assert await ask(address(here.reporter(name)), b"again") == b"again"
                assert len(here.reporter(name).all("opened")) == 1
            assert len(all_carriers(relay)) == 1


@pytest.mark.interpreted
async def test_a_bug_in_one_exposure_ends_that_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relay_here() as relay, local_server(echo) as target:
        access = relay.access
        async with running(**{name: spec(target, access, name=name) for name in ("good", "bad")}) as here:
            await until_served(here, "good", "bad")
            (carrier,) = all_carriers(relay)
            visitor = await connect(address(here.reporter("good")))
            await visitor.send_all(b"hello")
            assert await read_exactly(visitor, 5) == b"hello"

            def broken(_self: object, _visitor: object, server: socket.socket, _header: bytes, _local: object) -> None:
                server.close()
                raise KeyError("a bug")

            monkeypatch.setattr(LocalVisitors, "_join", broken)
            unlucky = await connect(address(here.reporter("bad")))
            ended = await here.reporter("bad").wait_for("ended")
            monkeypatch.undo()
            assert "KeyError" in str(ended["reason"])
            assert await is_dropped(unlucky)
            await visitor.send_all(b"still")
            assert await read_exactly(visitor, 5) == b"still"
            assert all_carriers(relay) == {carrier}
            for stream in (visitor, unlucky):
                await stream.aclose()


async def test_two_exposures_of_one_shared_tunnel_are_two_hidden_servers_to_the_relay() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        access = relay.access
        both = {name: spec(target, access, name="web", share=True) for name in "ab"}
        async with running(**both) as here:
            await until_served(here, "a", "b")
            assert (len(all_carriers(relay)), len(carriers_of(relay.tunnel))) == (1, 2)
            visitors = [await connect(address(here.reporter("a"))) for _ in range(6)]
            for visitor in visitors:
                await visitor.send_all(b"hello")
                assert await read_exactly(visitor, 5) == b"hello"
            assert [here.activities[name]().stats.served for name in "ab"] == [3, 3], (
                "a visitor goes to the one with the fewest"
            )
            here.exposures.apply({"a": both["a"]})
            await here.reporter("b").wait_for("draining")
            for visitor in visitors:
                await visitor.aclose()
            await here.reporter("b").wait_for("closed")
            assert await ask(address(here.reporter("a")), b"again") == b"again"


async def test_one_crowd_causes_more_carriers_and_all_tunnels_are_on_them() -> None:
    async with relay_here() as relay, local_server(echo, backlog=500) as target:
        access = relay.access
        async with running(**{name: spec(target, access, name=name) for name in "ab"}) as here:
            await until_served(here, "a", "b")
            with trio.fail_after(PATIENCE):
                visitors = [await connect(address(here.reporter("a"))) for _ in range(150)]
                for visitor in visitors:
                    await visitor.send_all(b"hello")
                for visitor in visitors:
                    assert await read_exactly(visitor, 5) == b"hello"
                assert await ask(address(here.reporter("b")), b"beside") == b"beside"
                assert set(carriers_of(tunnel_named(relay, "a"))) == set(carriers_of(tunnel_named(relay, "b")))
                assert len(all_carriers(relay)) == 2
                for visitor in visitors:
                    await visitor.aclose()
