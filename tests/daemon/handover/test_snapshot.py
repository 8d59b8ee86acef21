"""All tunnels of one service are handed over to another by manifest and bundle, as between two processes."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.peers import connect, is_dropped, read_all, read_exactly
from tunneld.backends import BACKENDS
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.daemon.handover import FdBundle, Snapshot, bundle, pack, unpack
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine
from tunneld.errors import DrainingError, LimitReachedError
from tunneld.net.address import HostName
from tunneld.net.endpoint import Endpoint, parse_network
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.tunnel import Phase, Tunnel
from tunneld.tunnel.visitor import Visitor

ME = Requester(host="127.0.0.1", owner="127.0.0.1:9", local_host="127.0.0.1")
Edit = Callable[[list[Any]], None]


class ServicePair:
    """Two services on one engine: `move` hands everything over from the first to the second."""

    def __init__(self, engine: Engine, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._settings = Settings(tunnels=TunnelSettings(ports="0"))
        self.engine = engine
        self.endpoints = KeyRegistry()
        self.endpoints.set_port("webmux", "webmux", 1)
        self.next_scheme = "webmux"  # of the second service
        self.service = TunnelService(lambda: self._settings, engine, BACKENDS, self.endpoints)

    async def begin(self) -> None:
        await self._nursery.start(self.service.run)

    async def open(self, backend: str = "tcp", **words: str) -> Tunnel:
        return await self.service.open_tunnel(backend, TunnelOptions.parse(words), ME)

    async def move(
        self, edit: Edit = lambda lines: None, lost: Callable[[Snapshot], list[socket.socket]] | None = None
    ) -> None:
        """Hand over by manifest and descriptors. `edit` may change lines; the sockets that `lost` returns get lost."""
        snapshot = Snapshot(service=await self.service.export())
        missing = {os.fstat(one.fileno()).st_ino for one in lost(snapshot)} if lost else set()
        packed = FdBundle()
        manifest, closed = pack(snapshot, packed)
        assert not closed
        fd = bundle.write_manifest(manifest, packed.held)
        head, _, held = bundle.read_manifest(fd).partition(b"\n\n")
        lines = [json.loads(line) for line in head.split(b"\n")]
        edit(lines)
        manifest = b"\n".join([*(json.dumps(line).encode() for line in lines), b"", b""]) + held
        arrived, _ = bundle.adopt([one.detach() for one in packed.sockets])
        for inode in missing:
            arrived.take(inode).close()
        self.endpoints = KeyRegistry()
        self.endpoints.set_port("webmux", self.next_scheme, 2)
        self.service = TunnelService(lambda: self._settings, self.engine, BACKENDS, self.endpoints)
        await self.begin()
        try:
            await self.service.adopt(unpack(manifest, arrived).service)
        finally:
            arrived.close()

    @property
    def tunnel(self) -> Tunnel:
        (tunnel,) = self.service.tunnels()
        return tunnel


@pytest.fixture
async def pair(engine: Engine, nursery: trio.Nursery) -> ServicePair:
    pair = ServicePair(engine, nursery)
    await pair.begin()
    return pair


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


async def test_relayed_and_parked_connections_are_kept(pair: ServicePair) -> None:
    before = await pair.open(persist="yes", name="web", allow_from="127.0.0.0/8", max_per_source="5", ttl="3600")
    parked = await connect(before.server_uri)
    visitor = await connect(before.client_uri)
    await until(lambda: before.served == 1)
    await visitor.send_all(b"one")
    assert await read_exactly(parked, 3) == b"one"
    spare = await connect(before.server_uri)
    await until(lambda: before.parked == 1)
    await pair.move()
    after = pair.tunnel
    assert (after.id, after.server_uri, after.client_uri) == (before.id, before.server_uri, before.client_uri)
    assert after.spec.options == before.spec.options
    assert (after.phase, after.parked, after.served, after.octets) == (Phase.READY, 1, 1, (3, 0))
    await visitor.send_all(b"two")
    assert await read_exactly(parked, 3) == b"two"
    third = await connect(after.client_uri)
    await third.send_all(b"hello")
    assert await read_exactly(spare, 5) == b"hello"
    await visitor.aclose()
    assert await read_all(parked) == b""
    assert after.octets == (11, 0)


async def test_visitors_keep_their_age_and_the_address_they_reached(pair: ServicePair, mock_clock: MockClock) -> None:
    tunnel = await pair.open(persist="yes")
    await connect(tunnel.server_uri)
    await connect(tunnel.client_uri)
    await until(lambda: tunnel.served == 1)
    ((_, before),) = tunnel.visitors.relays.items()
    mock_clock.jump(20)
    await pair.move()
    ((_, after),) = pair.tunnel.visitors.relays.items()
    assert (after.peer, after.reached) == (before.peer, ("127.0.0.1", tunnel.client_uri.port))
    assert trio.current_time() - after.since >= 20


async def test_changed_limits_are_kept(pair: ServicePair) -> None:
    tunnel = await pair.open(persist="yes", name="web", share="yes", max_visitors="5")
    await pair.service.change(tunnel.id, {"max_visitors": "3", "bandwidth": "1M"})
    await pair.move()
    assert (pair.tunnel.limits.max_visitors, pair.tunnel.limits.bandwidth) == (3, 1_000_000)
    assert await pair.open(persist="yes", name="web", share="yes", max_visitors="5") is pair.tunnel  # as its agent does


async def test_a_waiting_visitor_keeps_its_pairing_timeout(pair: ServicePair, mock_clock: MockClock) -> None:
    tunnel = await pair.open(persist="yes", pairing_timeout="30")
    one = await connect(tunnel.client_uri)
    await until(lambda: tunnel.waiting == 1)
    mock_clock.jump(20)
    await pair.move()
    await until(lambda: pair.tunnel.waiting == 1)
    server = await connect(pair.tunnel.server_uri)
    await one.send_all(b"x")
    assert await read_exactly(server, 1) == b"x"
    other = await connect(pair.tunnel.client_uri)
    await until(lambda: pair.tunnel.waiting == 1)
    mock_clock.jump(20)
    await pair.move()
    mock_clock.jump(11)
    assert await is_dropped(other)


async def test_a_one_shot_tunnel_closes_when_its_connection_ends_after_the_handover(pair: ServicePair) -> None:
    tunnel = await pair.open()
    server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    await until(lambda: tunnel.served == 1)
    await pair.move()
    tunnel = pair.tunnel
    await visitor.aclose()
    assert await read_all(server) == b""
    await server.aclose()
    await tunnel.wait_closed()
    assert tunnel.reason == "both sides finished"
    assert pair.service.tunnels() == []


@pytest.mark.parametrize(
    ("option", "reason"),
    [("ttl", "lifetime of 100 s is over (ttl)"), ("open_timeout", "no connection for 100 s (open_timeout)")],
)
async def test_timeouts_continue(pair: ServicePair, mock_clock: MockClock, option: str, reason: str) -> None:
    await pair.open(persist="yes", **{option: "100"})
    mock_clock.jump(60)
    await pair.move()
    tunnel = pair.tunnel
    mock_clock.jump(30)
    await wait_all_tasks_blocked()
    assert tunnel.phase is Phase.WAITING
    mock_clock.jump(15)
    await tunnel.wait_closed()
    assert tunnel.reason == reason


async def test_timeouts_include_the_time_of_the_handover(pair: ServicePair) -> None:
    await pair.open(persist="yes", ttl="100")

    def be_late(lines: list[Any]) -> None:
        lines[0]["stamp"] = time.monotonic() - 99.9

    await pair.move(be_late)
    assert trio.current_time() - pair.tunnel.opened_at >= 99.9
    await pair.tunnel.wait_closed()


async def test_an_idle_tunnel_stays_as_idle_as_it_was(pair: ServicePair, autojump_clock: MockClock) -> None:
    await pair.open(persist="yes", idle_timeout="80", open_timeout="1000")
    await trio.sleep(61)
    await pair.move()
    tunnel, began = pair.tunnel, trio.current_time()
    await tunnel.wait_closed()
    assert trio.current_time() - began <= 30
    assert tunnel.reason == "no data for 80 s (idle_timeout)"


async def test_a_drain_continues(pair: ServicePair) -> None:
    tunnel = await pair.open(persist="yes")
    server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    await until(lambda: tunnel.served == 1)
    tunnel.drain()
    uri = tunnel.server_uri
    await pair.move()
    tunnel = pair.tunnel
    assert (tunnel.phase, tunnel.server_uri) == (Phase.DRAINING, uri)
    await visitor.send_all(b"bye")
    await visitor.aclose()
    assert await read_all(server) == b"bye"
    await server.aclose()
    await tunnel.wait_closed()
    assert tunnel.reason == "drained"


async def test_kept_visitors_count_towards_max_per_source(pair: ServicePair) -> None:
    tunnel = await pair.open(persist="yes", max_per_source="2")
    server, relayed = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    await until(lambda: tunnel.served == 1)
    await connect(tunnel.client_uri)
    await until(lambda: tunnel.waiting == 1)
    await pair.move()
    tunnel = pair.tunnel
    assert await is_dropped(await connect(tunnel.client_uri))
    await relayed.aclose()
    await server.aclose()
    await until(lambda: not tunnel.visitors)
    await connect(tunnel.client_uri)
    await until(lambda: tunnel.waiting == 2)


async def test_a_quota_continues(pair: ServicePair) -> None:
    tunnel = await pair.open(persist="yes", quota="10")
    server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    await visitor.send_all(b"123456")
    assert await read_exactly(server, 6) == b"123456"
    await pair.move()
    tunnel = pair.tunnel
    assert tunnel.limits.quota == 10
    await visitor.send_all(b"7890xyz")
    await tunnel.wait_closed()
    assert tunnel.reason == "quota of 10 bytes is used up (quota)"
    assert tunnel.octets == (10, 0)


async def test_visitors_of_a_source_are_still_counted(pair: ServicePair) -> None:
    tunnel = await pair.open(persist="yes", max_per_source="1")
    await connect(tunnel.server_uri)
    visitor = await connect(tunnel.client_uri)
    await until(lambda: tunnel.served == 1)
    await pair.move()
    assert await is_dropped(await connect(pair.tunnel.client_uri))
    await visitor.aclose()


async def test_webmux_keeps_its_key_and_its_address_and_its_visitors_wait(pair: ServicePair) -> None:
    tunnel = await pair.open("webmux", persist="yes")
    before = tunnel.server_uri
    await connect(tunnel.client_uri)
    await until(lambda: tunnel.waiting == 1)
    await pair.move()
    assert pair.tunnel.server_uri == Endpoint("webmux", before.host, 2, before.key)
    assert (pair.tunnel.client_uri, pair.tunnel.waiting) == (tunnel.client_uri, 1)
    assert pair.endpoints.find(before.key) is not None


async def test_a_key_that_crossed_in_clear_is_replaced_if_the_next_process_has_tls(pair: ServicePair) -> None:
    before = (await pair.open("webmux", persist="yes")).server_uri
    pair.next_scheme = "webmuxs"
    await pair.move()
    assert pair.tunnel.server_uri.scheme == "webmuxs"
    assert pair.tunnel.server_uri.key not in {before.key, ""}
    assert pair.endpoints.find(before.key) is None


async def test_counters_continue(pair: ServicePair) -> None:
    closed, _open = await pair.open(), await pair.open(persist="yes")
    server, visitor = await connect(closed.server_uri), await connect(closed.client_uri)
    await visitor.send_all(b"12345")
    assert await read_exactly(server, 5) == b"12345"
    await visitor.aclose()
    await server.aclose()
    await closed.wait_closed()
    await pair.move()
    live = pair.service.live
    assert (live.opened, live.served, live.octets) == (2, 1, (5, 0))
    assert (await pair.open()).id == "t3"


async def test_records_and_quarantined_ports_continue(pair: ServicePair, mock_clock: MockClock) -> None:
    closed, tunnel = await pair.open(), await pair.open(name="web", persist="yes")
    before = pair.service.live.record_of(tunnel.id)
    await pair.service.close(closed.id)
    pair.service.bans.add(parse_network("192.0.2.0/24"), trio.current_time() + 60)
    mock_clock.jump(20)
    await pair.move()
    (ban,) = pair.service.bans.report(trio.current_time())
    assert (str(ban.network), round(ban.left)) == ("192.0.2.0/24", 40)
    (after,) = await pair.service.directory.list()
    assert replace(after, opened=before.opened) == before
    freed = {port for port, _, _ in pair.service.directory.pool.quarantined(trio.current_time())}
    assert freed == {closed.client_uri.port, closed.server_uri.port}
    requester = Requester("192.0.2.2", "192.0.2.2:9", "127.0.0.1")
    with pytest.raises(LimitReachedError, match="in 40 s"):
        await pair.service.open_tunnel("tcp", TunnelOptions(client_port=closed.client_uri.port), requester)


async def test_a_service_that_was_exported_opens_no_tunnel(pair: ServicePair) -> None:
    await pair.service.export()
    with pytest.raises(DrainingError, match="the relay is restarting; try again in a moment"):
        await pair.open()


# Other versions


async def test_a_manifest_of_version_1_is_read(pair: ServicePair) -> None:
    """There, a tunnel had one port, and its waiting visitors belonged to that."""
    tunnel = await pair.open(persist="yes")
    visitor = await connect(tunnel.client_uri)
    await visitor.send_all(b"hello")
    await until(lambda: tunnel.waiting == 1)

    def as_version_1(lines: list[Any]) -> None:
        lines[0]["version"] = 1
        described = lines[1]
        (ingress,) = described.pop("ingresses")
        waiting = described.pop("waiting")
        for one in waiting:
            del one["host"], one["credential"], one["early"]
        described["client"] = {
            "port": int(ingress["address"]), "listener": ingress["listener"], "waiting": waiting
        }  # fmt: skip

    await pair.move(as_version_1)
    assert pair.tunnel.client_uri == tunnel.client_uri
    await until(lambda: pair.tunnel.waiting == 1)
    server = await connect(pair.tunnel.server_uri)
    assert await read_exactly(server, 5) == b"hello"


@pytest.mark.parametrize("client", [None, 3, {}, {"port": 70000, "listener": None, "waiting": []}])
async def test_a_manifest_of_version_1_without_a_valid_port_is_not_used(pair: ServicePair, client: object) -> None:
    await pair.open(persist="yes")

    def spoil(lines: list[Any]) -> None:
        lines[0]["version"] = 1
        lines[1] = {key: value for key, value in lines[1].items() if key not in {"ingresses", "waiting"}}
        lines[1]["client"] = client

    with capture_logs() as logs:
        await pair.move(spoil)
    assert pair.service.tunnels() == []
    assert any(log["event"] == "tunnel could not be taken over" for log in logs)


async def test_bytes_read_from_a_waiting_visitor_are_handed_over(pair: ServicePair) -> None:
    tunnel = await pair.open(persist="yes")
    end, client = socket.socketpair()
    with client:
        end.setblocking(False)
        tunnel.arrivals.arrive(
            Visitor(end, ("192.0.2.1", 4), host=HostName("a.example"), credential="alice", early=b"GET /")
        )
        client.sendall(b" HTTP/1.1")
        await pair.move()
        await until(lambda: pair.tunnel.waiting == 1)
        server = await connect(pair.tunnel.server_uri)
        assert await read_exactly(server, 14) == b"GET / HTTP/1.1"


# Damaged manifests


async def test_an_invalid_tunnel_is_lost_and_the_others_are_kept(pair: ServicePair) -> None:
    spoilt, whole = await pair.open(persist="yes"), await pair.open(persist="yes")
    visitor = await connect(spoilt.client_uri)
    await until(lambda: spoilt.waiting == 1)

    def spoil(lines: list[Any]) -> None:
        lines[1]["from_the_future"] = True

    with capture_logs() as logs:
        await pair.move(spoil)
    assert [tunnel.id for tunnel in pair.service.tunnels()] == [whole.id]
    assert await is_dropped(visitor)
    told = [log for log in logs if log["event"] == "tunnel could not be taken over"]
    assert [(log["tunnel"], log["reason"]) for log in told] == [
        (spoilt.id, "from_the_future: Extra inputs are not permitted")
    ]


async def test_a_tunnel_with_a_missing_listener_is_lost(pair: ServicePair) -> None:
    await pair.open(persist="yes")

    def lost(snapshot: Snapshot) -> list[socket.socket]:
        listener = snapshot.service.tunnels[0][1].ingresses[0].listener
        assert listener is not None
        return [listener]

    with capture_logs() as logs:
        await pair.move(lost=lost)
    assert pair.service.tunnels() == []
    assert any("was not received" in log.get("reason", "") for log in logs)


async def test_a_missing_socket_costs_only_its_connection(pair: ServicePair) -> None:
    tunnel = await pair.open(persist="yes")
    pairs = []
    for number in (1, 2):
        server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
        await until(lambda number=number: tunnel.served == number)  # type: ignore[misc]
        pairs.append((server, visitor))
    await pair.move(lost=lambda snapshot: [snapshot.service.tunnels[0][1].relays[0].state.visitor])
    assert len(pair.tunnel.visitors) == 1
    assert await is_dropped(pairs[0][0])
    await pairs[1][1].send_all(b"x")
    assert await read_exactly(pairs[1][0], 1) == b"x"


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b"", "it is not a manifest of tunneld"),
        (b'{"version": 3}\n\n', "its format is version 3; this program reads versions 1 to 2"),
        (b'{"version": 1, "stamp": "soon"}\n\n', "stamp: Input should be a valid number"),
        (b"[]\n\n", "it is not a manifest of tunneld"),
    ],
)
def test_an_invalid_header_is_refused(manifest: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unpack(manifest, FdBundle())


def test_an_unsealed_manifest_is_refused() -> None:
    fd = os.memfd_create("unsealed")
    with pytest.raises(ValueError, match="it is not sealed"):
        bundle.read_manifest(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_connections_that_do_not_fit_are_cut_and_counted(pair: ServicePair) -> None:
    tunnel = await pair.open(persist="yes")
    server, visitor = await connect(tunnel.server_uri), await connect(tunnel.client_uri)
    await until(lambda: tunnel.served == 1)
    full = FdBundle(max_sockets=3)
    snapshot = Snapshot(service=await pair.service.export())
    manifest, closed = pack(snapshot, full)
    assert closed == 1
    assert await is_dropped(visitor)
    assert await is_dropped(server)
    assert json.loads(manifest.split(b"\n")[1])["relays"] == []
    full.close()
