"""The heartbeat: dead peers are noticed within three beats, live ones never given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.engine.timers import Timed
from tunneld.mux.heartbeat import Heartbeat
from tunneld.mux.limits import CarrierLimits

BEAT, PATIENCE = 10.0, 2.0


class Clock:
    """Deadlines whose time is turned by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timed: Timed | None = None

    def watch(self, timed: Timed) -> None:
        self.timed = timed

    def forget(self, timed: Timed) -> None:
        self.timed = None

    def turn(self, to: float) -> None:
        while self.timed is not None and self.timed.deadline <= to:
            timed, self.timed = self.timed, None
            self.now = timed.deadline
            timed.on_deadline()
        self.now = to


class Peer:
    """A heart whose peer answers or does not."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.alive = self.can_ask = True
        self.asked = self.silences = 0
        self.spoke_at: float | None = 0.0  # None: the kernel does not tell
        self.silent_at: float | None = None
        self.died_at: float | None = None
        limits = CarrierLimits(heartbeat=BEAT, patience=PATIENCE)
        self.heartbeat = Heartbeat(self, limits, self.clock, self.quiet, lambda: self.clock.now)

    def send_ping(self) -> bool:
        self.asked += 1
        return self.can_ask

    def quiet(self) -> float:
        return 0.0 if self.spoke_at is None else self.clock.now - self.spoke_at

    def on_unresponsive(self) -> None:
        self.silences += 1
        self.silent_at = self.clock.now

    def speak(self) -> None:
        self.heartbeat.received = True
        if self.spoke_at is not None:
            self.spoke_at = self.clock.now

    def on_dead(self, reason: str) -> None:
        assert "heartbeat" in reason
        self.died_at = self.clock.now

    def run(self, seconds: float) -> None:
        """Time passes in small steps; who is alive answers at once."""
        end, asked = self.clock.now + seconds, self.asked
        while self.clock.now < end and self.died_at is None:
            self.clock.turn(self.clock.now + 0.5)
            if self.alive and self.asked > asked:
                self.speak()
                asked = self.asked


def test_an_idle_live_peer_is_asked_and_never_given_up() -> None:
    peer = Peer()
    peer.run(1000)
    assert peer.died_at is None
    assert peer.silences == 0
    assert 1000 / BEAT / 3 <= peer.asked <= 1000 / BEAT


@given(st.floats(0, 50), st.booleans())
def test_a_dead_peer_is_noticed_within_three_heartbeats_of_its_last_word(last_word: float, told: bool) -> None:
    peer = Peer()
    if not told:
        peer.spoke_at = None
    peer.run(last_word)
    peer.speak()
    peer.alive = False
    dead_since = peer.clock.now
    peer.run(100)
    assert peer.died_at is not None
    assert peer.died_at - dead_since <= 3 * BEAT
    assert peer.silences == 1


@given(st.floats(0, 50))
def test_who_vanished_is_silent_within_a_heartbeat_and_the_patience_although_nobody_wants_it(last_word: float) -> None:
    peer = Peer()
    peer.run(last_word)
    peer.speak()
    peer.alive = False
    dead_since = peer.clock.now
    peer.run(100)
    assert peer.silent_at is not None
    assert BEAT + PATIENCE - 1e-6 <= peer.silent_at - dead_since <= BEAT + PATIENCE + 1e-6


def test_doubt_falls_silent_after_patience_alone_and_an_answer_ends_it() -> None:
    peer = Peer()
    peer.alive = False
    peer.heartbeat.ping_now()
    peer.heartbeat.ping_now()
    assert peer.asked == 1
    peer.run(PATIENCE)
    assert (peer.silences, peer.heartbeat.unresponsive) == (1, True)
    peer.speak()
    peer.alive = True
    peer.run(100)
    assert peer.died_at is None
    assert not peer.heartbeat.unresponsive


@given(st.floats(0, 30), st.lists(st.floats(0, 15), max_size=6))
def test_who_expects_an_answer_notices_silence_soon_and_gives_up_no_sooner(
    last_word: float, waits: list[float]
) -> None:
    peer = Peer()
    peer.run(last_word)
    peer.speak()
    peer.alive = False
    dead_since = peer.clock.now
    for wait in waits:
        peer.run(wait)
        wanted = peer.clock.now
        peer.heartbeat.expect_reply()
        before = peer.silences
        peer.run(2 * PATIENCE + 1)
        assert peer.silences > before or peer.heartbeat.unresponsive or peer.died_at is not None, wanted
    peer.run(100)
    assert peer.died_at is not None
    assert 2 * BEAT - 1 <= peer.died_at - dead_since <= 3 * BEAT
    assert peer.silences == 1


def test_who_vanishes_right_after_an_answer_is_noticed_by_whoever_wants_it() -> None:
    """The time for that answer is not over, and nobody waits for it any more."""
    peer = Peer()
    peer.run(BEAT + 0.5)
    assert peer.asked == 1
    peer.alive = False
    peer.heartbeat.expect_reply()
    peer.run(2 * PATIENCE + 1)
    assert peer.heartbeat.unresponsive


def test_a_peer_that_answers_may_be_expected_to_as_often_as_you_like() -> None:
    peer = Peer()
    for _ in range(100):
        peer.heartbeat.expect_reply()
        peer.speak()
        peer.run(0.7)
    assert (peer.silences, peer.asked, peer.died_at) == (0, 0, None)


def test_a_busy_peer_is_not_asked() -> None:
    peer = Peer()
    for _ in range(100):
        peer.run(BEAT / 2)
        peer.speak()
    assert peer.asked == 0


def test_where_no_question_can_be_asked_nobody_is_given_up_for_not_answering() -> None:
    peer = Peer()
    peer.alive = peer.can_ask = False
    peer.run(200)
    assert peer.died_at is None
    peer.can_ask = True
    peer.run(3 * BEAT)
    assert peer.died_at is not None


@pytest.mark.parametrize("patience", [0.0, BEAT])
def test_patience_may_be_nothing_and_a_whole_beat(patience: float) -> None:
    peer = Peer()
    peer.heartbeat.stop()
    limits = CarrierLimits(heartbeat=BEAT, patience=patience)
    peer.heartbeat = Heartbeat(peer, limits, peer.clock, peer.quiet, lambda: peer.clock.now)
    peer.alive = False
    peer.run(100)
    assert peer.died_at is not None
    assert peer.died_at <= 3 * BEAT
