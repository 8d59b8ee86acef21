"""Associations of two nodes: channels over one link after another, and links that are tampered with."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence

import pytest
import trio
from trio.testing import MockClock

from tests.egtp.bench import FROM_AGENT, FROM_RELAY, NodePair, Tamper, node_pair
from tests.engine.bench import open_descriptors, read_all
from tunneld.egtp.limits import AssociationLimits
from tunneld.engine.engine import Cause
from tunneld.errors import LimitReachedError
from tunneld.mux.limits import CarrierLimits
from tunneld.wire.egtp.streams import INITIAL_CREDIT

CANARY = b"a secret that nobody else may read; " * 40
HANDSHAKE_FRAMES = 3
"""The first frames of either direction, at most, belong to the handshake."""


@pytest.fixture
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[NodePair]:
    """Two nodes without a link. No descriptor may be left open after the test."""
    before = open_descriptors()
    marker = request.node.get_closest_marker("limits")
    times = request.node.get_closest_marker("times")
    async with node_pair(
        CarrierLimits(**marker.kwargs) if marker else None, AssociationLimits(**times.kwargs) if times else None
    ) as pair:
        yield pair
    assert open_descriptors() == before


async def test_bytes_go_both_ways_and_each_direction_ends_by_itself(pair: NodePair) -> None:
    await pair.connect()
    visitor, server, ends = await pair.visit()
    data = os.urandom(3 << 20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_send_and_finish, visitor, data)
        assert await read_all(server) == data
        await _send_and_finish(server, data[::-1])
        assert await read_all(visitor) == data[::-1]
    for each in ends:
        assert (await each.one()).cause is Cause.FINISHED
    assert pair.agent_owner.labels == [b"80"]
    assert not pair.relay.channels
    assert not pair.agent.channels


async def _send_and_finish(stream: trio.SocketStream, data: bytes) -> None:
    await stream.send_all(data)
    await stream.send_eof()


async def test_without_a_link_no_channel_is_opened(pair: NodePair) -> None:
    with pytest.raises(LimitReachedError):
        pair.relay.open(80)
    await pair.connect()
    assert pair.relay.answering
    pair.relay.open(80)


@pytest.mark.times(max_channels=2)
async def test_channels_are_limited_on_both_sides(pair: NodePair) -> None:
    await pair.connect()
    first, _ = await pair.channels()
    await pair.channels()
    assert pair.relay.channels_left == 0
    with pytest.raises(LimitReachedError):
        pair.relay.open(80)
    first.reset("enough")
    await pair.channels()


async def test_a_reset_says_why(pair: NodePair) -> None:
    await pair.connect()
    near, far = await pair.channels()
    reasons: list[str] = []
    near.handler = Recorder(reasons)
    far.reset("no local server")
    while not reasons:
        await trio.lowlevel.checkpoint()
    assert reasons == ["no local server"]


class Recorder:
    """A handler that takes everything and notes how the end fails."""

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons
        self.data = b""

    def on_data(self, data: memoryview) -> int:
        self.data += data
        return len(data)

    def on_writable(self) -> None:
        pass

    def on_eof(self) -> None:
        self.reasons.append("eof")

    def on_write_failed(self, error: OSError) -> None:
        self.reasons.append(str(error))

    def on_reset(self, error: OSError) -> None:
        self.reasons.append(error.strerror or "")

    def on_internal_error(self, error: Exception) -> None:
        raise error


# Links that come and go


async def test_channels_survive_the_loss_of_their_link(pair: NodePair) -> None:
    """Again and again, in the middle of transfers in both directions."""
    await pair.connect()
    visitor, server, _ = await pair.visit()
    data = os.urandom(4 << 20)
    received: list[bytes] = []

    async def receive(stream: trio.SocketStream) -> None:
        received.append(await read_all(stream))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_send_and_finish, visitor, data)
        nursery.start_soon(_send_and_finish, server, data)
        nursery.start_soon(receive, visitor)
        nursery.start_soon(receive, server)
        for number in range(6):
            link = (pair.agent, pair.relay)[number % 2].attachment.output.link
            assert link is not None
            link._connection.close()
            link._end("cut by the test")
            await trio.testing.wait_all_tasks_blocked()
            await pair.connect()
            for _ in range(20):
                await trio.lowlevel.checkpoint()
    assert received == [data, data]


async def test_a_link_that_is_replaced_before_its_loss_was_noticed(pair: NodePair) -> None:
    """As after a change of network: the old connection is silent."""
    await pair.connect()
    near, far = await pair.channels()
    await pair.connect()
    await pair.connect()
    far.handler = recorder = Recorder([])
    near.write(memoryview(b"hello"))
    near.finish()
    await pair.relay_owner.until(lambda: pair.relay.attachment.settled)
    assert (recorder.data, recorder.reasons) == (b"hello", ["eof"])


@pytest.mark.times(resume_timeout=5.0)
async def test_channels_are_reset_when_no_link_comes_in_time(pair: NodePair, autojump_clock: MockClock) -> None:
    await pair.connect()
    near, _ = await pair.channels()
    near.handler = recorder = Recorder([])
    assert pair.agent.attachment.output.link is not None
    pair.agent.attachment.output.link._end("cut by the test")
    began = trio.current_time()
    await pair.relay_owner.until(lambda: pair.relay_owner.reason is not None)
    assert 5 <= trio.current_time() - began < 6
    assert pair.relay_owner.reason == "not connected again within 5 s"
    assert len(recorder.reasons) == 1
    assert pair.relay.over


async def test_a_goodbye_ends_the_association_at_once(pair: NodePair) -> None:
    await pair.connect()
    near, _ = await pair.channels()
    near.handler = recorder = Recorder([])
    pair.agent.close("the agent stopped")
    await pair.relay_owner.until(lambda: pair.relay_owner.reason is not None)
    assert pair.relay_owner.reason == "the peer left: the agent stopped"
    assert recorder.reasons == ["multiplexed connection lost: the peer left: the agent stopped"]


async def test_retirement_is_acknowledged(pair: NodePair) -> None:
    await pair.connect()
    await pair.agent_owner.until(lambda: pair.agent.attachment.settled)
    pair.agent.retire()
    await pair.relay_owner.until(lambda: pair.relay_owner.retired == 1)
    await pair.agent_owner.until(lambda: pair.agent.attachment.settled)


@pytest.mark.limits(heartbeat=5.0)
async def test_a_silent_peer_is_asked_and_given_up(pair: NodePair, autojump_clock: MockClock) -> None:
    passing = True
    await pair.connect(lambda _direction, _number, frame: [frame] if passing else [])
    await pair.relay_owner.until(lambda: pair.relay.attachment.settled)
    passing = False
    began = trio.current_time()
    await pair.relay_owner.until(lambda: bool(pair.relay_owner.detached))
    assert 10 <= trio.current_time() - began <= 16
    assert "no answer for 5 s (heartbeat)" in pair.relay_owner.detached + pair.agent_owner.detached


# Links that are tampered with


def altered(direction: int, number: int, frame: bytes) -> Sequence[bytes]:
    return [frame if number != HANDSHAKE_FRAMES + 3 else frame[:-8] + bytes([frame[-8] ^ 1]) + frame[-7:]]


def replayed_with_the_next_number(direction: int, number: int, frame: bytes) -> Sequence[bytes]:
    if number != HANDSHAKE_FRAMES + 3:
        return [frame]
    return [frame, frame[:24] + (int.from_bytes(frame[24:32], "big") + 1).to_bytes(8, "big") + frame[32:]]


def lost(direction: int, number: int, frame: bytes) -> Sequence[bytes]:
    return [] if number == HANDSHAKE_FRAMES + 3 else [frame]


def garbage(direction: int, number: int, frame: bytes) -> Sequence[bytes]:
    return [frame, b"garbage"] if number == HANDSHAKE_FRAMES + 3 else [frame]


def turned_back(direction: int, number: int, frame: bytes) -> Sequence[bytes]:
    if number == HANDSHAKE_FRAMES + 3:
        return [frame, frame[:4] + os.urandom(20) + frame[24:]]
    return [frame]


def repeated(direction: int, number: int, frame: bytes) -> Sequence[bytes]:
    return [frame, frame]


def swapped() -> Tamper:
    held: dict[int, bytes] = {}

    def tamper(direction: int, number: int, frame: bytes) -> Sequence[bytes]:
        """Let each long frame wait for the next one of any length."""
        if direction in held:
            return [frame, held.pop(direction)]
        if number <= HANDSHAKE_FRAMES or len(frame) < 1000:
            return [frame]
        held[direction] = frame
        return []

    return tamper


ENDING = [altered, replayed_with_the_next_number, garbage, turned_back]


@pytest.mark.parametrize("direction", [FROM_AGENT, FROM_RELAY])
@pytest.mark.parametrize("tamper", ENDING, ids=lambda tamper: tamper.__name__)
async def test_tampering_ends_the_link_and_nothing_is_delivered_twice(
    pair: NodePair, tamper: Tamper, direction: int
) -> None:
    """The carrier is told why, and over the next link everything arrives."""
    await pair.connect(
        lambda towards, number, frame: tamper(towards, number, frame) if towards == direction else [frame]
    )
    visitor, server, _ = await pair.visit()
    data = os.urandom(1 << 20)
    received: list[bytes] = []

    async def receive(stream: trio.SocketStream) -> None:
        received.append(await read_all(stream))

    async with trio.open_nursery() as nursery:
        for stream in (visitor, server):
            nursery.start_soon(_send_and_finish, stream, data)
            nursery.start_soon(receive, stream)
        victim = pair.relay_owner if direction == FROM_AGENT else pair.agent_owner
        await victim.until(lambda: bool(victim.detached))
        assert victim.detached[0].startswith("the peer broke the EGTP protocol: ")
        await pair.connect()
    assert received == [data, data]


@pytest.mark.parametrize("direction", [FROM_AGENT, FROM_RELAY])
async def test_a_frame_that_is_left_out_is_noticed_by_the_heartbeat_or_the_next(pair: NodePair, direction: int) -> None:
    """TLS does not accept what follows it, in whatever order: the link stands still until another one replaces it."""
    await pair.connect(lambda towards, number, frame: lost(towards, number, frame) if towards == direction else [frame])
    near, far = await pair.channels()
    sender, receiver = (far, near) if direction == FROM_AGENT else (near, far)
    carrier = pair.agent if direction == FROM_AGENT else pair.relay
    receiver.handler = recorder = Recorder([])
    for number in range(20):
        sender.write(memoryview(b"%02d" % number))
        carrier.send_buffer.flush()
        await trio.testing.wait_all_tasks_blocked()
    assert not recorder.data.endswith(b"19")
    sender.finish()
    await pair.connect()
    while not recorder.reasons:
        await trio.lowlevel.checkpoint()
    assert (recorder.data, recorder.reasons) == (b"".join(b"%02d" % number for number in range(20)), ["eof"])


async def test_what_crosses_the_network_is_not_readable(pair: NodePair) -> None:
    """Neither in what is sent, nor in what is sent again."""
    recorded = bytearray()

    def record(_direction: int, _number: int, frame: bytes) -> Sequence[bytes]:
        recorded.extend(frame)
        return [frame]

    await pair.connect(record)
    near, far = await pair.channels()
    far.handler = recorder = Recorder([])
    for channel in (near, far):
        channel.write(memoryview(CANARY))
    pair.relay.send_buffer.flush()
    await pair.connect(record)
    near.finish()
    while not recorder.reasons:
        await trio.lowlevel.checkpoint()
    assert recorder.data == CANARY
    assert len(recorded) > 4 * len(CANARY)
    assert CANARY[:8] not in recorded
    assert near.sid == 2
    assert b"message for you" not in recorded


async def test_repeated_and_swapped_frames_do_no_harm(pair: NodePair) -> None:
    for tamper in (repeated_after_the_handshake, swapped()):
        await pair.connect(tamper)
        near, far = await pair.channels()
        far.handler = recorder = Recorder([])
        sent = b""
        for number in range(20):
            near.write(memoryview(bytes([number]) * 2000))
            sent += bytes([number]) * 2000
            pair.relay.send_buffer.flush()
        near.finish()
        pair.relay.send_buffer.flush()
        pair.relay.attachment.send_ping()  # a short frame, after which no other is held back
        while not recorder.reasons:
            await trio.lowlevel.checkpoint()
        assert (recorder.data, recorder.reasons) == (sent, ["eof"])
    assert pair.relay_owner.detached == pair.agent_owner.detached == []


def repeated_after_the_handshake(direction: int, number: int, frame: bytes) -> Sequence[bytes]:
    return [frame] if number < HANDSHAKE_FRAMES else [frame, frame]


async def test_a_peer_that_breaks_the_protocol_of_streams_loses_the_association(pair: NodePair) -> None:
    await pair.connect()
    near, far = await pair.channels()
    near.handler = recorder = Recorder([])
    stream = pair.agent.streams.streams[far.sid]
    stream.credit = 10 * INITIAL_CREDIT
    pair.agent.streams.send(stream, memoryview(bytes(2 * INITIAL_CREDIT)))
    pair.agent.schedule_flush()
    await pair.agent_owner.until(lambda: pair.agent_owner.reason is not None)
    assert pair.relay_owner.reason == "the peer broke the protocol of streams: credit exceeded"
    assert pair.agent_owner.reason == f"the peer left: {pair.relay_owner.reason}"
    assert len(recorder.reasons) == 1


# Memory


@pytest.mark.limits(max_window=256 * 1024)
async def test_a_slow_visitor_bounds_what_is_buffered(pair: NodePair) -> None:
    await pair.connect()
    near, far = await pair.channels()
    quick_near, quick_far = await pair.channels()
    sent = 0
    while (size := far.send_capacity()) or not pair.agent.attachment.settled:
        far.write(memoryview(bytes(size)))
        sent += size
        await trio.lowlevel.checkpoint()
    assert sent == len(near.buffered) == INITIAL_CREDIT
    quick_near.handler = recorder = Recorder([])
    quick_far.write(memoryview(b"not delayed"))
    quick_far.finish()
    while recorder.reasons != ["eof"]:
        await trio.lowlevel.checkpoint()
    assert recorder.data == b"not delayed"


async def test_without_a_link_little_is_kept(pair: NodePair) -> None:
    await pair.connect()
    near, _ = await pair.channels()
    assert pair.relay.attachment.output.link is not None
    pair.relay.attachment.output.link._end("cut by the test")
    sent = 0
    while size := near.send_capacity():
        near.write(memoryview(bytes(size)))
        sent += size
    assert sent <= INITIAL_CREDIT
