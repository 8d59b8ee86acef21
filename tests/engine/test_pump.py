"""What only the pump promises: resets noticed while blocked, the cost of many, urgent data, failures inside."""

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
    Joined,
    flood,
    open_descriptors,
    read_all,
    read_exactly,
    reset,
    stream,
    tcp_pair,
)
from tunneld.engine.engine import Cause, Relay, RelayEnd, Side
from tunneld.engine.pump import Pump

IDLE_PAIRS = 4000


async def clogged(bench: Bench) -> Joined:
    """A relay whose server does not read, and that has taken from its visitor all that it will."""
    joined = bench.join(SO_SNDBUF=65536, SO_RCVBUF=65536)
    bench.nursery.start_soon(flood, joined.visitor)
    await trio.testing.wait_all_tasks_blocked(0.05)
    return joined


async def test_a_reset_behind_held_bytes_is_noticed_at_once(pump: Bench) -> None:
    joined = await clogged(pump)
    trio.lowlevel.notify_closing(joined.visitor.socket)
    reset(joined.visitor)
    end = await joined.ends.one()
    assert (end.cause, end.side) == (Cause.RESET, Side.VISITOR)
    with pytest.raises(trio.BrokenResourceError):
        await read_all(joined.server)


async def test_whoever_loses_bytes_to_a_drop_gets_a_reset_and_no_end(pump: Bench) -> None:
    joined = await clogged(pump)
    joined.relay.drop()
    assert (await joined.ends.one()).cause is Cause.DROPPED
    with pytest.raises(trio.BrokenResourceError):
        await read_all(joined.server)


@pytest.mark.parametrize("size", [3, 65536, 100_000])
async def test_bytes_behind_urgent_data_are_relayed(pump: Bench, size: int) -> None:
    """Reads and splices stop in front of the urgent byte, which is itself not relayed."""
    visitor, near_visitor = tcp_pair()
    pump.sockets += [visitor, near_visitor]
    server, near_server = pump.tcp()
    part = NOISE[:size]
    assert (visitor.send(part), visitor.send(b"!", socket.MSG_OOB), visitor.send(part)) == (size, 1, size)
    pump.engine.join(near_visitor, near_server, linger=30, on_end=Ends().note)
    assert await read_exactly(server, 2 * size) == 2 * part


async def test_a_bug_in_one_relay_costs_that_relay_and_is_logged_once(pump: Bench) -> None:
    class Odd(socket.socket):
        def recv_into(self, *args: object) -> int:
            raise ZeroDivisionError

    _, plain = pump.tcp()
    odd = Odd(fileno=plain.detach())
    odd.setblocking(False)
    server, near_server = pump.tcp()
    ends, bystander = Ends(), pump.join()
    with structlog.testing.capture_logs() as logs:
        pump.engine.join(odd, near_server, linger=30, on_end=ends.note)
        far = pump.sockets[0]
        await stream(far).send_all(b"x")
        assert (await ends.one()).cause is Cause.DROPPED
        assert await read_all(server) == b""
    assert [entry["event"] for entry in logs] == ["relay failed"]
    await bystander.visitor.send_all(b"x")
    assert await read_exactly(bystander.server, 1) == b"x"


@pytest.mark.parametrize(("pump", "pipes"), [({}, 3), ({"max_pipes": 2}, 2), ({"max_pipes": 0}, 0)], indirect=["pump"])
async def test_blocked_flows_hold_pipes_as_far_as_the_pool_goes(pump: Bench, pipes: int) -> None:
    before = open_descriptors()
    relays = [await clogged(pump) for _ in range(3)]
    held = open_descriptors() - before - 3 * 4
    assert held == 2 * pipes
    for joined in relays:
        joined.relay.drop()
        await joined.ends.one()
    assert open_descriptors() - before == 3 * 2  # the far ends; a pipe with lost bytes in it is not used again


async def test_a_pipe_serves_one_flow_after_the_other(pump: Bench) -> None:
    before = open_descriptors()
    for _ in range(5):
        joined = pump.join()
        pump.nursery.start_soon(joined.visitor.send_all, NOISE)
        assert await read_exactly(joined.server, len(NOISE)) == NOISE
        await joined.visitor.aclose()
        await joined.server.aclose()
        await joined.ends.one()
    assert open_descriptors() - before <= 2


