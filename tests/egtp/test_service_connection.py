"""Connections of nodes that use the relay service, as bytes: classic nodes, replays, unknown nodes, limits."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.egtp.mesgen.keys import A, B, counted
from tunneld.egtp.classic import ClassicEnvelopes
from tunneld.egtp.freshness import FreshnessGuard
from tunneld.egtp.passing import PassingLimits, PassingService
from tunneld.egtp.service_connection import (
    ENOUGH_UNSENT,
    FRAME_OVERHEAD,
    FRAME_WORK,
    MAX_FIRST_FRAME,
    MAX_WORK,
    ServiceConnection,
)
from tunneld.errors import NotAllowedError, RemoteProtocolError
from tunneld.wire.egtp.frames import FrameReader, pack_frame
from tunneld.wire.egtp.ids import id_of
from tunneld.wire.egtp.mesgen import ClassicKey, MesgenSessions, OpenedEnvelope, SessionLost, new_key
from tunneld.wire.egtp.messages import MojoRequest, MojoResponse, parse_message, response_to
from tunneld.wire.egtp.packing import deflate, inflate
from tunneld.wire.egtp.relaying import (
    ARE_THERE_MESSAGES,
    MESSAGE_FOR_YOU,
    PASS_THIS_ALONG,
    MailQuery,
    PassAlong,
    parse_mail,
    parse_outcome,
    success,
)
from tunneld.wire.egtp.steps import PIECE

RELAY, UNKNOWN = new_key()[0], new_key()[0]
NONCES = counted()


class Relay:
    """A relay with a clock: its service, and connections to it."""

    def __init__(self, sessions: int = 100, clock: Callable[[], float] | None = None) -> None:
        self.now = 0.0
        self.clock = clock or (lambda: self.now)
        self.sessions_left = sessions
        self.owners = {A.node_id: "home", B.node_id: "office"}
        self.limits = PassingLimits()
        self.service = PassingService({RELAY.node_id}, lambda: self.limits, self.owners.get, lambda _: True, self.clock)
        self.sessions = MesgenSessions(RELAY, counted())
        self.guard = FreshnessGuard()

    def admits_session(self) -> bool:
        self.sessions_left -= 1
        return self.sessions_left >= 0

    def connection(self) -> ServiceConnection:
        envelopes = ClassicEnvelopes(self.sessions, self.admits_session)
        return ServiceConnection(RELAY.node_id, self.service, envelopes, self.guard, NONCES, self.clock)


class Node:
    """A classic node with a connection to the relay. `sent` are its frames, as an attacker records them."""

    def __init__(self, relay: Relay, key: ClassicKey) -> None:
        self.key = key
        self.sessions = MesgenSessions(key, counted())
        self.sessions.store_key(RELAY.public)
        self.connection = relay.connection()
        self.sent: list[bytes] = []
        self.last: bytes | None = None
        self.responses: list[MojoResponse] = []
        self.messages: list[tuple[bytes, bytes]] = []  # `message for you`: the request's id, and the envelope
        self.lost = 0

    def send(self, message: MojoRequest | MojoResponse) -> None:
        self.sent.append(pack_frame(self.sessions.seal(RELAY.node_id, deflate(message.encode()))))
        try:
            self.work(self.sent[-1])
        finally:
            self.read()

    def work(self, data: bytes = b"") -> None:
        """Have the connection handle its input, in as many turns as that takes."""
        done = self.connection.receive(data)
        while not done and self.connection.unsent < ENOUGH_UNSENT:
            done = self.connection.receive(b"")
        while self.connection.has_unsealed:
            self.connection.seal_more()

    def read(self) -> None:
        frames = FrameReader()
        frames.feed(self.connection.outgoing)
        self.connection.outgoing.clear()
        while (frame := frames.next_message()) is not None:
            match self.sessions.open(frame):
                case OpenedEnvelope(_, packed):
                    encoded = inflate(packed)
                    self.last = id_of(encoded)
                    message = parse_message(encoded)
                    if isinstance(message, MojoResponse):
                        self.responses.append(message)
                    else:
                        assert message.kind == MESSAGE_FOR_YOU
                        assert isinstance(message.body, bytes)
                        self.messages.append((self.last, message.body))
                case SessionLost():
                    self.lost += 1

    def ask(self, kind: bytes, body: Any) -> Any:
        request = MojoRequest(kind, RELAY.node_id, NONCES(20), body, self.last)
        self.send(request)
        response = self.responses.pop()
        assert response.reference == id_of(request.encode())
        assert response.failure is None
        return response.body

    def poll(self, fast: bool = False) -> tuple[bytes, ...]:
        return parse_mail(self.ask(ARE_THERE_MESSAGES, MailQuery(fast_relay=fast).encode())).messages

    def pass_along(self, recipient: bytes, envelope: bytes) -> str | None:
        return parse_outcome(self.ask(PASS_THIS_ALONG, PassAlong(recipient, envelope).encode()))

    def acknowledge(self, number: int, body: Any = None) -> None:
        """Answer the `message for you` with this number."""
        request = MojoRequest(MESSAGE_FOR_YOU, self.key.node_id, b"", b"")
        self.send(response_to(request, self.messages[number][0], body or success()))


def pair() -> tuple[Relay, Node, Node]:
    relay = Relay()
    return relay, Node(relay, A), Node(relay, B)


def test_the_first_poll_gets_nothing_and_the_second_what_waits() -> None:
    _, a, b = pair()
    assert a.pass_along(B.node_id, b"one") is None
    assert (b.poll(), b.poll(), b.poll()) == ((), (b"one",), ())


def test_fast_relay_of_messages_that_the_relay_cannot_read() -> None:
    relay, a, b = pair()
    a.sessions.store_key(B.public)
    for _ in range(2):
        b.poll(fast=True)
    for number in range(3):
        assert a.pass_along(B.node_id, a.sessions.seal(B.node_id, b"%d" % number)) is None
        b.read()
        assert b.sessions.open(b.messages[-1][1]) == OpenedEnvelope(A.node_id, b"%d" % number)
    b.acknowledge(2)
    b.acknowledge(0)
    b.acknowledge(0)
    assert relay.service.mailboxes.total.messages == 1
    b.connection.close()
    b.connection.close()
    assert [b.sessions.open(envelope) for envelope in b.poll()] == [OpenedEnvelope(A.node_id, b"1")]


def test_a_message_that_is_not_taken_waits() -> None:
    relay, a, b = pair()
    for number in range(2):
        b.poll(fast=True)
        b.poll(fast=True)
        a.pass_along(B.node_id, b"%d" % number)
        b.read()
    b.acknowledge(0, {b"result": b"failure", b"reason": b"full"})
    assert relay.service.mailboxes.total.messages == 2
    assert b.poll() == (b"0", b"1")


def test_a_message_that_is_not_answered_waits_after_the_timeout() -> None:
    relay, a, b = pair()
    b.poll()
    b.poll(fast=True)
    a.pass_along(B.node_id, b"one")
    assert b.connection.next_deadline == 300
    relay.now = 300
    b.connection.due()
    assert b.poll() == (b"one",)


@pytest.mark.parametrize("polls", [2, 5])
def test_recorded_requests_that_are_sent_again_get_nothing_and_delete_nothing(polls: int) -> None:
    relay, a, b = pair()
    for _ in range(polls):
        b.poll(fast=True)
    a.pass_along(B.node_id, b"one")
    b.read()
    b.connection.close()
    attacker = relay.connection()
    for frame in b.sent:
        attacker.receive(frame)
        assert len(attacker.outgoing) < 1000
        attacker.outgoing.clear()
    a.pass_along(B.node_id, b"two")
    assert not attacker.outgoing
    reconnected = Node(relay, B)
    reconnected.sessions, reconnected.last = b.sessions, b.last
    assert reconnected.poll() == (b"one", b"two")


def test_after_a_restart_of_the_relay_the_session_is_made_again() -> None:
    _, _, b = pair()
    b.poll()
    b.connection = Relay().connection()
    with pytest.raises(IndexError):
        b.poll()
    assert b.lost == 1
    b.sessions.store_key(RELAY.public)
    assert b.poll() == ()


def test_unknown_nodes_are_refused_before_anything_is_decompressed() -> None:
    relay = Relay()
    node = Node(relay, UNKNOWN)
    bomb = deflate(bytes(10**6))
    frame = pack_frame(node.sessions.seal(RELAY.node_id, bomb))
    with pytest.raises(NotAllowedError, match="is not known to this relay"):
        node.connection.receive(frame)


def test_new_sessions_are_limited() -> None:
    relay = Relay(sessions=1)
    a = Node(relay, A)
    a.poll()
    a.poll()
    with pytest.raises(RemoteProtocolError, match="too many new EGTP sessions"):
        Node(relay, B).poll()
    a.poll()


def test_other_requests_are_answered_with_a_failure() -> None:
    _, a, _ = pair()
    a.send(MojoRequest(b"hello", RELAY.node_id, NONCES(20), None))
    assert a.responses.pop().failure == "unrecognized message type"
    with pytest.raises(RemoteProtocolError, match="for another node"):
        a.send(MojoRequest(b"hello", B.node_id, NONCES(20), None))


def test_a_node_that_is_not_known_any_more_is_told_so() -> None:
    relay, a, _ = pair()
    a.poll()
    del relay.owners[A.node_id]
    with pytest.raises(NotAllowedError, match="not known"):
        a.poll()


def test_frames_are_small_until_a_known_node_was_heard() -> None:
    relay, a, _ = pair()
    with pytest.raises(RemoteProtocolError, match=f"longer than {MAX_FIRST_FRAME}"):
        relay.connection().receive((MAX_FIRST_FRAME + 1).to_bytes(4, "big"))
    a.poll()
    largest = relay.limits.max_message_bytes
    assert a.pass_along(B.node_id, NONCES(largest)) is None
    with pytest.raises(RemoteProtocolError, match=f"longer than {largest + FRAME_OVERHEAD}"):
        a.connection.receive((largest + FRAME_OVERHEAD + 1).to_bytes(4, "big"))


def test_a_connection_that_is_not_read_gets_no_more_messages() -> None:
    relay, a, b = pair()
    relay.limits = PassingLimits(fast_bytes=2**24)
    b.poll()
    b.poll(fast=True)
    a.poll()
    for number in range(3):
        a.pass_along(B.node_id, NONCES(ENOUGH_UNSENT - number * 20_000))
    assert b.connection.unsent < 2.1 * ENOUGH_UNSENT
    b.work()
    b.read()
    b.connection.on_written()
    b.work()
    b.read()
    assert len(b.messages) == 3


def test_requests_of_a_node_that_does_not_read_wait() -> None:
    _, a, b = pair()
    a.poll()
    b.poll()
    for number in range(4):
        a.pass_along(B.node_id, NONCES(ENOUGH_UNSENT // 2) + b"%d" % number)
    body = MailQuery(fast_relay=False).encode()
    for _ in range(8):
        request = MojoRequest(ARE_THERE_MESSAGES, RELAY.node_id, NONCES(20), body, b.last)
        b.connection.receive(pack_frame(b.sessions.seal(RELAY.node_id, deflate(request.encode()))))
    assert ENOUGH_UNSENT // 2 <= b.connection.unsent < 1.4 * ENOUGH_UNSENT
    while len(b.responses) < 8:
        b.work()
        b.read()
    sizes = [len(parse_mail(response.body).messages) for response in b.responses]
    assert sizes == [1, 1, 1, 1, 0, 0, 0, 0]


def test_other_tasks_have_a_turn_between_many_requests() -> None:
    relay, _, b = pair()
    b.poll()
    body = MailQuery(fast_relay=False).encode()
    frames = b""
    for _ in range(40):
        request = MojoRequest(ARE_THERE_MESSAGES, RELAY.node_id, NONCES(20), body, b.last)
        frames += pack_frame(b.sessions.seal(RELAY.node_id, deflate(request.encode())))
    answered = [0]
    done = b.connection.receive(frames)
    while answered[-1] < 40:
        b.read()
        answered.append(len(b.responses))
        done = b.connection.receive(b"")
    assert done
    turns = [after - before for before, after in itertools.pairwise(answered)]
    assert max(turns) <= MAX_WORK // FRAME_WORK
    assert len(turns) > 2
    assert relay.service.knows(B.node_id)


def test_a_large_message_takes_many_short_turns() -> None:
    """Opening it, and sealing it for its recipient; classic encryption of 1 MiB takes 0.1 s."""
    relay, a, b = pair()
    b.poll()
    b.poll(fast=True)
    size = relay.limits.max_message_bytes
    request = MojoRequest(
        PASS_THIS_ALONG, RELAY.node_id, NONCES(20), PassAlong(B.node_id, bytes(size)).encode(), a.last
    )
    sealed = a.sessions.seal(RELAY.node_id, request.encode())  # not compressed
    a.poll()
    turns, done = 1, a.connection.receive(pack_frame(sealed))
    while not done:
        assert a.connection._work > -2 * PIECE - MAX_WORK
        done = a.connection.receive(b"")
        turns += 1
    assert turns >= size // MAX_WORK
    turns = 0
    while b.connection.has_unsealed:
        b.connection.seal_more()
        assert b.connection._work > -2 * PIECE
        turns += 1
    b.read()
    assert [len(envelope) for _, envelope in b.messages] == [size]
    assert turns >= size // MAX_WORK


def test_a_peer_may_be_forgotten_between_two_steps() -> None:
    relay, a, _ = pair()
    a.poll()
    request = MojoRequest(PASS_THIS_ALONG, RELAY.node_id, NONCES(20), PassAlong(B.node_id, bytes(99999)).encode())
    sealed = a.sessions.seal(RELAY.node_id, request.encode())
    assert not a.connection.receive(pack_frame(sealed))
    relay.sessions.forget(A.node_id)
    while not a.connection.receive(b""):
        pass
    assert relay.service.passed == 1
    a.read()
    assert a.responses == []  # there is no key for the response


@given(st.data())
@settings(max_examples=30)
def test_garbage_is_the_peers_fault(data: st.DataObject) -> None:
    relay, _, b = pair()
    b.poll()
    wrong = bytearray(data.draw(st.sampled_from([b.sent[0], pack_frame(b.sessions.seal(RELAY.node_id, b"(4:null)"))])))
    for _ in range(data.draw(st.integers(0, 3))):
        wrong[data.draw(st.integers(0, len(wrong) - 1))] = data.draw(st.integers(0, 255))
    connection = relay.connection()
    with contextlib.suppress(RemoteProtocolError, NotAllowedError):
        connection.receive(bytes(wrong) + data.draw(st.binary(max_size=30)))
    assert len(connection.outgoing) < 1000
