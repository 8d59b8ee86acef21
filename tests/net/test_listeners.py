"""Doors: listeners that are exchanged while a face serves, and nobody is lost by it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from tunneld.errors import ListenError
from tunneld.net import sockets
from tunneld.net.listeners import BATCH, BindAddress, ReloadableListener, bind_again

HERE = "127.0.0.1"


class Guests:
    """Those who came through a door."""

    def __init__(self) -> None:
        self.came: list[socket.socket] = []

    def arrive(self, connection: socket.socket, _peer: Any) -> None:
        self.came.append(connection)


@asynccontextmanager
async def open_door(*listeners: socket.socket) -> AsyncIterator[tuple[ReloadableListener, Guests]]:
    door, guests = ReloadableListener("test", listeners), Guests()
    async with trio.open_nursery() as nursery:
        await nursery.start(door.serve, guests.arrive)
        yield door, guests
        nursery.cancel_scope.cancel()
    for connection in guests.came:
        connection.close()


def call(port: int, host: str = HERE) -> socket.socket:
    return socket.create_connection((host, port))


def free_port() -> int:
    with socket.create_server((HERE, 0)) as listener:
        return int(listener.getsockname()[1])


async def test_whoever_was_connected_to_a_listener_that_goes_is_taken_all_the_same() -> None:
    async with open_door(*sockets.bind_tcp(HERE, 0)) as (door, guests):
        with call(door.port), call(door.port):
            door.exchange(sockets.bind_tcp(HERE, 0))
            assert len(guests.came) == 2


async def test_a_door_listens_where_it_is_told_and_nowhere_else() -> None:
    async with open_door(*sockets.bind_tcp(HERE, 0)) as (door, guests):
        old = door.port
        door.exchange(sockets.bind_tcp(HERE, 0))
        with pytest.raises(ConnectionRefusedError):
            call(old)
        with call(door.port):
            await wait_all_tasks_blocked()
            assert len(guests.came) == 1
        port = door.port
        door.exchange([])
        assert door.port == 0
        with pytest.raises(ConnectionRefusedError):
            call(port)


class Turns(trio.abc.Instrument):
    """How many guests came in each turn that a task had, whichever order the tasks had theirs in."""

    def __init__(self, guests: Guests) -> None:
        self._guests, self._before = guests, 0
        self.took: list[int] = []

    def before_task_step(self, _task: trio.lowlevel.Task) -> None:
        self._before = len(self._guests.came)

    def after_task_step(self, _task: trio.lowlevel.Task) -> None:
        if took := len(self._guests.came) - self._before:
            self.took.append(took)


async def test_a_crowd_is_taken_in_batches() -> None:
    """So many in a turn, and then others have theirs."""
    listeners = sockets.bind_tcp(HERE, 0)
    with ExitStack() as people:
        for _ in range(BATCH + 1):
            people.enter_context(call(listeners[0].getsockname()[1]))
        async with open_door(*listeners) as (_door, guests):
            turns = Turns(guests)
            trio.lowlevel.add_instrument(turns)
            await wait_all_tasks_blocked()
            trio.lowlevel.remove_instrument(turns)
    assert turns.took == [BATCH, 1]


async def test_a_listener_that_stays_is_not_disturbed() -> None:
    async with open_door(*sockets.bind_tcp(HERE, 0)) as (door, guests):
        (stays,) = door.listeners
        door.exchange([stays, *sockets.bind_tcp(HERE, 0)])
        assert len(door.listeners) == 2
        for listener in door.listeners:
            call(listener.getsockname()[1]).close()
        await wait_all_tasks_blocked()
        assert len(guests.came) == 2


async def test_all_listeners_are_closed_with_the_face() -> None:
    async with open_door(*sockets.bind_tcp(HERE, 0)) as (door, _guests):
        listeners = [*door.listeners, *sockets.bind_tcp(HERE, 0)]
        door.exchange(listeners)
    assert [listener.fileno() for listener in listeners] == [-1, -1]


@pytest.mark.parametrize(("was", "then"), [(HERE, ""), ("", HERE), (HERE, "localhost")])
async def test_the_same_port_on_more_or_fewer_addresses(was: str, then: str) -> None:
    port = free_port()
    now, later = {"test": BindAddress(was, port)}, {"test": BindAddress(then, port)}
    async with open_door(*sockets.bind_tcp(was, port)) as (door, guests):
        door.exchange(bind_again({"test": door}, now, later)["test"])
        with call(port):
            await wait_all_tasks_blocked()
            assert len(guests.came) == 1


async def test_what_cannot_be_bound_leaves_everything_as_it_was() -> None:
    with socket.create_server((HERE, 0)) as taken:
        port = taken.getsockname()[1]
        async with (
            open_door(*sockets.bind_tcp(HERE, 0)) as (one, guests),
            open_door(*sockets.bind_tcp(HERE, 0)) as (other, _guests),
        ):
            doors = {"one": one, "other": other}
            now: dict[str, BindAddress | None] = {name: BindAddress(HERE, door.port) for name, door in doors.items()}
            descriptors = sockets.open_descriptors()
            with pytest.raises(ListenError, match=f"could not listen on tcp://{HERE}:{port}: address already in use"):
                bind_again(doors, now, {"one": BindAddress(HERE, 0), "other": BindAddress(HERE, port)})
            assert sockets.open_descriptors() == descriptors
            with call(one.port), call(other.port):
                await wait_all_tasks_blocked()
                assert len(guests.came) == 1


def test_faces_that_stay_where_they_are_are_not_bound() -> None:
    place = BindAddress(HERE, 7010)
    assert bind_again({"one": ReloadableListener("one")}, {"one": place}, {"one": place}) == {}
    assert bind_again({"one": ReloadableListener("one")}, {"one": place}, {"one": None}) == {"one": []}


class Short(socket.socket):
    """A listener on a machine that is out of descriptors, for a while."""

    tries = 0

    def accept(self) -> Any:
        self.tries += 1
        if self.tries < 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


async def test_out_of_descriptors_it_waits_and_says_so_once(autojump_clock: trio.testing.MockClock) -> None:
    listener = Short()
    listener.bind((HERE, 0))
    listener.listen()
    listener.setblocking(False)
    with capture_logs() as logs:
        async with open_door(listener) as (door, guests):
            with call(door.port):
                await trio.sleep(10)
                assert len(guests.came) == 1
    assert [log["event"] for log in logs] == ["test accepts no connections for now"]


async def test_a_bug_costs_the_connection_that_met_it() -> None:
    door = ReloadableListener("test", sockets.bind_tcp(HERE, 0))

    def bug(_connection: socket.socket, _peer: Any) -> None:
        raise ZeroDivisionError

    with capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            await nursery.start(door.serve, bug)
            for _ in range(2):
                with call(door.port) as connection:
                    await wait_all_tasks_blocked()
                    connection.setblocking(False)
                    assert connection.recv(1) == b""
            nursery.cancel_scope.cancel()
    assert [log["event"] for log in logs] == ["could not take a connection: a bug"] * 2
