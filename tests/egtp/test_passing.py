"""The relay service: every kind of request, fast relay with its acknowledgements, loop guards, limits; and two nodes
with classic envelopes that the relay cannot read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.wire.egtp.mesgen.keys import A, B, counted
from tunneld.egtp.mailbox import MESSAGE_COST, MailLimits
from tunneld.egtp.passing import MAX_LISTED, PassingLimits, PassingService
from tunneld.errors import NotAllowedError, RemoteProtocolError
from tunneld.wire.egtp.addresses import CryptoStrategy, LowerStrategy, RelayStrategy, Strategy, TcpStrategy
from tunneld.wire.egtp.ids import id_of, id_text
from tunneld.wire.egtp.mesgen import MesgenSessions, OpenedEnvelope
from tunneld.wire.egtp.messages import MojoRequest
from tunneld.wire.egtp.relaying import (
    ARE_THERE_MESSAGES,
    PASS_THIS_ALONG,
    RETRIEVE_MESSAGES,
    Mail,
    MailQuery,
    PassAlong,
    RetrieveMessages,
    WaitingMessage,
    parse_mail,
    parse_outcome,
)
from tunneld.wire.mencode import decode, encode

RELAY, OTHER_RELAY = b"R" * 20, b"S" * 20
ALICE, BOB, UNKNOWN = b"A" * 20, b"B" * 20, b"X" * 20


@dataclass(eq=False)
class Connection:
    """A connection that takes `message for you`, with room for some requests."""

    room: int = 100
    sent: list[bytes] = field(default_factory=list)

    def send_message(self, _node: bytes, envelope: bytes) -> bytes | None:
        if self.room == 0:
            return None
        self.room -= 1
        self.sent.append(envelope)
        return b"%d" % len(self.sent)


@dataclass
class Other:
    """Another relay, and the strategies of nodes."""

    strategies: dict[bytes, Strategy] = field(default_factory=dict)
    passed: list[tuple[bytes, PassAlong]] = field(default_factory=list)

    def strategy_for(self, recipient: bytes) -> Strategy | None:
        return self.strategies.get(recipient)

    def pass_along(self, relay_id: bytes, body: PassAlong) -> None:
        self.passed.append((relay_id, body))


class Relay:
    """A service with a clock, and short ways to use it."""

    def __init__(self, onward: Other | None = None, tokens: int = 1000, **limits: Any) -> None:
        self.now = 0.0
        self.limits = PassingLimits(**limits)
        self.owners = {ALICE: "home", BOB: "office", A.node_id: "home", B.node_id: "office"}
        self.tokens = tokens
        self.service = PassingService(
            {RELAY}, lambda: self.limits, self.owners.get, self.admit, lambda: self.now, onward
        )

    def admit(self, credential: str) -> bool:
        assert credential in self.owners.values()
        self.tokens -= 1
        return self.tokens >= 0

    def ask(self, sender: bytes, kind: bytes, body: Any, receiver: Connection | None = None) -> Any:
        """The response as the node reads it."""
        request = MojoRequest(kind, RELAY, b"N" * 20, decode(encode(body)))
        answer = self.service.on_request(sender, request, receiver)
        self.service.on_room(receiver)
        return decode(encode(answer))

    def send(self, envelope: bytes, sender: bytes = ALICE, recipient: bytes = BOB, sequence: int = -1) -> str | None:
        """The reason of a failure; None after success."""
        return parse_outcome(self.ask(sender, PASS_THIS_ALONG, PassAlong(recipient, envelope, sequence).encode()))

    def poll(self, node: bytes = BOB, version: int = 3) -> Mail:
        return parse_mail(self.ask(node, ARE_THERE_MESSAGES, MailQuery(version, fast_relay=False).encode()))

    def attach(self, connection: Connection, node: bytes = BOB) -> Mail:
        return parse_mail(self.ask(node, ARE_THERE_MESSAGES, MailQuery().encode(), connection))


def test_a_message_is_stored_and_fetched() -> None:
    relay = Relay()
    assert relay.send(b"one") is None
    assert relay.send(b"two") is None
    assert relay.poll() == Mail((b"one", b"two"))
    assert relay.poll() == Mail()
    assert relay.poll(ALICE) == Mail()
    assert (relay.service.passed, relay.service.delivered) == (2, 2)


@pytest.mark.parametrize("kind", [b"pass this along", PASS_THIS_ALONG])
def test_synonyms(kind: bytes) -> None:
    relay = Relay()
    assert parse_outcome(relay.ask(ALICE, kind, PassAlong(BOB, b"one").encode())) is None
    assert parse_mail(relay.ask(BOB, b"are there messages", MailQuery().encode())) == Mail((b"one",))
    assert parse_mail(relay.ask(BOB, b"retrieve messages", RetrieveMessages((), 9).encode())) == Mail()


def test_an_older_node_is_told_what_waits_and_retrieves_it() -> None:
    relay = Relay()
    relay.send(b"one")
    relay.send(b"three")
    relay.send(b"five")
    mail = relay.poll(version=2)
    assert mail.waiting == tuple(WaitingMessage(ALICE, id_of(text), len(text)) for text in (b"one", b"three", b"five"))
    assert relay.poll(version=2) == mail  # nothing is deleted
    wanted = (mail.waiting[2], mail.waiting[0], mail.waiting[0], WaitingMessage(ALICE, bytes(20), 1), mail.waiting[1])
    body = RetrieveMessages(wanted, 8).encode()
    assert parse_mail(relay.ask(BOB, RETRIEVE_MESSAGES, body)).messages == (b"five", b"one")
    assert relay.poll(version=2).waiting == (mail.waiting[1],)
    assert relay.ask(ALICE, RETRIEVE_MESSAGES, body) == {b"status": b"no messages"}
    assert relay.ask(BOB, RETRIEVE_MESSAGES, RetrieveMessages(wanted, 2).encode()) == {b"status": b"no messages"}


def test_a_response_is_limited_and_a_larger_message_comes_alone() -> None:
    relay = Relay(max_response_bytes=10)
    for envelope in (b"x" * 6, b"y" * 4, b"z", b"w" * 12):
        relay.send(envelope)
    assert [relay.poll().messages for _ in range(4)] == [(b"x" * 6, b"y" * 4), (b"z",), (b"w" * 12,), ()]


# Fast relay


def test_fast_relay_down_the_connection_that_asked() -> None:
    relay, connection = Relay(), Connection()
    relay.send(b"early")
    assert relay.attach(connection) == Mail((b"early",))
    relay.send(b"one")
    relay.send(b"two")
    assert connection.sent == [b"one", b"two"]
    relay.service.on_response(connection, b"1", succeeded=True)
    relay.service.on_response(connection, b"1", succeeded=True)
    relay.service.on_response(connection, b"7", succeeded=True)
    relay.service.on_lost(connection)
    assert relay.poll() == Mail((b"two",))
    assert relay.service.delivered == 3


def test_a_message_in_flight_is_not_delivered_twice_by_a_poll() -> None:
    relay, connection = Relay(), Connection()
    relay.attach(connection)
    relay.send(b"one")
    assert relay.attach(connection) == Mail()
    assert relay.poll() == Mail()
    relay.service.on_response(connection, b"1", succeeded=True)
    assert (relay.poll(), connection.sent) == (Mail(), [b"one"])


def test_what_was_not_acknowledged_goes_down_the_next_connection_in_order() -> None:
    relay, old, new = Relay(), Connection(), Connection()
    relay.attach(old)
    for envelope in (b"one", b"two", b"three"):
        relay.send(envelope)
    relay.service.on_response(old, b"2", succeeded=True)
    assert relay.attach(new) == Mail((b"one", b"three"))
    relay.service.on_response(old, b"1", succeeded=True)  # too late
    relay.service.on_lost(old)
    relay.send(b"four")
    assert (old.sent[3:], new.sent) == ([], [b"four"])


def test_after_a_failure_the_message_waits_until_the_node_asks_again() -> None:
    relay, connection = Relay(), Connection()
    relay.attach(connection)
    relay.send(b"one")
    relay.service.on_response(connection, b"1", succeeded=False)
    relay.send(b"two")
    assert connection.sent == [b"one"]
    assert relay.attach(connection) == Mail((b"one", b"two"))


def test_a_query_without_fast_relay_turns_it_off() -> None:
    relay, connection = Relay(), Connection()
    relay.attach(connection)
    relay.ask(BOB, ARE_THERE_MESSAGES, MailQuery(fast_relay=False).encode(), connection)
    relay.send(b"one")
    assert (connection.sent, relay.poll()) == ([], Mail((b"one",)))


def test_a_connection_without_room_gets_the_rest_later() -> None:
    relay, connection = Relay(), Connection(room=1)
    relay.attach(connection)
    relay.send(b"one")
    relay.send(b"two")
    assert connection.sent == [b"one"]
    connection.room = 5
    relay.service.on_room(connection)
    assert connection.sent == [b"one", b"two"]


@pytest.mark.parametrize(
    ("limits", "sent"), [({"fast_messages": 2}, 2), ({"fast_bytes": 8}, 2), ({"fast_bytes": 1}, 1)]
)
def test_what_is_in_flight_is_limited(limits: dict[str, Any], sent: int) -> None:
    relay, connection = Relay(**limits), Connection()
    relay.attach(connection)
    for number in range(4):
        relay.send(b"%04d" % number)
    assert len(connection.sent) == sent
    relay.service.on_response(connection, b"1", succeeded=True)
    assert connection.sent == [b"%04d" % number for number in range(sent + 1)]


def test_a_node_that_is_forgotten_gets_nothing_more() -> None:
    relay, connection = Relay(), Connection()
    relay.attach(connection)
    relay.send(b"one")
    relay.service.forget(BOB)
    relay.service.on_response(connection, b"1", succeeded=True)
    relay.service.on_lost(connection)
    relay.send(b"two")
    assert connection.sent == [b"one"]
    assert relay.poll() == Mail((b"two",))
    relay.service.forget(UNKNOWN)


def test_a_connection_that_goes_over_to_another_node_loses_nothing() -> None:
    relay, connection = Relay(), Connection()
    relay.attach(connection)
    relay.send(b"one")
    relay.attach(connection, ALICE)
    relay.send(b"two", sender=BOB, recipient=ALICE)
    assert (connection.sent, relay.poll()) == ([b"one", b"two"], Mail((b"one",)))


class PassingMachine(RuleBasedStateMachine):
    """Nodes that send, poll, connect, answer, refuse and vanish in any order.

    What was accepted arrives at its recipient, in the end, and nothing arrives elsewhere. Down one connection, messages
    come in order, none twice, and never more at once than allowed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.relay = Relay(fast_messages=3, max_response_bytes=12)
        self.nodes = [ALICE, BOB]
        self.accepted: dict[bytes, list[bytes]] = {ALICE: [], BOB: []}
        self.arrived: dict[bytes, set[bytes]] = {ALICE: set(), BOB: set()}
        self.connections: list[tuple[bytes, Connection, list[int]]] = []  # with the numbers that are not answered
        self.number = 0

    def note_new(self) -> None:
        """Note what was sent down connections."""
        for node, connection, open_numbers in self.connections:
            seen = max([*open_numbers, self.seen.get(connection, 0)], default=0)
            open_numbers.extend(range(seen + 1, len(connection.sent) + 1))
            self.seen[connection] = len(connection.sent)
            assert len(open_numbers) <= 3
            assert set(connection.sent) <= set(self.accepted[node])

    @initialize()
    def begin(self) -> None:
        self.seen: dict[Connection, int] = {}

    @rule(sender=st.integers(0, 1))
    def send(self, sender: int) -> None:
        self.number += 1
        message = b"%04d" % self.number
        recipient = self.nodes[1 - sender]
        assert self.relay.send(message, self.nodes[sender], recipient) is None
        self.accepted[recipient].append(message)

    @rule(node=st.sampled_from([ALICE, BOB]))
    def poll(self, node: bytes) -> None:
        self.arrived[node] |= set(self.relay.poll(node).messages)

    @rule(node=st.sampled_from([ALICE, BOB]), room=st.integers(0, 6))
    def connect(self, node: bytes, room: int) -> None:
        connection = Connection(room)
        self.connections.append((node, connection, []))
        self.arrived[node] |= set(self.relay.attach(connection, node).messages)

    @precondition(lambda self: self.connections)
    @rule(data=st.data(), succeeded=st.sampled_from([True, True, True, False]))
    def answer(self, data: st.DataObject, succeeded: bool) -> None:
        node, connection, open_numbers = data.draw(st.sampled_from(self.connections))
        if open_numbers:
            number = open_numbers.pop(data.draw(st.integers(0, len(open_numbers) - 1)))
            if succeeded:
                self.arrived[node].add(connection.sent[number - 1])
            self.relay.service.on_response(connection, b"%d" % number, succeeded)
            if not succeeded:
                self.lose(node, connection, open_numbers)

    @precondition(lambda self: self.connections)
    @rule(data=st.data(), room=st.integers(0, 4))
    def drain(self, data: st.DataObject, room: int) -> None:
        _, connection, _ = data.draw(st.sampled_from(self.connections))
        connection.room += room
        self.relay.service.on_room(connection)

    @precondition(lambda self: self.connections)
    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        self.lose(*data.draw(st.sampled_from(self.connections)))

    def lose(self, node: bytes, connection: Connection, open_numbers: list[int]) -> None:
        self.relay.service.on_lost(connection)
        self.connections.remove((node, connection, open_numbers))

    @invariant()
    def sent_in_order(self) -> None:
        self.note_new()
        for _, connection, _ in self.connections:
            assert sorted(set(connection.sent)) == connection.sent

    def teardown(self) -> None:
        for node, connection, open_numbers in list(self.connections):
            self.lose(node, connection, open_numbers)
        for node in self.nodes:
            while messages := self.relay.poll(node).messages:
                self.arrived[node] |= set(messages)
            assert self.arrived[node] == set(self.accepted[node])
        assert self.relay.service.mailboxes.total.messages == 0
        assert not self.relay.service._receivers
        assert not self.relay.service._deliveries