@pytest.mark.parametrize("what", ["pipe2", "splice"])
async def test_where_the_kernel_refuses_bulk_goes_through_the_buffer(
    pump: Bench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    asked = 0

    def refuse(*_args: object, **_options: object) -> int:
        nonlocal asked
        asked += 1
        raise OSError(24, "too many open files")

    monkeypatch.setattr(os, what, refuse)
    joined = pump.join()

    async def send() -> None:
        await joined.visitor.send_all(NOISE * 4)
        await joined.visitor.send_eof()

    pump.nursery.start_soon(send)
    assert await read_all(joined.server) == NOISE * 4
    assert asked


async def test_an_owner_that_fails_at_the_end_costs_nobody(bench: Bench) -> None:
    told = trio.Event()

    def fail(_relay: Relay, _end: RelayEnd) -> None:
        told.set()
        raise ZeroDivisionError

    visitor, near_visitor = bench.tcp()
    server, near_server = bench.tcp()
    with structlog.testing.capture_logs() as logs:
        bench.engine.join(near_visitor, near_server, linger=30, on_end=fail)
        await visitor.aclose()
        await server.aclose()
        await told.wait()
    assert [entry["event"] for entry in logs] == ["could not tell the end of a relay"]
    await bench.check()


class Greedy:
    """A handler that has more to do, three times; it notes in which turn of its neighbour it was served."""

    def __init__(self, pump: Pump, fd: int) -> None:
        self.pump, self.fd = pump, fd
        self.turn = 0
        self.served: list[int] = []
        self.done = trio.Event()

    def on_event(self, events: int) -> None:
        self.served.append(self.turn)
        if len(self.served) < 3:
            self.pump.rearm(self.fd)
        else:
            self.done.set()

    def on_failure(self, error: Exception) -> None:
        raise AssertionError from error

    def on_stop(self) -> None:
        """Nothing is left of it."""

    async def count_turns(self) -> None:
        """The neighbour: it has its turn whenever others than the pump have theirs."""
        while not self.done.is_set():
            await trio.lowlevel.checkpoint()
            self.turn += 1


@pytest.mark.parametrize(
    ("pump", "at_once"), [({"turn_time": 60.0}, True), ({"turn_time": 0.0}, False)], indirect=["pump"]
)
async def test_whoever_has_more_to_do_goes_on_until_the_turn_is_over(pump: Bench, at_once: bool) -> None:
    _, near = pump.tcp()
    engine = cast(Pump, pump.engine)
    greedy = Greedy(engine, near.fileno())
    engine.attach(near.fileno(), greedy)
    pump.nursery.start_soon(greedy.count_turns)
    await greedy.done.wait()
    engine.detach(near.fileno(), greedy)
    assert (len(set(greedy.served)) == 1) is at_once


@pytest.mark.parametrize("pump", [{"turn_time": 60.0, "poll_timeout": 60.0}], indirect=True)
async def test_whoever_comes_while_the_pump_dozes_is_served_in_the_same_turn(pump: Bench) -> None:
    far, near = tcp_pair()
    pump.sockets += [far, near]
    engine = cast(Pump, pump.engine)

    class Answered(Greedy):
        """The answer comes from elsewhere, since nobody else in this thread has a turn now."""

        def on_event(self, events: int) -> None:
            self.served.append(self.turn)
            if events & EPOLLIN:
                engine.limits = replace(engine.limits, poll_timeout=0.0)
                self.done.set()
            else:
                Thread(target=far.send, args=(b"x",)).start()

    answered = Answered(engine, near.fileno())
    engine.attach(near.fileno(), answered)
    pump.nursery.start_soon(answered.count_turns)
    await answered.done.wait()
    engine.detach(near.fileno(), answered)
    assert len(set(answered.served)) == 1


@pytest.mark.parametrize(
    ("pump", "looks"),
    [
        ({"turn_time": 60.0, "poll_timeout": 60.0, "busy_poll": 60.0}, True),
        ({"turn_time": 60.0, "poll_timeout": 60.0, "busy_poll": 0.0}, False),
    ],
    indirect=["pump"],
)
async def test_after_a_short_wait_the_pump_looks_again_before_it_sleeps(
    pump: Bench, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three answers, each awaited: the first asleep, then looking, if at all. While looking it gives way to others."""
    far, near = tcp_pair()
    pump.sockets += [far, near]
    engine = cast(Pump, pump.engine)
    gave_way: list[int] = []

    class Answered(Greedy):
        def on_event(self, events: int) -> None:
            self.served.append(len(gave_way))
            if len(self.served) == 4:
                engine.limits = replace(engine.limits, poll_timeout=0.0)
                self.done.set()
            elif not looks or len(self.served) == 1:
                Thread(target=far.send, args=(b"x",)).start()

    def give_way() -> None:
        gave_way.append(far.send(b"x"))

    monkeypatch.setattr(os, "sched_yield", give_way)
    answered = Answered(engine, near.fileno())
    engine.attach(near.fileno(), answered)
    await answered.done.wait()
    engine.detach(near.fileno(), answered)
    assert answered.served == ([0, 0, 1, 2] if looks else [0, 0, 0, 0])


async def test_a_closed_socket_is_a_broken_side_and_not_an_error(pump: Bench) -> None:
    """Its owner may have closed it a moment ago."""
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
    """Room for the far and near ends of all idle pairs."""
    needed = 4 * IDLE_PAIRS + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"the hard limit of descriptors is {hard}, {needed} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_thousands_of_idle_relays_cost_two_descriptors_and_little_memory_each(
    many_descriptors: None, pump: Bench
) -> None:
    numbers = array.array("i")  # all ends as bare numbers at first, so that only what the relays cost is measured
    for _ in range(2 * IDLE_PAIRS):
        numbers.extend(end.detach() for end in socket.socketpair())
    ends = Ends()
    far = numbers[::2]
    memory, descriptors = resident(), open_descriptors()
    relays = []
    for index in range(0, 4 * IDLE_PAIRS, 4):
        near = [socket.socket(fileno=numbers[index + offset]) for offset in (1, 3)]
        for connection in near:
            connection.setblocking(False)
        relays.append(pump.engine.join(near[0], near[1], linger=30, on_end=ends.note))
    await trio.testing.wait_all_tasks_blocked()
    assert (resident() - memory) / IDLE_PAIRS <= 5 * 1024
    assert open_descriptors() == descriptors  # the two ends of each pair, which were open before, and nothing else
    os.write(far[0], b"ping")
    await trio.testing.wait_all_tasks_blocked()
    assert os.read(far[1], 10) == b"ping"
    for relay in relays:
        relay.drop()
    await trio.testing.wait_all_tasks_blocked()
    assert ends.causes == [Cause.DROPPED] * IDLE_PAIRS
    assert open_descriptors() == descriptors - 2 * IDLE_PAIRS
    for number in far:
        os.close(number)
