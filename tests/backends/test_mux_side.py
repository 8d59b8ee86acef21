"""Which carrier a visitor goes to. The far ends of these carriers are idle sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.mux.bench import RecordingOwner
from tunneld.backends import BACKENDS
from tunneld.backends.webmux import WebMuxServerSide
from tunneld.config.schema import TunnelSettings
from tunneld.engine.engine import Engine
from tunneld.engine.pump import Pump
from tunneld.mux.carrier import MAX_CHANNELS, Carrier
from tunneld.mux.connection import connection_over
from tunneld.mux.limits import CarrierLimits
from tunneld.net.sockets import ANY_PORT
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.server_side import BackendServices, TunnelContext

MAX_CARRIERS = 8
"""Carriers of the tunnel."""


class ServerSideBench:
    """A server side, and the far ends of its carriers."""

    def __init__(self, engine: Engine) -> None:
        assert isinstance(engine, Pump)
        registry = KeyRegistry()
        registry.set_port("webmux", "webmux", 7012)
        self._pump = engine
        self._ends: list[socket.socket] = []
        self.side = WebMuxServerSide(
            TunnelContext(
                engine=engine,
                settings=TunnelSettings(),
                advertised_host="localhost",
                client_port=20000,
                services=BackendServices(BACKENDS, registry),
                secure="no",
                persist=True,
                former=None,
                ports=ANY_PORT,
                why_not_allowed=lambda _peer: "",
                parking_capacity=lambda: MAX_CARRIERS,
                on_attached=lambda _peer: None,
                on_detached=lambda _peer: None,
                on_refused=lambda _peer, _reason: None,
                on_failure=lambda _error: None,
            )
        )

    def carrier(self) -> Carrier:
        """Admit one more carrier; all of them have replied to their pings."""
        near, far = socket.socketpair()
        near.setblocking(False)
        self._ends.append(far)
        person = RecordingOwner()
        made = Carrier(self._pump, connection_over(near), person, initiator=False, limits=CarrierLimits())
        person.on_capacity = self.side.on_capacity  # type: ignore[method-assign]  # `on_over` calls it, too
        self.side.admit(made, ("127.0.0.1", 1), MAX_CARRIERS)
        for carrier in self.side.carriers:
            carrier.heartbeat.received = True
        return made

    def visit(self) -> object:
        """Dial for a visitor; returns the carrier that was chosen."""
        return self.side.dial_nowait().carrier

    def close(self) -> None:
        for end in self._ends:
            end.close()


def fill(carrier: Carrier) -> None:
    """Open as many channels as the carrier allows."""
    for _ in range(MAX_CHANNELS - len(carrier.channels)):
        carrier.open(20000)


@pytest.fixture
def here(engine: Engine) -> Iterator[ServerSideBench]:
    here = ServerSideBench(engine)
    yield here
    here.close()


async def test_the_carrier_with_fewer_visitors_gets_the_next(here: ServerSideBench) -> None:
    old, new = here.carrier(), here.carrier()
    assert [here.visit() for _ in range(4)] == [new, old, new, old]
    old.open(20000)
    assert [here.visit() for _ in range(2)] == [new, new]


async def test_an_unresponsive_carrier_gets_no_visitors_while_another_one_responds(here: ServerSideBench) -> None:
    old, new = here.carrier(), here.carrier()
    new.heartbeat.unresponsive, new.heartbeat.received = True, False
    assert [here.visit() for _ in range(3)] == [old, old, old]
    fill(old)
    assert here.visit() is new


async def test_a_carrier_with_an_unanswered_ping_gets_no_visitors_while_another_has_none(here: ServerSideBench) -> None:
    old, new = here.carrier(), here.carrier()
    new.heartbeat.awaiting_reply, new.heartbeat.received = True, False
    assert [here.visit() for _ in range(3)] == [old, old, old]


async def test_a_full_carrier_is_skipped_although_it_is_preferred(here: ServerSideBench) -> None:
    old, new = here.carrier(), here.carrier()
    old.heartbeat.unresponsive, old.heartbeat.received = True, False
    fill(new)
    assert here.visit() is old


async def test_if_all_carriers_are_full_a_visitor_waits_for_a_new_one(
    here: ServerSideBench, nursery: trio.Nursery
) -> None:
    for carrier in (here.carrier(), here.carrier()):
        fill(carrier)
    with pytest.raises(trio.WouldBlock):
        here.visit()
    served: list[object] = []

    async def wait() -> None:
        served.append((await here.side.dial()).carrier)

    nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    assert served == []
    new = here.carrier()
    await wait_all_tasks_blocked()
    assert served == [new]


async def test_a_retired_carrier_gets_no_new_visitors_and_is_not_counted(here: ServerSideBench) -> None:
    old, new = here.carrier(), here.carrier()
    old.open(20000)
    here.side.retire(new)
    here.side.retire(new)
    assert here.visit() is old
    assert (here.side.live_connections, here.side.parked) == (1, MAX_CHANNELS - 2)
    here.side.retire(old)
    assert here.side.unresponsive
    with pytest.raises(trio.WouldBlock):
        here.visit()


async def test_a_lost_carrier_is_removed(here: ServerSideBench) -> None:
    old, new = here.carrier(), here.carrier()
    here.side.on_carrier_closed(new)
    assert here.visit() is old
    assert list(here.side.carriers) == [old]
    here.side.on_carrier_closed(old)
    assert (here.side.unresponsive, here.side.parked) == (False, 0)


async def test_a_carrier_is_admitted_although_a_ping_finds_another_one_lost(here: ServerSideBench) -> None:
    old, other = here.carrier(), here.carrier()
    old.heartbeat.awaiting_reply = False
    old._ping.sid = None
    old.schedule_flush = lambda: here.side.on_carrier_closed(old)
    new = here.carrier()
    assert list(here.side.carriers) == [other, new]


async def test_a_visitor_goes_to_another_carrier_if_opening_finds_one_lost(here: ServerSideBench) -> None:
    old, new = here.carrier(), here.carrier()
    new.schedule_flush = lambda: new.close("its connection broke")
    assert here.visit() is old
    assert new.over
