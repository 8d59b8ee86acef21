"""Carriers on real sockets, plain and TLS: many visitors on one connection, and none delays another."""

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
from tests.mux.bench import CarrierPair, RecordingOwner, RelayedVisit
from tunneld.engine.end_stream import EndStream
from tunneld.engine.engine import Cause, Relay, RelayEnd, Side
from tunneld.engine.failures import RESET_ON_CLOSE
from tunneld.engine.relay import JoinedEnds
from tunneld.errors import LimitReachedError
from tunneld.mux.carrier import MAX_CHANNELS, Carrier
from tunneld.mux.connection import Connection
from tunneld.mux.limits import CarrierLimits
from tunneld.mux.webmux_channel import WebMuxChannel
from tunneld.wire.webmux.events import Opened
from tunneld.wire.webmux.mux import Mux


async def is_over(far: trio.SocketStream) -> bool:
    try:
        while await far.receive_some(65536):
            pass
    except trio.BrokenResourceError:
        pass
    return True


async def causes_of(visit: RelayedVisit) -> tuple[Cause, Cause]:
    return (await visit.ends[0].one()).cause, (await visit.ends[1].one()).cause


async def exchange(visit: RelayedVisit, up: bytes, down: bytes) -> None:
    """Send in both directions at once and check that everything arrives and that both relays finish."""

    async def send(far: trio.SocketStream, data: bytes) -> None:
        await far.send_all(data)
        await far.send_eof()

    async def receive(far: trio.SocketStream, data: bytes) -> None:
        assert await read_all(far) == data

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, visit.visitor, up)
        nursery.start_soon(send, visit.server, down)
        nursery.start_soon(receive, visit.server, up)
        nursery.start_soon(receive, visit.visitor, down)
    assert await causes_of(visit) == (Cause.FINISHED, Cause.FINISHED)
    for relay in visit.relays:
        assert (relay.up, relay.down) == (len(up), len(down))


# One visitor


async def test_a_finished_visit_leaves_no_garbage_cycles(pair: CarrierPair) -> None:
    """With thousands of visits per second the garbage collector would run all the time and stall every relay."""
    ended = [trio.Event(), trio.Event()]

    def setter(event: trio.Event) -> Callable[[Relay, RelayEnd], None]:
        return lambda _relay, _how: event.set()

    async def visit() -> None:
        channels, pairs = await pair.channels(), (tcp_pair(), tcp_pair())
        for channel, (far, near), side, event in zip(channels, pairs, (Side.VISITOR, Side.SERVER), ended, strict=True):
            sides = (near, channel) if side is Side.VISITOR else (channel, near)
            pair.pump.join(*sides, linger=10, on_end=setter(event))
            pair.far.append(stream(far))
            await pair.far[-1].send_eof()

    gc.collect()
    gc.disable()
    try:
        await visit()
        for event in ended:
            await event.wait()
        alive = Counter(type(thing) for thing in gc.get_objects())
        assert (alive[JoinedEnds], alive[WebMuxChannel]) == (0, 0)
    finally:
        gc.enable()


async def test_every_byte_arrives_in_both_directions_and_then_the_ends(pair: CarrierPair) -> None:
    visit = await pair.visit()
    await exchange(visit, NOISE * 8, NOISE[::-1] * 8)
    assert not pair.relay.channels
    assert not pair.agent.channels
    assert (pair.relay.mux.live, pair.agent.mux.live) == (0, 0)


@pytest.mark.parametrize("first", ["visitor", "server"])
async def test_one_direction_goes_on_when_the_other_has_ended(pair: CarrierPair, first: str) -> None:
    visit = await pair.visit()
    here, there = (visit.visitor, visit.server) if first == "visitor" else (visit.server, visit.visitor)
    await here.send_eof()
    assert await read_all(there) == b""
    await there.send_all(b"still here")
    assert await read_exactly(here, 10) == b"still here"
    await there.send_eof()
    assert await causes_of(visit) == (Cause.FINISHED, Cause.FINISHED)


@pytest.mark.parametrize("side", ["visitor", "server"])
async def test_a_reset_of_one_side_resets_the_other(pair: CarrierPair, side: str) -> None:
    visit = await pair.visit()
    await visit.visitor.send_all(b"hello")
    assert await read_exactly(visit.server, 5) == b"hello"
    reset(visit.visitor if side == "visitor" else visit.server)
    with pytest.raises(trio.BrokenResourceError):
        await (visit.server if side == "visitor" else visit.visitor).receive_some(1)
    for ends in visit.ends:
        end = await ends.one()
        assert (end.cause, end.side) == (Cause.RESET, Side(side))
    assert "connection reset" in str(visit.ends[0].told[0][1])
    assert not pair.relay.channels
    assert not pair.agent.channels


