"""Carriers over real sockets, plain and in TLS: many visitors, one connection, nobody in another's way."""

from __future__ import annotations

import array
import fcntl
import gc
import random
import socket
import termios
from collections import Counter
from collections.abc import Callable

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock, check_half_closeable_stream

from tests.engine.bench import NOISE, read_all, read_exactly, reset, stream, tcp_pair
from tests.mux.bench import Person, Two, Visit
from tunneld.engine.end_relay import EndRelay
from tunneld.engine.end_stream import EndStream
from tunneld.engine.engine import Cause, Relay, RelayEnd, Side
from tunneld.engine.failures import RESET_ON_CLOSE
from tunneld.errors import LimitReachedError
from tunneld.mux.carrier import MAX_CHANNELS, Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.connection import Connection
from tunneld.mux.limits import CarrierLimits
from tunneld.wire.webmux.events import Opened
from tunneld.wire.webmux.mux import Mux


async def is_dropped(far: trio.SocketStream) -> bool:
    try:
        while await far.receive_some(65536):
            pass
    except trio.BrokenResourceError:
        pass
    return True


async def ends_of(visit: Visit) -> tuple[Cause, Cause]:
    return (await visit.ends[0].one()).cause, (await visit.ends[1].one()).cause


async def both_ways(visit: Visit, up: bytes, down: bytes) -> None:
    """Everything arrives, in both directions at once, and both ends close."""

    async def say(far: trio.SocketStream, data: bytes) -> None:
        await far.send_all(data)
        await far.send_eof()

    async def hear(far: trio.SocketStream, data: bytes) -> None:
        assert await read_all(far) == data

    async with trio.open_nursery() as nursery:
        nursery.start_soon(say, visit.visitor, up)
        nursery.start_soon(say, visit.server, down)
        nursery.start_soon(hear, visit.server, up)
        nursery.start_soon(hear, visit.visitor, down)
    assert await ends_of(visit) == (Cause.FINISHED, Cause.FINISHED)
    for relay in visit.relays:
        assert (relay.up, relay.down) == (len(up), len(down))


# One visitor


async def test_a_visit_that_is_over_leaves_nothing_to_the_garbage_collector(two: Two) -> None:
    """Thousands a second would have it look through everything again and again, while everybody waits."""
    over = [trio.Event(), trio.Event()]

    def tell(event: trio.Event) -> Callable[[Relay, RelayEnd], None]:
        return lambda _relay, _how: event.set()

    async def visit() -> None:
        channels, pairs = await two.channels(), (tcp_pair(), tcp_pair())
        for channel, (far, near), side, event in zip(channels, pairs, (Side.VISITOR, Side.SERVER), over, strict=True):
            channel.join(near, linger=10, side=side, on_end=tell(event))
            two.far.append(stream(far))
            await two.far[-1].send_eof()

    gc.collect()
    gc.disable()
    try:
        await visit()
        for event in over:
            await event.wait()
        left = Counter(type(thing) for thing in gc.get_objects())
        assert (left[EndRelay], left[Channel]) == (0, 0)
    finally:
        gc.enable()


async def test_every_octet_arrives_both_ways_and_the_ends_after_them(two: Two) -> None:
    visit = await two.visit()
    await both_ways(visit, NOISE * 8, NOISE[::-1] * 8)
    assert not two.relay.channels
    assert not two.agent.channels
    assert (two.relay.mux.live, two.agent.mux.live) == (0, 0)


@pytest.mark.parametrize("first", ["visitor", "server"])
async def test_one_direction_goes_on_when_the_other_has_ended(two: Two, first: str) -> None:
    visit = await two.visit()
    here, there = (visit.visitor, visit.server) if first == "visitor" else (visit.server, visit.visitor)
    await here.send_eof()
    assert await read_all(there) == b""
    await there.send_all(b"still here")
    assert await read_exactly(here, 10) == b"still here"
    await there.send_eof()
    assert await ends_of(visit) == (Cause.FINISHED, Cause.FINISHED)


@pytest.mark.parametrize("who", ["visitor", "server"])
async def test_a_reset_of_one_side_is_a_reset_to_the_other(two: Two, who: str) -> None:
    visit = await two.visit()
    await visit.visitor.send_all(b"hello")
    assert await read_exactly(visit.server, 5) == b"hello"
    reset(visit.visitor if who == "visitor" else visit.server)
    with pytest.raises(trio.BrokenResourceError):
        await (visit.server if who == "visitor" else visit.visitor).receive_some(1)
    for ends in visit.ends:
        end = await ends.one()
        assert (end.cause, end.side) == (Cause.RESET, Side(who))
    assert "connection reset" in str(visit.ends[0].told[0][1])
    assert not two.relay.channels
    assert not two.agent.channels


