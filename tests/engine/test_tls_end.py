"""`TlsEnd`: one TLS connection per visitor treats ends of file, resets and slow readers as plain TCP does."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock, check_half_closeable_stream

from tests.engine.bench import NOISE, Ends, open_descriptors, read_all, read_exactly, reset, stream, tcp_pair
from tests.support.pki import Pki
from tunneld.engine.end_stream import EndStream
from tunneld.engine.engine import Cause, Relay, Side
from tunneld.engine.limits import EngineLimits
from tunneld.engine.plain_transport import PlainTransport
from tunneld.engine.pump import Pump
from tunneld.engine.tapped import TappedTransport
from tunneld.engine.tls_end import TlsEnd
from tunneld.tls.connection import TlsSocket

TEST_TIMEOUT = 30
"""Seconds after which a test fails; virtual seconds count, too."""

SocketPair = Callable[[], tuple[socket.socket, socket.socket]]


async def tls_pair(near: socket.socket, far: socket.socket, pki: Pki) -> tuple[TlsSocket, TlsSocket]:
    """Both sides of a TLS connection after the handshake: the relay's and the agent's."""
    relay = TlsSocket(near, pki.server, server_side=True)
    agent = TlsSocket(far, pki.client, server_hostname="localhost")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(relay.shake_hands)
        nursery.start_soon(agent.shake_hands)
    return relay, agent


@dataclass
class RelayedVisitor:
    """visitor ── relay ══ TLS ══ agent ── server."""

    visitor: trio.SocketStream
    server: trio.SocketStream
    relays: tuple[Relay, Relay]
    ends: tuple[Ends, Ends]

    async def causes(self) -> tuple[Cause, Cause]:
        return (await self.ends[0].one()).cause, (await self.ends[1].one()).cause


@dataclass
class TlsBench:
    """A running pump, and the far sockets of one test."""

    pump: Pump
    pki: Pki
    nursery: trio.Nursery
    far: list[trio.SocketStream] = field(default_factory=list)

    async def end_pair(self, pair: SocketPair = tcp_pair) -> tuple[TlsEnd, TlsEnd]:
        near, far = pair()
        relay, agent = [TlsEnd(self.pump, end) for end in await tls_pair(near, far, self.pki)]
        relay.start()
        agent.start()
        return relay, agent

    async def visit(
        self, *, linger: float = 10, pair: SocketPair = tcp_pair, rate: float | None = None, **options: int
    ) -> RelayedVisitor:
        relay, agent = await self.end_pair(pair)
        (visitor, near_visitor), (server, near_server) = tcp_pair(**options), tcp_pair(**options)
        ends = Ends(), Ends()
        throttle = self.pump.limit(rate, None, lambda: None) if rate else None
        relays = (
            self.pump.join(near_visitor, relay, linger=linger, on_end=ends[0].note, throttle=throttle),
            self.pump.join(agent, near_server, linger=linger, on_end=ends[1].note),
        )
        self.far += [stream(visitor), stream(server)]
        return RelayedVisitor(self.far[-2], self.far[-1], relays, ends)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.issue(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=["default buffers", "tiny buffers"])
async def bench(request: pytest.FixtureRequest, pki: Pki) -> AsyncIterator[TlsBench]:
    before = open_descriptors()
    limits = EngineLimits() if request.param == "default buffers" else EngineLimits(buffer_size=512, turn_size=1)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(TEST_TIMEOUT):
            bench = TlsBench(Pump(limits), pki, nursery)
            await nursery.start(bench.pump.run)
            yield bench
            for far in bench.far:
                await trio.aclose_forcefully(far)
        nursery.cancel_scope.cancel()
    assert open_descriptors() == before


async def send_and_finish(far: trio.SocketStream, data: bytes) -> None:
    await far.send_all(data)
    await far.send_eof()


async def check_both_ways(visit: RelayedVisitor, up: bytes, down: bytes) -> None:
    async def expect(far: trio.SocketStream, data: bytes) -> None:
        assert await read_all(far) == data

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_finish, visit.visitor, up)
        nursery.start_soon(send_and_finish, visit.server, down)
        nursery.start_soon(expect, visit.server, up)
        nursery.start_soon(expect, visit.visitor, down)
    assert await visit.causes() == (Cause.FINISHED, Cause.FINISHED)
    for relay in visit.relays:
        assert (relay.up, relay.down) == (len(up), len(down))


async def test_every_byte_arrives_both_ways_before_the_end_of_file(bench: TlsBench) -> None:
    size = 4 if bench.pump.buffer_size > 512 else 0.1
    up, down = NOISE * 4, NOISE[::-1] * 4
    await check_both_ways(await bench.visit(), up[: int(size * len(NOISE))], down[: int(size * len(NOISE))])


@pytest.mark.parametrize("first", ["visitor", "server"])
async def test_a_half_closed_side_still_receives_the_answer(bench: TlsBench, first: str) -> None:
    """Also when it had many unread bytes as it ended: close_notify does not fail because of them."""
    visit = await bench.visit()
    here, there = (visit.visitor, visit.server) if first == "visitor" else (visit.server, visit.visitor)
    bench.nursery.start_soon(send_and_finish, there, NOISE)
    await here.send_all(b"request")
    await here.send_eof()
    assert await read_all(there) == b"request"
    assert await read_all(here) == NOISE
    assert await visit.causes() == (Cause.FINISHED, Cause.FINISHED)


@pytest.mark.parametrize("first", ["visitor", "server"])
async def test_an_end_of_file_without_data_is_passed_on(bench: TlsBench, first: str) -> None:
    visit = await bench.visit()
    here, there = (visit.visitor, visit.server) if first == "visitor" else (visit.server, visit.visitor)
    await here.send_eof()
    assert await read_all(there) == b""
    await there.send_eof()
    assert await read_all(here) == b""
    assert await visit.causes() == (Cause.FINISHED, Cause.FINISHED)


@pytest.mark.parametrize("broken", ["visitor", "server"])
async def test_a_reset_of_one_side_resets_the_other(bench: TlsBench, broken: str) -> None:
    visit = await bench.visit()
    await visit.visitor.send_all(b"hello")
    assert await read_exactly(visit.server, 5) == b"hello"
    reset(visit.visitor if broken == "visitor" else visit.server)
    with pytest.raises(trio.BrokenResourceError):
        await (visit.server if broken == "visitor" else visit.visitor).receive_some(1)
    for ends in visit.ends:
        end = await ends.one()
        assert (end.cause, end.side) == (Cause.RESET, Side(broken))


async def test_a_half_closed_relay_without_data_ends_after_the_linger_time(
    autojump_clock: MockClock, bench: TlsBench
) -> None:
    visit = await bench.visit(linger=5)
    await visit.visitor.send_eof()
    assert Cause.LINGERED in await visit.causes()


async def test_a_slow_reader_stops_the_sender_and_loses_nothing(bench: TlsBench) -> None:
    small = 64 * 1024
    visit = await bench.visit(SO_SNDBUF=small, SO_RCVBUF=small, pair=lambda: tcp_pair(SO_SNDBUF=small, SO_RCVBUF=small))
    payload, sent = NOISE * 8, 0
    bench.nursery.start_soon(send_and_finish, visit.server, payload)
    await trio.testing.wait_all_tasks_blocked(0.2)
    sent = visit.relays[1].down
    assert sent < 3 * 2 * 2 * small + 3 * (1 << 18)  # the buffers of three connections, and of both ends
    assert await read_all(visit.visitor) == payload


async def test_a_throttle_limits_both_directions_together(autojump_clock: MockClock, bench: TlsBench) -> None:
    visit = await bench.visit(rate=100_000)
    began = trio.current_time()
    await check_both_ways(visit, NOISE[:100_000], NOISE[:100_000])
    assert 1.8 < trio.current_time() - began < 3


async def test_dropping_a_relay_resets_its_other_side_and_nothing_else(bench: TlsBench) -> None:
    dropped, other = await bench.visit(), await bench.visit()
    await dropped.visitor.send_all(b"x")
    assert await read_exactly(dropped.server, 1) == b"x"
    dropped.relays[0].drop()
    assert await dropped.ends[1].one()
    with pytest.raises(trio.BrokenResourceError):
        await dropped.server.receive_some(1)
    await check_both_ways(other, b"hello", b"world")


async def test_a_close_notify_that_the_peer_does_not_read_times_out(autojump_clock: MockClock, bench: TlsBench) -> None:
    """Both sides have finished, the peer reads nothing, and only the end is left."""
    relay, agent = await tls_pair(*tcp_pair(SO_SNDBUF=4096, SO_RCVBUF=4096), bench.pki)
    end = TlsEnd(bench.pump, relay)
    end.start()
    end.linger = 5
    for _ in range(4):
        end.write(memoryview(NOISE)[:50_000])
    end.finish()
    agent.finish()
    assert agent.flush()
    await trio.sleep(4)
    assert relay.pending_output
    assert relay.connection.fileno() != -1
    await trio.sleep(2)
    assert relay.connection.fileno() == -1
    agent.close()


async def test_a_truncated_connection_is_a_prefix_and_a_reset(pki: Pki) -> None:
    """A FIN without close_notify, which any machine on the path can forge, never counts as the end of the data."""
    text = NOISE[:3000]
    for cut in range(0, 3600, 97):
        async with trio.open_nursery() as nursery:
            bench = TlsBench(Pump(EngineLimits()), pki, nursery)
            await nursery.start(bench.pump.run)
            relay, ends, visitor, agent, raw_stream = await relay_over_forged_connection(bench)
            agent.write(memoryview(text))
            agent.finish()
            raw = agent._unsent.tobytes() + agent._outgoing.read()
            await raw_stream.send_all(raw[:cut])
            await raw_stream.send_eof()
            received = b""
            try:
                async for chunk in visitor:
                    received += chunk
                ended = True
            except trio.BrokenResourceError:
                ended = False
            assert text.startswith(received)
            assert ended == (cut >= len(raw))
            if not ended:
                assert (await ends.one()).cause is Cause.RESET
            relay.drop()
            await trio.aclose_forcefully(visitor)
            await trio.aclose_forcefully(raw_stream)
            agent.close()
            nursery.cancel_scope.cancel()


async def relay_over_forged_connection(
    bench: TlsBench,
) -> tuple[Relay, Ends, trio.SocketStream, TlsSocket, trio.SocketStream]:
    """A relay whose agent's ciphertext the test sends itself after the handshake."""
    near, far = tcp_pair()
    relay, agent = await tls_pair(near, far, bench.pki)
    await read_session_tickets(agent)
    end = TlsEnd(bench.pump, relay)
    end.start()
    visitor, near_visitor = tcp_pair()
    ends = Ends()
    joined = bench.pump.join(near_visitor, end, linger=30, on_end=ends.note)
    return joined, ends, stream(visitor), agent, stream(socket.socket(fileno=socket.dup(far.fileno())))


