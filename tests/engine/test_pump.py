"""What only the pump guarantees: resets noticed while blocked, low cost per relay, urgent data, isolated failures."""

from __future__ import annotations

import array
import gc
import os
import resource
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from select import EPOLLIN
from threading import Thread
from typing import cast

import pytest
import structlog
import trio

from tests.engine.bench import (
    NOISE,
    Bench,
    Ends,
    RelayBetweenSockets,
    flood,
    open_descriptors,
    read_all,
    read_exactly,
    reset,
    stream,
    tcp_pair,
    wait_reset,
)
from tunneld.engine.engine import Cause, Relay, RelayEnd, Side
from tunneld.engine.pump import Pump

IDLE_RELAYS = 4000


async def blocked_relay(bench: Bench) -> RelayBetweenSockets:
    """A relay whose server does not read, after it has taken all it can from the visitor."""
    joined = bench.join(linger=0.5, SO_SNDBUF=65536, SO_RCVBUF=65536)
    bench.nursery.start_soon(flood, joined.visitor)
    await trio.testing.wait_all_tasks_blocked(0.05)
    return joined


async def test_a_reset_behind_undelivered_bytes_ends_the_relay_if_they_are_not_taken(pump: Bench) -> None:
    """The bytes may still be delivered, for as long as `linger` says."""
    joined = await blocked_relay(pump)
    trio.lowlevel.notify_closing(joined.visitor.socket)
    reset(joined.visitor)
    end = await joined.ends.one()
    assert (end.cause, end.side) == (Cause.RESET, Side.VISITOR)
    with pytest.raises(trio.BrokenResourceError):
        await read_all(joined.server)


async def test_a_side_that_loses_bytes_to_a_drop_is_reset(pump: Bench) -> None:
    joined = await blocked_relay(pump)
    joined.relay.drop()
    assert (await joined.ends.one()).cause is Cause.DROPPED
    with pytest.raises(trio.BrokenResourceError):
        await read_all(joined.server)


@pytest.mark.parametrize("size", [3, 65536, 100_000])
async def test_bytes_behind_urgent_data_are_relayed(pump: Bench, size: int) -> None:
    """Reads and splices stop in front of the urgent byte, which is not relayed."""
    visitor, near_visitor = tcp_pair()
    pump.sockets += [visitor, near_visitor]
    server, near_server = pump.tcp()
    part = NOISE[:size]
    assert (visitor.send(part), visitor.send(b"!", socket.MSG_OOB), visitor.send(part)) == (size, 1, size)
    pump.engine.join(near_visitor, near_server, linger=30, on_end=Ends().note)
    assert await read_exactly(server, 2 * size) == 2 * part


@pytest.mark.parametrize("pump", [{"buffer_size": 4096}], indirect=True)
async def test_a_reset_that_splice_reports_is_no_end_of_file(pump: Bench) -> None:
    """It would look like the end of a whole file; no read reports it a second time."""
    joined = pump.join()
    await joined.server.send_all(NOISE[:200_000])
    assert await read_exactly(joined.visitor, 200_000) == NOISE[:200_000]
    assert joined.relay.from_server.splicing  # type: ignore[attr-defined]
    reset(joined.server)
    await wait_reset(joined.visitor)
    assert (await joined.ends.one()).side is Side.SERVER


async def test_a_bug_in_one_relay_costs_that_relay_and_is_logged_once(pump: Bench) -> None:
    class FaultySocket(socket.socket):
        def recv_into(self, *args: object) -> int:
            raise ZeroDivisionError

    _, plain = pump.tcp()
    faulty = FaultySocket(fileno=plain.detach())
    faulty.setblocking(False)
    server, near_server = pump.tcp()
    ends, bystander = Ends(), pump.join()
    with structlog.testing.capture_logs() as logs:
        pump.engine.join(faulty, near_server, linger=30, on_end=ends.note)
        far = pump.sockets[0]
        await stream(far).send_all(b"x")
        assert (await ends.one()).cause is Cause.DROPPED
        await wait_reset(server)
    assert [entry["event"] for entry in logs] == ["relay failed: internal error"]
    await bystander.visitor.send_all(b"x")
    assert await read_exactly(bystander.server, 1) == b"x"


