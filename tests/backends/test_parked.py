"""Parked connections: which one a visitor gets, and what happens to one whose peer a firewall has forgotten."""

from __future__ import annotations

import ctypes
import math
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from tests.support.peers import PATIENCE, connect, is_dropped, read_exactly
from tests.support.system import lacking
from tests.support.visitors import open_tunnel, until_parked, until_waiting
from tunneld.backends.parked import SILENT_INTERVALS, ParkableConnection, ParkedConnections
from tunneld.backends.tcp import TcpServerSide
from tunneld.config.schema import TunnelSettings
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import FailureCallback, Registration
from tunneld.net.endpoint import Peer
from tunneld.tunnel.tunnel import Phase, Tunnel

INTERVAL = 10.0
SILENT = INTERVAL * SILENT_INTERVALS


class FakeConnection:
    """A server connection whose peer is heard as the test says. Implements `ParkableConnection`."""

    def __init__(self, host: str = "192.0.2.1", heard: float = 0.0) -> None:
        self.peer: Peer = (host, 4)
        self.heard = heard
        self.probes = 0
        self.keepalive: float | None = None
        self.closed = False
        self.watched = False
        self.report_ended: Callable[[], None]

    def heard_ago(self) -> float:
        return self.heard

    def probe(self) -> None:
        self.probes += 1

    def set_keepalive(self, seconds: float) -> None:
        self.keepalive = seconds

    def watch(self, on_closed: Callable[[], None], _on_failure: FailureCallback) -> Registration:
        self.report_ended = on_closed
        self.watched = True
        return self

    def release(self) -> None:
        self.watched = False

    def close(self) -> None:
        self.closed = True

    def set_originator(self, visitor: Peer | None) -> None:
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        raise NotImplementedError

    @property
    def end(self) -> socket.socket:
        raise NotImplementedError


class Parking:
    """Parked connections with their callbacks recorded."""

    def __init__(self, *, shared: bool = False) -> None:
        self.ended: list[ParkableConnection] = []
        self.heard = trio.Event()
        self.parked = ParkedConnections(INTERVAL, self.ended.append, self.heard.set, self._fail, shared=shared)

    def add(self, *connections: FakeConnection) -> None:
        for connection in connections:
            self.parked.add(connection)

    @staticmethod
    def _fail(error: Exception) -> None:
        raise error


@pytest.fixture
async def parking(nursery: trio.Nursery) -> Parking:
    parking = Parking()
    nursery.start_soon(parking.parked.check)
    return parking


# The choice


def test_the_newest_connection_comes_first() -> None:
    parking = Parking()
    connections = [FakeConnection() for _ in range(3)]
    parking.add(*connections)
    assert [parking.parked.take() for _ in range(4)] == [*reversed(connections), None]
    assert not any(connection.watched for connection in connections)


def test_behind_one_address_of_a_shared_tunnel_the_oldest_connection_comes_first() -> None:
    """The newest one would always be that of the agent that has just been served."""
    parking = Parking(shared=True)
    connections = [FakeConnection() for _ in range(3)]
    parking.add(*connections)
    assert [parking.parked.take() for _ in range(3)] == connections


@pytest.mark.parametrize("sizes", [(8, 8), (200, 2), (1, 1)])
def test_agents_take_turns_whatever_the_sizes_of_their_pools(sizes: tuple[int, int]) -> None:
    """Each agent parks another connection when one is taken."""
    parking = Parking(shared=True)
    for number, size in enumerate(sizes):
        parking.add(*(FakeConnection(f"192.0.2.{number}") for _ in range(size)))
    served = Counter[str]()
    for _ in range(100):
        taken = parking.parked.take()
        assert taken is not None
        served[taken.peer[0]] += 1
        parking.add(FakeConnection(taken.peer[0]))
    assert served == {"192.0.2.0": 50, "192.0.2.1": 50}


def test_a_connection_may_be_silent_until_its_limit_and_no_longer() -> None:
    parking = Parking()
    dead, live = FakeConnection(heard=SILENT + 0.001), FakeConnection(heard=SILENT)
    parking.add(live, dead)
    assert parking.parked.take() is live
    assert parking.parked.take() is None
    assert len(parking.parked) == 1


def test_trimming_closes_the_oldest_and_spares_other_agents() -> None:
    parking = Parking()
    mine = [FakeConnection() for _ in range(3)]
    other = FakeConnection("192.0.2.2")
    parking.add(other, *mine)
    assert parking.parked.trim(1, {"192.0.2.2"}) == 2
    assert [connection.closed for connection in (other, *mine)] == [False, True, True, False]
    assert parking.parked.take_all() == [other, mine[2]]
    assert len(parking.parked) == 0


# Checks


async def test_silent_connections_are_all_probed_and_those_that_answer_are_taken(
    parking: Parking, autojump_clock: MockClock
) -> None:
    connections = [FakeConnection(heard=60.0) for _ in range(3)]
    parking.add(*connections)
    assert parking.parked.take() is None
    assert parking.parked.take() is None  # another visitor: no second probe
    await trio.sleep(0.1)
    assert [connection.probes for connection in connections] == [1, 1, 1]
    connections[1].heard = 0.0
    await parking.heard.wait()
    assert connections[1].keepalive == INTERVAL
    assert parking.parked.take() is connections[1]
    assert parking.parked.take() is None
    await trio.sleep(60)
    assert [connection.probes for connection in connections] == [1, 1, 1]


