"""Peers that vanish without a word are noticed; readers that pause are not taken for them.

The kernel's counts are real: the connections are in a network namespace of the test, whose loopback device goes down.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from threading import Thread
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.engine.bench import NOISE, Bench, Ends, flood, read_exactly, stream, tcp_pair
from tunneld.engine import vanished
from tunneld.engine.engine import Cause, Side
from tunneld.engine.timers import Timers
from tunneld.engine.vanished import MIN_UNANSWERED, VanishedPeers

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
TIMEOUT = 0.5
"""Seconds; the kernel has retransmitted three times after 1.4."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the counts")


class FailingNetwork:
    """A network namespace with a loopback device that can be taken down. It lives as long as a socket in it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._control: socket.socket | None = None

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """A connection in it: far and near. Skips the test if the namespace is not permitted."""
        made: list[tuple[socket.socket, socket.socket]] = []
        failure: list[int] = []

        def make() -> None:
            """In a thread of its own, since a namespace belongs to a thread."""
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
                failure.append(ctypes.get_errno())
                return
            self._control = socket.socket()
            self.set_up(up=True)
            made.append(tcp_pair(SO_SNDBUF=65536, SO_RCVBUF=65536))

        thread = Thread(target=make)
        thread.start()
        thread.join()
        if failure:
            pytest.skip(f"this process may not make a network namespace: {os.strerror(failure[0])}")
        assert self._control is not None
        self._bench.sockets += [self._control, *made[0]]
        return made[0]

    def set_up(self, *, up: bool) -> None:
        """Take the device up or down."""
        assert self._control is not None
        fcntl.ioctl(self._control, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP if up else 0))


@pytest.mark.parametrize("pump", [{"unacknowledged_timeout": TIMEOUT}], indirect=True)
@pytest.mark.parametrize("gone", Side)
async def test_a_peer_that_vanishes_in_the_middle_of_a_transfer_ends_its_relay(pump: Bench, gone: Side) -> None:
    network = FailingNetwork(pump)
    far, near = network.pair()
    other, near_other = pump.tcp()
    ends = Ends()
    pair = (near, near_other) if gone is Side.VISITOR else (near_other, near)
    pump.engine.join(*pair, linger=30, on_end=ends.note)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood, other)  # until it is reset
        await read_exactly(stream(far), 1 << 20)
        network.set_up(up=False)
        end = await ends.one()
    assert (end.cause, end.side) == (Cause.RESET, gone)
    assert "nothing was acknowledged" in str(end)


@pytest.mark.parametrize("pump", [{"unacknowledged_timeout": 0.02}], indirect=True)
async def test_a_reader_that_pauses_is_waited_for(pump: Bench) -> None:
    """Its window is closed for longer than the timeout; the kernel probes it, and it answers."""
    far, near = FailingNetwork(pump).pair()
    other, near_other = pump.tcp()
    ends = Ends()
    pump.engine.join(near, near_other, linger=30, on_end=ends.note)
    reader = stream(far)
    pump.nursery.start_soon(flood, other)
    answers = 0
    while answers <= MIN_UNANSWERED:
        before = vanished._outstanding(near)
        await trio.sleep(0.05)
        now = vanished._outstanding(near)
        answers += before is not None and now is not None and before[0] != now[0]  # a probe of the closed window
    assert ends.told == []
    assert await read_exactly(reader, len(NOISE)) == NOISE


# The decision, with counts of the test


class Counts:
    """A socket whose kernel reports these counts."""

    def __init__(self, **counts: int) -> None:
        self.state, self.retransmits, self.unacked, self.out, self.come, self.unsent = 1, 0, 1, 100, 100, 0
        self.set(**counts)

    def set(self, **counts: int) -> None:
        vars(self).update(counts)

    def fileno(self) -> int:
        return -1

    def setsockopt(self, level: int, option: int, value: Any, /) -> None:
        raise NotImplementedError

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        return vanished._COUNTS.pack(self.state, self.retransmits, self.unacked, self.out, self.come, self.unsent)


class Watched:
    """Stands for a relay and both of its flows; records how long its peer was silent."""

    closed = False
    looked_at = 0
    silent = None

    def __init__(self, connection: Counts) -> None:
        self.tcp_connection = connection
        self.moved = 1
        self.source = self.reverse = self.from_visitor = self.from_server = self
        self.gone: list[float] = []

    def on_vanished(self, flow: Watched, seconds: float) -> None:
        self.gone.append(seconds)


def watching(connection: Counts) -> tuple[Watched, VanishedPeers]:
    relay = Watched(connection)
    relays: Any = {relay}
    return relay, VanishedPeers(Timers(lambda: None), relays, 60)


@pytest.mark.interpreted
async def test_silence_of_the_timeout_and_unanswered_segments_are_needed(mock_clock: MockClock) -> None:
    relay, peers = watching(counts := Counts())
    peers.on_deadline()
    counts.set(out=100 + MIN_UNANSWERED - 1)
    mock_clock.jump(60)
    peers.on_deadline()
    assert relay.gone == []
    counts.set(out=100 + MIN_UNANSWERED)
    peers.on_deadline()
    assert relay.gone[0] == 60


@pytest.mark.interpreted
async def test_before_the_timeout_nothing_is_decided(mock_clock: MockClock) -> None:
    relay, peers = watching(counts := Counts())
    peers.on_deadline()
    counts.set(out=200)
    mock_clock.jump(59.9)
    peers.on_deadline()
    assert relay.gone == []


@pytest.mark.interpreted
async def test_any_segment_from_the_peer_is_an_answer(mock_clock: MockClock) -> None:
    relay, peers = watching(counts := Counts())
    for answers in range(5):
        peers.on_deadline()
        counts.set(come=101 + answers, out=100 + 10 * answers)
        mock_clock.jump(59)
    assert relay.gone == []


@pytest.mark.interpreted
async def test_retransmissions_without_a_route_count(mock_clock: MockClock) -> None:
    relay, peers = watching(counts := Counts())
    peers.on_deadline()
    counts.set(retransmits=MIN_UNANSWERED)
    mock_clock.jump(61)
    peers.on_deadline()
    assert relay.gone


@pytest.mark.interpreted
@pytest.mark.parametrize("counts", [{"unacked": 0}, {"state": 2}], ids=["nothing is outstanding", "it connects"])
async def test_an_end_that_waits_for_nothing_is_not_watched(mock_clock: MockClock, counts: dict[str, int]) -> None:
    relay, peers = watching(connection := Counts(**counts))
    for _ in range(3):
        peers.on_deadline()
        connection.set(out=connection.out + 100)
        mock_clock.jump(100)
    assert relay.gone == []


@pytest.mark.interpreted
async def test_an_idle_relay_costs_no_system_call(mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    _relay, peers = watching(counts := Counts(unacked=0))
    peers.on_deadline()
    monkeypatch.setattr(counts, "getsockopt", lambda *_: pytest.fail("asked"))
    peers.on_deadline()


@pytest.mark.interpreted
async def test_another_timeout_applies_to_present_relays_and_0_means_never(mock_clock: MockClock) -> None:
    relay, peers = watching(counts := Counts())
    peers.timeout = 5
    peers.on_deadline()
    counts.set(out=200)
    mock_clock.jump(6)
    peers.timeout = 0
    peers.on_deadline()
    assert (relay.gone, peers.watching) == ([], False)
    peers.timeout = 5
    peers.on_deadline()
    assert relay.gone
