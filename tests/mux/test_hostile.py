"""Peers that break the WebMUX protocol on purpose: it may cost them their channels, but no other peer."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from tests.engine.bench import NOISE, Ends, flood, read_all, read_exactly, stream, tcp_pair
from tests.mux.bench import CarrierPair, RecordingOwner
from tunneld.engine.end_flow import EndToSocket
from tunneld.engine.engine import Cause
from tunneld.engine.pump import Pump
from tunneld.engine.socket_to_end import MIN_READ_COST, SocketToEnd
from tunneld.mux.carrier import PREAUTH_EXCEEDED, Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.connection import Connection
from tunneld.mux.limits import MAX_FRAMES_PER_TURN, PREAUTH_LIMIT
from tunneld.wire.webmux.header import CONTROL, FIN, FIRST_ATOM, LONG, MAX_FRAGMENTS, RST, SYN, TWO_WORDS, WORD, Code

pytestmark = pytest.mark.parametrize("pair", ["plain"], indirect=True)


class SharedPort(RecordingOwner):
    """Owns a carrier like the shared port: resets every channel, and authenticates a peer that names an endpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.protocols: list[int] = []
        self.on_channel: Callable[[], None] = lambda: None
        self.authenticates: Carrier | None = None

    def on_opened(self, channel: Channel, protocol: int) -> None:
        channel.reset("nothing is served here")
        self.protocols.append(protocol)
        self.on_channel()
        self.called.set()

    def on_endpoint(self, uri: str | None) -> None:
        super().on_endpoint(uri)
        if self.authenticates is not None:
            self.authenticates.mark_authenticated()

    async def wait_opened(self, protocol: int) -> None:
        while protocol not in self.protocols[-1:]:
            self.called = trio.Event()
            await self.called.wait()


class RawPeer:
    """A bare socket as the peer of a carrier of the relay."""

    def __init__(self, pair: CarrierPair, *, authenticated: bool = True) -> None:
        self.pair = pair
        self.socket, near = tcp_pair()
        self.owner = SharedPort()
        self.stream = stream(self.socket)
        self.carrier = Carrier(
            pair.pump,
            Connection(near),
            self.owner,
            initiator=False,
            limits=pair.relay.limits,
            authenticated=authenticated,
        )

    async def send(self, *frames: bytes) -> None:
        """Send frames, and wait until the carrier has read them."""
        await self.stream.send_all(b"".join(frames))
        await self.settle()

    async def settle(self) -> None:
        """Wait until everything that was sent has arrived."""
        await trio.testing.wait_all_tasks_blocked(0.01)

    async def discard_input(self) -> None:
        """Read and discard what the carrier sends, until closed."""
        with contextlib.suppress(trio.ClosedResourceError):
            while await self.stream.receive_some(65536):
                pass


@pytest.fixture
async def raw(pair: CarrierPair) -> AsyncIterator[RawPeer]:
    raw = RawPeer(pair)
    yield raw
    raw.carrier.close()
    await trio.aclose_forcefully(raw.stream)


def head(sid: int, flags: int = 0, value: int = 0) -> bytes:
    return WORD.pack(sid << 24 | flags | value)


CREDIT = CONTROL | Code.ADD_CREDIT << 19
MSS = CONTROL | Code.SET_MSS << 19
NOOP = head(0, CONTROL | Code.NO_OP << 19)


def join(channel: Channel, linger: float = 5) -> tuple[socket.socket, Ends]:
    """Join a visitor to a channel; returns its socket and the record of the relay's end."""
    (visitor, near), ends = tcp_pair(), Ends()
    cast(Pump, channel.engine).join(near, channel, linger=linger, on_end=ends.note)
    return visitor, ends


async def test_data_on_the_session_of_a_ping_breaks_the_ping_and_not_the_channel_that_gets_its_id(
    mock_clock: MockClock, pair: CarrierPair, raw: RawPeer
) -> None:
    """A visitor's channel that was mistaken for the ping was reset in the codec only; its end then stopped the pump."""
    mock_clock.rate = 1
    assert raw.carrier.send_ping()
    ping = 3  # the first id that an acceptor opens
    await raw.send(head(ping, 0, 4), b"what")
    for _ in range(126):  # ids that were never used come first
        channel = raw.carrier.open(80)
        await raw.send(head(channel.sid, SYN, 80), head(channel.sid, FIN))
        channel.reset("done")
    channel = raw.carrier.open(80)
    assert channel.sid == ping
    visitor, ends = join(channel)
    with visitor:
        visitor.shutdown(socket.SHUT_WR)
        await raw.send(head(ping, SYN, 80), head(ping, 0, 8), b"for this")
        assert visitor.recv(16) == b"for this"
        mock_clock.jump(6)
        assert (await ends.one()).cause is Cause.LINGERED
    assert raw.carrier.send_ping()
    assert not pair.relay.over


