"""What every backend must do, told once and run over each: a new one is a line in `WAYS`.

The hidden server's end is the real one: the agent, or OpenSSH's client.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from tests.agent.support import BACKEND, SECURE, echo, unused_port
from tests.backends.support import Way, way, way_to
from tests.engine.bench import NOISE, open_descriptors
from tests.support.papers import Papers
from tests.support.people import connect, is_dropped, read_all, read_exactly, reset
from tests.support.system import find_program
from tunneld.net.endpoint import Target

WAYS = ["tcp", "tcp in TLS", "webmux", "webmux in TLS", "ssh"]
PATIENCE = 60.0
"""Seconds of real time: the large ones are large, and the machine may be busy."""
VISITORS = 500


@pytest.fixture(scope="session")
def relay_papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers.issue(tmp_path_factory.mktemp("papers"))


@pytest.fixture(params=WAYS)
def backend(request: pytest.FixtureRequest, relay_papers: Papers) -> Iterator[str]:
    name, _, secure = request.param.partition(" ")
    if name == "ssh":
        find_program("ssh")
    tokens = BACKEND.set(name), SECURE.set(relay_papers if secure else None)
    yield name
    BACKEND.reset(tokens[0])
    SECURE.reset(tokens[1])


@pytest.fixture
async def nothing_is_left() -> AsyncIterator[None]:
    """No more descriptors after the test than before."""
    gc.collect()  # of the test before
    before = open_descriptors()
    yield
    assert open_descriptors() <= before


@asynccontextmanager
async def in_time() -> AsyncIterator[None]:
    with trio.fail_after(PATIENCE):
        yield


def noise(size: int) -> bytes:
    return (NOISE * (size // len(NOISE) + 1))[:size]


# Octets


async def test_8_mib_cross_both_ways_at_once(backend: str, nothing_is_left: None) -> None:
    data = noise(8 << 20)
    digests: list[str] = []

    async def talk(stream: trio.SocketStream) -> None:
        """Say and hear 8 MiB at the same time."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(say_all, stream, data[::-1])
            digests.append(hashlib.sha256(await read_all(stream)).hexdigest())

    async with in_time(), way(backend, talk) as there:
        visitor = await connect(there.address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(say_all, visitor, data)
            assert await read_all(visitor) == data[::-1]
        await visitor.aclose()
        await there.until(lambda: bool(digests) and not there.tunnel.visitors)
        assert digests == [hashlib.sha256(data).hexdigest()]
        assert there.tunnel.octets == (len(data), len(data))


async def say_all(stream: trio.SocketStream, data: bytes) -> None:
    await stream.send_all(data)
    await stream.send_eof()


async def test_a_slow_reader_holds_up_its_own_relay_and_no_other(backend: str) -> None:
    async with in_time(), way(backend, echo) as there:
        slow, quick = await connect(there.address), await connect(there.address)
        with trio.move_on_after(0.5):
            await slow.send_all(noise(64 << 20))  # it reads nothing
        await quick.send_all(b"hello")
        assert await read_exactly(quick, 5) == b"hello"


@pytest.mark.parametrize("size", [1, 1000, 100_000])
async def test_the_visitor_ends_first_and_is_answered_after_that(backend: str, size: int) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        heard = await read_all(stream)
        await stream.send_all(heard[::-1])

    async with in_time(), way(backend, answer) as there:
        visitor = await connect(there.address)
        await say_all(visitor, noise(size))
        assert await read_all(visitor) == noise(size)[::-1]


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000])
async def test_the_server_ends_first_and_hears_the_visitor_after_that(backend: str, size: int) -> None:
    heard: list[bytes] = []

    async def greet(stream: trio.SocketStream) -> None:
        await say_all(stream, noise(size))
        heard.append(await read_all(stream))

    async with in_time(), way(backend, greet) as there:
        visitor = await connect(there.address)
        assert await read_all(visitor) == noise(size)
        await say_all(visitor, b"and now I speak")
        await there.until(lambda: heard == [b"and now I speak"])