async def test_what_is_said_first_comes_first_also_where_no_credit_is_there_yet(two: Two) -> None:
    near, far = await two.channels()
    header, text = bytes(range(256)) * 500, b"and then the visitor"  # more than the draft's first credit
    near.send(header)
    visitor, near_visitor = tcp_pair()
    near.join(near_visitor, linger=5, on_end=lambda _relay, _end: None)
    two.far.append(stream(visitor))
    await two.far[0].send_all(text)
    assert await read_exactly(EndStream(far), len(header) + len(text)) == header + text


async def test_a_half_closed_relay_without_a_byte_is_abandoned(autojump_clock: MockClock, two: Two) -> None:
    visit = await two.visit(linger=5)
    await visit.visitor.send_eof()
    assert Cause.LINGERED in await ends_of(visit)
    assert await is_dropped(visit.server)


async def test_dropping_a_relay_drops_its_other_end_and_nothing_else(two: Two) -> None:
    dropped, other = await two.visit(SO_RCVBUF=4096, SO_SNDBUF=4096), await two.visit()
    with trio.move_on_after(0.2):
        await dropped.server.send_all(NOISE)  # more than the visitor takes: much is held
    dropped.relays[0].drop()
    assert await dropped.ends[1].one()
    assert await is_dropped(dropped.server)
    await both_ways(other, b"hello", b"world")


# Many


async def test_a_visitor_who_reads_nothing_holds_up_no_other_and_is_held_within_its_window(two: Two) -> None:
    stuck = [await two.visit(SO_RCVBUF=4096) for _ in range(5)]
    async with trio.open_nursery() as nursery:
        for visit in stuck:
            nursery.start_soon(visit.server.send_all, NOISE * 16)
        await both_ways(await two.visit(), NOISE * 4, NOISE * 4)
        limits = two.relay.limits
        for channel in two.relay.channels.values():
            assert len(channel.buffered) <= channel.window.size <= limits.max_window
        assert sum(len(c.buffered) for c in two.relay.channels.values()) <= 5 * limits.first_window + limits.memory
        assert len(two.agent.mux.outgoing) <= limits.pause_at + limits.quantum
        nursery.cancel_scope.cancel()


async def test_the_shares_of_bulk_transfers_differ_little(two: Two) -> None:
    visits = [await two.visit() for _ in range(4)]
    counts = [0] * len(visits)

    async def count(number: int, visitor: trio.SocketStream) -> None:
        while sum(counts) < 64 << 20:
            counts[number] += len(await visitor.receive_some(65536))

    async with trio.open_nursery() as nursery:
        for number, visit in enumerate(visits):
            nursery.start_soon(visit.server.send_all, NOISE * 64)
            nursery.start_soon(count, number, visit.visitor)
        while sum(counts) < 64 << 20:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert min(counts) > max(counts) / 4


async def test_a_full_carrier_opens_no_channel_until_one_ends(two: Two) -> None:
    visits = [await two.visit() for _ in range(MAX_CHANNELS)]
    assert two.relay.channels_left == 0
    with pytest.raises(LimitReachedError):
        two.relay.open(80)
    await both_ways(visits.pop(), b"up", b"down")
    while not two.relay.can_open:
        await trio.lowlevel.checkpoint()
    await both_ways(await two.visit(), b"up", b"down")
    two.relay.heartbeat.ping_now()  # also on a full one
    while not two.relays_owner.answers:
        await trio.lowlevel.checkpoint()


async def test_thousands_of_visitors_one_after_another_leave_nothing(two: Two) -> None:
    dice = random.Random(1)
    for _ in range(600):
        visit = await two.visit()
        await visit.visitor.send_all(b"ping")
        assert await read_exactly(visit.server, 4) == b"ping"
        if dice.random() < 0.5:
            reset(visit.visitor)
        else:
            await visit.visitor.aclose()
        await visit.server.aclose()
        await ends_of(visit)
        del two.far[:]
    assert not two.relay.channels
    assert not two.agent.channels
    assert two.relay.channels_left == MAX_CHANNELS
    assert two.relay._budget.left == two.relay.limits.memory


# Bad luck and bad peers


@pytest.mark.parametrize("who", ["relay", "agent"])
async def test_a_lost_carrier_drops_its_relays_and_says_why(two: Two, who: str) -> None:
    visits = [await two.visit() for _ in range(3)]
    getattr(two, who).close("told to")
    for visit in visits:
        assert set(await ends_of(visit)) == {Cause.RESET}
        assert "the carrier was lost" in str(visit.ends[0].told[0][1])
        assert await is_dropped(visit.visitor)
        assert await is_dropped(visit.server)
    await two.relays_owner.over.wait()
    await two.agents_owner.over.wait()
    assert (two.relays_owner if who == "relay" else two.agents_owner).reason == "told to"
    assert two.relays_owner.reason
    assert two.agents_owner.reason
    assert not two.relay.can_open
    assert two.relay.channels_left == 0