TestPassingMachine = PassingMachine.TestCase
TestPassingMachine.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)


# Refusals


def test_only_known_nodes_may_use_the_relay() -> None:
    relay = Relay()
    for kind, body in (
        (PASS_THIS_ALONG, PassAlong(BOB, b"x").encode()),
        (ARE_THERE_MESSAGES, MailQuery().encode()),
        (RETRIEVE_MESSAGES, RetrieveMessages((), 1).encode()),
    ):
        with pytest.raises(NotAllowedError, match=f"node {id_text(UNKNOWN)} is not known to this relay"):
            relay.ask(UNKNOWN, kind, body)


def test_other_requests_are_left_to_the_caller_and_malformed_ones_are_the_peers_fault() -> None:
    relay = Relay()
    assert relay.service.on_request(UNKNOWN, MojoRequest(b"hello", RELAY, b"N" * 20, None), None) is None
    for kind in (PASS_THIS_ALONG, ARE_THERE_MESSAGES, RETRIEVE_MESSAGES):
        with pytest.raises(RemoteProtocolError):
            relay.ask(ALICE, kind, [])


@pytest.mark.parametrize(
    ("recipient", "reason"),
    [
        (RELAY, "a relay passes no messages to itself"),
        (ALICE, "sender and recipient are the same node"),
        (UNKNOWN, f"node {id_text(UNKNOWN)} is not known to this relay"),
    ],
)
def test_recipients_that_are_refused(recipient: bytes, reason: str) -> None:
    assert Relay().send(b"x", recipient=recipient) == reason


