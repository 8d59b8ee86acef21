"""The contract of `watch`, and of `join` after it."""

from __future__ import annotations

import os
import socket

import pytest
import trio

from tests.engine.bench import Bench, Ends, no_failure, read_all, read_exactly, reset
from tunneld.engine.engine import Cause


class Events:
    """Counts calls; `note` is an `on_event` callback."""

    def __init__(self) -> None:
        self.count = 0
        self._called = trio.Event()

    def note(self) -> None:
        self.count += 1
        self._called.set()

    async def more(self, than: int = 0) -> None:
        """Wait until there have been more than this many calls."""
        while self.count <= than:
            self._called = trio.Event()
            await self._called.wait()


async def test_the_first_byte_is_reported_and_not_read(bench: Bench) -> None:
    far, near = bench.tcp()
    events = Events()
    bench.engine.watch(near, events.note, no_failure)
    await far.send_all(b"x")
    await events.more()
    assert near.recv(10) == b"x"


async def test_an_idle_connection_is_not_reported(bench: Bench) -> None:
    _, near = bench.tcp()
    events = Events()
    bench.engine.watch(near, events.note, no_failure)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert events.count == 0


async def test_bytes_from_before_the_watch_are_reported(bench: Bench) -> None:
    far, near = bench.tcp()
    await far.send_all(b"x")
    events = Events()
    bench.engine.watch(near, events.note, no_failure)
    await events.more()


async def test_an_end_of_file_is_reported(bench: Bench) -> None:
    far, near = bench.tcp()
    events = Events()
    bench.engine.watch(near, events.note, no_failure)
    await far.aclose()
    await events.more()
    assert near.recv(10) == b""


async def test_a_reset_is_reported(bench: Bench) -> None:
    far, near = bench.tcp()
    events = Events()
    bench.engine.watch(near, events.note, no_failure)
    await trio.testing.wait_all_tasks_blocked()
    reset(far)
    await events.more()
    with pytest.raises(ConnectionResetError):
        near.recv(10)


async def test_a_refused_connection_is_reported(bench: Bench) -> None:
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        near = bench.dialled(not_listening.getsockname())
        events = Events()
        bench.engine.watch(near, events.note, no_failure)
        await events.more()
    with pytest.raises(ConnectionRefusedError):
        near.recv(10)


async def test_the_pump_reports_an_end_of_file_behind_unread_bytes(pump: Bench) -> None:
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


async def test_nothing_is_reported_after_release(bench: Bench) -> None:
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


async def test_a_new_watch_after_a_release_is_served(bench: Bench) -> None:
    for _ in range(20):  # the portable engine starts its tasks in random order
        far, near = bench.tcp()
        first, second = Events(), Events()
        bench.engine.watch(near, first.note, no_failure).release()
        bench.engine.watch(near, second.note, no_failure)
        await far.send_all(b"x")
        await second.more()
        assert first.count == 0


@pytest.mark.parametrize("pause", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("waiting", [b"", b"banner"], ids=["silent", "with bytes waiting"])
async def test_a_released_connection_is_joined_with_its_pending_bytes(
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
        registration.release()  # has no effect any more
    await visitor.aclose()
    assert (await ends.one()).cause is Cause.FINISHED


async def test_join_may_be_called_from_an_on_event_callback(bench: Bench) -> None:
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


async def test_a_descriptor_that_was_released_closed_and_reused_is_a_new_one(pump: Bench) -> None:
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


async def test_a_failing_callback_affects_only_its_owner(bench: Bench) -> None:
    far, near = bench.tcp()
    failures: list[Exception] = []
    called = trio.Event()

    def fail() -> None:
        raise ZeroDivisionError

    def on_failure(error: Exception) -> None:
        failures.append(error)
        called.set()
        raise RuntimeError("and this fails, too")

    bench.engine.watch(near, fail, on_failure)
    await far.send_all(b"x")
    await called.wait()
    assert [type(error) for error in failures] == [ZeroDivisionError]
    await bench.check_still_works()
