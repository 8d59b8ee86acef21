"""A carrier that several tunnels share, seen by a peer that speaks WebMUX by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import trio

from tests.agent.support import PATIENCE, RelayHere, relay_here, using_backend
from tests.backends.test_webmux_port import RawWebMuxPeer
from tests.support.peers import connect, is_dropped, read_exactly
from tunneld.backends.webmux import WebMuxServerSide
from tunneld.directory.requester import Requester
from tunneld.mux import carrier as mux_carrier
from tunneld.net.endpoint import Endpoint
from tunneld.policy.access import EVERYBODY
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.tunnel import Tunnel
from tunneld.wire.webmux.events import Finished, Opened, Reset, SessionRefused
from tunneld.wire.webmux.header import FIRST_ATOM

ME = Requester(host="127.0.0.1", owner="me@127.0.0.1:9", local_host="127.0.0.1", grant=replace(EVERYBODY, name="me"))
OTHER = replace(ME, owner="other@127.0.0.1:9", grant=replace(EVERYBODY, name="other"))


@pytest.fixture(autouse=True)
def _webmux() -> Iterator[None]:
    with using_backend("webmux"):
        yield


@pytest.fixture
async def relay() -> AsyncIterator[RelayHere]:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay:
            yield relay


async def tunnels(relay: RelayHere, count: int, requester: Requester = ME, **options: str) -> Sequence[Tunnel]:
    parsed = TunnelOptions.parse({"persist": "yes", **options})
    return [await relay.service.open_tunnel("webmux", parsed, requester) for _ in range(count)]


def side_of(tunnel: Tunnel) -> WebMuxServerSide:
    assert isinstance(tunnel.server_side, WebMuxServerSide)
    return tunnel.server_side


class SharingPeer(RawWebMuxPeer):
    """An agent that offers several tunnels on one connection. Its sessions by the index of the atom."""

    def __init__(self, uri: Endpoint) -> None:
        super().__init__(uri)
        self.sessions: dict[int, int] = {}
        self.seen: list[object] = []

    async def offer(self, index: int, uri: Endpoint | str) -> None:
        self.sessions[index] = self.mux.open(self.mux.intern_atom(index, str(uri)))
        await self.flush()

    async def until(self, wanted: Callable[[object], bool]) -> object:
        """Wait for the first item that is wanted, and return it; pings are answered."""
        while True:
            for item in self.seen:
                if wanted(item):
                    self.seen.remove(item)
                    return item
            items = await self.receive()
            assert items, "the relay closed the connection"
            for item in items:
                if isinstance(item, Opened) and not item.protocol:
                    self.mux.reset(item.session)
            self.seen += items
            await self.flush()

    async def visitor(self, index: int) -> int:
        """Wait for a visitor of a tunnel and accept it; returns its session."""
        item = await self.until(lambda item: isinstance(item, Opened) and item.protocol == FIRST_ATOM + index)
        assert isinstance(item, Opened)
        self.mux.accept(item.session)
        await self.flush()
        return item.session

    async def refusal(self, index: int) -> str:
        """Wait until the relay refuses or ends a tunnel; returns why."""
        session = self.sessions[index]
        item = await self.until(lambda item: isinstance(item, Reset | SessionRefused) and item.session == session)
        assert isinstance(item, Reset | SessionRefused)
        return item.text


async def until_ready(*all_of_them: Tunnel) -> None:
    while not all(side_of(tunnel).carriers for tunnel in all_of_them):
        await trio.lowlevel.checkpoint()


async def serving(*tunnels: Tunnel) -> SharingPeer:
    """A connection that serves these tunnels, by hand."""
    peer = SharingPeer(tunnels[0].server_uri)
    for index, tunnel in enumerate(tunnels):
        await peer.offer(index, tunnel.server_uri)
    await until_ready(*tunnels)
    return peer


async def test_the_visitors_of_each_tunnel_name_it_by_its_atom(relay: RelayHere) -> None:
    one, two = await tunnels(relay, 2)
    peer = SharingPeer(one.server_uri)
    for index, tunnel in ((0, one), (200, two)):
        await peer.offer(index, tunnel.server_uri)
    await until_ready(one, two)
    for index, tunnel in ((200, two), (0, one)):
        visitor = await connect(tunnel.client_uri)
        session = await peer.visitor(index)
        assert session % 2 == 1
        peer.mux.send(session, b"hello")
        await peer.flush()
        assert await read_exactly(visitor, 5) == b"hello"
    await peer.stream.aclose()


async def test_one_connection_counts_once_however_many_tunnels_it_has(relay: RelayHere) -> None:
    three = await tunnels(relay, 3)
    peer = SharingPeer(three[0].server_uri)
    for index, tunnel in enumerate(three):
        await peer.offer(index, tunnel.server_uri)
    await until_ready(*three)
    tenant = three[0].spec.tenant
    assert sum(side.connections for side in tenant.server_sides) == 1
    await peer.stream.aclose()
    while any(side_of(tunnel).carriers for tunnel in three):
        await trio.lowlevel.checkpoint()
    assert sum(side.connections for side in tenant.server_sides) == 0


async def test_an_owner_that_has_all_its_connections_may_add_tunnels_and_no_connection(relay: RelayHere) -> None:
    one, two = await tunnels(relay, 2)
    tenant = one.spec.tenant
    tenant.limits = replace(tenant.limits, server_connections=1)
    peer = await serving(one, two)
    further = SharingPeer(one.server_uri)
    await further.offer(0, one.server_uri)
    assert (await further.refusal(0)).startswith("limit connection limit reached: its owner has 1 server")
    for each in (peer, further):
        await each.stream.aclose()


async def test_a_tunnel_has_no_more_shared_carriers_than_others(relay: RelayHere) -> None:
    webmux = relay.settings.webmux.model_copy(update={"max_carriers": 1})
    relay.settings = relay.settings.model_copy(update={"webmux": webmux})
    (tunnel,) = await tunnels(relay, 1)
    peers = [SharingPeer(tunnel.server_uri) for _ in range(2)]
    await peers[0].offer(0, tunnel.server_uri)
    await until_ready(tunnel)
    await peers[1].offer(0, tunnel.server_uri)
    assert (await peers[1].refusal(0)).startswith("limit connection limit reached: the tunnel has 1 server connections")
    for each in peers:
        await each.stream.aclose()


async def test_a_key_that_no_open_tunnel_has_is_refused_and_another_one_may_follow(relay: RelayHere) -> None:
    (tunnel,) = await tunnels(relay, 1)
    peer = SharingPeer(tunnel.server_uri)
    await peer.offer(0, "webmux://127.0.0.1:1/wrong")
    assert await peer.refusal(0) == "no-such-tunnel no open tunnel has the server URI that the agent defined"
    await peer.offer(1, tunnel.server_uri)
    await until_ready(tunnel)
    await peer.offer(2, "webmux://127.0.0.1:1/wrong")
    assert (await peer.refusal(2)).startswith("no-such-tunnel")
    await peer.offer(1, tunnel.server_uri)  # the same atom again
    assert (await peer.refusal(1)).startswith("not-allowed")
    visitor = await connect(tunnel.client_uri)
    await peer.visitor(1)
    await visitor.aclose()
    await peer.stream.aclose()


async def test_a_tunnel_of_another_credential_is_refused(relay: RelayHere) -> None:
    (mine,), (other,) = await tunnels(relay, 1), await tunnels(relay, 1, OTHER)
    peer = await serving(mine)
    await peer.offer(1, other.server_uri)
    assert await peer.refusal(1) == "not-allowed the other tunnels of this connection belong to another credential"
    assert not side_of(other).carriers
    await peer.stream.aclose()


async def test_a_withdrawn_tunnel_gets_no_visitors_and_ends_with_its_last_one(relay: RelayHere) -> None:
    goes, stays = await tunnels(relay, 2)
    peer = await serving(goes, stays)
    visitor = await connect(goes.client_uri)
    session = await peer.visitor(0)
    peer.mux.finish(peer.sessions[0])
    await peer.flush()
    while side_of(goes).live_connections:
        await trio.lowlevel.checkpoint()
    waiting = await connect(goes.client_uri)
    other = await connect(stays.client_uri)
    await peer.visitor(1)
    assert goes.waiting == 1
    peer.mux.reset(session)
    await peer.flush()
    await peer.until(lambda item: isinstance(item, Finished) and item.session == peer.sessions[0])
    assert await is_dropped(visitor)
    assert (len(side_of(goes).carriers), len(side_of(stays).carriers)) == (0, 1)
    for stream in (visitor, waiting, other, peer.stream):
        await stream.aclose()


async def test_a_tunnel_that_closes_says_why_and_the_other_ones_go_on(relay: RelayHere) -> None:
    goes, stays = await tunnels(relay, 2)
    peer = await serving(goes, stays)
    goes.close("a test")
    assert await peer.refusal(0) == "the tunnel closed"
    visitor = await connect(stays.client_uri)
    await peer.visitor(1)
    await visitor.aclose()
    await peer.stream.aclose()


async def test_an_agent_that_gives_up_a_tunnel_cuts_its_visitors_and_no_others(relay: RelayHere) -> None:
    goes, stays = await tunnels(relay, 2)
    peer = await serving(goes, stays)
    cut, kept = await connect(goes.client_uri), await connect(stays.client_uri)
    await peer.visitor(0)
    session = await peer.visitor(1)
    peer.mux.reset(peer.sessions[0])
    await peer.flush()
    assert await is_dropped(cut)
    peer.mux.send(session, b"hello")
    await peer.flush()
    assert await read_exactly(kept, 5) == b"hello"
    for stream in (cut, kept, peer.stream):
        await stream.aclose()


async def test_data_on_the_session_of_a_tunnel_ends_it(relay: RelayHere) -> None:
    (tunnel,) = await tunnels(relay, 1)
    peer = await serving(tunnel)
    peer.mux.send(peer.sessions[0], b"?")
    await peer.flush()
    assert await peer.refusal(0) == "a session that stands for a tunnel carries no data"
    assert not side_of(tunnel).carriers
    await peer.stream.aclose()


async def test_a_tunnel_that_closes_with_visitors_leaves_the_carrier_with_its_last_one(relay: RelayHere) -> None:
    goes, stays = await tunnels(relay, 2)
    peer = await serving(goes, stays)
    visitor = await connect(goes.client_uri)
    await peer.visitor(0)
    goes.close("a test")
    assert await peer.refusal(0) == "the tunnel closed"
    assert await is_dropped(visitor)
    assert not side_of(goes).carriers
    for stream in (visitor, peer.stream):
        await stream.aclose()


@pytest.mark.interpreted
async def test_where_channels_are_scarce_the_tunnels_have_them_in_turn(
    relay: RelayHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mux_carrier, "MAX_CHANNELS", 1)
    greedy, modest = await tunnels(relay, 2)
    peer = await serving(greedy, modest)
    visitors = [await connect(greedy.client_uri)]
    session = await peer.visitor(0)
    for tunnel, count in ((greedy, 3), (modest, 1)):
        for number in range(count):
            visitors.append(await connect(tunnel.client_uri))
            while tunnel.waiting != number + 1:
                await trio.lowlevel.checkpoint()
    order = []
    for _ in range(4):
        peer.mux.reset(session)
        await peer.flush()
        item = await peer.until(lambda item: isinstance(item, Opened) and item.protocol >= FIRST_ATOM)
        assert isinstance(item, Opened)
        order.append(item.protocol - FIRST_ATOM)
        session = item.session
    assert order == [0, 1, 0, 0]
    for stream in (*visitors, peer.stream):
        await stream.aclose()