def test_large_messages_are_refused() -> None:
    relay = Relay(max_message_bytes=5)
    assert relay.send(b"12345") is None
    assert relay.send(b"123456") == "message of 6 bytes is larger than 5 bytes"


def test_the_rate_of_a_credential_is_limited() -> None:
    relay = Relay(tokens=2)
    assert [relay.send(b"%d" % number) for number in range(2)] == [None, None]
    reason = relay.send(b"2")
    assert reason is not None
    assert reason.startswith("rate limit reached: credential 'home'")
    with pytest.raises(NotAllowedError, match="rate limit reached"):
        relay.poll()


def test_a_response_lists_some_of_many_messages() -> None:
    relay = Relay()
    for number in range(MAX_LISTED + 1):
        relay.send(b"%d" % number)
    assert len(relay.poll(version=2).waiting) == MAX_LISTED
    assert [len(relay.poll().messages) for _ in range(3)] == [MAX_LISTED, 1, 0]


def test_quotas_are_reasons_of_failures() -> None:
    relay = Relay(mail=MailLimits(mailbox_messages=1))
    assert relay.send(b"1") is None
    assert relay.send(b"2") == "mailbox limit reached: 1 of 1 messages wait"
    relay.limits = replace(relay.limits, mail=MailLimits(credential_bytes=MESSAGE_COST))  # a reload
    reason = relay.send(b"2")
    assert reason is not None
    assert reason.startswith("credential 'home' limit reached")