class Faulty:
    """A user with a bug in everything."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []

    def on_data(self, data: memoryview) -> int:
        raise ZeroDivisionError

    def on_writable(self) -> None:
        raise ZeroDivisionError

    def on_eof(self) -> None:
        raise ZeroDivisionError

    def on_reset(self, error: OSError) -> None:
        raise ZeroDivisionError

    def on_internal_error(self, error: Exception) -> None:
        self.failures.append(error)


@pytest.mark.parametrize("what", ["data", "end", "reset", "room"])
async def test_a_bug_in_a_channels_user_costs_that_channel(two: Two, what: str) -> None:
    near, far = await two.channels()
    far.handler = faulty = Faulty()
    other = await two.visit()
    if what == "data":
        near.send(b"x")
    elif what == "end":
        near.finish()
    elif what == "reset":
        near.reset("gone")
    else:
        far.notify_writable()
    while not faulty.failures:
        await trio.lowlevel.checkpoint()
    assert far.closed
    await both_ways(other, b"hello", b"world")
    assert not two.agent.over


async def raw_peer(two: Two) -> tuple[socket.socket, Carrier, Person]:
    """A carrier of the relay's whose peer is a bare socket."""
    far, near = tcp_pair()
    person = Person()
    return far, Carrier(two.pump, Connection(near), person, initiator=False, limits=two.relay.limits), person


@pytest.mark.parametrize("seed", range(8))
async def test_garbage_costs_its_carrier_and_nothing_else(two: Two, seed: int) -> None:
    far, carrier, person = await raw_peer(two)
    dice = random.Random(seed)
    with far:
        async with trio.open_nursery() as nursery:
            send = stream(far)
            for _ in range(200):
                try:
                    await send.send_all(dice.randbytes(4096))
                except trio.BrokenResourceError:
                    break
            nursery.cancel_scope.cancel()
        await send.aclose()
    await person.over.wait()
    assert carrier.over
    await both_ways(await two.visit(), b"hello", b"world")


async def test_a_peer_that_grants_one_octet_at_a_time_gets_everything(two: Two) -> None:
    far, carrier, _ = await raw_peer(two)
    mux, peer = Mux(initiator=True), stream(far)
    mux.set_mss(1)
    got = bytearray()
    near = carrier.open(80)
    visitor, near_visitor = tcp_pair()
    near.join(near_visitor, linger=5, on_end=lambda _relay, _end: None)
    text = NOISE[:40_000]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream(visitor).send_all, text)
        while len(got) < len(text):
            await peer.send_all(bytes(mux.outgoing))
            mux.outgoing.clear()
            for item in mux.receive(bytes(await peer.receive_some(65536))):
                if isinstance(item, tuple):
                    got += item[1]
                    mux.grant(item[0], len(item[1]))
                elif isinstance(item, Opened):
                    mux.accept(item.session)
    assert got == text
    carrier.close()
    visitor.close()
    far.close()


async def test_a_peer_that_reads_nothing_stops_its_visitors_and_no_memory_grows(two: Two) -> None:
    far, carrier, _ = await raw_peer(two)
    visitors = []
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            visitor, near_visitor = tcp_pair()
            carrier.open(80).join(near_visitor, linger=5, on_end=lambda _relay, _end: None)
            visitors.append(stream(visitor))
            nursery.start_soon(visitors[-1].send_all, NOISE * 8)
        await both_ways(await two.visit(), NOISE, NOISE)
        limits = carrier.limits
        assert len(carrier.mux.outgoing) <= limits.pause_at + limits.quantum
        nursery.cancel_scope.cancel()
    carrier.close()
    far.close()
    for each in visitors:
        await trio.aclose_forcefully(each)


@pytest.mark.limits(heartbeat=4.0, patience=1.0)
async def test_a_hung_peer_is_given_up_and_an_idle_one_is_not(autojump_clock: MockClock, two: Two) -> None:
    far, carrier, person = await raw_peer(two)
    await person.over.wait()
    assert "heartbeat" in (person.reason or "")
    assert person.silences == 1
    assert not carrier.can_open
    assert not two.relay.over
    assert two.relay.answering
    far.close()


async def test_a_uri_is_defined_and_the_answer_comes_behind_it(two: Two) -> None:
    two.agent.define_endpoint("webmux://relay.example.org:7012/KEY")
    two.agent.heartbeat.ping_now()
    while not two.agents_owner.answers:
        await two.agents_owner.stirred.wait()
    assert two.relays_owner.uris == ["webmux://relay.example.org:7012/KEY"]


