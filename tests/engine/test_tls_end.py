"""One connection in TLS for one visitor: what plain TCP does to ends, resets and slow readers, TLS does, too."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock, check_half_closeable_stream

from tests.engine.bench import NOISE, Ends, open_descriptors, read_all, read_exactly, reset, stream, tcp_pair
from tests.support.papers import Papers
from tunneld.engine.end_stream import EndStream
from tunneld.engine.engine import Cause, Relay, Side
from tunneld.engine.limits import EngineLimits
from tunneld.engine.pump import Pump
from tunneld.engine.tls_end import TlsEnd
from tunneld.tls.connection import TlsSocket

LIMIT = 30
"""Seconds, virtual ones included, after which a test has failed."""

Pairs = Callable[[], tuple[socket.socket, socket.socket]]


async def encrypted(near: socket.socket, far: socket.socket, papers: Papers) -> tuple[TlsSocket, TlsSocket]:
    """A relay's and an agent's end."""
    relay = TlsSocket(near, papers.server, server_side=True)
    agent = TlsSocket(far, papers.client, server_hostname="localhost")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(relay.shake_hands)
        nursery.start_soon(agent.shake_hands)
    return relay, agent


@dataclass
class Visit:
    """visitor ── relay ══ TLS ══ agent ── server."""

    visitor: trio.SocketStream
    server: trio.SocketStream
    relays: tuple[Relay, Relay]
    ends: tuple[Ends, Ends]

    async def causes(self) -> tuple[Cause, Cause]:
        return (await self.ends[0].one()).cause, (await self.ends[1].one()).cause


@dataclass
class Room:
    """A pump, and what is open."""

    pump: Pump
    papers: Papers
    nursery: trio.Nursery
    far: list[trio.SocketStream] = field(default_factory=list)

    async def ducts(self, pair: Pairs = tcp_pair) -> tuple[TlsEnd, TlsEnd]:
        near, far = pair()
        relay, agent = [TlsEnd(self.pump, end) for end in await encrypted(near, far, self.papers)]
        relay.start()
        agent.start()
        return relay, agent

    async def visit(
        self, *, linger: float = 10, pair: Pairs = tcp_pair, rate: float | None = None, **options: int
    ) -> Visit:
        relay, agent = await self.ducts(pair)
        (visitor, near_visitor), (server, near_server) = tcp_pair(**options), tcp_pair(**options)
        ends = Ends(), Ends()
        throttle = self.pump.limit(rate, None, lambda: None) if rate else None
        relays = (
            relay.join(near_visitor, linger=linger, on_end=ends[0].note, throttle=throttle),
            agent.join(near_server, linger=linger, on_end=ends[1].note, side=Side.SERVER),
        )
        self.far += [stream(visitor), stream(server)]
        return Visit(self.far[-2], self.far[-1], relays, ends)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers.issue(tmp_path_factory.mktemp("papers"))


@pytest.fixture(params=["as it is", "in small sips"])
async def room(request: pytest.FixtureRequest, papers: Papers) -> AsyncIterator[Room]:
    before = open_descriptors()
    limits = EngineLimits() if request.param == "as it is" else EngineLimits(buffer_size=512, turn_size=1)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            room = Room(Pump(limits), papers, nursery)
            await nursery.start(room.pump.run)
            yield room
            for far in room.far:
                await trio.aclose_forcefully(far)
        nursery.cancel_scope.cancel()
    assert open_descriptors() == before


async def say(far: trio.SocketStream, data: bytes) -> None:
    await far.send_all(data)
    await far.send_eof()


async def both_ways(visit: Visit, up: bytes, down: bytes) -> None:
    async def hear(far: trio.SocketStream, data: bytes) -> None:
        assert await read_all(far) == data

    async with trio.open_nursery() as nursery:
        nursery.start_soon(say, visit.visitor, up)
        nursery.start_soon(say, visit.server, down)
        nursery.start_soon(hear, visit.server, up)
        nursery.start_soon(hear, visit.visitor, down)
    assert await visit.causes() == (Cause.FINISHED, Cause.FINISHED)
    for relay in visit.relays:
        assert (relay.up, relay.down) == (len(up), len(down))


async def test_every_octet_arrives_both_ways_and_the_ends_after_them(room: Room) -> None:
    size = 4 if room.pump.buffer_size > 512 else 0.1
    up, down = NOISE * 4, NOISE[::-1] * 4
    await both_ways(await room.visit(), up[: int(size * len(NOISE))], down[: int(size * len(NOISE))])


@pytest.mark.parametrize("first", ["visitor", "server"])
async def test_a_side_that_has_ended_is_still_answered(room: Room, first: str) -> None:
    """Also when much stood there unread as it ended: the goodbye does not stumble over it."""
    visit = await room.visit()
    here, there = (visit.visitor, visit.server) if first == "visitor" else (visit.server, visit.visitor)
    room.nursery.start_soon(say, there, NOISE)
    await here.send_all(b"request")
    await here.send_eof()
    assert await read_all(there) == b"request"
    assert await read_all(here) == NOISE
    assert await visit.causes() == (Cause.FINISHED, Cause.FINISHED)


@pytest.mark.parametrize("first", ["visitor", "server"])
async def test_an_end_without_an_octet_is_passed_on(room: Room, first: str) -> None:
    visit = await room.visit()
    here, there = (visit.visitor, visit.server) if first == "visitor" else (visit.server, visit.visitor)
    await here.send_eof()
    assert await read_all(there) == b""
    await there.send_eof()
    assert await read_all(here) == b""
    assert await visit.causes() == (Cause.FINISHED, Cause.FINISHED)


@pytest.mark.parametrize("who", ["visitor", "server"])
async def test_a_reset_of_one_side_is_a_reset_to_the_other(room: Room, who: str) -> None:
    visit = await room.visit()
    await visit.visitor.send_all(b"hello")
    assert await read_exactly(visit.server, 5) == b"hello"
    reset(visit.visitor if who == "visitor" else visit.server)
    with pytest.raises(trio.BrokenResourceError):
        await (visit.server if who == "visitor" else visit.visitor).receive_some(1)
    for ends in visit.ends:
        end = await ends.one()
        assert (end.cause, end.side) == (Cause.RESET, Side(who))


async def test_a_half_closed_relay_without_an_octet_is_abandoned(autojump_clock: MockClock, room: Room) -> None:
    visit = await room.visit(linger=5)
    await visit.visitor.send_eof()
    assert Cause.LINGERED in await visit.causes()


async def test_a_slow_reader_stops_its_sender_and_loses_nothing(room: Room) -> None:
    small = 64 * 1024
    visit = await room.visit(SO_SNDBUF=small, SO_RCVBUF=small, pair=lambda: tcp_pair(SO_SNDBUF=small, SO_RCVBUF=small))
    payload, sent = NOISE * 8, 0
    room.nursery.start_soon(say, visit.server, payload)
    await trio.testing.wait_all_tasks_blocked(0.2)
    sent = visit.relays[1].down
    assert sent < 3 * 2 * 2 * small + 3 * (1 << 18)  # three connections' buffers, and what each end holds
    assert await read_all(visit.visitor) == payload


async def test_a_throttle_holds_for_both_directions(autojump_clock: MockClock, room: Room) -> None:
    visit = await room.visit(rate=100_000)
    began = trio.current_time()
    await both_ways(visit, NOISE[:100_000], NOISE[:100_000])
    assert 1.8 < trio.current_time() - began < 3


async def test_dropping_a_relay_drops_its_other_end_and_nothing_else(room: Room) -> None:
    dropped, other = await room.visit(), await room.visit()
    await dropped.visitor.send_all(b"x")
    assert await read_exactly(dropped.server, 1) == b"x"
    dropped.relays[0].drop()
    assert await dropped.ends[1].one()
    with pytest.raises(trio.BrokenResourceError):
        await dropped.server.receive_some(1)
    await both_ways(other, b"hello", b"world")


async def test_a_goodbye_that_nobody_takes_is_not_waited_for_for_ever(autojump_clock: MockClock, room: Room) -> None:
    """Both have ended, the peer reads nothing, and nobody but the duct is left."""
    relay, agent = await encrypted(*tcp_pair(SO_SNDBUF=4096, SO_RCVBUF=4096), room.papers)
    duct = TlsEnd(room.pump, relay)
    duct.start()
    duct.linger = 5
    for _ in range(4):
        duct.write(memoryview(NOISE)[:50_000])
    duct.finish()
    agent.finish()
    assert agent.flush()
    await trio.sleep(4)
    assert relay.pending_output
    assert relay.connection.fileno() != -1
    await trio.sleep(2)
    assert relay.connection.fileno() == -1
    agent.close()


async def test_a_connection_that_is_cut_is_a_prefix_and_a_reset(papers: Papers) -> None:
    """An end of file that anybody on the way can make never passes for an end: cut after every so many octets."""
    text = NOISE[:3000]
    for cut in range(0, 3600, 97):
        async with trio.open_nursery() as nursery:
            room = Room(Pump(EngineLimits()), papers, nursery)
            await nursery.start(room.pump.run)
            relay, ends, visitor, agent, inside = await _through_a_wire(room)
            agent.write(memoryview(text))
            agent.finish()
            raw = agent._unsent.tobytes() + agent._outgoing.read()
            await inside.send_all(raw[:cut])
            await inside.send_eof()
            heard = b""
            try:
                async for chunk in visitor:
                    heard += chunk
                ended = True
            except trio.BrokenResourceError:
                ended = False
            assert text.startswith(heard)
            assert ended == (cut >= len(raw))
            if not ended:
                assert (await ends.one()).cause is Cause.RESET
            relay.drop()
            await trio.aclose_forcefully(visitor)
            await trio.aclose_forcefully(inside)
            agent.close()
            nursery.cancel_scope.cancel()


async def _through_a_wire(room: Room) -> tuple[Relay, Ends, trio.SocketStream, TlsSocket, trio.SocketStream]:
    """A relay whose agent's octets we carry ourselves after the handshake."""
    near, far = tcp_pair()
    relay, agent = await encrypted(near, far, room.papers)
    await agent_has_read_its_tickets(agent)
    duct = TlsEnd(room.pump, relay)
    duct.start()
    visitor, near_visitor = tcp_pair()
    ends = Ends()
    joined = duct.join(near_visitor, linger=30, on_end=ends.note)
    return joined, ends, stream(visitor), agent, stream(socket.socket(fileno=socket.dup(far.fileno())))