def test_old_messages_are_deleted() -> None:
    relay = Relay(mail=MailLimits(max_age=60))
    relay.send(b"1")
    relay.now = relay.service.next_expiry
    assert relay.now == 60
    relay.service.expire()
    assert (relay.poll(), relay.service.expired) == (Mail(), 1)


# Loop guards of messages for nodes of other relays


def passing_on(lower: LowerStrategy, sequence: int = 5) -> tuple[Relay, Other]:
    other = Other({UNKNOWN: CryptoStrategy({}, lower, sequence)})
    return Relay(other), other


def test_a_message_is_passed_on_by_a_newer_strategy_only() -> None:
    relay, other = passing_on(RelayStrategy(OTHER_RELAY), sequence=5)
    assert relay.send(b"x", recipient=UNKNOWN, sequence=4) is None
    assert other.passed == [(OTHER_RELAY, PassAlong(UNKNOWN, b"x", 5))]
    for sequence in (5, 6):
        reason = relay.send(b"x", recipient=UNKNOWN, sequence=sequence)
        assert reason == "no newer strategy for the recipient is known than that by which the message came"
    assert len(other.passed) == 1


@pytest.mark.parametrize(
    ("lower", "reason"),
    [
        (RelayStrategy(UNKNOWN), "a message is not passed to its recipient by way of the recipient"),
        (RelayStrategy(RELAY), "the message would be passed in a circle"),
        (RelayStrategy(ALICE), "the message would be passed in a circle"),
        (TcpStrategy("192.0.2.1", 20001), "which dials no nodes"),
    ],
)
def test_a_message_that_could_come_back_is_not_passed_on(lower: LowerStrategy, reason: str) -> None:
    relay, other = passing_on(lower)
    failed = relay.send(b"x", recipient=UNKNOWN)
    assert failed is not None
    assert failed.endswith(reason)
    assert other.passed == []


