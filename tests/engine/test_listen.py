"""The contract of `listen`."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from tests.engine.bench import ENGINES, Bench, no_failure, tcp_pair
from tests.support.shortage import no_descriptors_left
from tunneld.engine.limits import EngineLimits


class Arrivals:
    """Collects connections; its `note` is an `on_connection`."""

    def __init__(self, bench: Bench) -> None:
        self.connections: list[tuple[socket.socket, Any]] = []
        self._bench = bench
        self._more = trio.Event()

    def note(self, connection: socket.socket, address: Any) -> None:
        self.connections.append((connection, address))
        self._bench.sockets.append(connection)
        self._more.set()

    async def wait_for(self, count: int) -> None:
        while len(self.connections) < count:
            self._more = trio.Event()
            await self._more.wait()


def dial(bench: Bench, listener: socket.socket) -> socket.socket:
    """A client, connected as far as its kernel is concerned."""
    client = socket.create_connection(listener.getsockname())
    bench.sockets.append(client)
    return client


async def test_connections_arrive_with_their_address_not_blocking_and_not_inherited(bench: Bench) -> None:
    listener, arrivals = bench.listener(), Arrivals(bench)
    bench.engine.listen(listener, arrivals.note, no_failure)
    client = dial(bench, listener)
    await arrivals.wait_for(1)
    connection, address = arrivals.connections[0]
    assert address == client.getsockname()
    assert connection.gettimeout() == 0
    with pytest.raises(BlockingIOError):
        connection.recv(1)
    assert not connection.get_inheritable()


async def test_more_connections_than_one_batch_arrive(bench: Bench) -> None:
    listener, arrivals = bench.listener(), Arrivals(bench)
    listener.listen(200)
    clients = {dial(bench, listener).getsockname() for _ in range(150)}
    bench.engine.listen(listener, arrivals.note, no_failure)
    await arrivals.wait_for(150)
    assert {address for _, address in arrivals.connections} == clients


async def test_nobody_arrives_after_release(bench: Bench) -> None:
    listener, arrivals = bench.listener(), Arrivals(bench)
    registration = bench.engine.listen(listener, arrivals.note, no_failure)
    await trio.testing.wait_all_tasks_blocked()
    registration.release()
    registration.release()
    dial(bench, listener)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert arrivals.connections == []
    bench.engine.listen(listener, arrivals.note, no_failure)
    await arrivals.wait_for(1)


async def test_an_owner_that_fails_costs_one_connection(bench: Bench) -> None:
    listener, failures = bench.listener(), list[Exception]()
    arrivals = Arrivals(bench)

    def stumble(connection: socket.socket, address: Any) -> None:
        if not failures:
            raise ZeroDivisionError
        arrivals.note(connection, address)

    bench.engine.listen(listener, stumble, failures.append)
    first = dial(bench, listener)
    dial(bench, listener)
    await arrivals.wait_for(1)
    assert [type(error) for error in failures] == [ZeroDivisionError]
    assert first.recv(1) == b""
    await bench.check()


async def test_a_socket_that_does_not_listen_is_its_owners_failure(bench: Bench) -> None:
    _, near = bench.tcp()
    failures: list[Exception] = []
    told = trio.Event()

    def on_failure(error: Exception) -> None:
        failures.append(error)
        told.set()

    near.shutdown(socket.SHUT_RD)
    bench.engine.listen(near, lambda *_: None, on_failure)
    await told.wait()
    assert isinstance(failures[0], OSError)
    await bench.check()


class HastyListener(socket.socket):
    """A listener whose first caller has hung up before it was answered."""

    asked = 0

    def _accept(self) -> tuple[int, Any]:
        self.asked += 1
        accepted: tuple[int, Any] = super()._accept()  # type: ignore[misc]  # typeshed does not know it
        if self.asked == 1:
            socket.close(accepted[0])
            raise OSError(errno.ECONNABORTED, "connection aborted")
        return accepted


async def test_who_hung_up_at_once_keeps_nobody_else_waiting(bench: Bench) -> None:
    plain, arrivals = bench.listener(), Arrivals(bench)
    listener = HastyListener(fileno=plain.detach())
    listener.setblocking(False)
    bench.sockets.append(listener)
    clients = [dial(bench, listener).getsockname() for _ in range(3)]
    bench.engine.listen(listener, arrivals.note, no_failure)
    await arrivals.wait_for(2)
    assert [address for _, address in arrivals.connections] == clients[1:]


class CountingListener(socket.socket):
    """A listener that counts how often it says no for want of descriptors."""

    refusals = 0
    fourth_refusal: trio.Event

    def _accept(self) -> tuple[int, Any]:  # which `socket.accept` calls, and the pump
        try:
            accepted: tuple[int, Any] = super()._accept()  # type: ignore[misc]  # typeshed does not know it
        except OSError as error:
            if error.errno == errno.EMFILE:
                self.refusals += 1
                if self.refusals == 4:
                    self.fourth_refusal.set()
            raise
        return accepted


async def test_out_of_descriptors_it_rests_says_so_once_and_recovers(bench: Bench) -> None:
    plain, arrivals = bench.listener(), Arrivals(bench)
    listener = CountingListener(fileno=plain.detach())
    listener.setblocking(False)
    listener.fourth_refusal = trio.Event()
    bench.sockets.append(listener)
    bench.engine.listen(listener, arrivals.note, no_failure)
    for _ in range(3):
        dial(bench, listener)
    with structlog.testing.capture_logs() as logs, no_descriptors_left():
        began = trio.current_time()
        await listener.fourth_refusal.wait()
        elapsed = trio.current_time() - began
        assert arrivals.connections == []
    await arrivals.wait_for(3)
    assert [(entry["log_level"], entry["event"]) for entry in logs] == [("warning", "could not accept connections")]
    assert elapsed > 0.25  # three rests of 0.1 s lie between four attempts


class Told:
    """A processor of structlog's: wakes whoever waits for the first line."""

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.first = trio.Event()

    def __call__(self, _logger: Any, _method: str, line: Any) -> Any:
        self.lines.append(line)
        self.first.set()
        raise structlog.DropEvent


