"""Relays that are lifted out of an engine and put down again: their far ends notice nothing."""

from __future__ import annotations

import hashlib
import random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.engine.bench import NOISE, Bench, Joined, flood, read_all, read_exactly, reset
from tunneld.engine.engine import Cause, RelayEnd, Side

SIPS = {"buffer_size": 512, "pipe_size": 4096, "turn_size": 1}
ENGINES = pytest.mark.parametrize("pump", [{}, {"max_pipes": 0}, SIPS], ids=["", "no pipes", "sips"], indirect=True)


def move(bench: Bench, joined: Joined) -> int:
    """From the engine into nobody's hands and back; how many octets were on their way."""
    lifted = bench.engine.export_relay(joined.relay)
    assert lifted is not None
    bench.sockets += [lifted.visitor, lifted.server]
    joined.relay = bench.engine.import_relay(lifted, on_end=joined.ends.note)
    return len(lifted.up.held) + len(lifted.down.held)


@ENGINES
async def test_every_byte_arrives_once_and_in_order_however_often_the_relay_is_lifted(pump: Bench) -> None:
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
            move(pump, joined)
            for _ in range(dice.randrange(1, 20)):
                await trio.lowlevel.checkpoint()
    assert sums["up"][0] == sums["up"][1]
    assert sums["down"][0] == sums["down"][1]
    assert await joined.ends.one() == RelayEnd(Cause.FINISHED)


@ENGINES
async def test_a_reader_who_has_stopped_finds_all_of_it_later(pump: Bench) -> None:
    joined = pump.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood, joined.server)
        await wait_all_tasks_blocked(0.02)
        assert move(pump, joined) > 0
        await wait_all_tasks_blocked(0.02)
        assert await read_exactly(joined.visitor, 3 * len(NOISE)) == NOISE * 3
        nursery.cancel_scope.cancel()


async def test_counts_go_on_where_they_were(pump: Bench) -> None:
    joined = pump.join()
    await joined.visitor.send_all(b"question")
    assert await read_exactly(joined.server, 8) == b"question"
    move(pump, joined)
    await joined.visitor.send_all(b"?")
    assert await read_exactly(joined.server, 1) == b"?"
    assert (joined.relay.up, joined.relay.down) == (9, 0)


async def test_what_came_in_between_is_relayed(pump: Bench) -> None:
    joined = pump.join()
    lifted = pump.engine.export_relay(joined.relay)
    assert lifted is not None
    await joined.visitor.send_all(b"meanwhile")
    await joined.visitor.send_eof()
    await wait_all_tasks_blocked()
    pump.engine.import_relay(lifted, on_end=joined.ends.note)
    assert await read_all(joined.server) == b"meanwhile"


@pytest.mark.parametrize("side", Side)
async def test_a_half_closed_relay_stays_half_closed_and_is_answered(pump: Bench, side: Side) -> None:
    joined = pump.join()
    first, other = (joined.visitor, joined.server) if side is Side.VISITOR else (joined.server, joined.visitor)
    await first.send_eof()
    assert await read_all(other) == b""
    move(pump, joined)
    await other.send_all(b"answer")
    await other.aclose()
    assert await read_all(first) == b"answer"
    assert await joined.ends.one() == RelayEnd(Cause.FINISHED)


async def test_lingering_goes_on_where_it_was(pump: Bench, mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    joined = pump.join(linger=10)
    await joined.visitor.send_eof()
    assert await read_all(joined.server) == b""
    mock_clock.jump(6)
    move(pump, joined)
    mock_clock.jump(5)
    assert await joined.ends.one() == RelayEnd(Cause.LINGERED)


async def test_a_reset_in_between_is_one_for_the_other_side(pump: Bench) -> None:
    joined = pump.join()
    lifted = pump.engine.export_relay(joined.relay)
    assert lifted is not None
    reset(joined.server)
    await wait_all_tasks_blocked()
    pump.engine.import_relay(lifted, on_end=joined.ends.note)
    assert (await joined.ends.one()).cause is Cause.RESET
    with pytest.raises(trio.BrokenResourceError):
        await joined.visitor.receive_some()


async def test_what_is_lifted_is_not_the_engines_any_more(pump: Bench) -> None:
    joined = pump.join()
    lifted = pump.engine.export_relay(joined.relay)
    assert lifted is not None
    joined.relay.drop()
    pump.stop.cancel()
    await wait_all_tasks_blocked()
    assert joined.ends.told == []
    assert lifted.visitor.fileno() >= 0
    lifted.close()
    assert await read_all(joined.server) == b""


async def test_an_ended_relay_cannot_be_lifted(bench: Bench) -> None:
    joined = bench.join()
    joined.relay.drop()
    assert bench.engine.export_relay(joined.relay) is None


async def test_a_throttled_relay_keeps_its_pace(pump: Bench) -> None:
    throttle = pump.engine.limit(None, 100, lambda: None)
    joined = pump.join(throttle=throttle)
    await joined.visitor.send_all(bytes(60))
    assert await read_exactly(joined.server, 60) == bytes(60)
    lifted = pump.engine.export_relay(joined.relay)
    assert lifted is not None
    assert throttle.left == 40
    joined.relay = pump.engine.import_relay(lifted, on_end=joined.ends.note, throttle=throttle)
    await joined.visitor.send_all(bytes(60))
    assert await read_exactly(joined.server, 40) == bytes(40)
    await wait_all_tasks_blocked(0.01)
    assert joined.relay.up == 100