def test_two_relays_that_point_at_each_other_do_not_loop() -> None:
    sequences = {RELAY: 7, OTHER_RELAY: 7}
    hops: list[bytes] = []
    relays: dict[bytes, PassingService] = {}

    class Pointing:
        def __init__(self, own: bytes, other: bytes) -> None:
            self.own, self.other = own, other

        def strategy_for(self, recipient: bytes) -> Strategy:
            return CryptoStrategy({}, RelayStrategy(self.other), sequences[self.own])

        def pass_along(self, relay_id: bytes, body: PassAlong) -> None:
            hops.append(relay_id)
            request = MojoRequest(PASS_THIS_ALONG, relay_id, b"N" * 20, body.encode())
            relays[relay_id].on_request(ALICE, request, None)

    admit: Callable[[str], bool] = lambda _: True  # noqa: E731
    for own, other in ((RELAY, OTHER_RELAY), (OTHER_RELAY, RELAY)):
        relays[own] = PassingService(
            {own}, PassingLimits, {ALICE: "home"}.get, admit, lambda: 0.0, onward=Pointing(own, other)
        )
    request = MojoRequest(PASS_THIS_ALONG, RELAY, b"N" * 20, PassAlong(UNKNOWN, b"x").encode())
    relays[RELAY].on_request(ALICE, request, None)
    assert hops == [OTHER_RELAY]


def test_two_nodes_talk_through_a_relay_that_cannot_read_them() -> None:
    relay, connection = Relay(), Connection()
    a, b = MesgenSessions(A, counted()), MesgenSessions(B, counted())
    a.store_key(B.public)
    relay.attach(connection, B.node_id)
    for number in range(3):
        request = b"the secret %d" % number
        assert relay.send(a.seal(B.node_id, request), A.node_id, B.node_id) is None
        assert request not in connection.sent[-1]
        assert b.open(connection.sent[-1]) == OpenedEnvelope(A.node_id, request)
        assert relay.send(b.seal(A.node_id, b"answer"), B.node_id, A.node_id) is None
        (answer,) = relay.poll(A.node_id).messages
        assert a.open(answer) == OpenedEnvelope(B.node_id, b"answer")


def test_each_refusal_is_counted_by_its_reason_and_usage_by_credential() -> None:
    relay = Relay(tokens=7, max_message_bytes=100, mail=MailLimits(credential_messages=2, mailbox_messages=9))
    assert relay.send(b"one", ALICE, BOB) is None
    assert relay.send(b"two", ALICE, BOB) is None
    for recipient, envelope in ((BOB, b"three"), (BOB, bytes(101)), (ALICE, b""), (UNKNOWN, b"")):
        assert relay.send(envelope, ALICE, recipient)
    assert relay.send(b"four", BOB, ALICE) is None
    assert relay.send(b"five", BOB, ALICE)
    assert {kind.value: number for kind, number in relay.service.refused.items()} == {
        "credential": 1,
        "size": 1,
        "circle": 1,
        "unknown": 1,
        "rate": 1,
    }
    assert relay.service.usage() == {
        "mail_messages": 3,
        "mail_bytes": len(b"onetwofour") + 3 * MESSAGE_COST,
        "mail_from": "home:2 office:1",
        "max_mail_messages": 2,
        "max_mail_bytes": relay.limits.mail.credential_bytes,
    }