async def agent_has_read_its_tickets(agent: TlsSocket) -> None:
    with trio.move_on_after(0.05):
        await agent.receive(1)


async def test_octets_that_are_changed_on_the_way_break_the_connection(papers: Papers) -> None:
    dice = random.Random(3)
    for _ in range(20):
        async with trio.open_nursery() as nursery:
            room = Room(Pump(EngineLimits()), papers, nursery)
            await nursery.start(room.pump.run)
            _relay, ends, visitor, agent, inside = await _through_a_wire(room)
            agent.write(memoryview(NOISE[:3000]))
            raw = bytearray(agent._outgoing.read())
            raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
            await inside.send_all(raw + agent._outgoing.read())
            await inside.aclose()
            with pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)
            assert (await ends.one()).cause is Cause.RESET
            await trio.aclose_forcefully(visitor)
            agent.close()
            nursery.cancel_scope.cancel()


async def test_whoever_spoke_before_it_was_joined_is_heard_first(room: Room) -> None:
    relay, agent = await room.ducts()
    agent.send(b"220 hidden.example ESMTP\r\n")
    agent.finish()
    while not relay.buffered:
        await trio.lowlevel.checkpoint()
    visitor, near_visitor = tcp_pair()
    room.far.append(stream(visitor))
    ends = Ends()
    relay.join(near_visitor, linger=10, on_end=ends.note)
    assert await read_all(room.far[0]) == b"220 hidden.example ESMTP\r\n"


