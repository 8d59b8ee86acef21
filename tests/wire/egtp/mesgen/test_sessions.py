"""Sessions: which kind of envelope is sent, and two nodes back to back over a network that loses and reorders."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.wire.egtp.mesgen.keys import A, B, counted
from tunneld.wire.egtp.mesgen import (
    EnvelopeError,
    MesgenSessions,
    OpenedEnvelope,
    RejectAnswer,
    SessionLost,
    UnknownKeyError,
    new_key,
)
from tunneld.wire.egtp.mesgen.envelope import (
    HeaderMessage,
    RejectMessage,
    ShortMessage,
    parse_envelope,
)
from tunneld.wire.egtp.mesgen.sessions import TRANSITIONS, SendState, SessionEvent


def pair() -> tuple[MesgenSessions, MesgenSessions]:
    """Nodes A and B; A has the key of B."""
    a, b = MesgenSessions(A, counted()), MesgenSessions(B, counted())
    a.store_key(B.public)
    return a, b


def confirmed() -> tuple[MesgenSessions, MesgenSessions]:
    """The same, and both have heard of each other."""
    a, b = pair()
    b.open(a.seal(B.node_id, b"hello"))
    a.open(b.seal(A.node_id, b"hello"))
    return a, b


def test_every_state_knows_every_event() -> None:
    unheard = {(SendState.NONE, SessionEvent.SHORT_MESSAGE), (SendState.NONE, SessionEvent.REJECT)}
    assert set(TRANSITIONS) | unheard == {(state, event) for state in SendState for event in SessionEvent}


def test_the_header_is_repeated_until_the_first_short_message() -> None:
    a, b = pair()
    headers = set()
    for number in range(3):
        envelope = a.seal(B.node_id, b"%d" % number)
        parsed = parse_envelope(envelope)
        assert isinstance(parsed, HeaderMessage)
        headers.add(parsed.header)
        assert b.needs_private_key(envelope) is (number == 0)
        assert b.open(envelope) == OpenedEnvelope(A.node_id, b"%d" % number)
    assert len(headers) == 1
    answer = b.seal(A.node_id, b"answer")
    assert isinstance(parse_envelope(answer), ShortMessage)
    assert a.open(answer) == OpenedEnvelope(B.node_id, b"answer")
    short = a.seal(B.node_id, b"short")
    assert isinstance(parse_envelope(short), ShortMessage)
    assert not b.needs_private_key(short)
    assert b.open(short) == OpenedEnvelope(A.node_id, b"short")


def test_both_directions_have_ids_of_their_own() -> None:
    a, b = confirmed()
    ours, theirs = parse_envelope(a.seal(B.node_id, b"")), parse_envelope(b.seal(A.node_id, b""))
    assert isinstance(ours, ShortMessage)
    assert isinstance(theirs, ShortMessage)
    assert ours.session_id != theirs.session_id
    reflected = a.seal(B.node_id, b"")
    assert isinstance(a.open(reflected), RejectAnswer)


def test_if_both_make_headers_both_keep_sending_them() -> None:
    a, b = pair()
    b.store_key(A.public)
    for number in range(3):
        to_b, to_a = a.seal(B.node_id, b"%d" % number), b.seal(A.node_id, b"%d" % number)
        assert b.open(to_b) == OpenedEnvelope(A.node_id, b"%d" % number)
        assert a.open(to_a) == OpenedEnvelope(B.node_id, b"%d" % number)
        assert isinstance(parse_envelope(to_b), HeaderMessage)
        assert isinstance(parse_envelope(to_a), HeaderMessage)


def test_after_a_reject_the_key_must_be_stored_again() -> None:
    a, _ = confirmed()
    restarted = MesgenSessions(B, counted())
    answer = restarted.open(a.seal(B.node_id, b"lost"))
    assert isinstance(answer, RejectAnswer)
    assert len(answer.envelope) == 44
    assert a.open(answer.envelope) == SessionLost(B.node_id)
    with pytest.raises(UnknownKeyError, match="not known"):
        a.seal(B.node_id, b"again")
    a.store_key(B.public)
    assert restarted.open(a.seal(B.node_id, b"again")) == OpenedEnvelope(A.node_id, b"again")


def test_a_peer_that_restarts_is_answered_in_its_new_session() -> None:
    _, b = confirmed()
    restarted = MesgenSessions(A, bytes)
    restarted.store_key(B.public)
    assert b.open(restarted.seal(B.node_id, b"new")) == OpenedEnvelope(A.node_id, b"new")
    assert restarted.open(b.seal(A.node_id, b"answer")) == OpenedEnvelope(B.node_id, b"answer")


def test_a_node_that_made_the_session_adopts_that_of_a_restarted_peer() -> None:
    a, _ = confirmed()
    restarted = MesgenSessions(B, bytes)
    restarted.store_key(A.public)
    assert a.state(B.node_id) is SendState.CONFIRMED
    a.open(restarted.seal(A.node_id, b"new"))
    assert a.state(B.node_id) is SendState.ADOPTED
    assert restarted.open(a.seal(B.node_id, b"answer")) == OpenedEnvelope(A.node_id, b"answer")


def test_a_reject_of_a_session_that_is_not_in_use_is_not_believed() -> None:
    a, b = confirmed()
    in_use = parse_envelope(a.seal(B.node_id, b""))
    other_way = parse_envelope(b.seal(A.node_id, b""))
    assert isinstance(in_use, ShortMessage)
    assert isinstance(other_way, ShortMessage)
    for session_id, node_id in (
        (other_way.session_id, B.node_id),
        (in_use.session_id, A.node_id),
        (in_use.session_id, bytes(20)),
        (bytes(20), B.node_id),
    ):
        with pytest.raises(EnvelopeError, match="does not use"):
            a.open(RejectMessage(session_id, node_id).encode())
    assert a.state(B.node_id) is SendState.CONFIRMED


def test_a_message_of_another_session_changes_nothing() -> None:
    a, b = pair()
    good = parse_envelope(a.seal(B.node_id, b"hello"))
    assert isinstance(good, HeaderMessage)
    with pytest.raises(EnvelopeError, match="altered"):
        b.open(replace(good, iv=bytes(8)).encode())
    assert (len(b), b.state(A.node_id)) == (0, SendState.NONE)


def test_a_message_can_be_replayed() -> None:
    """Known, and documented: the envelope has no counters."""
    a, b = pair()
    envelope = a.seal(B.node_id, b"once")
    assert b.open(envelope) == b.open(envelope) == OpenedEnvelope(A.node_id, b"once")


def test_the_peer_not_used_for_longest_gives_way() -> None:
    other = new_key()[0]
    a = MesgenSessions(A, counted(), max_peers=2)
    b = MesgenSessions(B, counted())
    a.store_key(B.public)
    b.open(a.seal(B.node_id, b""))
    a.store_key(other.public)
    a.open(b.seal(A.node_id, b""))  # used again
    third = MesgenSessions(new_key()[0], counted())
    third.store_key(A.public)
    a.open(third.seal(A.node_id, b""))
    assert len(a) == 2
    with pytest.raises(UnknownKeyError):
        a.seal(other.node_id, b"")
    a.seal(B.node_id, b"")


def test_what_was_forgotten_leaves_nothing_behind() -> None:
    a, b = confirmed()
    for sessions, peer in ((a, B.node_id), (b, A.node_id)):
        sessions.forget(peer)
        sessions.forget(peer)
        assert (len(sessions), sessions._receiving, sessions._headers) == (0, {}, {})


class TwoNodes(RuleBasedStateMachine):
    """Two nodes that send, restart and answer, over a network that loses, repeats and reorders.

    Whatever happens, a message that is opened was sent by that peer, and an exchange without losses works in the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keys = [A, B]
        self.random = counted()
        self.nodes = [MesgenSessions(key, self.random) for key in self.keys]
        self.flying: list[tuple[int, bytes]] = []
        self.sent: list[set[bytes]] = [set(), set()]
        self.number = 0

    def send(self, sender: int) -> None:
        peer = self.keys[1 - sender].public
        self.number += 1
        message = b"%d" % self.number
        self.sent[sender].add(message)
        try:
            envelope = self.nodes[sender].seal(peer.node_id, message)
        except UnknownKeyError:
            self.nodes[sender].store_key(peer)
            envelope = self.nodes[sender].seal(peer.node_id, message)
        self.flying.append((1 - sender, envelope))

    def deliver(self, receiver: int, envelope: bytes) -> bool:
        try:
            match self.nodes[receiver].open(envelope):
                case OpenedEnvelope(sender, message):
                    assert sender == self.keys[1 - receiver].node_id
                    assert message in self.sent[1 - receiver]
                    return True
                case RejectAnswer(answer):
                    self.flying.append((1 - receiver, answer))
        except EnvelopeError as problem:
            assert "does not use" in str(problem)  # noqa: PT017 - a reject that comes late
        return False

    @rule(sender=st.integers(0, 1))
    def sends(self, sender: int) -> None:
        self.send(sender)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), fate=st.sampled_from(["arrive", "arrive", "arrive", "repeat", "lose"]))
    def fly(self, data: st.DataObject, fate: str) -> None:
        at = data.draw(st.integers(0, len(self.flying) - 1))
        receiver, envelope = self.flying[at] if fate == "repeat" else self.flying.pop(at)
        if fate != "lose":
            self.deliver(receiver, envelope)

    @rule(node=st.integers(0, 1))
    def restart(self, node: int) -> None:
        self.nodes[node] = MesgenSessions(self.keys[node], self.random)

    @invariant()
    def bounded(self) -> None:
        for node in self.nodes:
            assert len(node) <= 1
            assert len(node._receiving) <= 2
            assert len(node._headers) <= 1

    def teardown(self) -> None:
        """Without losses, a message arrives after at most two attempts in each direction."""
        self.flying.clear()
        for sender in (0, 1):
            for attempt in range(3):
                self.send(sender)
                receiver, envelope = self.flying.pop()
                if self.deliver(receiver, envelope):
                    break
                assert attempt < 2
                while self.flying:
                    self.deliver(*self.flying.pop())


TestTwoNodes = TwoNodes.TestCase
TestTwoNodes.settings = settings(max_examples=8, stateful_step_count=25, deadline=None)
