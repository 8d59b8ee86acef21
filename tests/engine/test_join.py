"""The contract of `join`, which every engine keeps."""

from __future__ import annotations

import hashlib
import random
import socket

import pytest
import trio

from tests.engine.bench import NOISE, Bench, Ends, flood, read_all, read_exactly, reset, stream, wait_reset
from tunneld.engine.engine import Cause, RelayEnd, Side

DROPPED = RelayEnd(Cause.DROPPED)
FINISHED = RelayEnd(Cause.FINISHED)


async def test_every_byte_arrives_once_and_in_order_in_chunks_of_any_size(bench: Bench) -> None:
    joined = bench.join()
    dice = random.Random(11)
    sums: dict[str, str] = {}
    sent: dict[str, str] = {}

    async def send(name: str, far: trio.SocketStream) -> None:
        digest = hashlib.sha256()
        for _ in range(120):
            size = dice.choice([1, 3, 511, 4096, 65535, 65536, 65537, 300_000])
            start = dice.randrange(len(NOISE) - size)
            chunk = NOISE[start : start + size]
            digest.update(chunk)
            await far.send_all(chunk)
        await far.send_eof()
        sent[name] = digest.hexdigest()

    async def receive(name: str, far: trio.SocketStream) -> None:
        digest = hashlib.sha256()
        while chunk := await far.receive_some(dice.choice([1, 1000, 70_000, 1 << 20])):
            digest.update(chunk)
        sums[name] = digest.hexdigest()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, "up", joined.visitor)
        nursery.start_soon(send, "down", joined.server)
        nursery.start_soon(receive, "up", joined.server)
        nursery.start_soon(receive, "down", joined.visitor)
    assert sums == sent
    assert await joined.ends.one() == FINISHED


async def test_both_directions_are_counted(bench: Bench) -> None:
    joined = bench.join()
    await joined.visitor.send_all(b"question")
    assert await read_exactly(joined.server, 8) == b"question"
    await joined.server.send_all(b"yes")
    assert await read_exactly(joined.visitor, 3) == b"yes"
    await joined.visitor.aclose()
    await joined.server.aclose()
    await joined.ends.one()
    assert (joined.relay.up, joined.relay.down) == (8, 3)


@pytest.mark.parametrize("first", Side)
async def test_a_half_closed_side_still_receives_the_answer(bench: Bench, first: Side) -> None:
    joined = bench.join()
    one, other = (joined.visitor, joined.server) if first is Side.VISITOR else (joined.server, joined.visitor)
    await one.send_all(b"request")
    await one.send_eof()
    assert await read_all(other) == b"request"
    answer = NOISE * 4  # more than a pipe

    async def send_answer() -> None:
        await other.send_all(answer)
        await other.send_eof()

    bench.nursery.start_soon(send_answer)
    assert await read_all(one) == answer
    assert await joined.ends.one() == FINISHED


async def test_an_end_of_file_without_data_is_passed_on(bench: Bench) -> None:
    joined = bench.join()
    await joined.visitor.send_eof()
    assert await read_all(joined.server) == b""
    await joined.server.aclose()
    assert await read_all(joined.visitor) == b""
    assert await joined.ends.one() == FINISHED


@pytest.mark.parametrize("broken", Side)
async def test_a_reset_of_one_side_resets_the_other(bench: Bench, broken: Side) -> None:
    joined = bench.join()
    one, other = (joined.visitor, joined.server) if broken is Side.VISITOR else (joined.server, joined.visitor)
    await one.send_all(b"half a wo")
    assert await read_exactly(other, 9) == b"half a wo"
    reset(one)
    with pytest.raises(trio.BrokenResourceError) as caught:
        await read_all(other)
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    end = await joined.ends.one()
    assert (end.cause, end.side) == (Cause.RESET, broken)
    assert isinstance(end.error, ConnectionResetError)


async def test_a_reset_during_a_bulk_transfer_resets_the_other_side(bench: Bench) -> None:
    joined = bench.join()
    bench.nursery.start_soon(flood, joined.visitor)
    await read_exactly(joined.server, 3_000_000)
    reset(joined.server)
    end = await joined.ends.one()
    assert (end.cause, end.side) == (Cause.RESET, Side.SERVER)


async def test_a_reset_after_the_end_of_file_is_noticed(bench: Bench) -> None:
    joined = bench.join()
    await joined.visitor.send_eof()
    assert await read_all(joined.server) == b""
    await joined.server.send_all(b"x")
    assert await read_exactly(joined.visitor, 1) == b"x"
    reset(joined.visitor)
    bench.nursery.start_soon(flood, joined.server)  # the portable engine finds out only by sending
    assert (await joined.ends.one()).cause is Cause.RESET


async def test_a_slow_reader_stops_the_sender_and_loses_nothing(bench: Bench) -> None:
    small = 64 * 1024
    joined = bench.join(SO_SNDBUF=small, SO_RCVBUF=small)
    payload = memoryview(NOISE * 8)
    taken = stalled = 0
    while stalled < 3:
        try:
            taken += send_at_once(joined.visitor, payload[taken:])
            stalled = 0
        except BlockingIOError:
            stalled += 1
            await trio.testing.wait_all_tasks_blocked(0.03)
    kernel = (
        2 * 2 * (2 * small)
    )  # two connections, a send and a receive buffer each, of which Linux makes twice the size
    assert taken <= kernel + (1 << 20) + (1 << 16)

    async def send_rest() -> None:
        await joined.visitor.send_all(payload[taken:])
        await joined.visitor.send_eof()

    bench.nursery.start_soon(send_rest)
    assert await read_all(joined.server) == payload