@pytest.mark.skipif(sys.platform != "linux", reason="the pump is Linux's")
async def test_the_last_descriptors_are_left_to_others_and_nobody_who_comes_is_lost(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunneld.engine.acceptor import FdReserve  # noqa: PLC0415
    from tunneld.engine.pump import Pump  # noqa: PLC0415  # Linux only

    told, pump = Told(), Pump(EngineLimits(accept_backoff=0.01))
    monkeypatch.setattr("tunneld.engine.failures.log", structlog.wrap_logger(None, processors=[told]))
    await nursery.start(pump.run)
    with socket.create_server(("127.0.0.1", 0)) as listener, no_gaps() as first_free:
        listener.setblocking(False)
        clients = [socket.socket() for _ in range(6)]
        pump.fd_reserve = FdReserve(most=first_free + len(clients) + 2)
        for client in clients:
            client.connect(listener.getsockname())
        arrived, more = list[socket.socket](), trio.Event()

        def arrive(connection: socket.socket, _address: Any) -> None:
            nonlocal more
            arrived.append(connection)
            more.set()
            more = trio.Event()

        registration = pump.listen(listener, arrive, no_failure)
        await told.first.wait()
        assert [one.fileno() for one in arrived] == [first_free + len(clients) + number for number in range(2)]
        with socket.socket():  # others have more
            for number in range(2, len(clients)):  # who waits comes as soon as there is room, and not before
                coming = more
                arrived[number - 2].close()
                await coming.wait()
                assert len(arrived) == number + 1
        registration.release()
        for one in [*arrived, *clients]:
            one.close()
    assert [line["reason"][:19] for line in told.lines] == ["too many open files"]
    nursery.cancel_scope.cancel()


@contextmanager
def no_gaps() -> Iterator[int]:
    """Descriptors that are opened in this block have numbers from this one on, in order."""
    highest = max(int(entry.name) for entry in Path("/dev/fd").iterdir())
    fillers: list[int] = []
    while not fillers or fillers[-1] <= highest:
        fillers.append(os.dup(0))
    yield fillers[-1] + 1
    for filler in fillers:
        os.close(filler)


@pytest.mark.skipif(sys.platform != "linux", reason="pipes are Linux's")
def test_a_pipe_of_the_last_descriptors_is_not_borrowed() -> None:
    from tunneld.engine.pipes import Pipes  # noqa: PLC0415  # Linux only

    with no_gaps() as first_free:
        assert Pipes(4096, 8, least=1, below=first_free + 1).borrow() is None
        os.close(probe := os.dup(0))
        assert probe == first_free
        pipe = Pipes(4096, 8, least=1, below=first_free + 2).borrow()
        assert pipe is not None
        pipe.close()


@pytest.mark.parametrize("make_engine", ENGINES.values(), ids=ENGINES)
async def test_an_engine_that_does_not_run_refuses(make_engine: Callable[[], Any]) -> None:
    engine = make_engine()
    far, near = tcp_pair()
    with far, near, pytest.raises(RuntimeError, match="not running"):
        engine.watch(near, lambda: None, no_failure)