async def test_a_header_is_sent_first_even_if_it_exceeds_the_credit(pair: CarrierPair) -> None:
    near, far = await pair.channels()
    header, text = bytes(range(256)) * 500, b"and then the visitor"  # more than the draft's first credit
    near.send(header)
    visitor, near_visitor = tcp_pair()
    pair.pump.join(near_visitor, near, linger=5, on_end=lambda _relay, _end: None)
    pair.far.append(stream(visitor))
    await pair.far[0].send_all(text)
    assert await read_exactly(EndStream(far), len(header) + len(text)) == header + text


async def test_a_half_closed_relay_without_traffic_is_ended_after_linger(
    autojump_clock: MockClock, pair: CarrierPair
) -> None:
    visit = await pair.visit(linger=5)
    await visit.visitor.send_eof()
    assert Cause.LINGERED in await causes_of(visit)
    assert await is_over(visit.server)


async def test_dropping_a_relay_drops_its_other_end_and_nothing_else(pair: CarrierPair) -> None:
    dropped, other = await pair.visit(SO_RCVBUF=4096, SO_SNDBUF=4096), await pair.visit()
    with trio.move_on_after(0.2):
        await dropped.server.send_all(NOISE)  # more than the visitor reads: much is buffered
    dropped.relays[0].drop()
    assert await dropped.ends[1].one()
    assert await is_over(dropped.server)
    await exchange(other, b"hello", b"world")


# Many


async def test_a_visitor_that_reads_nothing_delays_no_other_and_is_buffered_within_its_window(
    pair: CarrierPair,
) -> None:
    stuck = [await pair.visit(SO_RCVBUF=4096) for _ in range(5)]
    async with trio.open_nursery() as nursery:
        for visit in stuck:
            nursery.start_soon(visit.server.send_all, NOISE * 16)
        await exchange(await pair.visit(), NOISE * 4, NOISE * 4)
        limits = pair.relay.limits
        for channel in pair.relay.channels.values():
            assert len(channel.buffered) <= channel.window.size <= limits.max_window
        buffered = sum(len(channel.buffered) for channel in pair.relay.channels.values())
        assert buffered <= 5 * limits.initial_window + limits.window_budget
        assert len(pair.agent.mux.outgoing) <= limits.pause_at + limits.quantum
        nursery.cancel_scope.cancel()


async def test_bulk_transfers_share_the_carrier_fairly(pair: CarrierPair) -> None:
    visits = [await pair.visit() for _ in range(4)]
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


async def test_a_full_carrier_opens_no_channel_until_one_ends(pair: CarrierPair) -> None:
    visits = [await pair.visit() for _ in range(MAX_CHANNELS)]
    assert pair.relay.channels_left == 0
    with pytest.raises(LimitReachedError):
        pair.relay.open(80)
    await exchange(visits.pop(), b"up", b"down")
    while not pair.relay.can_open:
        await trio.lowlevel.checkpoint()
    await exchange(await pair.visit(), b"up", b"down")
    pair.relay.heartbeat.ping_now()  # also on a full carrier
    while not pair.relay_owner.pongs:
        await trio.lowlevel.checkpoint()


async def test_hundreds_of_visitors_one_after_another_leave_nothing(pair: CarrierPair) -> None:
    dice = random.Random(1)
    for _ in range(600):
        visit = await pair.visit()
        await visit.visitor.send_all(b"ping")
        assert await read_exactly(visit.server, 4) == b"ping"
        if dice.random() < 0.5:
            reset(visit.visitor)
        else:
            await visit.visitor.aclose()
        await visit.server.aclose()
        await causes_of(visit)
        del pair.far[:]
    assert not pair.relay.channels
    assert not pair.agent.channels
    assert pair.relay.channels_left == MAX_CHANNELS
    assert pair.relay._budget.available == pair.relay.limits.window_budget


# Failures and hostile peers


@pytest.mark.parametrize("side", ["relay", "agent"])
async def test_a_lost_carrier_ends_its_relays_with_a_reason(pair: CarrierPair, side: str) -> None:
    visits = [await pair.visit() for _ in range(3)]
    getattr(pair, side).close("closed by the test")
    for visit in visits:
        assert set(await causes_of(visit)) == {Cause.RESET}
        assert "multiplexed connection lost" in str(visit.ends[0].told[0][1])
        assert await is_over(visit.visitor)
        assert await is_over(visit.server)
    await pair.relay_owner.closed.wait()
    await pair.agent_owner.closed.wait()
    assert (pair.relay_owner if side == "relay" else pair.agent_owner).reason == "closed by the test"
    assert pair.relay_owner.reason
    assert pair.agent_owner.reason
    assert not pair.relay.can_open
    assert pair.relay.channels_left == 0