async def read_session_tickets(agent: TlsSocket) -> None:
    with trio.move_on_after(0.05):
        await agent.receive(1)


async def test_modified_ciphertext_breaks_the_connection(pki: Pki) -> None:
    dice = random.Random(3)
    for _ in range(20):
        async with trio.open_nursery() as nursery:
            bench = TlsBench(Pump(EngineLimits()), pki, nursery)
            await nursery.start(bench.pump.run)
            _relay, ends, visitor, agent, raw_stream = await relay_over_forged_connection(bench)
            agent.write(memoryview(NOISE[:3000]))
            raw = bytearray(agent._outgoing.read())
            raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
            await raw_stream.send_all(raw + agent._outgoing.read())
            await raw_stream.aclose()
            with pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)
            assert (await ends.one()).cause is Cause.RESET
            await trio.aclose_forcefully(visitor)
            agent.close()
            nursery.cancel_scope.cancel()


async def test_bytes_from_before_the_join_are_relayed_first(bench: TlsBench) -> None:
    relay, agent = await bench.end_pair()
    agent.send(b"220 hidden.example ESMTP\r\n")
    agent.finish()
    while not relay.buffered:
        await trio.lowlevel.checkpoint()
    visitor, near_visitor = tcp_pair()
    bench.far.append(stream(visitor))
    ends = Ends()
    bench.pump.join(near_visitor, relay, linger=10, on_end=ends.note)
    assert await read_all(bench.far[0]) == b"220 hidden.example ESMTP\r\n"


