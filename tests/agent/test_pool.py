"""The pool by itself; tests/agent/test_expose.py has it at work. And its size, for all loads and limits."""

from __future__ import annotations

import errno
import math
import socket
from contextlib import ExitStack
from dataclasses import replace

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.support import PATIENCE
from tunneld.agent import pool as pool_module
from tunneld.agent.access import RelayAccess
from tunneld.agent.carriers import CarrierSource, RelayCarriers
from tunneld.agent.handshake_pool import HandshakePool
from tunneld.agent.pool import WINDOWS_HELD, Pool, PoolLimits, grown_size, needed_size, shrunk_size
from tunneld.agent.source import ConnectionSource, SourceEvents, VisitorConnection
from tunneld.engine.engine import Engine
from tunneld.net.endpoint import Endpoint
from tunneld.wire.proxy_protocol import encode_v2

HEADER = encode_v2(("2001:db8::1", 4242), ("2001:db8::2", 80))  # over IPv6, the longer form


class EventRecorder:
    """Records the events of a source of connections."""

    def __init__(self) -> None:
        self.visitors: list[tuple[VisitorConnection, bytes]] = []
        self.troubles: list[str] = []
        self.events = SourceEvents(
            lambda visitor, header: self.visitors.append((visitor, header)), self._trouble, self._fail
        )

    def _fail(self, error: Exception) -> None:
        raise error

    def _trouble(self, reason: str) -> None:
        assert not self.troubles, "reported twice without a resume between"
        self.troubles.append(reason)


async def test_trouble_is_reported_once_and_nothing_is_dialled_until_resume(engine: Engine) -> None:
    recorder = EventRecorder()
    nowhere = (socket.AF_UNIX, "/nowhere/at.all")
    pool = Pool(engine, nowhere, PoolLimits(4, 4), recorder.events, keep_header=False)
    pool.resume()
    assert recorder.troubles == ["could not connect to the relay: no such file or directory"]
    assert pool.parked == 0


