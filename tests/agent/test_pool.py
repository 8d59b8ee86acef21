"""What the pool does by itself, beside what the agent's tests show of it."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest
import trio
import trio.testing

from tests.agent.support import PATIENCE
from tunneld.agent.access import RelayAccess
from tunneld.agent.carriers import Carriers
from tunneld.agent.handshake_pool import HandshakePool
from tunneld.agent.pool import Pool, PoolLimits
from tunneld.agent.source import ConnectionSource, SourceEvents, VisitorConnection
from tunneld.engine.engine import Engine
from tunneld.net.endpoint import Endpoint
from tunneld.wire.proxy_protocol import encode_v2

HEADER = encode_v2(("2001:db8::1", 4242), ("2001:db8::2", 80))  # the long kind


class Hearer:
    """An owner that remembers."""

    def __init__(self) -> None:
        self.taken: list[tuple[VisitorConnection, bytes]] = []
        self.troubles: list[str] = []
        self.owner = SourceEvents(lambda way, head: self.taken.append((way, head)), self._trouble, self._fail)

    def _fail(self, error: Exception) -> None:
        raise error

    def _trouble(self, reason: str) -> None:
        assert not self.troubles, "told twice without a resume between"
        self.troubles.append(reason)


async def test_trouble_is_told_once_and_nothing_is_dialled_until_resume(engine: Engine) -> None:
    hearer = Hearer()
    nowhere = (socket.AF_UNIX, "/nowhere/at.all")
    pool = Pool(engine, nowhere, PoolLimits(4, 4), hearer.owner, keep_header=False)
    pool.resume()
    assert hearer.troubles == ["no such file or directory"]
    assert pool.parked == 0


@pytest.mark.parametrize("keep_header", [True, False])
async def test_a_header_that_comes_octet_by_octet_is_taken_whole_and_nothing_behind_it(
    engine: Engine, keep_header: bool
) -> None:
    hearer = Hearer()
    with socket.create_server(("127.0.0.1", 0)) as listener, trio.fail_after(PATIENCE):
        listener.setblocking(False)
        pool = Pool(
            engine, (socket.AF_INET, listener.getsockname()), PoolLimits(1, 1), hearer.owner, keep_header=keep_header
        )
        pool.resume()
        await trio.lowlevel.wait_readable(listener)
        relay, _ = listener.accept()
        relay.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with relay:
            for octet in HEADER:
                assert not hearer.taken
                relay.send(bytes([octet]))
                for _ in range(20):
                    await trio.lowlevel.checkpoint()
            relay.send(b"visitor")
            while not hearer.taken:
                await trio.lowlevel.checkpoint()
            ((way, head),) = hearer.taken
            async with way.stream() as stream:
                assert head == HEADER
                assert (await stream.receive_some(100)).removesuffix(b"visitor") == (HEADER if keep_header else b"")
            pool.close()


async def test_what_is_no_header_is_trouble(engine: Engine) -> None:
    hearer = Hearer()
    with socket.create_server(("127.0.0.1", 0)) as listener, trio.fail_after(PATIENCE):
        listener.setblocking(False)
        pool = Pool(engine, (socket.AF_INET, listener.getsockname()), PoolLimits(1, 1), hearer.owner, keep_header=False)
        pool.resume()
        await trio.lowlevel.wait_readable(listener)
        relay, _ = listener.accept()
        with relay:
            relay.send(b"GET / HTTP/1.1\r\n")
            while not hearer.troubles:
                await trio.lowlevel.checkpoint()
        assert "PROXY protocol header" in hearer.troubles[0]
        assert pool.parked == 0
        pool.close()


async def test_what_is_trimmed_as_we_asked_is_no_trouble_though_visitors_have_come_meanwhile(engine: Engine) -> None:
    """The relay closes those that were too many when it was asked; by then they may be too few."""
    hearer = Hearer()
    with (
        socket.create_server(("127.0.0.1", 0), backlog=64) as listener,
        trio.fail_after(PATIENCE),
        ExitStack() as stack,
    ):
        listener.setblocking(False)
        pool = Pool(
            engine, (socket.AF_INET, listener.getsockname()), PoolLimits(1, 64), hearer.owner, keep_header=False
        )
        pool.resume()
        relay: list[socket.socket] = []

        async def settle() -> None:
            """Until the relay has what the pool has."""
            while len(relay) != pool.parked:
                await trio.lowlevel.wait_readable(listener)
                relay.append(stack.enter_context(listener.accept()[0]))

        async def visit(count: int) -> None:
            taken = len(hearer.taken) + count
            for _ in range(count):
                relay.pop().send(HEADER)
            while len(hearer.taken) != taken:
                await trio.lowlevel.checkpoint()
            await settle()

        await settle()
        for count in (1, 2, 4):
            await visit(count)
        parked = pool.parked
        pool.resize()
        assert pool.resize(), "nobody came since the last one"
        surplus = parked - pool.size
        await visit(pool.size)
        assert pool.size > parked - surplus
        size = pool.size
        for _ in range(surplus):
            relay.pop(0).close()
        while len(relay) < size:
            await trio.lowlevel.wait_readable(listener)
            relay.append(stack.enter_context(listener.accept()[0]))
        assert (pool.parked, hearer.troubles) == (size, [])
        relay.pop(0).close()
        while not hearer.troubles:
            await trio.lowlevel.checkpoint()
        assert pool.parked == size - 1
        pool.close()
        for way, _ in hearer.taken:
            way.close("a test")


@pytest.mark.parametrize("kind", ["keyed", "carriers"])
async def test_what_is_made_in_the_moment_in_which_all_is_closed_is_closed_too(
    engine: Engine, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A task that has what it waited for is not cancelled any more."""
    near, far = socket.socketpair()
    made = trio.Event()

    async def dial(*_: object) -> socket.socket:
        await made.wait()
        return near

    async def dial_keyed(*_: object) -> tuple[socket.socket, bytes]:
        return await dial(), b""

    monkeypatch.setattr(RelayAccess, "dial_keyed", dial_keyed)
    monkeypatch.setattr(RelayAccess, "dial_carrier", dial)
    relay, uri, owner = RelayAccess("127.0.0.1:1"), Endpoint.parse("tcp://127.0.0.1:1/key"), Hearer().owner
    supply: ConnectionSource = Carriers(engine, relay, uri, owner, nursery, keep_header=False)
    if kind == "keyed":
        supply = HandshakePool(engine, relay, uri, PoolLimits(1, 1), owner, nursery, keep_header=False)
    with far:
        supply.resume()
        await trio.testing.wait_all_tasks_blocked()
        made.set()
        supply.close()
        await trio.testing.wait_all_tasks_blocked()
        assert near.fileno() == -1