async def test_an_end_of_file_that_is_reported_twice_is_passed_on_once(bench: TlsBench) -> None:
    """An end that has received only an end of file is joined while its buffered bytes are delivered."""
    relay, agent = await bench.end_pair()
    agent.finish()
    while not relay.eof_received:
        await trio.lowlevel.checkpoint()
    visitor, near_visitor = tcp_pair()
    bench.far.append(stream(visitor))
    ends = Ends()
    bench.pump.join(near_visitor, relay, linger=10, on_end=ends.note)
    relay.deliver_buffered()
    assert await read_all(bench.far[0]) == b""
    await send_and_finish(bench.far[0], b"answer")
    while agent.buffered != b"answer":
        await trio.lowlevel.checkpoint()
    assert (await ends.one()).cause is Cause.FINISHED


async def test_it_keeps_the_contract_of_a_trio_stream(bench: TlsBench) -> None:
    async def make() -> tuple[EndStream, EndStream]:
        near, far = await bench.end_pair()
        return EndStream(near), EndStream(far)

    await check_half_closeable_stream(make, None)


async def test_close_notify_can_be_sent_while_received_bytes_are_unread(pki: Pki) -> None:
    relay, agent = await tls_pair(*tcp_pair(), pki)
    await relay.send_all(NOISE[:50_000])
    assert await agent.receive(10) == NOISE[:10]
    agent.finish()
    assert agent.flush()
    assert await relay.receive(1) == b""
    received = NOISE[:10]
    while len(received) < 50_000:
        received += await agent.receive(50_000)
    assert received == NOISE[:50_000]
    agent.close()
    relay.close()


