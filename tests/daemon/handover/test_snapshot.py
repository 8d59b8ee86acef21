"""All tunnels of one service go to another one by letter and baggage, as between two processes."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.people import connect, is_dropped, read_all, read_exactly
from tunneld.backends import BACKENDS
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.daemon.handover import FdBundle, Snapshot, bundle, pack, unpack
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine
from tunneld.errors import DrainingError
from tunneld.net.endpoint import Endpoint
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.tunnel import Phase, Tunnel

ME = Requester(host="127.0.0.1", owner="127.0.0.1:9", local_host="127.0.0.1")
Edit = Callable[[list[Any]], None]


class House:
    """Two services on one engine: what the first leaves, the second takes over."""

    def __init__(self, engine: Engine, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._settings = Settings(tunnels=TunnelSettings(ports="0"))
        self.engine = engine
        self.endpoints = KeyRegistry()
        self.endpoints.set_port("webmux", "webmux", 1)
        self.service = TunnelService(lambda: self._settings, engine, BACKENDS, self.endpoints)

    async def begin(self) -> None:
        await self._nursery.start(self.service.run)

    async def open(self, backend: str = "tcp", **words: str) -> Tunnel:
        return await self.service.open_tunnel(backend, TunnelOptions.parse(words), ME)

    async def move(
        self, edit: Edit = lambda lines: None, lost: Callable[[Snapshot], list[socket.socket]] | None = None
    ) -> None:
        """By way of octets and descriptors; `edit` may change the lines, the sockets that `lost` names go missing."""
        estate = Snapshot(service=await self.service.export())
        missing = {os.fstat(one.fileno()).st_ino for one in lost(estate)} if lost else set()
        packed = FdBundle()
        letter, closed = pack(estate, packed)
        assert not closed
        fd = bundle.write_manifest(letter, packed.held)
        head, _, held = bundle.read_manifest(fd).partition(b"\n\n")
        lines = [json.loads(line) for line in head.split(b"\n")]
        edit(lines)
        letter = b"\n".join([*(json.dumps(line).encode() for line in lines), b"", b""]) + held
        arrived, _ = bundle.adopt([one.detach() for one in packed.sockets])
        for inode in missing:
            arrived.take(inode).close()
        self.endpoints = KeyRegistry()
        self.endpoints.set_port("webmux", "webmuxs", 2)
        self.service = TunnelService(lambda: self._settings, self.engine, BACKENDS, self.endpoints)
        await self.begin()
        try:
            await self.service.adopt(unpack(letter, arrived).service)
        finally:
            arrived.close()

    @property
    def tunnel(self) -> Tunnel:
        (tunnel,) = self.service.tunnels()
        return tunnel


@pytest.fixture
async def house(engine: Engine, nursery: trio.Nursery) -> House:
    house = House(engine, nursery)
    await house.begin()
    return house


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


async def test_a_relay_its_tunnel_and_its_parked_connections_go_on(house: House) -> None:
    before = await house.open(persist="yes", name="web", allow_from="127.0.0.0/8", max_per_source="5", ttl="3600")
    parked = await connect(before.server_uri)
    visitor = await connect(before.client_uri)
    await until(lambda: before.served == 1)
    await visitor.send_all(b"one")
    assert await read_exactly(parked, 3) == b"one"
    spare = await connect(before.server_uri)
    await until(lambda: before.parked == 1)
    await house.move()
    after = house.tunnel
    assert (after.id, after.server_uri, after.client_uri) == (before.id, before.server_uri, before.client_uri)
    assert after.spec.options == before.spec.options
    assert (after.phase, after.parked, after.served, after.octets) == (Phase.READY, 1, 1, (3, 0))
    await visitor.send_all(b"two")
    assert await read_exactly(parked, 3) == b"two"
    newcomer = await connect(after.client_uri)
    await newcomer.send_all(b"hello")
    assert await read_exactly(spare, 5) == b"hello"
    await visitor.aclose()
    assert await read_all(parked) == b""
    assert after.octets == (11, 0)


async def test_a_visitor_that_waits_goes_on_waiting_and_not_for_longer(house: House, mock_clock: MockClock) -> None:
    tunnel = await house.open(persist="yes", pairing_timeout="30")
    one = await connect(tunnel.client_uri)
    await until(lambda: tunnel.waiting == 1)
    mock_clock.jump(20)
    await house.move()
    await until(lambda: house.tunnel.waiting == 1)
    server = await connect(house.tunnel.server_uri)
    await one.send_all(b"x")
    assert await read_exactly(server, 1) == b"x"
    other = await connect(house.tunnel.client_uri)
    await until(lambda: house.tunnel.waiting == 1)
    mock_clock.jump(20)
    await house.move()
    mock_clock.jump(11)
    assert await is_dropped(other)


async def test_a_one_shot_tunnel_closes_with_its_relay_on_the_other_side(house: House) -> None:
    tunnel = await house.open()
    server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    await until(lambda: tunnel.served == 1)
    await house.move()
    tunnel = house.tunnel
    await visitor.aclose()
    assert await read_all(server) == b""
    await server.aclose()
    await tunnel.wait_closed()
    assert tunnel.reason == "both sides finished"
    assert house.service.tunnels() == []


@pytest.mark.parametrize(
    ("option", "reason"),
    [("ttl", "lifetime of 100 s is over (ttl)"), ("open_timeout", "no connection for 100 s (open_timeout)")],
)
async def test_clocks_go_on_where_they_were(house: House, mock_clock: MockClock, option: str, reason: str) -> None:
    await house.open(persist="yes", **{option: "100"})
    mock_clock.jump(60)
    await house.move()
    tunnel = house.tunnel
    mock_clock.jump(30)
    await wait_all_tasks_blocked()
    assert tunnel.phase is Phase.WAITING
    mock_clock.jump(15)
    await tunnel.wait_closed()
    assert tunnel.reason == reason


async def test_the_time_between_two_processes_passes_for_clocks_too(house: House) -> None:
    await house.open(persist="yes", ttl="100")

    def be_late(lines: list[Any]) -> None:
        lines[0]["stamp"] = time.monotonic() - 99.9

    await house.move(be_late)
    assert trio.current_time() - house.tunnel.opened_at >= 99.9
    await house.tunnel.wait_closed()


async def test_an_idle_tunnel_stays_as_idle_as_it_was(house: House, autojump_clock: MockClock) -> None:
    await house.open(persist="yes", idle_timeout="80", open_timeout="1000")
    await trio.sleep(61)
    await house.move()
    tunnel, began = house.tunnel, trio.current_time()
    await tunnel.wait_closed()
    assert trio.current_time() - began <= 30
    assert tunnel.reason == "no data for 80 s (idle_timeout)"


async def test_a_drain_goes_on(house: House) -> None:
    tunnel = await house.open(persist="yes")
    server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    await until(lambda: tunnel.served == 1)
    tunnel.drain()
    uri = tunnel.server_uri
    await house.move()
    tunnel = house.tunnel
    assert (tunnel.phase, tunnel.server_uri) == (Phase.DRAINING, uri)
    await visitor.send_all(b"bye")
    await visitor.aclose()
    assert await read_all(server) == b"bye"
    await server.aclose()
    await tunnel.wait_closed()
    assert tunnel.reason == "drained"


async def test_who_is_relayed_or_waits_is_counted_at_the_door_of_the_other_side(house: House) -> None:
    tunnel = await house.open(persist="yes", max_per_source="2")
    server, relayed = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    await until(lambda: tunnel.served == 1)
    await connect(tunnel.client_uri)
    await until(lambda: tunnel.waiting == 1)
    await house.move()
    tunnel = house.tunnel
    assert await is_dropped(await connect(tunnel.client_uri))
    await relayed.aclose()
    await server.aclose()
    await until(lambda: not tunnel.visitors)
    await connect(tunnel.client_uri)
    await until(lambda: tunnel.waiting == 2)


async def test_a_quota_is_not_begun_anew(house: House) -> None:
    tunnel = await house.open(persist="yes", quota="10")
    server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    await visitor.send_all(b"123456")
    assert await read_exactly(server, 6) == b"123456"
    await house.move()
    tunnel = house.tunnel
    assert tunnel.limits.quota == 10
    await visitor.send_all(b"7890xyz")
    await tunnel.wait_closed()
    assert tunnel.reason == "quota of 10 bytes is used up (quota)"
    assert tunnel.octets == (10, 0)


async def test_visitors_of_a_source_are_still_counted(house: House) -> None:
    tunnel = await house.open(persist="yes", max_per_source="1")
    await connect(tunnel.server_uri)
    visitor = await connect(tunnel.client_uri)
    await until(lambda: tunnel.served == 1)
    await house.move()
    assert await is_dropped(await connect(house.tunnel.client_uri))
    await visitor.aclose()


async def test_webmux_keeps_its_key_and_its_address_and_its_visitors_wait(house: House) -> None:
    tunnel = await house.open("webmux", persist="yes")
    before = tunnel.server_uri
    await connect(tunnel.client_uri)
    await until(lambda: tunnel.waiting == 1)
    await house.move()
    assert house.tunnel.server_uri == Endpoint("webmuxs", before.host, 2, before.key)
    assert (house.tunnel.client_uri, house.tunnel.waiting) == (tunnel.client_uri, 1)
    assert house.endpoints.find(before.key) is not None


async def test_what_was_counted_is_counted_on(house: House) -> None:
    closed, _open = await house.open(), await house.open(persist="yes")
    server, visitor = await connect(closed.server_uri), await connect(closed.client_uri)
    await visitor.send_all(b"12345")
    assert await read_exactly(server, 5) == b"12345"
    await visitor.aclose()
    await server.aclose()
    await closed.wait_closed()
    await house.move()
    assert (house.service.opened, house.service.served, house.service.octets) == (2, 1, (5, 0))
    assert (await house.open()).id == "t3"


async def test_nothing_is_opened_by_a_service_that_leaves(house: House) -> None:
    await house.service.export()
    with pytest.raises(DrainingError, match="the relay is restarting; try again in a moment"):
        await house.open()


# What does not fit costs what it describes


async def test_a_tunnel_that_is_not_understood_costs_that_tunnel(house: House) -> None:
    spoilt, whole = await house.open(persist="yes"), await house.open(persist="yes")
    visitor = await connect(spoilt.client_uri)
    await until(lambda: spoilt.waiting == 1)

    def spoil(lines: list[Any]) -> None:
        lines[1]["from_the_future"] = True

    with capture_logs() as logs:
        await house.move(spoil)
    assert [tunnel.id for tunnel in house.service.tunnels()] == [whole.id]
    assert await is_dropped(visitor)
    told = [log for log in logs if log["event"] == "tunnel could not be taken over"]
    assert [(log["tunnel"], log["reason"]) for log in told] == [
        (spoilt.id, "from_the_future: Extra inputs are not permitted")
    ]


async def test_a_listener_that_is_missing_costs_its_tunnel(house: House) -> None:
    await house.open(persist="yes")

    def lost(estate: Snapshot) -> list[socket.socket]:
        listener = estate.service.tunnels[0][1].client.listener
        assert listener is not None
        return [listener]

    with capture_logs() as logs:
        await house.move(lost=lost)
    assert house.service.tunnels() == []
    assert any("has not come along" in log.get("reason", "") for log in logs)


async def test_a_connection_that_is_missing_costs_its_relay(house: House) -> None:
    tunnel = await house.open(persist="yes")
    pairs = []
    for number in (1, 2):
        server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
        await until(lambda number=number: tunnel.served == number)  # type: ignore[misc]
        pairs.append((server, visitor))
    await house.move(lost=lambda estate: [estate.service.tunnels[0][1].relays[0][0].visitor])
    assert len(house.tunnel.visitors) == 1
    assert await is_dropped(pairs[0][0])
    await pairs[1][1].send_all(b"x")
    assert await read_exactly(pairs[1][0], 1) == b"x"


@pytest.mark.parametrize(
    ("letter", "said"),
    [
        (b"", "it is not a letter of tunneld"),
        (b'{"version": 2}\n\n', "its format is 2, and this tunneld reads 1"),
        (b'{"version": 1, "stamp": "soon"}\n\n', "stamp: Input should be a valid number"),
        (b"[]\n\n", "it is not a letter of tunneld"),
    ],
)
def test_a_letter_of_another_kind_is_not_read(letter: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unpack(letter, FdBundle())


def test_a_letter_that_somebody_could_still_change_is_not_read() -> None:
    fd = os.memfd_create("unsealed")
    with pytest.raises(ValueError, match="it is not sealed"):
        bundle.read_manifest(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_relays_that_find_no_room_are_cut_and_counted(house: House) -> None:
    tunnel = await house.open(persist="yes")
    server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    await until(lambda: tunnel.served == 1)
    full = FdBundle(most=3)
    estate = Snapshot(service=await house.service.export())
    letter, closed = pack(estate, full)
    assert closed == 1
    assert await is_dropped(visitor)
    assert await is_dropped(server)
    assert json.loads(letter.split(b"\n")[1])["relays"] == []
    full.close()
