"""The contract of `watch`, and of what comes after it."""

from __future__ import annotations

import os
import socket

import pytest
import trio

from tests.engine.bench import Bench, Ends, no_failure, read_all, read_exactly, reset
from tunneld.engine.engine import Cause


class Events:
    """Counts calls; its `note` is an `on_event`."""

    def __init__(self) -> None:
        self.count = 0
        self._called = trio.Event()

    def note(self) -> None:
        self.count += 1
        self._called.set()

    async def more(self, than: int = 0) -> None:
        """Wait for more calls than these."""
        while self.count <= than:
            self._called = trio.Event()
            await self._called.wait()


async def test_the_first_byte_is_told_and_not_taken(bench: Bench) -> None:
    far, near = bench.tcp()
    events = Events()
    bench.engine.watch(near, events.note, no_failure)
    await far.send_all(b"x")
    await events.more()
    assert near.recv(10) == b"x"


async def test_an_idle_connection_is_not_told(bench: Bench) -> None:
    _, near = bench.tcp()
    events = Events()
    bench.engine.watch(near, events.note, no_failure)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert events.count == 0


async def test_bytes_that_came_before_the_watch_are_told(bench: Bench) -> None:
    far, near = bench.tcp()
    await far.send_all(b"x")
    events = Events()
    bench.engine.watch(near, events.note, no_failure)
    await events.more()


async def test_a_peer_that_leaves_is_told(bench: Bench) -> None:
    far, near = bench.tcp()
    events = Events()
    bench.engine.watch(near, events.note, no_failure)
    await far.aclose()
    await events.more()
    assert near.recv(10) == b""


async def test_a_reset_is_told(bench: Bench) -> None:
    far, near = bench.tcp()
    events = Events()
    bench.engine.watch(near, events.note, no_failure)
    await trio.testing.wait_all_tasks_blocked()
    reset(far)
    await events.more()
    with pytest.raises(ConnectionResetError):
        near.recv(10)


async def test_a_refused_connection_is_told(bench: Bench) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        near = bench.dialled(nobody.getsockname())
        events = Events()
        bench.engine.watch(near, events.note, no_failure)
        await events.more()
    with pytest.raises(ConnectionRefusedError):
        near.recv(10)


async def test_an_end_behind_unread_bytes_is_told_by_the_pump(pump: Bench) -> None:
    far, near = pump.tcp()
    events = Events()
    pump.engine.watch(near, events.note, no_failure)
    await far.send_all(b"x")
    await events.more()
    before = events.count
    await far.aclose()
    await events.more(than=before)
    assert near.recv(10) == b"x"
    assert near.recv(10) == b""


async def test_nothing_is_told_after_release(bench: Bench) -> None:
    far, near = bench.tcp()
    events = Events()
    registration = bench.engine.watch(near, events.note, no_failure)
    registration.release()
    registration.release()
    await far.send_all(b"x")
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert events.count == 0
    await far.send_all(b"y")
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert near.recv(10) == b"xy"


async def test_whoever_watches_after_a_release_is_told(bench: Bench) -> None:
    for _ in range(20):  # the portable engine starts its tasks in random order
        far, near = bench.tcp()
        first, second = Events(), Events()
        bench.engine.watch(near, first.note, no_failure).release()
        bench.engine.watch(near, second.note, no_failure)
        await far.send_all(b"x")
        await second.more()
        assert first.count == 0


@pytest.mark.parametrize("pause", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("waiting", [b"", b"spoke first"], ids=["silent", "with bytes waiting"])
async def test_a_released_connection_is_joined_with_all_that_stands_in_it(
    bench: Bench, waiting: bytes, pause: bool
) -> None:
    server, near_server = bench.tcp()
    visitor, near_visitor = bench.tcp()
    registrations = [bench.engine.watch(near, Events().note, no_failure) for near in (near_server, near_visitor)]
    await server.send_all(waiting)
    await server.send_eof()
    await trio.testing.wait_all_tasks_blocked(0.01)
    for registration in registrations:
        registration.release()
    if pause:
        await visitor.send_all(b"he")
        await trio.testing.wait_all_tasks_blocked(0.01)
        await visitor.send_all(b"llo")
    else:
        await visitor.send_all(b"hello")
    ends = Ends()
    bench.engine.join(near_visitor, near_server, linger=30, on_end=ends.note)
    assert await read_all(visitor) == waiting
    assert await read_exactly(server, 5) == b"hello"
    for registration in registrations:
        registration.release()  # too late to matter
    await visitor.aclose()
    assert (await ends.one()).cause is Cause.FINISHED


async def test_an_owner_may_join_from_inside_its_callback(bench: Bench) -> None:
    server, near_server = bench.tcp()
    visitor, near_visitor = bench.tcp()
    ends = Ends()

    def pair_up() -> None:
        registration.release()
        bench.engine.join(near_visitor, near_server, linger=30, on_end=ends.note)

    registration = bench.engine.watch(near_server, pair_up, no_failure)
    await server.send_all(b"banner")
    assert await read_exactly(visitor, 6) == b"banner"
    await visitor.aclose()
    await server.aclose()
    assert (await ends.one()).cause is Cause.FINISHED


async def test_a_descriptor_that_was_released_closed_and_given_out_again_is_a_new_one(pump: Bench) -> None:
    _, near = pump.tcp()
    registration = pump.engine.watch(near, Events().note, no_failure)
    await trio.testing.wait_all_tasks_blocked()
    registration.release()
    number = near.fileno()
    far, again = pump.tcp()
    os.dup2(again.fileno(), number)  # closes what was there
    near.detach()
    again.close()
    again = socket.socket(fileno=number)
    again.setblocking(False)
    pump.sockets.append(again)
    events = Events()
    pump.engine.watch(again, events.note, no_failure)
    await far.send_all(b"x")
    await events.more()
    assert again.recv(10) == b"x"


async def test_a_watch_that_fails_costs_its_owner_alone(bench: Bench) -> None:
    far, near = bench.tcp()
    failures: list[Exception] = []
    told = trio.Event()

    def fail() -> None:
        raise ZeroDivisionError

    def on_failure(error: Exception) -> None:
        failures.append(error)
        told.set()
        raise RuntimeError("and this fails, too")

    bench.engine.watch(near, fail, on_failure)
    await far.send_all(b"x")
    await told.wait()
    assert [type(error) for error in failures] == [ZeroDivisionError]
    await bench.check()