# What is encrypted already goes on without TLS


@pytest.mark.parametrize("leaver", ["agent", "both"])
async def test_a_connection_leaves_tls_in_the_middle_of_a_transfer(bench: TlsBench, leaver: str) -> None:
    relay, agent = await bench.end_pair()
    relay.may_leave = True
    (visitor, near_visitor), (server, near_server) = tcp_pair(), tcp_pair()
    ends = Ends(), Ends()
    bench.pump.join(near_visitor, relay, linger=10, on_end=ends[0].note)
    bench.pump.join(agent, near_server, linger=10, on_end=ends[1].note)
    bench.far += [stream(visitor), stream(server)]
    up, down = NOISE[:300_001], NOISE[-300_001:]
    received: dict[str, bytes] = {}

    async def send(far: trio.SocketStream, data: bytes) -> None:
        for at in range(0, len(data), 10_000):
            await far.send_all(data[at : at + 10_000])
            if at == 100_000 and far is bench.far[1]:
                agent.leave_tls()
                if leaver == "both":
                    relay.leave_tls()
        await far.send_eof()

    async def receive(far: trio.SocketStream, name: str) -> None:
        received[name] = await read_all(far)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, bench.far[0], up)
        nursery.start_soon(send, bench.far[1], down)
        nursery.start_soon(receive, bench.far[0], "down")
        nursery.start_soon(receive, bench.far[1], "up")
    assert (received["up"] == up, received["down"] == down) == (True, True)
    assert (await ends[0].one()).cause is (await ends[1].one()).cause is Cause.FINISHED
    for end in (relay, agent):
        assert isinstance(end._tls, TlsSocket)
        assert end._tls.sends_clear
        assert end._tls.receives_clear


async def test_what_was_sent_behind_a_close_notify_is_ignored_unless_that_was_agreed_on(bench: TlsBench) -> None:
    relay, agent = await bench.end_pair()
    near, far = EndStream(relay), EndStream(agent)
    await far.send_all(b"encrypted")
    assert await near.receive_some() == b"encrypted"
    agent.leave_tls()
    await far.send_all(b"in clear")
    assert await near.receive_some() == b""
    assert await near.receive_some() == b""
    relay.reset("the test has ended")
    agent.reset("the test has ended")


async def test_a_reset_without_tls_is_a_reset(bench: TlsBench) -> None:
    relay, agent = await bench.end_pair()
    relay.may_leave = True
    near, far = EndStream(relay), EndStream(agent)
    agent.leave_tls()
    await far.send_all(b"in clear")
    assert await near.receive_some() == b"in clear"
    agent.reset("the test says so")
    with pytest.raises(trio.BrokenResourceError):
        await near.receive_some()


class CountingTap:
    """Counts the bytes that it sees."""

    def __init__(self) -> None:
        self.read = self.written = 0

    def on_written(self, data: bytes | bytearray | memoryview) -> None:
        self.written += len(data)

    def on_read(self, data: bytes | bytearray | memoryview) -> None:
        self.read += len(data)


@pytest.mark.parametrize("tapped", [True, False])
async def test_bulk_data_of_a_plain_connection_passes_in_pipes_unless_it_is_tapped(tapped: bool) -> None:
    pump, tap, ends = Pump(EngineLimits()), CountingTap(), Ends()
    (far, near), (other_far, other) = tcp_pair(), tcp_pair()
    client, server = stream(far), stream(other_far)
    async with trio.open_nursery() as nursery:
        await nursery.start(pump.run)
        end = TlsEnd(pump, TappedTransport(other, tap) if tapped else PlainTransport(other))
        end.start()
        pump.join(near, end, linger=30, on_end=ends.note)
        async with trio.open_nursery() as both:
            both.start_soon(client.send_all, NOISE)
            both.start_soon(server.send_all, NOISE)
            assert await read_exactly(server, len(NOISE)) == NOISE
            assert await read_exactly(client, len(NOISE)) == NOISE
        assert (tap.read, tap.written) == ((len(NOISE), len(NOISE)) if tapped else (0, 0))
        assert (pump.pipes.open > 0) is not tapped
        await client.send_eof()
        await server.send_eof()
        assert (await ends.one()).cause is Cause.FINISHED
        nursery.cancel_scope.cancel()
    for each in (client, server):
        each.socket.close()
