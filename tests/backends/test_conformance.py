"""The conformance suite of backends: each test runs over each of `VARIANTS`. A new backend is one more variant.

The clients are real: the agent, or OpenSSH's client.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.agent.support import BACKEND, SECURE, echo, unused_port
from tests.backends.support import PRIVATE, BackendTunnel, tunnel_to, tunnel_with
from tests.engine.bench import NOISE, open_descriptors
from tests.support.peers import connect, is_dropped, read_all, read_exactly, reset
from tests.support.pki import Pki
from tests.support.private import make_home
from tests.support.system import find_program
from tunneld.net.endpoint import Target

VARIANTS = ["tcp", "tcp in TLS", "webmux", "webmux in TLS", "egtp", "ssh"]
VARIANTS += ["tcp in TLS, private", "webmux in TLS, private", "egtp private"]
PATIENCE = 60.0
"""Seconds of real time per test: some transfer a lot, and the machine may be busy."""
VISITORS = 500


@pytest.fixture(scope="session")
def relay_papers(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.issue(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=VARIANTS)
def backend(
    request: pytest.FixtureRequest, relay_papers: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The name of the backend. With `private`, the visitors' address is the port of `tunnel visit`."""
    name, _, how = request.param.partition(" ")
    if name == "ssh":
        find_program("ssh")
    keys = make_home(tmp_path, monkeypatch) if "private" in how else None
    tokens = BACKEND.set(name), SECURE.set(relay_papers if "TLS" in how else None), PRIVATE.set(keys)
    yield name
    BACKEND.reset(tokens[0])
    SECURE.reset(tokens[1])
    PRIVATE.reset(tokens[2])


@pytest.fixture
async def no_descriptors_leaked() -> AsyncIterator[None]:
    """Check that as many descriptors are open after the test as before."""
    gc.collect()  # what the previous test left
    before = open_descriptors()
    yield
    assert open_descriptors() <= before


@asynccontextmanager
async def in_time() -> AsyncIterator[None]:
    with trio.fail_after(PATIENCE):
        yield