# As a stream


async def test_a_channel_is_a_half_closeable_stream(two: Two) -> None:
    async def make() -> tuple[EndStream, EndStream]:
        near, far = await two.channels()
        return EndStream(near), EndStream(far)

    async def clog() -> tuple[EndStream, EndStream]:
        pair = await make()
        for one in pair:
            with trio.move_on_after(0.05):
                await one.send_all(NOISE)
        return pair

    await check_half_closeable_stream(make, clog)


async def test_a_cancelled_send_harms_its_channel_alone(two: Two) -> None:
    near, far = (EndStream(channel) for channel in await two.channels())
    with trio.move_on_after(0.05):
        await near.send_all(NOISE * 4)
    await both_ways(await two.visit(), NOISE, NOISE)
    await far.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await near.send_all(NOISE * 64)


def test_the_limits_of_the_default_are_within_each_other() -> None:
    limits = CarrierLimits()
    assert limits.first_window <= limits.max_window <= limits.memory
    assert limits.quantum <= limits.pause_at
    assert limits.patience <= limits.heartbeat


# What is said is written


def unread(carrier: Carrier) -> int:
    """Octets that wait in the kernel to be read."""
    count = array.array("i", [0])
    fcntl.ioctl(carrier._fd, termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize(
    "at_once",
    [
        pytest.param(True, marks=pytest.mark.limits(gather=0.0)),
        pytest.param(False, marks=pytest.mark.limits(gather=60.0)),
    ],
)
async def test_what_is_said_waits_for_more_and_no_longer_than_gather(two: Two, at_once: bool) -> None:
    """Nobody else has a turn between the two looks, as if many others were served."""
    before = unread(two.agent)
    two.relay.open(80)
    assert (unread(two.agent) > before) is at_once
    await two.agents_owner.channel()


@pytest.mark.limits(gather=60.0, pause_at=4096)
async def test_there_is_no_room_where_asking_for_it_finds_the_connection_broken(two: Two) -> None:
    near, _ = await two.channels()
    await trio.testing.wait_all_tasks_blocked()
    near.write(memoryview(b"x"))
    connection = two.agent._link.connection
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    two.agent.close()
    assert near.send_capacity() == 0
    assert near.closed


# With a throttle


@pytest.mark.limits(heartbeat=1e6)
async def test_a_throttle_holds_for_both_directions_together(autojump_clock: MockClock, two: Two) -> None:
    throttle = two.pump.limit(100_000, None, lambda: None)
    visit = await two.visit(throttle=throttle)
    began = trio.current_time()
    await both_ways(visit, NOISE[:250_000], NOISE[:250_000])
    assert 4.5 <= trio.current_time() - began <= 7


@pytest.mark.limits(heartbeat=1e6)
async def test_a_quota_ends_where_it_says(autojump_clock: MockClock, two: Two) -> None:
    told = trio.Event()
    throttle = two.pump.limit(None, 100_000, told.set)
    visit, idle = await two.visit(throttle=throttle), await two.visit(throttle=throttle)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(visit.server.send_all, NOISE[:100_001])
        assert await read_exactly(visit.visitor, 100_000) == NOISE[:100_000]
        await told.wait()
        nursery.cancel_scope.cancel()
    for each in (visit, idle):
        each.relays[0].drop()


async def test_the_question_for_a_sign_of_life_is_nobodys_visitor(two: Two) -> None:
    """Who owns the other end would serve it like one."""
    for carrier in (two.relay, two.agent):
        carrier.request_ack()
    while not (two.relays_owner.answers and two.agents_owner.answers):
        await trio.lowlevel.checkpoint()
    assert (two.relay.channels, two.agent.channels) == ({}, {})
    for owner in (two.relays_owner, two.agents_owner):
        with pytest.raises(trio.WouldBlock):
            owner.channel_nowait()


async def test_a_visitor_whose_octets_are_dropped_hears_a_reset_and_no_end(two: Two) -> None:
    """An end would say that this was all."""
    near, far = await two.channels()
    visitor, near_visitor = tcp_pair(SO_RCVBUF=4096, SO_SNDBUF=4096)
    relay = near.join(near_visitor, linger=5, on_end=lambda _relay, _end: None)
    two.far.append(stream(visitor))
    sender = EndStream(far)
    with trio.move_on_after(5):
        await sender.send_all(NOISE)
        while not near.buffered:
            await trio.lowlevel.checkpoint()
    assert near.buffered
    relay.drop()
    with pytest.raises(trio.BrokenResourceError):
        await read_all(two.far[0])