async def test_an_end_that_is_told_twice_is_passed_on_once(room: Room) -> None:
    """Somebody who only said good-bye is handed over while what stood ahead of the visitor is offered."""
    relay, agent = await room.ducts()
    agent.finish()
    while not relay.eof_received:
        await trio.lowlevel.checkpoint()
    visitor, near_visitor = tcp_pair()
    room.far.append(stream(visitor))
    ends = Ends()
    relay.join(near_visitor, linger=10, on_end=ends.note)
    relay.deliver_buffered()
    assert await read_all(room.far[0]) == b""
    await say(room.far[0], b"answer")
    while agent.buffered != b"answer":
        await trio.lowlevel.checkpoint()
    assert (await ends.one()).cause is Cause.FINISHED


async def test_it_is_a_stream_like_any_other(room: Room) -> None:
    async def make() -> tuple[EndStream, EndStream]:
        near, far = await room.ducts()
        return EndStream(near), EndStream(far)

    await check_half_closeable_stream(make, None)


async def test_a_goodbye_does_not_stumble_over_what_has_come_and_was_not_read(papers: Papers) -> None:
    relay, agent = await encrypted(*tcp_pair(), papers)
    await relay.send_all(NOISE[:50_000])
    assert await agent.receive(10) == NOISE[:10]
    agent.finish()
    assert agent.flush()
    assert await relay.receive(1) == b""
    heard = NOISE[:10]
    while len(heard) < 50_000:
        heard += await agent.receive(50_000)
    assert heard == NOISE[:50_000]
    agent.close()
    relay.close()