def pattern(size: int) -> bytes:
    return (NOISE * (size // len(NOISE) + 1))[:size]


# Transfers


async def test_8_mib_in_both_directions_at_once(backend: str, no_descriptors_leaked: None) -> None:
    data = pattern(8 << 20)
    digests: list[str] = []

    async def transfer(stream: trio.SocketStream) -> None:
        """Send and receive 8 MiB at the same time."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_finish, stream, data[::-1])
            digests.append(hashlib.sha256(await read_all(stream)).hexdigest())

    async with in_time(), tunnel_with(backend, transfer) as there:
        visitor = await connect(there.address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_finish, visitor, data)
            assert await read_all(visitor) == data[::-1]
        await visitor.aclose()
        await there.until(lambda: bool(digests) and not there.tunnel.visitors)
        assert digests == [hashlib.sha256(data).hexdigest()]
        assert there.tunnel.octets == (len(data), len(data))


async def send_and_finish(stream: trio.SocketStream, data: bytes) -> None:
    await stream.send_all(data)
    await stream.send_eof()


async def test_a_slow_reader_delays_no_other_visitor(backend: str) -> None:
    async with in_time(), tunnel_with(backend, echo) as there:
        slow, quick = await connect(there.address), await connect(there.address)
        with trio.move_on_after(0.5):
            await slow.send_all(pattern(64 << 20))  # its peer echoes, and it reads nothing
        await quick.send_all(b"hello")
        assert await read_exactly(quick, 5) == b"hello"


@pytest.mark.parametrize("size", [1, 1000, 100_000])
async def test_a_visitor_that_sends_eof_first_receives_the_reply(backend: str, size: int) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        received = await read_all(stream)
        await stream.send_all(received[::-1])

    async with in_time(), tunnel_with(backend, answer) as there:
        visitor = await connect(there.address)
        await send_and_finish(visitor, pattern(size))
        assert await read_all(visitor) == pattern(size)[::-1]


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000])
async def test_a_server_that_sends_eof_first_receives_the_rest(backend: str, size: int) -> None:
    received: list[bytes] = []

    async def greet(stream: trio.SocketStream) -> None:
        await send_and_finish(stream, pattern(size))
        received.append(await read_all(stream))

    async with in_time(), tunnel_with(backend, greet) as there:
        visitor = await connect(there.address)
        assert await read_all(visitor) == pattern(size)
        await send_and_finish(visitor, b"and now I speak")
        await there.until(lambda: received == [b"and now I speak"])


async def test_everything_that_a_server_sends_before_close_arrives(backend: str) -> None:
    async def send_and_close(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(pattern(1 << 20))

    async with in_time(), tunnel_with(backend, send_and_close) as there:
        for _ in range(5):
            assert await read_all(await connect(there.address)) == pattern(1 << 20)


# Refused, lost, reconnected


async def test_an_unreachable_server_costs_the_visitor_and_not_the_tunnel(backend: str) -> None:
    async with in_time(), tunnel_to(backend, Target("127.0.0.1", unused_port())) as there:
        for _ in range(3):
            with suppress(OSError):  # it may be reset before `connect` returns
                assert await is_dropped(await connect(there.address))
        await there.until(lambda: not there.tunnel.visitors)
        assert there.tunnel.served == 3


async def test_a_client_that_is_lost_and_reconnects_has_the_same_address(backend: str) -> None:
    async with in_time(), tunnel_with(backend, echo) as there:
        address = there.address
        visitor = await connect(address)
        await visitor.send_all(b"hello")
        assert await read_exactly(visitor, 5) == b"hello"
        there.disconnect()
        assert await is_dropped(visitor)
        await there.connect()
        assert there.address == address
        again = await connect(address)
        await again.send_all(b"hello again")
        assert await read_exactly(again, 11) == b"hello again"


# Many


async def test_500_visitors_at_once_get_their_own_bytes(backend: str) -> None:
    async with in_time(), tunnel_with(backend, echo) as there:
        wrong: list[int] = []

        async def visit(number: int) -> None:
            question = b"%06d" % number * 500
            visitor = await connect(there.address)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_and_finish, visitor, question)
                if await read_all(visitor) != question:
                    wrong.append(number)
            await visitor.aclose()

        async with trio.open_nursery() as nursery:
            for number in range(VISITORS):
                nursery.start_soon(visit, number)
        assert wrong == []
        await there.until(lambda: not there.tunnel.visitors)
        assert there.tunnel.served == VISITORS


# Ended at every point

POINTS = ["connected", "sent", "received", "in the middle", "eof", "half-closed"]


async def advance(point: str, visitor: trio.SocketStream) -> None:
    """Bring a connection to an echo server to this point."""
    match point:
        case "connected":
            await trio.lowlevel.checkpoint()
        case "sent":
            await visitor.send_all(b"hello")
        case "received":
            await visitor.send_all(b"hello")
            await read_exactly(visitor, 5)
        case "in the middle":
            with trio.move_on_after(0.05):
                await visitor.send_all(pattern(8 << 20))
        case "eof":
            await send_and_finish(visitor, b"hello")
        case "half-closed":
            await send_and_finish(visitor, b"hello")
            await read_exactly(visitor, 5)


async def until_no_visitors(there: BackendTunnel) -> None:
    await there.until(lambda: not there.tunnel.visitors and not there.tunnel.waiting)


@pytest.mark.parametrize("how", ["closes", "resets"])
async def test_a_visitor_disconnects_at_every_point(backend: str, how: str) -> None:
    async with in_time(), tunnel_with(backend, echo) as there:
        for point in POINTS:
            visitor = await connect(there.address)
            await advance(point, visitor)
            if how == "resets":
                reset(visitor)
            else:
                await visitor.aclose()
            await until_no_visitors(there)
        assert await ask(there, b"still there") == b"still there"


async def ask(there: BackendTunnel, question: bytes) -> bytes:
    visitor = await connect(there.address)
    await send_and_finish(visitor, question)
    return await read_all(visitor)


@pytest.mark.parametrize("point", POINTS)
async def test_a_tunnel_is_closed_at_every_point(backend: str, point: str, no_descriptors_leaked: None) -> None:
    async with in_time(), tunnel_with(backend, echo) as there:
        visitor, tunnel = await connect(there.address), there.tunnel
        await advance(point, visitor)
        tunnel.close("closed by the test")
        with suppress(trio.BrokenResourceError):
            await read_all(visitor)
        await tunnel.wait_closed()
        await there.until(lambda: not tunnel.visitors)  # they end after the batch of events
        await visitor.aclose()


@pytest.mark.parametrize("point", POINTS)
async def test_the_client_is_lost_at_every_point(backend: str, point: str) -> None:
    async with in_time(), tunnel_with(backend, echo) as there:
        visitor, tunnel = await connect(there.address), there.tunnel
        await advance(point, visitor)
        there.disconnect()
        with suppress(trio.BrokenResourceError):
            await read_all(visitor)
        await there.until(lambda: not tunnel.visitors)


# Early answers, and cuts


@pytest.mark.parametrize("upload", [1000, 300_000, 3_000_000])
async def test_an_early_answer_survives_an_upload(backend: str, upload: int) -> None:
    """The local server reads a little, answers and closes, as for an HTTP upload that it refuses."""

    async def refuse(stream: trio.SocketStream) -> None:
        await stream.receive_some(16)
        await stream.send_all(b"413")

    async def send(visitor: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await visitor.send_all(pattern(upload))

    async with in_time(), tunnel_with(backend, refuse) as there:
        for _ in range(10):
            visitor = await connect(there.address)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, visitor)
                assert await read_exactly(visitor, 3) == b"413"
                nursery.cancel_scope.cancel()
            await visitor.aclose()


async def test_a_closed_tunnel_resets_a_visitor_in_the_middle_of_an_answer(backend: str) -> None:
    """A clean end would make curl take half a file for the whole."""

    async def begin(stream: trio.SocketStream) -> None:
        await stream.send_all(b"part 1")
        await trio.sleep_forever()

    async with in_time(), tunnel_with(backend, begin) as there:
        visitor = await connect(there.address)
        assert await read_exactly(visitor, 6) == b"part 1"
        await there.service.close(there.tunnel.id)
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()


async def test_a_visitor_that_leaves_in_the_middle_of_a_download_ends_it_on_both_sides(backend: str) -> None:
    """At once, and not after `linger`: nothing is transferred for a visitor that is gone."""
    ended = trio.Event()

    async def flood(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                await stream.send_all(NOISE)
        ended.set()

    async with in_time(), tunnel_with(backend, flood) as there:
        for _ in range(10):
            ended = trio.Event()
            visitor = await connect(there.address)
            await read_exactly(visitor, 4 << 20)
            await visitor.aclose()
            with trio.fail_after(10):
                await ended.wait()
                await there.until(lambda: not there.tunnel.visitors)