@pytest.mark.parametrize(("pump", "pipes"), [({}, 3), ({"max_pipes": 2}, 2), ({"max_pipes": 0}, 0)], indirect=["pump"])
async def test_blocked_flows_keep_pipes_up_to_the_limit_of_the_pool(pump: Bench, pipes: int) -> None:
    before = open_descriptors()
    relays = [await blocked_relay(pump) for _ in range(3)]
    held = open_descriptors() - before - 3 * 4
    assert held == 2 * pipes
    for joined in relays:
        joined.relay.drop()
        await joined.ends.one()
    assert open_descriptors() - before == 3 * 2  # the far sockets; a pipe with lost bytes in it is closed


async def test_a_pipe_is_reused(pump: Bench) -> None:
    before = open_descriptors()
    for _ in range(5):
        joined = pump.join()
        pump.nursery.start_soon(joined.visitor.send_all, NOISE)
        assert await read_exactly(joined.server, len(NOISE)) == NOISE
        await joined.visitor.aclose()
        await joined.server.aclose()
        await joined.ends.one()
    assert open_descriptors() - before <= 2


@pytest.mark.parametrize("function", ["pipe2", "splice"])
async def test_without_pipes_or_splice_bytes_go_through_the_buffer(
    pump: Bench, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    calls = 0

    def refuse(*_args: object, **_options: object) -> int:
        nonlocal calls
        calls += 1
        raise OSError(24, "too many open files")

    monkeypatch.setattr(os, function, refuse)
    joined = pump.join()

    async def send() -> None:
        await joined.visitor.send_all(NOISE * 4)
        await joined.visitor.send_eof()

    pump.nursery.start_soon(send)
    assert await read_all(joined.server) == NOISE * 4
    assert calls


async def test_a_failing_on_end_callback_affects_no_other_relay(bench: Bench) -> None:
    called = trio.Event()

    def fail(_relay: Relay, _end: RelayEnd) -> None:
        called.set()
        raise ZeroDivisionError

    visitor, near_visitor = bench.tcp()
    server, near_server = bench.tcp()
    with structlog.testing.capture_logs() as logs:
        bench.engine.join(near_visitor, near_server, linger=30, on_end=fail)
        await visitor.aclose()
        await server.aclose()
        await called.wait()
    assert [entry["event"] for entry in logs] == ["on_end callback failed: internal error"]
    await bench.check_still_works()


class BusyHandler:
    """A handler that rearms itself twice; it records how often another task had run before each of its events."""

    def __init__(self, pump: Pump, fd: int) -> None:
        self.pump, self.fd = pump, fd
        self.turns = 0
        self.served: list[int] = []
        self.done = trio.Event()

    def on_event(self, events: int) -> None:
        self.served.append(self.turns)
        if len(self.served) < 3:
            self.pump.rearm(self.fd)
        else:
            self.done.set()

    def on_failure(self, error: Exception) -> None:
        raise AssertionError from error

    def on_stop(self) -> None:
        """Nothing to close."""

    async def count_turns(self) -> None:
        """Another task: it runs whenever the pump returns to the scheduler."""
        while not self.done.is_set():
            await trio.lowlevel.checkpoint()
            self.turns += 1


@pytest.mark.parametrize(
    ("pump", "in_one_turn"), [({"turn_time": 60.0}, True), ({"turn_time": 0.0}, False)], indirect=["pump"]
)
async def test_a_rearmed_handler_is_served_again_until_the_turn_is_over(pump: Bench, in_one_turn: bool) -> None:
    _, near = pump.tcp()
    engine = cast(Pump, pump.engine)
    handler = BusyHandler(engine, near.fileno())
    engine.attach(near.fileno(), handler)
    pump.nursery.start_soon(handler.count_turns)
    await handler.done.wait()
    engine.detach(near.fileno(), handler)
    assert (len(set(handler.served)) == 1) is in_one_turn


@pytest.mark.parametrize("pump", [{"turn_time": 60.0, "poll_timeout": 60.0}], indirect=True)
async def test_an_event_during_the_poll_timeout_is_served_in_the_same_turn(pump: Bench) -> None:
    far, near = tcp_pair()
    pump.sockets += [far, near]
    engine = cast(Pump, pump.engine)

    class AnsweredHandler(BusyHandler):
        """The answer comes from another thread, since no other task of this thread runs now."""

        def on_event(self, events: int) -> None:
            self.served.append(self.turns)
            if events & EPOLLIN:
                engine.limits = replace(engine.limits, poll_timeout=0.0)
                self.done.set()
            else:
                Thread(target=far.send, args=(b"x",)).start()

    handler = AnsweredHandler(engine, near.fileno())
    engine.attach(near.fileno(), handler)
    pump.nursery.start_soon(handler.count_turns)
    await handler.done.wait()
    engine.detach(near.fileno(), handler)
    assert len(set(handler.served)) == 1


@pytest.mark.parametrize(
    ("pump", "polls"),
    [
        ({"turn_time": 60.0, "poll_timeout": 60.0, "busy_poll": 60.0}, True),
        ({"turn_time": 60.0, "poll_timeout": 60.0, "busy_poll": 0.0}, False),
    ],
    indirect=["pump"],
)
async def test_after_a_short_wait_the_pump_polls_before_it_sleeps(
    pump: Bench, polls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three answers: the pump sleeps for the first, then polls, if at all. It yields the processor between polls."""
    far, near = tcp_pair()
    pump.sockets += [far, near]
    engine = cast(Pump, pump.engine)
    yields: list[int] = []

    class AnsweredHandler(BusyHandler):
        def on_event(self, events: int) -> None:
            self.served.append(len(yields))
            if len(self.served) == 4:
                engine.limits = replace(engine.limits, poll_timeout=0.0)
                self.done.set()
            elif not polls or len(self.served) == 1:
                Thread(target=far.send, args=(b"x",)).start()

    def yield_processor() -> None:
        yields.append(far.send(b"x"))

    monkeypatch.setattr(os, "sched_yield", yield_processor)
    handler = AnsweredHandler(engine, near.fileno())
    engine.attach(near.fileno(), handler)
    await handler.done.wait()
    engine.detach(near.fileno(), handler)
    assert handler.served == ([0, 0, 1, 2] if polls else [0, 0, 0, 0])


async def test_a_closed_socket_is_a_failed_side(pump: Bench) -> None:
    """The owner may have closed it a moment ago."""
    visitor, near_visitor = pump.tcp()
    _, near_server = pump.tcp()
    near_server.close()
    ends = Ends()
    pump.engine.join(near_visitor, near_server, linger=30, on_end=ends.note)
    end = await ends.one()
    assert (end.cause, end.side) == (Cause.RESET, Side.SERVER)
    with pytest.raises(trio.BrokenResourceError):
        await read_all(visitor)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Enough descriptors for the far and near sockets of all idle relays."""
    needed = 4 * IDLE_RELAYS + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"the hard limit of descriptors is {hard}, {needed} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident_bytes() -> int:
    """Resident memory of this process, in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_thousands_of_idle_relays_cost_two_descriptors_and_little_memory_each(
    many_descriptors: None, pump: Bench
) -> None:
    numbers = array.array("i")  # bare numbers at first, so that only the cost of the relays is measured
    for _ in range(2 * IDLE_RELAYS):
        numbers.extend(end.detach() for end in socket.socketpair())
    ends = Ends()
    far = numbers[::2]
    memory, descriptors = resident_bytes(), open_descriptors()
    relays = []
    for index in range(0, 4 * IDLE_RELAYS, 4):
        near = [socket.socket(fileno=numbers[index + offset]) for offset in (1, 3)]
        for connection in near:
            connection.setblocking(False)
        relays.append(pump.engine.join(near[0], near[1], linger=30, on_end=ends.note))
    await trio.testing.wait_all_tasks_blocked()
    assert (resident_bytes() - memory) / IDLE_RELAYS <= 5 * 1024
    assert open_descriptors() == descriptors  # the two sockets of each relay, which were open before, and nothing else
    os.write(far[0], b"ping")
    await trio.testing.wait_all_tasks_blocked()
    assert os.read(far[1], 10) == b"ping"
    for relay in relays:
        relay.drop()
    await trio.testing.wait_all_tasks_blocked()
    assert ends.causes == [Cause.DROPPED] * IDLE_RELAYS
    assert open_descriptors() == descriptors - 2 * IDLE_RELAYS
    for number in far:
        os.close(number)