async def test_a_shortage_is_no_trouble_and_nothing_is_dialled_until_resume(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dial_nowait(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    recorder, shortages = EventRecorder(), list[str]()
    monkeypatch.setattr(pool_module, "dial_nowait", dial_nowait)
    events = replace(recorder.events, on_shortage=shortages.append)
    pool = Pool(engine, (socket.AF_INET, ("127.0.0.1", 1)), PoolLimits(4, 4), events, keep_header=False)
    pool.resume()
    assert shortages == ["could not connect to the relay: too many open files"]
    assert recorder.troubles == []


async def test_old_connections_are_replaced_a_few_at_a_time_and_the_relay_trims_the_oldest(engine: Engine) -> None:
    recorder = EventRecorder()
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        limits = PoolLimits(8, 8, max_age=0.0)
        pool = Pool(engine, (socket.AF_INET, listener.getsockname()), limits, recorder.events, keep_header=False)
        pool.resume()
        assert pool.parked == 8
        assert not pool.resize()
        assert pool.parked == 10, "a quarter of them have a successor"
        assert pool.resize(), "which the relay is now asked to trim to the size"
        assert (pool.size, pool.parked) == (8, 10)
        pool.close()


async def test_young_connections_stay(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        address = (socket.AF_INET, listener.getsockname())
        pool = Pool(engine, address, PoolLimits(8, 8, max_age=1e6), EventRecorder().events, keep_header=False)
        pool.resume()
        assert not pool.resize()
        assert pool.parked == 8
        pool.close()


@pytest.mark.parametrize("keep_header", [True, False])
async def test_a_header_that_arrives_byte_by_byte_is_read_whole_and_nothing_after_it(
    engine: Engine, keep_header: bool
) -> None:
    recorder = EventRecorder()
    with socket.create_server(("127.0.0.1", 0)) as listener, trio.fail_after(PATIENCE):
        listener.setblocking(False)
        pool = Pool(
            engine, (socket.AF_INET, listener.getsockname()), PoolLimits(1, 1), recorder.events, keep_header=keep_header
        )
        pool.resume()
        await trio.lowlevel.wait_readable(listener)
        relay, _ = listener.accept()
        relay.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with relay:
            for byte in HEADER:
                assert not recorder.visitors
                relay.send(bytes([byte]))
                for _ in range(20):
                    await trio.lowlevel.checkpoint()
            relay.send(b"visitor")
            while not recorder.visitors:
                await trio.lowlevel.checkpoint()
            ((visitor, header),) = recorder.visitors
            async with visitor.stream() as stream:
                assert header == HEADER
                assert (await stream.receive_some(100)).removesuffix(b"visitor") == (HEADER if keep_header else b"")
            pool.close()


async def test_anything_but_a_header_is_trouble(engine: Engine) -> None:
    recorder = EventRecorder()
    with socket.create_server(("127.0.0.1", 0)) as listener, trio.fail_after(PATIENCE):
        listener.setblocking(False)
        pool = Pool(
            engine, (socket.AF_INET, listener.getsockname()), PoolLimits(1, 1), recorder.events, keep_header=False
        )
        pool.resume()
        await trio.lowlevel.wait_readable(listener)
        relay, _ = listener.accept()
        with relay:
            relay.send(b"GET / HTTP/1.1\r\n")
            while not recorder.troubles:
                await trio.lowlevel.checkpoint()
        assert "PROXY protocol header" in recorder.troubles[0]
        assert pool.parked == 0
        pool.close()


async def test_a_trimmed_connection_is_no_trouble_although_visitors_arrived_meanwhile(engine: Engine) -> None:
    """The relay closes as many as were too many when it was asked; by then too few may be left."""
    recorder = EventRecorder()
    with (
        socket.create_server(("127.0.0.1", 0), backlog=64) as listener,
        trio.fail_after(PATIENCE),
        ExitStack() as stack,
    ):
        listener.setblocking(False)
        pool = Pool(
            engine, (socket.AF_INET, listener.getsockname()), PoolLimits(1, 64), recorder.events, keep_header=False
        )
        pool.resume()
        relay: list[socket.socket] = []

        async def settle() -> None:
            """Accept until the relay has all of the pool's connections."""
            while len(relay) != pool.parked:
                await trio.lowlevel.wait_readable(listener)
                relay.append(stack.enter_context(listener.accept()[0]))

        async def visit(count: int) -> None:
            total = len(recorder.visitors) + count
            for _ in range(count):
                relay.pop().send(HEADER)
            while len(recorder.visitors) != total:
                await trio.lowlevel.checkpoint()
            await settle()

        await settle()
        for count in (1, 2, 4):
            await visit(count)
        parked = pool.parked
        pool.resize()
        assert pool.resize(), "no visitor since the last review"
        surplus = parked - pool.size
        await visit(pool.size)
        assert pool.size > parked - surplus
        size = pool.size
        for _ in range(surplus):
            relay.pop(0).close()
        while len(relay) < size:
            await trio.lowlevel.wait_readable(listener)
            relay.append(stack.enter_context(listener.accept()[0]))
        assert (pool.parked, recorder.troubles) == (size, [])
        relay.pop(0).close()
        while not recorder.troubles:
            await trio.lowlevel.checkpoint()
        assert pool.parked == size - 1
        pool.close()
        for visitor, _ in recorder.visitors:
            visitor.close("a test")


@pytest.mark.parametrize("kind", ["keyed", "carriers"])
async def test_a_connection_made_at_the_moment_of_closing_is_closed_too(
    engine: Engine, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A task that already has what it waited for cannot be cancelled."""
    connection, peer = socket.socketpair()
    dialled = trio.Event()

    async def dial(*_: object) -> socket.socket:
        await dialled.wait()
        return connection

    async def dial_keyed(*_: object) -> tuple[socket.socket, bytes]:
        return await dial(), b""

    monkeypatch.setattr(RelayAccess, "dial_keyed", dial_keyed)
    monkeypatch.setattr(RelayAccess, "dial_carrier", dial)
    relay, uri, events = RelayAccess("127.0.0.1:1"), Endpoint.parse("tcp://127.0.0.1:1/key"), EventRecorder().events
    carriers = RelayCarriers(engine, relay, nursery)
    source: ConnectionSource = CarrierSource(carriers, uri, events, nursery, keep_header=False)
    if kind == "keyed":
        source = HandshakePool(engine, relay, uri, PoolLimits(1, 1), events, nursery, keep_header=False)
    with peer:
        source.resume()
        await trio.testing.wait_all_tasks_blocked()
        dialled.set()
        source.close()
        await trio.testing.wait_all_tasks_blocked()
        assert connection.fileno() == -1


# Its size


arrivals = st.integers(0, 100_000)


@st.composite
def limits(draw: st.DrawFn) -> PoolLimits:
    minimum = draw(st.integers(1, 500))
    return PoolLimits(minimum, draw(st.integers(minimum, 1000)))


@given(limits(), arrivals, st.data())
def test_a_size_stays_within_its_limits(bounds: PoolLimits, count: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(bounds.minimum, bounds.maximum))
    assert bounds.minimum <= grown_size(size, count, bounds) <= bounds.maximum
    assert bounds.minimum <= shrunk_size(size, count, bounds) <= bounds.maximum


@given(limits(), arrivals, st.data())
def test_growing_never_shrinks_and_shrinking_never_grows(bounds: PoolLimits, count: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(bounds.minimum, bounds.maximum))
    assert shrunk_size(size, count, bounds) <= size <= grown_size(size, count, bounds)


@given(limits(), arrivals)
def test_a_review_keeps_what_the_busiest_window_needed(bounds: PoolLimits, count: int) -> None:
    size = grown_size(bounds.minimum, count, bounds)
    assert shrunk_size(size, count, bounds) == size


@given(limits(), arrivals)
def test_the_pool_holds_twice_the_visitors_of_a_window_if_the_limits_allow(bounds: PoolLimits, count: int) -> None:
    assert needed_size(count, bounds) >= min(WINDOWS_HELD * count, bounds.maximum)


@given(limits(), arrivals)
def test_without_visitors_the_pool_is_at_its_minimum_after_a_few_reviews(bounds: PoolLimits, count: int) -> None:
    size = grown_size(bounds.minimum, count, bounds)
    for _ in range(math.ceil(math.log2(size)) + 1):
        size = shrunk_size(size, 0, bounds)
    assert size == bounds.minimum