async def test_a_deadline_or_a_flush_that_raises_ends_nothing_else(pair: CarrierPair) -> None:
    """Both run in tasks of the pump that all carriers share."""

    class Faulty:
        deadline = 0.0

        def on_deadline(self) -> None:
            raise ZeroDivisionError

    def write() -> None:
        raise ZeroDivisionError

    flushed = trio.Event()
    pair.pump.timers.watch(Faulty())
    pair.pump.call_after_batch(write)
    pair.pump.call_after_batch(flushed.set)
    await flushed.wait()
    visit = await pair.visit()
    await visit.visitor.send_all(b"still here")
    assert await read_exactly(visit.server, 10) == b"still here"


async def test_request_ack_pings_again_if_the_ping_was_broken(pair: CarrierPair, raw: RawPeer) -> None:
    raw.carrier.request_ack()
    raw.carrier.request_ack()  # while the first ping is outstanding
    await raw.send(head(3, 0, 4), b"what")
    await raw.send(head(5, SYN))
    assert raw.owner.pongs == 1


# Floods of small frames


class CountingHandler:
    """Another handler of the same pump; it counts its turns."""

    def __init__(self, pair: CarrierPair) -> None:
        self.turns = 0
        self.far, self.near = tcp_pair()
        self._pump, self._fd = pair.pump, self.near.fileno()
        pair.pump.attach(self._fd, self)
        pair.far.append(stream(self.far))

    def on_event(self, events: int) -> None:
        self.turns += 1
        self._pump.rearm(self._fd)

    def on_failure(self, error: Exception) -> None:
        raise AssertionError from error

    def on_stop(self) -> None:
        """Closed by the test."""

    def close(self) -> None:
        del self._pump.handlers[self._fd]
        self.near.close()


SMALL_FRAMES = {
    "noop": head(0, CONTROL | Code.NO_OP << 19),
    "fin on an idle id": head(2, FIN),
    "rst on an idle id": head(2, RST),
    "empty data": head(2),
    "syn and rst": head(2, SYN) + head(2, RST),
    "ping": head(4, SYN),
    "a byte of credit": head(3, CONTROL | Code.ADD_CREDIT << 19, 1),
    "a byte of data": head(3, 0, 1) + b"....",
}


@pytest.mark.parametrize("frame", SMALL_FRAMES)
async def test_a_flood_of_small_frames_leaves_other_handlers_their_turns(
    pair: CarrierPair, raw: RawPeer, frame: str
) -> None:
    visitor, _ends = join(raw.carrier.open(80))
    await raw.send(head(3, SYN, 80))
    other = CountingHandler(pair)
    with visitor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raw.discard_input)
            raw.owner.on_channel = lambda: turns.append(other.turns)
            turns: list[int] = []
            await raw.stream.send_all(
                head(6, SYN, 80) + SMALL_FRAMES[frame] * (40 * MAX_FRAMES_PER_TURN) + head(8, SYN, 4711)
            )
            await raw.owner.wait_opened(4711)
            nursery.cancel_scope.cancel()
    assert turns[-1] - turns[0] >= 40
    other.close()


async def test_nothing_of_a_flood_is_lost(pair: CarrierPair, raw: RawPeer) -> None:
    visitor, ends = join(raw.carrier.open(80))
    text = NOISE[: 20 * MAX_FRAMES_PER_TURN]
    frames = [head(3, 0, 1) + text[at : at + 1] + b"..." for at in range(len(text))]
    await raw.stream.send_all(head(3, SYN, 80) + b"".join(frames) + head(3, FIN))
    far = stream(visitor)
    assert await read_all(far) == text
    await far.aclose()
    assert (await ends.one()).cause is Cause.FINISHED


# Before authentication


@pytest.fixture
async def unauthenticated(pair: CarrierPair) -> AsyncIterator[RawPeer]:
    raw = RawPeer(pair, authenticated=False)
    yield raw
    raw.carrier.close()
    await trio.aclose_forcefully(raw.stream)


