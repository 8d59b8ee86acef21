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
from tests.support.system import has_ipv6
from tunneld.engine.limits import EngineLimits
from tunneld.net.sockets import bind_tcp


class AcceptedConnections:
    """Collects connections; `note` is an `on_connection` callback."""

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
    """A connected client socket; the connection may wait in the listener's queue."""
    client = socket.create_connection(listener.getsockname())
    bench.sockets.append(client)
    return client


@pytest.mark.skipif(not has_ipv6(), reason="no dual-stack sockets")
async def test_an_ipv4_peer_of_a_dual_stack_listener_has_an_ipv4_address(bench: Bench) -> None:
    (listener,), accepted = bind_tcp("", 0), AcceptedConnections(bench)
    bench.sockets.append(listener)
    bench.engine.listen(listener, accepted.note, no_failure)
    client = socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
    bench.sockets.append(client)
    await accepted.wait_for(1)
    assert accepted.connections[0][1] == client.getsockname()


async def test_connections_come_with_their_address_non_blocking_and_not_inheritable(bench: Bench) -> None:
    listener, accepted = bench.listener(), AcceptedConnections(bench)
    bench.engine.listen(listener, accepted.note, no_failure)
    client = dial(bench, listener)
    await accepted.wait_for(1)
    connection, address = accepted.connections[0]
    assert address == client.getsockname()
    assert connection.gettimeout() == 0
    with pytest.raises(BlockingIOError):
        connection.recv(1)
    assert not connection.get_inheritable()


async def test_more_connections_than_one_batch_are_accepted(bench: Bench) -> None:
    listener, accepted = bench.listener(), AcceptedConnections(bench)
    listener.listen(200)
    clients = {dial(bench, listener).getsockname() for _ in range(150)}
    bench.engine.listen(listener, accepted.note, no_failure)
    await accepted.wait_for(150)
    assert {address for _, address in accepted.connections} == clients


async def test_nothing_is_accepted_after_release(bench: Bench) -> None:
    listener, accepted = bench.listener(), AcceptedConnections(bench)
    registration = bench.engine.listen(listener, accepted.note, no_failure)
    await trio.testing.wait_all_tasks_blocked()
    registration.release()
    registration.release()
    dial(bench, listener)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert accepted.connections == []
    bench.engine.listen(listener, accepted.note, no_failure)
    await accepted.wait_for(1)


async def test_a_failing_callback_costs_one_connection(bench: Bench) -> None:
    listener, failures = bench.listener(), list[Exception]()
    accepted = AcceptedConnections(bench)

    def fail_once(connection: socket.socket, address: Any) -> None:
        if not failures:
            raise ZeroDivisionError
        accepted.note(connection, address)

    bench.engine.listen(listener, fail_once, failures.append)
    first = dial(bench, listener)
    dial(bench, listener)
    await accepted.wait_for(1)
    assert [type(error) for error in failures] == [ZeroDivisionError]
    assert first.recv(1) == b""
    await bench.check_still_works()


async def test_a_socket_that_does_not_listen_is_reported_to_the_owner(bench: Bench) -> None:
    _, near = bench.tcp()
    failures: list[Exception] = []
    called = trio.Event()

    def on_failure(error: Exception) -> None:
        failures.append(error)
        called.set()

    near.shutdown(socket.SHUT_RD)
    bench.engine.listen(near, lambda *_: None, on_failure)
    await called.wait()
    assert isinstance(failures[0], OSError)
    await bench.check_still_works()


class AbortedListener(socket.socket):
    """A listener whose first client aborts before the connection is accepted."""

    calls = 0

    def _accept(self) -> tuple[int, Any]:
        self.calls += 1
        accepted: tuple[int, Any] = super()._accept()  # type: ignore[misc]  # typeshed does not know it
        if self.calls == 1:
            socket.close(accepted[0])
            raise OSError(errno.ECONNABORTED, "connection aborted")
        return accepted


async def test_an_aborted_connection_does_not_delay_other_clients(bench: Bench) -> None:
    plain, accepted = bench.listener(), AcceptedConnections(bench)
    listener = AbortedListener(fileno=plain.detach())
    listener.setblocking(False)
    bench.sockets.append(listener)
    clients = [dial(bench, listener).getsockname() for _ in range(3)]
    bench.engine.listen(listener, accepted.note, no_failure)
    await accepted.wait_for(2)
    assert [address for _, address in accepted.connections] == clients[1:]


