"""`relay()` over Trio streams of every kind, sound and faulty."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from tests.relay.bench import NOISE, Bench, read_all, read_exactly, stream, tcp_pair
from tests.support.faults import FaultyStream, Plan
from tunneld.relay import Cause, Engine, RelayEnd, Side, relay

FINISHED = RelayEnd(Cause.FINISHED)
PAYLOAD = NOISE[:1500]

POINTS = [0, 1, 2, 699, 700, 1023, 1024, 1499, 1500]
"Where things go wrong: at the edges of the payload, and somewhere."


async def speak(far: trio.abc.HalfCloseableStream, data: bytes) -> None:
    """Say all there is to say, then end; somebody may have hung up."""
    try:
        await far.send_all(data)
        await far.send_eof()
    except trio.BrokenResourceError:
        pass


async def hear(far: trio.abc.ReceiveStream, heard: bytearray) -> None:
    """Collect until the end, or until the other hangs up."""
    try:
        async for chunk in far:
            heard += chunk
    except trio.BrokenResourceError:
        pass


async def relayed(plan: Plan, faulty: Side) -> tuple[RelayEnd, bytes, bytes]:
    """A relay with both ends talking and one stream faulty: how it ended, what the server and the visitor heard."""
    visitor, near_visitor = memory_stream_pair()
    server, near_server = memory_stream_pair()
    up, down = bytearray(), bytearray()
    sides = {Side.VISITOR: near_visitor, Side.SERVER: near_server}
    streams = {side: FaultyStream(near, plan) if side is faulty else near for side, near in sides.items()}
    with trio.fail_after(600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak, visitor, PAYLOAD)
            nursery.start_soon(speak, server, PAYLOAD)
            nursery.start_soon(hear, server, up)
            nursery.start_soon(hear, visitor, down)
            end = await relay(streams[Side.VISITOR], streams[Side.SERVER], linger=30)
    return end, bytes(up), bytes(down)


@pytest.mark.parametrize("faulty", Side)
@pytest.mark.parametrize("plan", [Plan(), Plan(step=1), Plan(step=7)], ids=["clean", "one byte at a time", "seven"])
async def test_all_arrives_however_it_is_cut(plan: Plan, faulty: Side, autojump_clock: MockClock) -> None:
    assert await relayed(plan, faulty) == (FINISHED, PAYLOAD, PAYLOAD)


@pytest.mark.parametrize("faulty", Side)
@pytest.mark.parametrize("point", POINTS)
async def test_of_a_stream_that_is_cut_a_prefix_arrives(point: int, faulty: Side, autojump_clock: MockClock) -> None:
    end, up, down = await relayed(Plan(step=100, cut_at=point), faulty)
    assert (end.cause, end.side) == (Cause.RESET, faulty)
    assert PAYLOAD.startswith(up)
    assert PAYLOAD.startswith(down)


@pytest.mark.parametrize("faulty", Side)
@pytest.mark.parametrize("point", POINTS)
async def test_a_stalled_stream_is_not_waited_for_once_the_other_way_has_ended(
    point: int, faulty: Side, autojump_clock: MockClock
) -> None:
    visitor, near_visitor = memory_stream_pair()
    server, near_server = memory_stream_pair()
    talker, listener = (visitor, server) if faulty is Side.VISITOR else (server, visitor)
    stalled = FaultyStream(near_visitor if faulty is Side.VISITOR else near_server, Plan(stall_at=point))
    streams = (stalled, near_server) if faulty is Side.VISITOR else (near_visitor, stalled)
    heard = bytearray()
    with trio.fail_after(600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak, talker, PAYLOAD)
            nursery.start_soon(hear, listener, heard)
            nursery.start_soon(speak, listener, b"")
            began = trio.current_time()
            end = await relay(*streams, linger=30)
    assert end == RelayEnd(Cause.LINGERED)
    assert trio.current_time() - began == pytest.approx(30)
    assert heard == PAYLOAD[:point]


@pytest.mark.parametrize("seed", range(5))
async def test_random_steps_change_nothing(seed: int, autojump_clock: MockClock) -> None:
    dice = random.Random(seed)
    plan = Plan(step=dice.randrange(1, 400))
    assert await relayed(plan, dice.choice(list(Side))) == (FINISHED, PAYLOAD, PAYLOAD)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_cancelling_closes_both_ends(busy: bool, autojump_clock: MockClock) -> None:
    visitor, near_visitor = memory_stream_pair()
    server, near_server = memory_stream_pair()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: relay(near_visitor, near_server, linger=30))
            if busy:
                await visitor.send_all(PAYLOAD)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        for far in (visitor, server):
            with pytest.raises(trio.BrokenResourceError):
                await far.send_all(b"x")


async def test_an_error_that_no_stream_may_raise_closes_both_ends_and_is_raised(autojump_clock: MockClock) -> None:
    class Odd(FaultyStream):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            raise ZeroDivisionError

    visitor, near_visitor = memory_stream_pair()
    server, near_server = memory_stream_pair()
    with trio.fail_after(10):
        with pytest.raises(ZeroDivisionError):
            await relay(Odd(near_visitor, Plan()), near_server, linger=30)
        assert await read_all(visitor) == await read_all(server) == b""


async def test_a_stream_that_its_owner_closed_ends_the_relay(autojump_clock: MockClock) -> None:
    _, near_visitor = memory_stream_pair()
    server, near_server = memory_stream_pair()
    await near_visitor.aclose()
    with trio.fail_after(10):
        end = await relay(near_visitor, near_server, linger=30)
        assert (end.cause, end.side) == (Cause.RESET, Side.VISITOR)
        assert await read_all(server) == b""


@pytest.mark.parametrize("with_engine", [True, False], ids=["engine", "tasks"])
async def test_sockets_are_relayed_by_either_way(bench: Bench, with_engine: bool) -> None:
    visitor, near_visitor = bench.tcp()
    server, near_server = bench.tcp()
    engine: Engine | None = bench.engine if with_engine else None
    ends: list[RelayEnd] = []

    async def join() -> None:
        ends.append(await relay(stream(near_visitor), stream(near_server), linger=30, engine=engine))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(join)
        nursery.start_soon(speak, visitor, NOISE)
        assert await read_all(server) == NOISE
        nursery.start_soon(speak, server, NOISE)
        assert await read_all(visitor) == NOISE
    assert ends == [FINISHED]


@pytest.mark.parametrize("with_engine", [True, False], ids=["engine", "tasks"])
async def test_cancelling_a_relay_of_sockets_closes_both(bench: Bench, with_engine: bool) -> None:
    visitor, near_visitor = bench.tcp()
    server, near_server = bench.tcp()
    engine: Engine | None = bench.engine if with_engine else None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: relay(stream(near_visitor), stream(near_server), linger=30, engine=engine))
        await visitor.send_all(b"x")
        assert await read_exactly(server, 1) == b"x"
        nursery.cancel_scope.cancel()
    assert await read_all(visitor) == await read_all(server) == b""


async def test_whatever_breaks_one_stream_is_a_reset_of_a_socket_on_the_other_side() -> None:
    far, near = tcp_pair()
    visitor, near_visitor = memory_stream_pair()
    async with stream(far) as server:
        with trio.fail_after(10):
            await visitor.send_all(b"xyz")
            end = await relay(FaultyStream(near_visitor, Plan(cut_at=1)), stream(near), linger=30)
            assert (end.cause, end.side) == (Cause.RESET, Side.VISITOR)
            with pytest.raises(trio.BrokenResourceError):
                await read_all(server)
