"""Relays that are exported from an engine and imported again; the far sockets notice nothing."""

from __future__ import annotations

import hashlib
import random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.engine.bench import NOISE, Bench, RelayBetweenSockets, flood, read_all, read_exactly, reset
from tunneld.engine.engine import Cause, RelayEnd, Side

TINY_BUFFERS = {"buffer_size": 512, "pipe_size": 4096, "turn_size": 1}
ENGINES = pytest.mark.parametrize(
    "pump", [{}, {"max_pipes": 0}, TINY_BUFFERS], ids=["", "no pipes", "tiny buffers"], indirect=True
)


def export_and_import(bench: Bench, joined: RelayBetweenSockets) -> int:
    """Export a relay and import it again; return how many bytes were undelivered."""
    state = bench.engine.export_relay(joined.relay)
    assert state is not None
    bench.sockets += [state.visitor, state.server]
    joined.relay = bench.engine.import_relay(state, on_end=joined.ends.note)
    return len(state.up.held) + len(state.down.held)


@ENGINES
async def test_every_byte_arrives_once_and_in_order_during_repeated_exports(pump: Bench) -> None:
    joined = pump.join(SO_RCVBUF=50_000, SO_SNDBUF=50_000)
    dice = random.Random(3)
    sums: dict[str, list[str]] = {"up": [], "down": []}
    busy = 4

    async def send(name: str, far: trio.SocketStream) -> None:
        nonlocal busy
        digest = hashlib.sha256()
        for _ in range(60):
            start, size = dice.randrange(len(NOISE) // 2), dice.choice([1, 511, 65536, 300_000])
            digest.update(NOISE[start : start + size])
            await far.send_all(NOISE[start : start + size])
        await far.send_eof()
        sums[name].append(digest.hexdigest())
        busy -= 1

    async def receive(name: str, far: trio.SocketStream) -> None:
        nonlocal busy
        digest = hashlib.sha256()
        while chunk := await far.receive_some(dice.choice([1000, 70_000])):
            digest.update(chunk)
            await trio.lowlevel.checkpoint()
        sums[name].append(digest.hexdigest())
        busy -= 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, "up", joined.visitor)
        nursery.start_soon(send, "down", joined.server)
        nursery.start_soon(receive, "up", joined.server)
        nursery.start_soon(receive, "down", joined.visitor)
        while busy and not joined.ends.told:
            export_and_import(pump, joined)
            for _ in range(dice.randrange(1, 20)):
                await trio.lowlevel.checkpoint()
    assert sums["up"][0] == sums["up"][1]
    assert sums["down"][0] == sums["down"][1]
    assert await joined.ends.one() == RelayEnd(Cause.FINISHED)


@ENGINES
async def test_undelivered_bytes_of_a_slow_reader_are_exported(pump: Bench) -> None:
    joined = pump.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood, joined.server)
        await wait_all_tasks_blocked(0.02)
        assert export_and_import(pump, joined) > 0
        await wait_all_tasks_blocked(0.02)
        assert await read_exactly(joined.visitor, 3 * len(NOISE)) == NOISE * 3
        nursery.cancel_scope.cancel()


async def test_byte_counts_survive(pump: Bench) -> None:
    joined = pump.join()
    await joined.visitor.send_all(b"question")
    assert await read_exactly(joined.server, 8) == b"question"
    export_and_import(pump, joined)
    await joined.visitor.send_all(b"?")
    assert await read_exactly(joined.server, 1) == b"?"
    assert (joined.relay.up, joined.relay.down) == (9, 0)


async def test_bytes_that_arrive_between_export_and_import_are_relayed(pump: Bench) -> None:
    joined = pump.join()
    state = pump.engine.export_relay(joined.relay)
    assert state is not None
    await joined.visitor.send_all(b"meanwhile")
    await joined.visitor.send_eof()
    await wait_all_tasks_blocked()
    pump.engine.import_relay(state, on_end=joined.ends.note)
    assert await read_all(joined.server) == b"meanwhile"


@pytest.mark.parametrize("side", Side)
async def test_a_half_closed_relay_stays_half_closed_and_is_answered(pump: Bench, side: Side) -> None:
    joined = pump.join()
    first, other = (joined.visitor, joined.server) if side is Side.VISITOR else (joined.server, joined.visitor)
    await first.send_eof()
    assert await read_all(other) == b""
    export_and_import(pump, joined)
    await other.send_all(b"answer")
    await other.aclose()
    assert await read_all(first) == b"answer"
    assert await joined.ends.one() == RelayEnd(Cause.FINISHED)


async def test_the_linger_time_continues(pump: Bench, mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    joined = pump.join(linger=10)
    await joined.visitor.send_eof()
    assert await read_all(joined.server) == b""
    mock_clock.jump(6)
    export_and_import(pump, joined)
    mock_clock.jump(5)
    assert await joined.ends.one() == RelayEnd(Cause.LINGERED)


async def test_a_reset_between_export_and_import_resets_the_other_side(pump: Bench) -> None:
    joined = pump.join()
    state = pump.engine.export_relay(joined.relay)
    assert state is not None
    reset(joined.server)
    await wait_all_tasks_blocked()
    pump.engine.import_relay(state, on_end=joined.ends.note)
    assert (await joined.ends.one()).cause is Cause.RESET
    with pytest.raises(trio.BrokenResourceError):
        await joined.visitor.receive_some()


async def test_an_exported_relay_no_longer_belongs_to_the_engine(pump: Bench) -> None:
    joined = pump.join()
    state = pump.engine.export_relay(joined.relay)
    assert state is not None
    joined.relay.drop()
    pump.stop.cancel()
    await wait_all_tasks_blocked()
    assert joined.ends.told == []
    assert state.visitor.fileno() >= 0
    state.close()
    assert await read_all(joined.server) == b""


async def test_an_ended_relay_cannot_be_exported(bench: Bench) -> None:
    joined = bench.join()
    joined.relay.drop()
    assert bench.engine.export_relay(joined.relay) is None


async def test_a_throttled_relay_keeps_its_quota(pump: Bench) -> None:
    throttle = pump.engine.limit(None, 100, lambda: None)
    joined = pump.join(throttle=throttle)
    await joined.visitor.send_all(bytes(60))
    assert await read_exactly(joined.server, 60) == bytes(60)
    state = pump.engine.export_relay(joined.relay)
    assert state is not None
    assert throttle.left == 40
    joined.relay = pump.engine.import_relay(state, on_end=joined.ends.note, throttle=throttle)
    await joined.visitor.send_all(bytes(60))
    assert await read_exactly(joined.server, 40) == bytes(40)
    await wait_all_tasks_blocked(0.01)
    assert joined.relay.up == 100