def send_at_once(far: trio.SocketStream, data: memoryview) -> int:
    """Send what the kernel takes at once. Raises BlockingIOError if it takes nothing."""
    with socket.socket(fileno=socket.dup(far.socket.fileno())) as twin:
        return twin.send(data, socket.MSG_DONTWAIT)


async def test_drop_closes_both_sides_and_calls_on_end_once(bench: Bench) -> None:
    joined = bench.join()
    await joined.visitor.send_all(b"hello")
    assert await read_exactly(joined.server, 5) == b"hello"
    joined.relay.drop()
    joined.relay.drop()
    assert await joined.ends.one() == DROPPED
    await wait_reset(joined.visitor)
    await wait_reset(joined.server)
    joined.relay.drop()
    await trio.testing.wait_all_tasks_blocked()
    assert await joined.ends.one() == DROPPED


async def test_an_immediate_drop_calls_on_end_later(bench: Bench) -> None:
    joined = bench.join()
    joined.relay.drop()
    assert joined.ends.told == []
    assert await joined.ends.one() == DROPPED


async def test_a_stopped_engine_drops_its_relays(bench: Bench) -> None:
    idle, busy = bench.join(), bench.join()
    bench.nursery.start_soon(flood, busy.visitor)
    await read_exactly(busy.server, 1_000_000)
    bench.stop.cancel()
    assert await idle.ends.one() == await busy.ends.one() == DROPPED
    await wait_reset(idle.visitor)
    with pytest.raises(RuntimeError, match="not running"):
        bench.join()


async def test_a_refused_connection_ends_the_relay(bench: Bench) -> None:
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        server = bench.dialled(not_listening.getsockname())
        visitor, near_visitor = bench.tcp()
        ends = Ends()
        bench.engine.join(near_visitor, server, linger=30, on_end=ends.note)
        end = await ends.one()
    assert (end.cause, end.side) == (Cause.RESET, Side.SERVER)
    assert isinstance(end.error, ConnectionRefusedError)
    with pytest.raises(trio.BrokenResourceError):
        await read_all(visitor)


async def test_bytes_and_end_of_file_wait_for_a_connecting_socket(bench: Bench) -> None:
    """A listener with a full queue makes the next connect wait for its second SYN, a second later."""
    listener = bench.listener()
    listener.listen(0)
    bench.dialled(listener.getsockname())
    server = bench.dialled(listener.getsockname())
    with pytest.raises(OSError, match="not connected"):
        server.getpeername()
    visitor, near_visitor = bench.tcp()
    ends = Ends()
    await visitor.send_eof()
    bench.engine.join(near_visitor, server, linger=30, on_end=ends.note)
    await trio.testing.wait_all_tasks_blocked(0.01)
    listener.accept()[0].close()
    await trio.lowlevel.wait_readable(listener)
    accepted, _ = listener.accept()
    bench.sockets.append(accepted)
    far = stream(accepted)
    await far.send_all(b"answer")
    assert await read_all(far) == b""
    await far.aclose()
    assert await read_all(visitor) == b"answer"
    assert await ends.one() == FINISHED


@pytest.mark.parametrize("data", [b"", b"early", NOISE], ids=["nothing", "little", "much"])
async def test_bytes_and_end_of_file_from_before_the_join_are_relayed(bench: Bench, data: bytes) -> None:
    visitor, near_visitor = bench.tcp()
    server, near_server = bench.tcp()

    async def send(far: trio.SocketStream) -> None:
        await far.send_all(data)
        await far.send_eof()

    bench.nursery.start_soon(send, visitor)
    bench.nursery.start_soon(send, server)
    await trio.testing.wait_all_tasks_blocked(0.01)
    ends = Ends()
    bench.engine.join(near_visitor, near_server, linger=30, on_end=ends.note)
    assert await read_all(server) == data
    assert await read_all(visitor) == data
    assert await ends.one() == FINISHED


async def test_an_end_of_file_right_after_the_last_bytes_is_not_missed(bench: Bench) -> None:
    joined = bench.join()
    for _ in range(50):
        other = bench.join()
        await other.visitor.send_all(b"last words")
        await other.visitor.aclose()
        assert await read_all(other.server) == b"last words"
        await other.server.aclose()
        assert await other.ends.one() == FINISHED
    joined.relay.drop()


async def test_a_bulk_transfer_does_not_delay_small_messages(bench: Bench) -> None:
    bulk, small = bench.join(), bench.join()

    async def discard() -> None:
        await wait_reset(bulk.server)

    bench.nursery.start_soon(flood, bulk.visitor)
    bench.nursery.start_soon(discard)
    for _ in range(100):
        await small.visitor.send_all(b"ping")
        assert await read_exactly(small.server, 4) == b"ping"
    bulk.relay.drop()
    await bulk.ends.one()
