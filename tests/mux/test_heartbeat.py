"""Keep-alive: dead peers are detected within three heartbeats, live ones are never given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.engine.timers import Timed
from tunneld.mux.heartbeat import Heartbeat
from tunneld.mux.limits import CarrierLimits

HEARTBEAT, PATIENCE = 10.0, 2.0


class Clock:
    """A timer service whose time is advanced by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timed: Timed | None = None

    def watch(self, timed: Timed) -> None:
        self.timed = timed

    def forget(self, timed: Timed) -> None:
        self.timed = None

    def advance(self, to: float) -> None:
        while self.timed is not None and self.timed.deadline <= to:
            timed, self.timed = self.timed, None
            self.now = timed.deadline
            timed.on_deadline()
        self.now = to


class PingedPeer:
    """A carrier whose peer answers pings, or does not."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.alive = self.can_ping = True
        self.pings = self.unresponsive_calls = 0
        self.sent_at: float | None = 0.0  # None: the kernel does not know
        self.unresponsive_at: float | None = None
        self.died_at: float | None = None
        limits = CarrierLimits(heartbeat=HEARTBEAT, patience=PATIENCE)
        self.heartbeat = Heartbeat(self, limits, self.clock, self.idle_seconds, lambda: self.clock.now)

    def send_ping(self) -> bool:
        self.pings += 1
        return self.can_ping

    def idle_seconds(self) -> float:
        return 0.0 if self.sent_at is None else self.clock.now - self.sent_at

    def on_unresponsive(self) -> None:
        self.unresponsive_calls += 1
        self.unresponsive_at = self.clock.now

    def send(self) -> None:
        self.heartbeat.received = True
        if self.sent_at is not None:
            self.sent_at = self.clock.now

    def on_dead(self, reason: str) -> None:
        assert "heartbeat" in reason
        self.died_at = self.clock.now

    def run(self, seconds: float) -> None:
        """Let time pass in small steps; a live peer answers at once."""
        end, pings = self.clock.now + seconds, self.pings
        while self.clock.now < end and self.died_at is None:
            self.clock.advance(self.clock.now + 0.5)
            if self.alive and self.pings > pings:
                self.send()
                pings = self.pings


def test_an_idle_live_peer_is_pinged_and_never_given_up() -> None:
    peer = PingedPeer()
    peer.run(1000)
    assert peer.died_at is None
    assert peer.unresponsive_calls == 0
    assert 1000 / HEARTBEAT / 3 <= peer.pings <= 1000 / HEARTBEAT


@given(st.floats(0, 50), st.booleans())
def test_a_dead_peer_is_detected_within_three_heartbeats(last_byte: float, idle_time_known: bool) -> None:
    peer = PingedPeer()
    if not idle_time_known:
        peer.sent_at = None
    peer.run(last_byte)
    peer.send()
    peer.alive = False
    dead_since = peer.clock.now
    peer.run(100)
    assert peer.died_at is not None
    assert peer.died_at - dead_since <= 3 * HEARTBEAT
    assert peer.unresponsive_calls == 1


@given(st.floats(0, 50))
def test_a_dead_peer_is_unresponsive_within_a_heartbeat_and_the_patience(last_byte: float) -> None:
    peer = PingedPeer()
    peer.run(last_byte)
    peer.send()
    peer.alive = False
    dead_since = peer.clock.now
    peer.run(100)
    assert peer.unresponsive_at is not None
    assert HEARTBEAT + PATIENCE - 1e-6 <= peer.unresponsive_at - dead_since <= HEARTBEAT + PATIENCE + 1e-6


def test_after_ping_now_a_peer_is_unresponsive_within_the_patience_until_it_answers() -> None:
    peer = PingedPeer()
    peer.alive = False
    peer.heartbeat.ping_now()
    peer.heartbeat.ping_now()
    assert peer.pings == 1
    peer.run(PATIENCE)
    assert (peer.unresponsive_calls, peer.heartbeat.unresponsive) == (1, True)
    peer.send()
    peer.alive = True
    peer.run(100)
    assert peer.died_at is None
    assert not peer.heartbeat.unresponsive


@given(st.floats(0, 30), st.lists(st.floats(0, 15), max_size=6))
def test_an_expected_reply_makes_a_peer_unresponsive_sooner_but_not_dead(last_byte: float, waits: list[float]) -> None:
    peer = PingedPeer()
    peer.run(last_byte)
    peer.send()
    peer.alive = False
    dead_since = peer.clock.now
    for wait in waits:
        peer.run(wait)
        expected = peer.clock.now
        peer.heartbeat.expect_reply()
        before = peer.unresponsive_calls
        peer.run(2 * PATIENCE + 1)
        assert peer.unresponsive_calls > before or peer.heartbeat.unresponsive or peer.died_at is not None, expected
    peer.run(100)
    assert peer.died_at is not None
    assert 2 * HEARTBEAT - 1 <= peer.died_at - dead_since <= 3 * HEARTBEAT
    assert peer.unresponsive_calls == 1


def test_a_peer_that_dies_right_after_an_answer_is_unresponsive_when_a_reply_is_expected() -> None:
    """The deadline of the answered ping has not passed yet, and must not count."""
    peer = PingedPeer()
    peer.run(HEARTBEAT + 0.5)
    assert peer.pings == 1
    peer.alive = False
    peer.heartbeat.expect_reply()
    peer.run(2 * PATIENCE + 1)
    assert peer.heartbeat.unresponsive


def test_a_peer_that_answers_stays_responsive_however_often_a_reply_is_expected() -> None:
    peer = PingedPeer()
    for _ in range(100):
        peer.heartbeat.expect_reply()
        peer.send()
        peer.run(0.7)
    assert (peer.unresponsive_calls, peer.pings, peer.died_at) == (0, 0, None)


def test_a_busy_peer_is_not_pinged() -> None:
    peer = PingedPeer()
    for _ in range(100):
        peer.run(HEARTBEAT / 2)
        peer.send()
    assert peer.pings == 0


def test_a_peer_that_cannot_be_pinged_is_not_given_up() -> None:
    peer = PingedPeer()
    peer.alive = peer.can_ping = False
    peer.run(200)
    assert peer.died_at is None
    peer.can_ping = True
    peer.run(3 * HEARTBEAT)
    assert peer.died_at is not None


@pytest.mark.parametrize("patience", [0.0, HEARTBEAT])
def test_the_patience_may_be_0_and_a_whole_heartbeat(patience: float) -> None:
    peer = PingedPeer()
    peer.heartbeat.stop()
    limits = CarrierLimits(heartbeat=HEARTBEAT, patience=patience)
    peer.heartbeat = Heartbeat(peer, limits, peer.clock, peer.idle_seconds, lambda: peer.clock.now)
    peer.alive = False
    peer.run(100)
    assert peer.died_at is not None
    assert peer.died_at <= 3 * HEARTBEAT