class Faulty:
    """A handler with a bug in every callback."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []

    def on_data(self, data: memoryview) -> int:
        raise ZeroDivisionError

    def on_writable(self) -> None:
        raise ZeroDivisionError

    def on_eof(self) -> None:
        raise ZeroDivisionError

    def on_write_failed(self, error: OSError) -> None:
        raise ZeroDivisionError

    def on_reset(self, error: OSError) -> None:
        raise ZeroDivisionError

    def on_internal_error(self, error: Exception) -> None:
        self.failures.append(error)


@pytest.mark.parametrize("event", ["data", "eof", "reset", "writable"])
async def test_a_bug_in_a_channels_handler_costs_only_that_channel(pair: CarrierPair, event: str) -> None:
    near, far = await pair.channels()
    far.handler = faulty = Faulty()
    other = await pair.visit()
    if event == "data":
        near.send(b"x")
    elif event == "eof":
        near.finish()
    elif event == "reset":
        near.reset("gone")
    else:
        far.notify_writable()
    while not faulty.failures:
        await trio.lowlevel.checkpoint()
    assert far.closed
    await exchange(other, b"hello", b"world")
    assert not pair.agent.over


async def raw_peer(pair: CarrierPair) -> tuple[socket.socket, Carrier, RecordingOwner]:
    """A carrier of the relay, whose peer is a bare socket, and the carrier's owner."""
    far, near = tcp_pair()
    owner = RecordingOwner()
    return far, Carrier(pair.pump, Connection(near), owner, initiator=False, limits=pair.relay.limits), owner


@pytest.mark.parametrize("seed", range(8))
async def test_garbage_closes_its_carrier_and_nothing_else(pair: CarrierPair, seed: int) -> None:
    far, carrier, owner = await raw_peer(pair)
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
    await owner.closed.wait()
    assert carrier.over
    await exchange(await pair.visit(), b"hello", b"world")


async def test_a_peer_with_an_mss_of_one_byte_gets_everything(pair: CarrierPair) -> None:
    far, carrier, _ = await raw_peer(pair)
    mux, peer = Mux(initiator=True), stream(far)
    mux.set_mss(1)
    got = bytearray()
    near = carrier.open(80)
    visitor, near_visitor = tcp_pair()
    pair.pump.join(near_visitor, near, linger=5, on_end=lambda _relay, _end: None)
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


async def test_a_peer_that_reads_nothing_pauses_its_visitors_and_memory_is_bounded(pair: CarrierPair) -> None:
    far, carrier, _ = await raw_peer(pair)
    visitors = []
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            visitor, near_visitor = tcp_pair()
            pair.pump.join(near_visitor, carrier.open(80), linger=5, on_end=lambda _relay, _end: None)
            visitors.append(stream(visitor))
            nursery.start_soon(visitors[-1].send_all, NOISE * 8)
        await exchange(await pair.visit(), NOISE, NOISE)
        limits = carrier.limits
        assert len(carrier.mux.outgoing) <= limits.pause_at + limits.quantum
        nursery.cancel_scope.cancel()
    carrier.close()
    far.close()
    for each in visitors:
        await trio.aclose_forcefully(each)


@pytest.mark.limits(heartbeat=4.0, patience=1.0)
async def test_a_hung_peer_is_given_up_and_an_idle_one_is_not(autojump_clock: MockClock, pair: CarrierPair) -> None:
    far, carrier, owner = await raw_peer(pair)
    await owner.closed.wait()
    assert "heartbeat" in (owner.reason or "")
    assert owner.unresponsive_calls == 1
    assert not carrier.can_open
    assert not pair.relay.over
    assert pair.relay.answering
    far.close()


async def test_an_endpoint_is_announced_before_the_ping_is_answered(pair: CarrierPair) -> None:
    pair.agent.define_endpoint("webmux://relay.example.org:7012/KEY")
    pair.agent.heartbeat.ping_now()
    while not pair.agent_owner.pongs:
        await pair.agent_owner.called.wait()
    assert pair.relay_owner.uris == ["webmux://relay.example.org:7012/KEY"]


# Channels as Trio streams


async def test_a_channel_is_a_half_closeable_stream(pair: CarrierPair) -> None:
    async def make() -> tuple[EndStream, EndStream]:
        near, far = await pair.channels()
        return EndStream(near), EndStream(far)

    async def clog() -> tuple[EndStream, EndStream]:
        ends = await make()
        for one in ends:
            with trio.move_on_after(0.05):
                await one.send_all(NOISE)
        return ends

    await check_half_closeable_stream(make, clog)


