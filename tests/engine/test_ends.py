"""The conformance suite of ends: each test runs for every pair of kinds, in both engines. A new kind of end is one more
entry in `KINDS`.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import AsyncIterator

import pytest
import trio
from trio.abc import HalfCloseableStream
from trio.testing import MockClock

from tests.engine.bench import NOISE, Ends, open_descriptors, read_all, read_exactly
from tests.engine.end_kinds import IN_A_PUMP, KINDS, MAX_HELD, PORTABLE, EndsBench, JoinedSides, ends_bench, received
from tests.support.pki import Pki
from tunneld.engine.engine import Cause, RelayEnd
from tunneld.engine.engine import Side as Name

PAIRS = [
    *[("pump", visitor, server) for visitor in KINDS for server in KINDS],
    *[("tiny", visitor, server) for visitor in IN_A_PUMP for server in IN_A_PUMP],
    *[("portable", visitor, server) for visitor in PORTABLE for server in PORTABLE],
]
TIME = 20
"""Seconds per test, real or virtual."""
FINISHED = RelayEnd(Cause.FINISHED)

Pair = tuple[str, str, str]


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.issue(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> Pair:
    """An engine and the kinds of both sides."""
    found: Pair = request.param
    return found


@pytest.fixture
async def bench(pair: Pair, pki: Pki) -> AsyncIterator[EndsBench]:
    """No descriptor and no task is left after the test."""
    descriptors, tasks = open_descriptors(), trio.lowlevel.current_statistics().tasks_living
    with trio.fail_after(TIME):
        async with ends_bench(pair[0], pki) as bench:
            yield bench
    assert open_descriptors() == descriptors
    assert trio.lowlevel.current_statistics().tasks_living <= tasks


def sides_of(joined: JoinedSides, first: Name) -> tuple[HalfCloseableStream, HalfCloseableStream]:
    """The far streams: the first side's, and the other's."""
    pair = joined.visitor.far, joined.server.far
    return pair if first is Name.VISITOR else (pair[1], pair[0])


async def send_and_finish(far: HalfCloseableStream, data: bytes) -> None:
    await far.send_all(data)
    await far.send_eof()


# Bytes and ends of file


async def test_every_byte_arrives_once_and_in_order_both_ways(bench: EndsBench, pair: Pair) -> None:
    joined = await bench.join(*pair[1:])
    dice = random.Random(5)
    sizes = [1, 2, 511, 512, 513, 3000] if pair[0] == "tiny" else [1, 511, 4096, 16_385, 65_536, 65_537, 200_000]
    sent, came = {}, {}

    async def send(name: str, far: HalfCloseableStream) -> None:
        digest = hashlib.sha256()
        for _ in range(40):
            size = dice.choice(sizes)
            start = dice.randrange(len(NOISE) - size)
            digest.update(NOISE[start : start + size])
            await far.send_all(NOISE[start : start + size])
        await far.send_eof()
        sent[name] = digest.hexdigest()

    async def receive(name: str, far: HalfCloseableStream) -> None:
        digest = hashlib.sha256()
        while chunk := await far.receive_some(dice.choice([1000, 70_000, 1 << 20])):
            digest.update(chunk)
        came[name] = digest.hexdigest()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, "up", joined.visitor.far)
        nursery.start_soon(send, "down", joined.server.far)
        nursery.start_soon(receive, "up", joined.server.far)
        nursery.start_soon(receive, "down", joined.visitor.far)
    assert came == sent
    assert await joined.ends.one() == FINISHED


@pytest.mark.parametrize("first", Name)
async def test_a_half_closed_side_still_receives_the_answer(bench: EndsBench, pair: Pair, first: Name) -> None:
    joined = await bench.join(*pair[1:])
    one, other = sides_of(joined, first)
    await send_and_finish(one, b"request")
    assert await read_all(other) == b"request"
    answer = NOISE[: 20_000 if pair[0] == "tiny" else 300_000]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_finish, other, answer)
        assert await read_all(one) == answer
    assert await joined.ends.one() == FINISHED
    counts = (7, len(answer)) if first is Name.VISITOR else (len(answer), 7)
    assert (joined.relay.up, joined.relay.down) == counts


async def test_ends_of_file_without_a_byte_are_passed_on(bench: EndsBench, pair: Pair) -> None:
    joined = await bench.join(*pair[1:])
    await joined.server.far.send_eof()
    assert await read_all(joined.visitor.far) == b""
    await joined.visitor.far.send_eof()
    assert await read_all(joined.server.far) == b""
    assert await joined.ends.one() == FINISHED


async def test_bytes_and_an_end_of_file_from_before_the_join_are_relayed(bench: EndsBench, pair: Pair) -> None:
    sides = await bench.side(pair[1]), await bench.side(pair[2])
    for side in sides:
        await send_and_finish(side.far, b"early")
    await trio.testing.wait_all_tasks_blocked(0.01)
    ended = trio.Event()
    bench.engine.join(sides[0].near, sides[1].near, linger=30, on_end=lambda *_: ended.set())
    for side in sides:
        assert await read_all(side.far) == b"early"
    await ended.wait()


@pytest.mark.parametrize("size", [1, 60_000])
@pytest.mark.parametrize("says_more", [True, False])
async def test_bytes_read_from_the_visitor_already_come_first(
    bench: EndsBench, pair: Pair, size: int, says_more: bool
) -> None:
    """Ahead of what is still in its end, also where the server does not take them at once."""
    sides, ends = (await bench.side(pair[1]), await bench.side(pair[2])), Ends()
    size = min(size, 3000) if pair[0] == "tiny" else size
    early, more = NOISE[:size], b"and more" if says_more else b""
    if says_more:
        await send_and_finish(sides[0].far, more)
    relay = bench.engine.join(sides[0].near, sides[1].near, linger=30, on_end=ends.note, early=early)
    await trio.testing.wait_all_tasks_blocked(0.01)
    if not says_more:
        await sides[0].far.send_eof()
    assert await read_all(sides[1].far) == early + more
    await send_and_finish(sides[1].far, b"answer")
    assert await read_all(sides[0].far) == b"answer"
    assert await ends.one() == FINISHED
    assert (relay.up, relay.down) == (len(early + more), 6)


# Failures


@pytest.mark.parametrize("broken", Name)
async def test_a_reset_in_the_middle_of_a_transfer_is_passed_on(bench: EndsBench, pair: Pair, broken: Name) -> None:
    """What had arrived is the beginning of what was sent, and never looks like the whole."""
    joined = await bench.join(*pair[1:])
    one, other = (joined.visitor, joined.server) if broken is Name.VISITOR else (joined.server, joined.visitor)
    size = 4000 if pair[0] == "tiny" else 150_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.far.send_all, NOISE[:size])
        head = await read_exactly(other.far, size)
        assert head == NOISE[:size]
    one.reset()
    rest, cleanly = await received(other.far)
    assert rest == b""
    kind = pair[1] if other is joined.visitor else pair[2]
    if "memory" not in pair:
        assert not cleanly, kind
        end = await joined.ends.one()
        assert (end.cause, end.side) == (Cause.RESET, broken)


@pytest.mark.parametrize("early", Name)
async def test_an_answer_in_front_of_a_failed_write_arrives(bench: EndsBench, pair: Pair, early: Name) -> None:
    """One side reads a little of an upload, answers and closes."""
    joined = await bench.join(*pair[1:])
    one, other = sides_of(joined, early)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(swallow, other)
        await read_exactly(one, 16)
        await one.send_all(b"413 too large")
        await one.aclose()
        assert await read_exactly(other, 13) == b"413 too large"
        await trio.aclose_forcefully(other)
        nursery.cancel_scope.cancel()
    await joined.ends.one()


# Slow readers


@pytest.mark.parametrize("slow", Name)
async def test_a_slow_reader_stops_the_sender_and_loses_nothing(bench: EndsBench, pair: Pair, slow: Name) -> None:
    if pair[0] == "tiny":
        pytest.skip("its buffers do not matter here")
    joined = await bench.join(*pair[1:])
    reader, sender = sides_of(joined, slow)
    whole, sent = memoryview(NOISE * 6), 0

    async def send() -> None:
        nonlocal sent
        while sent < len(whole):
            await sender.send_all(whole[sent : sent + 16_384])
            sent += 16_384
        await sender.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while True:
            before = sent
            await trio.testing.wait_all_tasks_blocked(0.02)
            if sent == before:
                break
        if "memory" not in pair:  # its own buffer has no bound
            assert sent <= MAX_HELD
        assert hashlib.sha256(await read_all(reader)).digest() == hashlib.sha256(whole).digest()


# Cuts: the side that is still receiving gets a reset


async def begun(bench: EndsBench, pair: Pair, linger: float = 30) -> JoinedSides:
    """A relay in the middle of an answer."""
    joined = await bench.join(*pair[1:], linger=linger)
    await joined.server.far.send_all(b"half an ans")
    assert await read_exactly(joined.visitor.far, 11) == b"half an ans"
    return joined


async def check_reset(pair: Pair, joined: JoinedSides) -> None:
    for kind, side in zip(pair[1:], (joined.visitor, joined.server), strict=True):
        rest, cleanly = await received(side.far)
        assert rest == b""
        if kind != "memory":
            assert not cleanly


async def test_a_dropped_relay_resets_both_sides(bench: EndsBench, pair: Pair) -> None:
    joined = await begun(bench, pair)
    joined.relay.drop()
    joined.relay.drop()
    await check_reset(pair, joined)
    assert (await joined.ends.one()).cause is Cause.DROPPED


async def test_a_used_up_quota_passes_its_last_byte_and_the_owners_drop_resets(bench: EndsBench, pair: Pair) -> None:
    used_up = trio.Event()
    joined = await bench.join(*pair[1:], throttle=bench.engine.limit(None, 10_000, used_up.set))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(joined.server.far.send_all, NOISE[:10_100])
        assert await read_exactly(joined.visitor.far, 10_000) == NOISE[:10_000]
        await used_up.wait()
        joined.relay.drop()
        rest, cleanly = await received(joined.visitor.far)
        assert rest == b""
        assert pair[1] == "memory" or not cleanly
        nursery.cancel_scope.cancel()


async def test_linger_resets_the_side_that_was_not_told_an_end(
    bench: EndsBench, pair: Pair, autojump_clock: MockClock
) -> None:
    joined = await begun(bench, pair, linger=5)
    await joined.visitor.far.send_eof()
    assert await read_all(joined.server.far) == b""
    assert (await joined.ends.one()).cause is Cause.LINGERED
    rest, cleanly = await received(joined.visitor.far)
    assert rest == b""
    assert pair[1] == "memory" or not cleanly


async def test_a_stopped_engine_drops_the_relay(bench: EndsBench, pair: Pair) -> None:
    joined = await begun(bench, pair)
    bench.stop()
    assert (await joined.ends.one()).cause is Cause.DROPPED
    if not {"channel", "tls-over-channel"} & set(pair):  # the far end of a channel is in the same engine
        await check_reset(pair, joined)


POINTS = ["joined", "sent", "received", "in the middle", "half-closed", "answered"]


@pytest.mark.parametrize("point", POINTS)
async def test_a_relay_is_dropped_at_every_point(bench: EndsBench, pair: Pair, point: str) -> None:
    joined = await bench.join(*pair[1:])
    visitor, server = joined.visitor.far, joined.server.far
    async with trio.open_nursery() as nursery:
        match point:
            case "sent":
                await visitor.send_all(b"hello")
            case "received":
                await visitor.send_all(b"hello")
                assert await read_exactly(server, 5) == b"hello"
            case "in the middle":
                nursery.start_soon(swallow, visitor)
                await read_exactly(server, 5000)
            case "half-closed":
                await send_and_finish(visitor, b"hello")
                assert await read_all(server) == b"hello"
            case "answered":
                await send_and_finish(visitor, b"hello")
                await server.send_all(b"world")
                assert await read_exactly(visitor, 5) == b"world"
        joined.relay.drop()
        assert (await joined.ends.one()).cause is Cause.DROPPED
        nursery.cancel_scope.cancel()


async def swallow(far: HalfCloseableStream) -> None:
    """Send until the stream breaks."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            await far.send_all(NOISE[:50_000])


async def test_a_relay_that_ends_itself_while_bytes_arrive_on_both_sides(bench: EndsBench, pair: Pair) -> None:
    """Both far sides break at once: one end is reported."""
    joined = await bench.join(*pair[1:])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(swallow, joined.visitor.far)
        nursery.start_soon(swallow, joined.server.far)
        await read_exactly(joined.server.far, 3000)
        joined.visitor.reset()
        joined.server.reset()
        nursery.cancel_scope.cancel()
    joined.relay.drop()
    await joined.ends.one()