async def test_a_connection_that_the_kernel_drops_during_its_check_is_closed_and_reported(
    parking: Parking, autojump_clock: MockClock
) -> None:
    dead, other = FakeConnection(heard=60.0), FakeConnection(heard=60.0)
    parking.add(dead, other)
    assert parking.parked.take() is None
    await trio.sleep(0.1)
    dead.report_ended()
    dead.report_ended()
    assert (dead.closed, parking.ended, len(parking.parked)) == (True, [dead], 1)
    other.heard = 0.0
    await parking.heard.wait()
    assert parking.parked.take() is other


async def test_a_new_connection_is_taken_while_the_silent_ones_are_checked(
    parking: Parking, autojump_clock: MockClock
) -> None:
    silent, fresh = FakeConnection(heard=60.0), FakeConnection()
    parking.add(silent)
    assert parking.parked.take() is None
    await trio.sleep(1)
    parking.add(fresh)
    assert parking.parked.take() is fresh


async def test_one_that_falls_silent_during_a_check_is_checked_as_well(
    parking: Parking, autojump_clock: MockClock
) -> None:
    first, second = FakeConnection(heard=60.0), FakeConnection(heard=60.0)
    parking.add(first)
    assert parking.parked.take() is None
    await trio.sleep(1)
    parking.add(second)
    assert parking.parked.take() is None
    await trio.sleep(1)
    assert (first.probes, second.probes) == (1, 1)
    second.heard = 0.0
    await parking.heard.wait()
    assert parking.parked.take() is second


async def test_a_check_can_follow_another(parking: Parking, autojump_clock: MockClock) -> None:
    connection = FakeConnection(heard=60.0)
    parking.add(connection)
    for count in (1, 2):
        assert parking.parked.take() is None
        await trio.sleep(0.1)
        assert connection.probes == count
        connection.heard = 0.0
        await parking.heard.wait()
        parking.heard = trio.Event()
        parking.parked._on_heard = parking.heard.set
        connection.heard = math.inf


# Real connections

DROP_EVERYTHING = struct.pack("HBBI", 0x06, 0, 0, 0)
"""A socket filter of one instruction: keep 0 bytes of each packet."""
SO_ATTACH_FILTER = 26


def lose(stream: trio.SocketStream) -> None:
    """Let nothing through to this end of a connection any more, as a firewall does that has forgotten it."""
    if sys.platform != "linux":
        pytest.skip("socket filters are Linux's")
    code = ctypes.create_string_buffer(DROP_EVERYTHING, len(DROP_EVERYTHING))
    try:
        stream.socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(code)))
    except PermissionError:
        lacking("this kernel lets only root attach a socket filter")


class TestFirewall:
    @pytest.fixture
    def tunnel_settings(self) -> TunnelSettings:
        return TunnelSettings(ports="0", parked_check=0.2)

    @staticmethod
    async def until_silent(tunnel: Tunnel) -> None:
        """Wait until no parked connection has been heard for longer than the limit."""
        side = tunnel.server_side
        assert isinstance(side, TcpServerSide)
        while min(connection.heard_ago() for connection in side.parked_connections) <= 0.2 * SILENT_INTERVALS:  # noqa: ASYNC110 - the kernel tells by no event
            await trio.sleep(0.01)

    async def test_a_visitor_gets_a_connection_that_still_works(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        servers = [await connect(tunnel.server_uri) for _ in range(4)]
        await until_parked(tunnel, 4)
        for number in (0, 2, 3):
            lose(servers[number])
        await self.until_silent(tunnel)
        visitor = await connect(tunnel.client_uri)
        await visitor.send_all(b"hello")
        with trio.fail_after(PATIENCE):
            assert await read_exactly(servers[1], 5) == b"hello"
        assert (tunnel.served, tunnel.waiting) == (1, 0)

    async def test_a_visitor_waits_for_a_new_connection_where_all_are_lost(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        servers = [await connect(tunnel.server_uri) for _ in range(8)]
        await until_parked(tunnel, 8)
        for server in servers:
            lose(server)
        await self.until_silent(tunnel)
        visitors = [await connect(tunnel.client_uri) for _ in range(8)]
        await until_waiting(tunnel, 8)
        for number, visitor in enumerate(visitors):
            await visitor.send_all(b"%d" % number)
            server = await connect(tunnel.server_uri)
            with trio.fail_after(PATIENCE):
                assert await read_exactly(server, 1) == b"%d" % number

    async def test_the_kernel_drops_the_lost_ones(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        lose(await connect(tunnel.server_uri))
        await until_parked(tunnel, 1)
        await self.until_silent(tunnel)
        await connect(tunnel.client_uri)
        with trio.fail_after(PATIENCE):
            while tunnel.parked:  # noqa: ASYNC110 - the kernel tells by no event
                await trio.sleep(0.01)
        assert (tunnel.phase, tunnel.waiting) == (Phase.WAITING, 1)

    async def test_connections_being_checked_are_closed_with_the_tunnel(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service)
        server = await connect(tunnel.server_uri)
        await until_parked(tunnel, 1)
        await self.until_silent(tunnel)
        await connect(tunnel.client_uri)
        await service.close(tunnel.id)
        assert await is_dropped(server)