async def test_a_cancelled_send_breaks_only_its_channel(pair: CarrierPair) -> None:
    near, far = (EndStream(channel) for channel in await pair.channels())
    with trio.move_on_after(0.05):
        await near.send_all(NOISE * 4)
    await exchange(await pair.visit(), NOISE, NOISE)
    await far.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await near.send_all(NOISE * 64)


def test_the_default_limits_are_consistent() -> None:
    limits = CarrierLimits()
    assert limits.initial_window <= limits.max_window <= limits.window_budget
    assert limits.quantum <= limits.pause_at
    assert limits.patience <= limits.heartbeat


# When output is written


def socket_of(carrier: Carrier) -> socket.socket:
    assert isinstance(carrier._connection, Connection)
    return carrier._connection.connection


def unread_bytes(carrier: Carrier) -> int:
    """Bytes that the kernel has for the carrier to read."""
    count = array.array("i", [0])
    fcntl.ioctl(socket_of(carrier), termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize("pair", ["plain", "tls"], indirect=True)
@pytest.mark.parametrize(
    "at_once",
    [
        pytest.param(True, marks=pytest.mark.limits(coalesce=0.0)),
        pytest.param(False, marks=pytest.mark.limits(coalesce=60.0)),
    ],
)
async def test_output_waits_for_more_output_no_longer_than_coalesce(pair: CarrierPair, at_once: bool) -> None:
    """No other handler runs between the two checks, as if the pump were busy."""
    before = unread_bytes(pair.agent)
    pair.relay.open(80)
    assert (unread_bytes(pair.agent) > before) is at_once
    await pair.agent_owner.channel()


@pytest.mark.parametrize("pair", ["plain", "tls"], indirect=True)
@pytest.mark.limits(coalesce=60.0, pause_at=4096)
async def test_send_capacity_is_0_if_its_flush_finds_the_connection_broken(pair: CarrierPair) -> None:
    near, _ = await pair.channels()
    await trio.testing.wait_all_tasks_blocked()
    near.write(memoryview(b"x"))
    connection = socket_of(pair.agent)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    pair.agent.close()
    assert near.send_capacity() == 0
    assert near.closed


# Throttled relays


@pytest.mark.limits(heartbeat=1e6)
async def test_a_throttle_holds_for_both_directions_together(autojump_clock: MockClock, pair: CarrierPair) -> None:
    throttle = pair.pump.limit(100_000, None, lambda: None)
    visit = await pair.visit(throttle=throttle)
    began = trio.current_time()
    await exchange(visit, NOISE[:250_000], NOISE[:250_000])
    assert 4.5 <= trio.current_time() - began <= 7


@pytest.mark.limits(heartbeat=1e6)
async def test_a_quota_stops_at_its_last_byte(autojump_clock: MockClock, pair: CarrierPair) -> None:
    used_up = trio.Event()
    throttle = pair.pump.limit(None, 100_000, used_up.set)
    visit, idle = await pair.visit(throttle=throttle), await pair.visit(throttle=throttle)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(visit.server.send_all, NOISE[:100_001])
        assert await read_exactly(visit.visitor, 100_000) == NOISE[:100_000]
        await used_up.wait()
        nursery.cancel_scope.cancel()
    for each in (visit, idle):
        each.relays[0].drop()


async def test_a_ping_is_not_reported_as_a_channel(pair: CarrierPair) -> None:
    """The owner of the other end would serve it like a visitor."""
    for carrier in (pair.relay, pair.agent):
        carrier.request_ack()
    while not (pair.relay_owner.pongs and pair.agent_owner.pongs):
        await trio.lowlevel.checkpoint()
    assert (pair.relay.channels, pair.agent.channels) == ({}, {})
    for owner in (pair.relay_owner, pair.agent_owner):
        with pytest.raises(trio.WouldBlock):
            owner.channel_nowait()


async def test_a_visitor_whose_bytes_are_dropped_gets_a_reset_and_no_eof(pair: CarrierPair) -> None:
    """An EOF would mean that the visitor got everything."""
    near, far = await pair.channels()
    visitor, near_visitor = tcp_pair(SO_RCVBUF=4096, SO_SNDBUF=4096)
    relay = pair.pump.join(near_visitor, near, linger=5, on_end=lambda _relay, _end: None)
    pair.far.append(stream(visitor))
    sender = EndStream(far)
    with trio.move_on_after(5):
        await sender.send_all(NOISE)
        while not near.buffered:
            await trio.lowlevel.checkpoint()
    assert near.buffered
    relay.drop()
    with pytest.raises(trio.BrokenResourceError):
        await read_all(pair.far[0])