async def test_a_server_that_closes_whole_is_heard_to_the_end(backend: str) -> None:
    async def say_and_close(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(noise(1 << 20))

    async with in_time(), way(backend, say_and_close) as there:
        for _ in range(5):
            assert await read_all(await connect(there.address)) == noise(1 << 20)


# Refused, lost, back


async def test_a_server_that_is_not_there_costs_the_visitor_and_not_the_tunnel(backend: str) -> None:
    async with in_time(), way_to(backend, Target("127.0.0.1", unused_port())) as there:
        for _ in range(3):
            with suppress(OSError):  # it may be refused before we know that we were connected
                assert await is_dropped(await connect(there.address))
        await there.until(lambda: not there.tunnel.visitors)
        assert there.tunnel.served == 3


async def test_the_end_is_lost_and_comes_back_at_the_same_address(backend: str) -> None:
    async with in_time(), way(backend, echo) as there:
        address = there.address
        visitor = await connect(address)
        await visitor.send_all(b"hello")
        assert await read_exactly(visitor, 5) == b"hello"
        there.lose()
        assert await is_dropped(visitor)
        await there.come()
        assert there.address == address
        again = await connect(address)
        await again.send_all(b"hello again")
        assert await read_exactly(again, 11) == b"hello again"


# Many


async def test_500_visitors_at_once_get_the_right_octets(backend: str) -> None:
    async with in_time(), way(backend, echo) as there:
        wrong: list[int] = []

        async def visit(number: int) -> None:
            question = b"%06d" % number * 500
            visitor = await connect(there.address)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(say_all, visitor, question)
                if await read_all(visitor) != question:
                    wrong.append(number)
            await visitor.aclose()

        async with trio.open_nursery() as nursery:
            for number in range(VISITORS):
                nursery.start_soon(visit, number)
        assert wrong == []
        await there.until(lambda: not there.tunnel.visitors)
        assert there.tunnel.served == VISITORS


# Cancelled at every point

POINTS = ["connected", "spoke", "heard", "in the middle", "ended", "half"]


async def go_to(point: str, visitor: trio.SocketStream) -> None:
    """Bring a visit of an echo as far as this."""
    match point:
        case "connected":
            await trio.lowlevel.checkpoint()
        case "spoke":
            await visitor.send_all(b"hello")
        case "heard":
            await visitor.send_all(b"hello")
            await read_exactly(visitor, 5)
        case "in the middle":
            with trio.move_on_after(0.05):
                await visitor.send_all(noise(8 << 20))
        case "ended":
            await say_all(visitor, b"hello")
        case "half":
            await say_all(visitor, b"hello")
            await read_exactly(visitor, 5)


async def nobody_is_left(there: Way) -> None:
    await there.until(lambda: not there.tunnel.visitors and not there.tunnel.waiting)


@pytest.mark.parametrize("how", ["closes", "resets"])
async def test_a_visitor_may_leave_at_every_point(backend: str, how: str) -> None:
    async with in_time(), way(backend, echo) as there:
        for point in POINTS:
            visitor = await connect(there.address)
            await go_to(point, visitor)
            if how == "resets":
                reset(visitor)
            else:
                await visitor.aclose()
            await nobody_is_left(there)
        assert await ask(there, b"still there") == b"still there"


async def ask(there: Way, question: bytes) -> bytes:
    visitor = await connect(there.address)
    await say_all(visitor, question)
    return await read_all(visitor)


@pytest.mark.parametrize("point", POINTS)
async def test_a_tunnel_may_be_closed_at_every_point(backend: str, point: str, nothing_is_left: None) -> None:
    async with in_time(), way(backend, echo) as there:
        visitor, tunnel = await connect(there.address), there.tunnel
        await go_to(point, visitor)
        tunnel.close("the test wants it")
        with suppress(trio.BrokenResourceError):
            await read_all(visitor)
        await tunnel.wait_closed()
        await there.until(lambda: not tunnel.visitors)  # their ends are told after the batch
        await visitor.aclose()


@pytest.mark.parametrize("point", POINTS)
async def test_the_hidden_server_may_be_lost_at_every_point(backend: str, point: str) -> None:
    async with in_time(), way(backend, echo) as there:
        visitor, tunnel = await connect(there.address), there.tunnel
        await go_to(point, visitor)
        there.lose()
        with suppress(trio.BrokenResourceError):
            await read_all(visitor)
        await there.until(lambda: not tunnel.visitors)
