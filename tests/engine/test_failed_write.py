"""A side that takes no more bytes may still have sent some: they are delivered before the relay ends."""

from __future__ import annotations

import contextlib
import socket

import pytest
import trio

from tests.engine.bench import NOISE, Bench, RelayBetweenSockets, flood, read_all, read_exactly, reset, wait_reset
from tunneld.engine.engine import Cause, Side

ANSWER = b"HTTP/1.1 413 Content Too Large\r\n\r\n"


async def answer_early(joined: RelayBetweenSockets, answer: bytes = ANSWER) -> None:
    """The server reads a little of an upload, answers and closes, with most of the upload unread: its kernel resets."""
    await read_exactly(joined.server, 16)
    await joined.server.send_all(answer)
    joined.server.socket.close()


async def received(far: trio.SocketStream) -> bytes:
    """Everything that arrives, however the stream ends."""
    data = b""
    with contextlib.suppress(trio.BrokenResourceError):
        async for chunk in far:
            data += chunk
    return data


@pytest.mark.parametrize("upload", [100, 100_000, 3_000_000])
async def test_an_early_answer_survives_an_upload(bench: Bench, upload: int) -> None:
    for _ in range(10):
        joined = bench.join()

        async def send(joined: RelayBetweenSockets = joined) -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await joined.visitor.send_all(bytes(16 + upload))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await answer_early(joined)
            assert await received(joined.visitor) == ANSWER
        joined.visitor.socket.close()
        await joined.ends.one()


async def test_a_long_early_answer_arrives_whole_at_a_slow_reader(bench: Bench) -> None:
    joined = bench.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood, joined.visitor)
        await read_exactly(joined.server, 16)
        nursery.start_soon(joined.server.send_all, NOISE)
        got = await read_exactly(joined.visitor, len(NOISE) // 2)
        joined.server.socket.shutdown(socket.SHUT_RD)
        got += await read_exactly(joined.visitor, len(NOISE) - len(got))
        assert got == NOISE
        joined.server.socket.close()
        nursery.cancel_scope.cancel()


async def test_the_answer_of_a_visitor_survives_a_download(bench: Bench) -> None:
    joined = bench.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood, joined.server)
        await read_exactly(joined.visitor, 16)
        await joined.visitor.send_all(b"stop")
        joined.visitor.socket.close()
        assert await received(joined.server) == b"stop"
        nursery.cancel_scope.cancel()


async def test_the_cause_is_the_side_whose_connection_broke(bench: Bench) -> None:
    joined = bench.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood, joined.visitor)
        await answer_early(joined)
        await received(joined.visitor)
        joined.visitor.socket.close()
        end = await joined.ends.one()
        assert (end.cause, end.side) == (Cause.RESET, Side.SERVER)
        nursery.cancel_scope.cancel()


async def test_a_reset_is_never_told_as_a_clean_end(bench: Bench) -> None:
    for _ in range(20):
        joined = bench.join()
        await joined.visitor.send_all(bytes(200_000))
        await read_exactly(joined.server, 16)
        reset(joined.server)
        await wait_reset(joined.visitor)


async def test_a_side_that_was_told_the_end_is_not_reset(bench: Bench) -> None:
    """Linger cuts the other direction only: the visitor has the whole answer and its end."""
    joined = bench.join(linger=0.2)
    await joined.server.send_all(ANSWER)
    await joined.server.send_eof()
    assert await read_all(joined.visitor) == ANSWER
    assert (await joined.ends.one()).cause is Cause.LINGERED
    assert await read_all(joined.visitor) == b""
    await wait_reset(joined.server)