class CountingListener(socket.socket):
    """A listener that counts failures of accept for lack of descriptors."""

    failures_seen = 0
    fourth_failure: trio.Event

    def _accept(self) -> tuple[int, Any]:  # called by `socket.accept` and by the pump
        try:
            accepted: tuple[int, Any] = super()._accept()  # type: ignore[misc]  # typeshed does not know it
        except OSError as error:
            if error.errno == errno.EMFILE:
                self.failures_seen += 1
                if self.failures_seen == 4:
                    self.fourth_failure.set()
            raise
        return accepted


async def test_out_of_descriptors_the_acceptor_backs_off_logs_once_and_recovers(bench: Bench) -> None:
    plain, accepted = bench.listener(), AcceptedConnections(bench)
    listener = CountingListener(fileno=plain.detach())
    listener.setblocking(False)
    listener.fourth_failure = trio.Event()
    bench.sockets.append(listener)
    bench.engine.listen(listener, accepted.note, no_failure)
    for _ in range(3):
        dial(bench, listener)
    with structlog.testing.capture_logs() as logs, no_descriptors_left():
        began = trio.current_time()
        await listener.fourth_failure.wait()
        elapsed = trio.current_time() - began
        assert accepted.connections == []
    await accepted.wait_for(3)
    assert [(entry["log_level"], entry["event"]) for entry in logs] == [("warning", "could not accept connections")]
    assert elapsed > 0.25  # three pauses of 0.1 s between four attempts


class LogRecorder:
    """A structlog processor that records lines and signals the first one."""

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.first = trio.Event()

    def __call__(self, _logger: Any, _method: str, line: Any) -> Any:
        self.lines.append(line)
        self.first.set()
        raise structlog.DropEvent


@pytest.mark.skipif(sys.platform != "linux", reason="the pump needs Linux")
async def test_the_descriptor_reserve_is_respected_and_no_client_is_lost(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunneld.engine.acceptor import FdReserve  # noqa: PLC0415
    from tunneld.engine.pump import Pump  # noqa: PLC0415  # Linux only

    recorder, pump = LogRecorder(), Pump(EngineLimits(accept_backoff=0.01))
    monkeypatch.setattr("tunneld.engine.failures.log", structlog.wrap_logger(None, processors=[recorder]))
    await nursery.start(pump.run)
    with socket.create_server(("127.0.0.1", 0)) as listener, consecutive_descriptors() as first_free:
        listener.setblocking(False)
        clients = [socket.socket() for _ in range(6)]
        pump.fd_reserve = FdReserve(limit=first_free + len(clients) + 2)
        for client in clients:
            client.connect(listener.getsockname())
        accepted, more = list[socket.socket](), trio.Event()

        def on_connection(connection: socket.socket, _address: Any) -> None:
            nonlocal more
            accepted.append(connection)
            more.set()
            more = trio.Event()

        registration = pump.listen(listener, on_connection, no_failure)
        await recorder.first.wait()
        assert [one.fileno() for one in accepted] == [first_free + len(clients) + number for number in range(2)]
        with socket.socket():  # the rest of the process may use the reserve
            for number in range(2, len(clients)):  # one client per free descriptor
                next_one = more
                accepted[number - 2].close()
                await next_one.wait()
                assert len(accepted) == number + 1
        registration.release()
        for one in [*accepted, *clients]:
            one.close()
    assert [line["reason"][:19] for line in recorder.lines] == ["too many open files"]
    nursery.cancel_scope.cancel()


@contextmanager
def consecutive_descriptors() -> Iterator[int]:
    """Descriptors opened inside the block get consecutive numbers, starting with the yielded one."""
    highest = max(int(entry.name) for entry in Path("/dev/fd").iterdir())
    fillers: list[int] = []
    while not fillers or fillers[-1] <= highest:
        fillers.append(os.dup(0))
    yield fillers[-1] + 1
    for filler in fillers:
        os.close(filler)


@pytest.mark.skipif(sys.platform != "linux", reason="pipes need Linux")
def test_a_pipe_with_reserved_descriptors_is_not_borrowed() -> None:
    from tunneld.engine.pipes import PipePool  # noqa: PLC0415  # Linux only

    with consecutive_descriptors() as first_free:
        assert PipePool(4096, 8, min_size=1, fd_limit=first_free + 1).borrow() is None
        os.close(probe := os.dup(0))
        assert probe == first_free
        pipe = PipePool(4096, 8, min_size=1, fd_limit=first_free + 2).borrow()
        assert pipe is not None
        pipe.close()


@pytest.mark.parametrize("make_engine", ENGINES.values(), ids=ENGINES)
async def test_an_engine_that_is_not_running_raises(make_engine: Callable[[], Any]) -> None:
    engine = make_engine()
    far, near = tcp_pair()
    with far, near, pytest.raises(RuntimeError, match="not running"):
        engine.watch(near, lambda: None, no_failure)
