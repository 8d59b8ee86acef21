"""Half-closed relays end after `linger` seconds without a byte.

The clock is virtual and the tests move it forward; it also runs, because the bytes go through the kernel.
"""

from __future__ import annotations

import trio
from trio.testing import MockClock

from tests.engine.bench import Bench, Ends, RelayBetweenSockets, flood, read_all, read_exactly, wait_reset
from tunneld.engine.engine import Cause, RelayEnd

LINGERED = RelayEnd(Cause.LINGERED)


async def half_closed(bench: Bench, linger: float) -> RelayBetweenSockets:
    """A relay whose visitor has sent an end of file."""
    joined = bench.join(linger=linger)
    await joined.visitor.send_eof()
    assert await read_all(joined.server) == b""
    return joined


async def answer(joined: RelayBetweenSockets) -> None:
    """Send a byte from the server to the visitor."""
    await joined.server.send_all(b"x")
    assert await read_exactly(joined.visitor, 1) == b"x"
    await trio.testing.wait_all_tasks_blocked()


async def test_silence_ends_a_half_closed_relay(bench: Bench, mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    joined = await half_closed(bench, linger=10)
    mock_clock.jump(9)
    await answer(joined)
    assert joined.ends.told == []
    mock_clock.jump(11)
    assert await joined.ends.one() == LINGERED
    await wait_reset(joined.visitor)


async def test_every_byte_extends_the_linger_time(bench: Bench, mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    joined = await half_closed(bench, linger=10)
    for _ in range(4):
        mock_clock.jump(6)
        await answer(joined)
    assert joined.ends.told == []
    await joined.server.aclose()
    assert (await joined.ends.one()).cause is Cause.FINISHED


async def test_a_relay_that_is_open_both_ways_never_times_out(bench: Bench, mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    joined = bench.join(linger=1)
    await joined.visitor.send_all(b"x")
    assert await read_exactly(joined.server, 1) == b"x"
    mock_clock.jump(30)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert joined.ends.told == []


async def test_a_shorter_linger_time_does_not_wait_for_a_longer_one(bench: Bench, mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    long, short = await half_closed(bench, linger=40), await half_closed(bench, linger=5)
    mock_clock.jump(6)
    assert await short.ends.one() == LINGERED
    assert long.ends.told == []
    mock_clock.jump(36)
    assert await long.ends.one() == LINGERED


async def test_a_reader_that_never_reads_again_is_not_waited_for(bench: Bench, mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    joined = bench.join(linger=10)
    await joined.visitor.send_eof()
    bench.nursery.start_soon(flood, joined.server)
    await trio.testing.wait_all_tasks_blocked(0.1)
    mock_clock.jump(11)
    assert await joined.ends.one() == LINGERED


async def test_a_server_that_never_connects_is_dropped_after_the_visitor_has_left(
    pump: Bench, mock_clock: MockClock
) -> None:
    mock_clock.rate = 1
    listener = pump.listener()
    listener.listen(0)
    pump.dialled(listener.getsockname())
    server = pump.dialled(listener.getsockname())  # there is no room for it in the queue
    visitor, near_visitor = pump.tcp()
    ends = Ends()
    pump.engine.join(near_visitor, server, linger=10, on_end=ends.note)
    await visitor.send_eof()
    await trio.testing.wait_all_tasks_blocked(0.01)
    mock_clock.jump(11)
    assert await ends.one() == LINGERED