async def test_an_unauthenticated_peer_may_send_the_limit_and_no_byte_more(unauthenticated: RawPeer) -> None:
    await unauthenticated.send(NOOP * (PREAUTH_LIMIT // 4 - 1))
    await unauthenticated.send(NOOP)
    assert unauthenticated.owner.reason is None
    await unauthenticated.send(b"\0")
    assert unauthenticated.owner.reason == PREAUTH_EXCEEDED


async def test_a_peer_authenticated_by_its_first_bytes_may_send_more_in_the_same_read(pair: CarrierPair) -> None:
    raw = RawPeer(pair, authenticated=False)
    raw.owner.authenticates = raw.carrier
    name = b"webmux://localhost:1/key"
    named = head(0, CONTROL | Code.INTERN_ATOM << 19, len(name)) + name
    named += head(0, CONTROL | Code.DEFINE_ENDPOINT << 19, FIRST_ATOM)
    await raw.send(NOOP * 500 + named + NOOP * PREAUTH_LIMIT + head(6, SYN, 4711))
    assert raw.owner.uris == [name.decode()]
    assert raw.owner.protocols[-1] == 4711
    assert not raw.carrier.over
    raw.carrier.close()
    await trio.aclose_forcefully(raw.stream)


# Buffers and waiting channels


async def test_the_growth_of_a_window_stays_reserved_while_its_bytes_are_buffered(
    pair: CarrierPair, raw: RawPeer
) -> None:
    """Otherwise each channel that ends with a visitor that does not read could buffer the whole carrier's budget."""
    channel = raw.carrier.open(80)
    assert channel.window._budget.reserve(1 << 20)
    channel.window.size += 1 << 20
    budget = channel.window._budget
    left = budget.available
    await raw.send(head(3, SYN, 80), head(3, 0, 1000), bytes(1000))
    channel.finish()
    await raw.send(head(3, FIN))
    assert not raw.carrier.channels
    assert (len(channel.buffered), budget.available) == (1000, left)
    channel.consume(999)
    assert budget.available == left
    channel.consume(1)
    assert budget.available == left + (1 << 20) == raw.carrier.limits.window_budget


async def test_bytes_consumed_after_the_end_do_not_grow_the_window(pair: CarrierPair, raw: RawPeer) -> None:
    """The budget would never get that growth back."""
    channel = raw.carrier.open(80)
    await raw.send(head(3, SYN, 80), head(3, 0, 65536), bytes(65536))
    channel.finish()
    await raw.send(head(3, FIN))
    channel.consume(len(channel.buffered))
    assert channel.window._budget.available == raw.carrier.limits.window_budget


async def test_a_lost_channel_sends_nothing_on_an_id_that_was_reused(raw: RawPeer) -> None:
    """A visitor that had to wait gets its channel at one moment and is joined at another."""
    lost = raw.carrier.open(80)
    await raw.send(head(3, RST))
    raw.carrier.mux.table.ids._settled.rotate(1)
    assert raw.carrier.open(80).sid == lost.sid
    with pytest.raises(ConnectionResetError):
        lost.send(b"PROXY ...")


async def test_a_channel_waits_only_once_for_a_full_carrier(pair: CarrierPair, raw: RawPeer) -> None:
    """However often its peer grants one more byte without reading any."""
    visitors = [join(raw.carrier.open(80))[0] for _ in range(3)]
    await raw.send(*(head(sid, SYN, 80) + TWO_WORDS.pack(sid << 24 | CREDIT | LONG, 1 << 30) for sid in (3, 5, 7)))
    async with trio.open_nursery() as nursery:
        for visitor in visitors:
            pair.far.append(stream(visitor))
            nursery.start_soon(flood, pair.far[-1])
        send_buffer = raw.carrier.send_buffer
        while len(send_buffer._paused) < 3:
            await trio.lowlevel.checkpoint()
        for _ in range(20):
            await raw.send(*(head(sid, CREDIT, 1) for sid in (3, 5, 7)))
        assert len(send_buffer._paused) == 3
        nursery.cancel_scope.cancel()


class RecordingFlow:
    """Replaces a flow in the pump, and records how many bytes each turn moves."""

    def __init__(self, flow: SocketToEnd) -> None:
        self.flow = flow
        self.steps: list[int] = []
        self.on_failure, self.on_stop = flow.on_failure, flow.on_stop

    def on_event(self, events: int) -> None:
        before = self.flow.moved
        self.flow.on_event(events)
        self.steps.append(self.flow.moved - before)


async def test_a_peer_with_an_mss_of_one_byte_gets_its_turn_and_no_more(pair: CarrierPair, raw: RawPeer) -> None:
    """Each read then makes 256 fragments and costs as much as a read of 64 KiB."""
    channel = raw.carrier.open(80)
    visitor, _ends = join(channel)
    await raw.send(head(3, SYN, 80), TWO_WORDS.pack(3 << 24 | CREDIT | LONG, 1 << 30), head(0, MSS, 1))
    assert isinstance(channel.handler, EndToSocket)
    flow = cast(SocketToEnd, channel.handler.reverse)
    recorder = pair.pump.handlers[flow.fd] = RecordingFlow(flow)
    with visitor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raw.discard_input)
            sent = visitor.send(NOISE)
            while flow.moved < sent:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    pair.pump.handlers[flow.fd] = flow
    assert 0 < max(recorder.steps) <= channel.quantum // MIN_READ_COST * MAX_FRAGMENTS
