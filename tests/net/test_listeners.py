"""Listeners that a reload replaces while their service accepts; no client is lost."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from tunneld.engine import new_engine
from tunneld.errors import ListenError
from tunneld.net import sockets
from tunneld.net.listeners import MAX_ACCEPTS_PER_TURN, BindAddress, ReloadableListener, bind_again

HERE = "127.0.0.1"


class AcceptedConnections:
    """Collects accepted connections."""

    def __init__(self) -> None:
        self.connections: list[socket.socket] = []

    def add(self, connection: socket.socket, _peer: Any) -> None:
        self.connections.append(connection)


@asynccontextmanager
async def serving(
    *listeners: socket.socket, by_engine: bool = False
) -> AsyncIterator[tuple[ReloadableListener, AcceptedConnections]]:
    listener, accepted, engine = ReloadableListener("test", listeners), AcceptedConnections(), new_engine()
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await nursery.start(partial(listener.serve, accepted.add, listen=engine.listen if by_engine else None))
        yield listener, accepted
        nursery.cancel_scope.cancel()
    for connection in accepted.connections:
        connection.close()


def connect(port: int, host: str = HERE) -> socket.socket:
    return socket.create_connection((host, port))


def free_port() -> int:
    with socket.create_server((HERE, 0)) as listener:
        return int(listener.getsockname()[1])


by_task_and_engine = pytest.mark.parametrize("by_engine", [False, True], ids=["task", "engine"])


@by_task_and_engine
async def test_clients_in_the_queue_of_a_replaced_listener_are_accepted(by_engine: bool) -> None:
    async with serving(*sockets.bind_tcp(HERE, 0), by_engine=by_engine) as (service, accepted):
        with connect(service.port), connect(service.port):
            service.exchange(sockets.bind_tcp(HERE, 0))
            assert len(accepted.connections) == 2


@by_task_and_engine
async def test_after_an_exchange_only_the_new_listeners_accept(by_engine: bool) -> None:
    async with serving(*sockets.bind_tcp(HERE, 0), by_engine=by_engine) as (service, accepted):
        old = service.port
        service.exchange(sockets.bind_tcp(HERE, 0))
        with pytest.raises(ConnectionRefusedError):
            connect(old)
        with connect(service.port):
            await wait_all_tasks_blocked()
            assert len(accepted.connections) == 1
        port = service.port
        service.exchange([])
        assert service.port == 0
        with pytest.raises(ConnectionRefusedError):
            connect(port)


class AcceptsPerStep(trio.abc.Instrument):
    """How many connections were accepted in each step of a task, in any order of the tasks."""

    def __init__(self, accepted: AcceptedConnections) -> None:
        self._accepted, self._before = accepted, 0
        self.counts: list[int] = []

    def before_task_step(self, _task: trio.lowlevel.Task) -> None:
        self._before = len(self._accepted.connections)

    def after_task_step(self, _task: trio.lowlevel.Task) -> None:
        if count := len(self._accepted.connections) - self._before:
            self.counts.append(count)


async def test_many_connections_are_accepted_in_batches() -> None:
    """Other tasks run between two batches."""
    listeners = sockets.bind_tcp(HERE, 0)
    with ExitStack() as clients:
        for _ in range(MAX_ACCEPTS_PER_TURN + 1):
            clients.enter_context(connect(listeners[0].getsockname()[1]))
        async with serving(*listeners) as (_, accepted):
            steps = AcceptsPerStep(accepted)
            trio.lowlevel.add_instrument(steps)
            await wait_all_tasks_blocked()
            trio.lowlevel.remove_instrument(steps)
    assert steps.counts == [MAX_ACCEPTS_PER_TURN, 1]


@by_task_and_engine
async def test_a_listener_that_stays_goes_on_accepting(by_engine: bool) -> None:
    async with serving(*sockets.bind_tcp(HERE, 0), by_engine=by_engine) as (service, accepted):
        (stays,) = service.listeners
        service.exchange([stays, *sockets.bind_tcp(HERE, 0)])
        assert len(service.listeners) == 2
        for listener in service.listeners:
            connect(listener.getsockname()[1]).close()
        await wait_all_tasks_blocked()
        assert len(accepted.connections) == 2


async def test_exported_listeners_go_on_with_another_owner() -> None:
    async with serving(*sockets.bind_tcp(HERE, 0), by_engine=True) as (service, accepted):
        port = service.port
        (exported,) = service.export()
        with exported, connect(port):
            await wait_all_tasks_blocked()
            assert not accepted.connections
            service.exchange([exported])
            await wait_all_tasks_blocked()
            assert len(accepted.connections) == 1


@by_task_and_engine
async def test_all_listeners_are_closed_when_the_service_stops(by_engine: bool) -> None:
    async with serving(*sockets.bind_tcp(HERE, 0), by_engine=by_engine) as (service, _):
        listeners = [*service.listeners, *sockets.bind_tcp(HERE, 0)]
        service.exchange(listeners)
    assert [listener.fileno() for listener in listeners] == [-1, -1]


@pytest.mark.parametrize(("was", "then"), [(HERE, ""), ("", HERE), (HERE, "localhost")])
async def test_the_same_port_on_more_or_fewer_addresses(was: str, then: str) -> None:
    port = free_port()
    now, later = {"test": BindAddress(was, port)}, {"test": BindAddress(then, port)}
    async with serving(*sockets.bind_tcp(was, port)) as (service, accepted):
        service.exchange(bind_again({"test": service}, now, later)["test"])
        with connect(port):
            await wait_all_tasks_blocked()
            assert len(accepted.connections) == 1


async def test_a_failed_bind_changes_nothing() -> None:
    with socket.create_server((HERE, 0)) as taken:
        port = taken.getsockname()[1]
        async with (
            serving(*sockets.bind_tcp(HERE, 0)) as (one, accepted),
            serving(*sockets.bind_tcp(HERE, 0)) as (other, _),
        ):
            services = {"one": one, "other": other}
            now: dict[str, BindAddress | None] = {
                name: BindAddress(HERE, service.port) for name, service in services.items()
            }
            descriptors = sockets.open_descriptors()
            with pytest.raises(ListenError, match=f"could not listen on tcp://{HERE}:{port}: address already in use"):
                bind_again(services, now, {"one": BindAddress(HERE, 0), "other": BindAddress(HERE, port)})
            assert sockets.open_descriptors() == descriptors
            with connect(one.port), connect(other.port):
                await wait_all_tasks_blocked()
                assert len(accepted.connections) == 1


def test_services_with_an_unchanged_address_are_not_bound() -> None:
    address = BindAddress(HERE, 7010)
    assert bind_again({"one": ReloadableListener("one")}, {"one": address}, {"one": address}) == {}
    assert bind_again({"one": ReloadableListener("one")}, {"one": address}, {"one": None}) == {"one": []}


class FailingListener(socket.socket):
    """A listener whose first two accepts fail for lack of descriptors."""

    tries = 0

    def accept(self) -> Any:
        self.tries += 1
        if self.tries < 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


async def test_out_of_descriptors_it_backs_off_and_logs_once(autojump_clock: trio.testing.MockClock) -> None:
    listener = FailingListener()
    listener.bind((HERE, 0))
    listener.listen()
    listener.setblocking(False)
    with capture_logs() as logs:
        async with serving(listener) as (service, accepted):
            with connect(service.port):
                await trio.sleep(10)
                assert len(accepted.connections) == 1
    assert [log["event"] for log in logs] == ["could not accept test connections"]


class AbortedListener(socket.socket):
    """A listener whose first client aborts before the connection is accepted."""

    calls = 0

    def accept(self) -> Any:
        self.calls += 1
        connection, address = super().accept()
        if self.calls == 1:
            connection.close()
            raise OSError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))
        return connection, address


async def test_an_aborted_connection_is_no_shortage_and_does_not_delay_the_next_client() -> None:
    listener = AbortedListener()
    listener.bind((HERE, 0))
    listener.listen()
    listener.setblocking(False)
    with capture_logs() as logs, connect(listener.getsockname()[1]), connect(listener.getsockname()[1]):
        async with serving(listener) as (_, accepted):
            await wait_all_tasks_blocked()
            assert len(accepted.connections) == 1
    assert logs == []


async def test_a_failing_callback_costs_one_connection() -> None:
    service = ReloadableListener("test", sockets.bind_tcp(HERE, 0))

    def fail(_connection: socket.socket, _peer: Any) -> None:
        raise ZeroDivisionError

    with capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            await nursery.start(service.serve, fail)
            for _ in range(2):
                with connect(service.port) as connection:
                    await wait_all_tasks_blocked()
                    connection.setblocking(False)
                    assert connection.recv(1) == b""
            nursery.cancel_scope.cancel()
    assert [log["event"] for log in logs] == ["could not handle a connection: internal error"] * 2
