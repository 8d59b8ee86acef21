"""Stored messages: states, quotas at their edges, ages, and sums that agree with what is stored."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tunneld.egtp.mailbox import (
    MESSAGE_COST,
    TRANSITIONS,
    Mailboxes,
    MailEvent,
    MailLimits,
    MailState,
    MailUsage,
    StoredMessage,
)
from tunneld.errors import LimitReachedError

ALICE, BOB, CAROL = b"A" * 20, b"B" * 20, b"C" * 20
OWNERS = {ALICE: "home", BOB: "office", CAROL: "home"}
LIMITS = MailLimits(
    credential_messages=4,
    credential_bytes=4 * MESSAGE_COST + 400,
    mailbox_messages=3,
    mailbox_bytes=4 * MESSAGE_COST + 400,
    total_bytes=100 * MESSAGE_COST,
    max_age=60,
)


def store(
    mailboxes: Mailboxes, envelope: bytes, sender: bytes = ALICE, recipient: bytes = CAROL, now: float = 0
) -> StoredMessage:
    return mailboxes.store(envelope, sender, OWNERS[sender], recipient, OWNERS[recipient], now)


def waiting(mailboxes: Mailboxes, recipient: bytes = CAROL) -> list[bytes]:
    return [message.envelope for message in mailboxes.waiting(recipient)]


def boxes(**changes: int) -> Mailboxes:
    limits = replace(LIMITS, **changes)
    return Mailboxes(lambda: limits)


def test_every_state_is_left_in_the_ways_of_the_table() -> None:
    assert {state for state, _ in TRANSITIONS} == {MailState.WAITING, MailState.SENT}
    assert {event for _, event in TRANSITIONS} == set(MailEvent)
    mailboxes = boxes()
    message = store(mailboxes, b"x")
    with pytest.raises(KeyError):
        mailboxes.move(message, MailEvent.RETURN)


def test_messages_wait_in_their_order() -> None:
    mailboxes = boxes()
    first, second = store(mailboxes, b"first"), store(mailboxes, b"second")
    mailboxes.move(first, MailEvent.SEND)
    assert waiting(mailboxes) == [b"second"]
    mailboxes.move(first, MailEvent.RETURN)
    assert waiting(mailboxes) == [b"first", b"second"]
    mailboxes.move(second, MailEvent.FETCHED)
    assert (waiting(mailboxes), waiting(mailboxes, BOB)) == ([b"first"], [])


def test_a_message_that_is_gone_stays_gone() -> None:
    mailboxes = boxes()
    message = store(mailboxes, b"x")
    mailboxes.move(message, MailEvent.SEND)
    mailboxes.drop(CAROL)
    for event in (MailEvent.DELIVERED, MailEvent.RETURN):
        mailboxes.move(message, event)
    assert (message.state, mailboxes.total) == (MailState.GONE, MailUsage())


def test_a_message_that_is_sent_again_is_stored_once() -> None:
    mailboxes = boxes()
    assert store(mailboxes, b"x") is store(mailboxes, b"x") is store(mailboxes, b"x", BOB)
    assert mailboxes.total == MailUsage(1, 1 + MESSAGE_COST)


def test_a_message_is_found_by_its_id_while_it_waits() -> None:
    mailboxes = boxes()
    message = store(mailboxes, b"x")
    assert mailboxes.find(CAROL, message.message_id) is message
    assert mailboxes.find(BOB, message.message_id) is None
    mailboxes.move(message, MailEvent.SEND)
    assert mailboxes.find(CAROL, message.message_id) is None


# Quotas


def test_messages_of_one_credential() -> None:
    mailboxes = boxes(mailbox_messages=9)
    kept = [store(mailboxes, b"%d" % number, sender) for number, sender in enumerate([ALICE, CAROL, ALICE])]
    store(mailboxes, b"3", CAROL, ALICE)
    with pytest.raises(LimitReachedError, match="credential 'home' limit reached: 4 of 4 messages wait"):
        store(mailboxes, b"4", ALICE, BOB)
    store(mailboxes, b"4", BOB, CAROL)  # another credential
    mailboxes.move(kept[0], MailEvent.FETCHED)
    store(mailboxes, b"4", ALICE, BOB)


def test_bytes_of_one_credential() -> None:
    mailboxes = boxes(mailbox_bytes=2**20)
    store(mailboxes, bytes(LIMITS.credential_bytes - 2 * MESSAGE_COST - 1))
    with pytest.raises(LimitReachedError, match=f"home' limit reached: .* of {LIMITS.credential_bytes} bytes"):
        store(mailboxes, b"xx", ALICE, BOB)
    store(mailboxes, b"x", ALICE, BOB)
    assert mailboxes.usage("home").bytes == LIMITS.credential_bytes
    assert mailboxes.usage("office") == MailUsage()


def test_messages_of_one_mailbox() -> None:
    mailboxes = boxes()
    for number in range(3):
        store(mailboxes, b"%d" % number)
    with pytest.raises(LimitReachedError, match="mailbox limit reached: 3 of 3 messages wait"):
        store(mailboxes, b"3", BOB)
    store(mailboxes, b"3", ALICE, BOB)


def test_bytes_of_one_mailbox() -> None:
    mailboxes = boxes(credential_bytes=2**20)
    store(mailboxes, bytes(LIMITS.mailbox_bytes - 2 * MESSAGE_COST - 1))
    with pytest.raises(LimitReachedError, match=r"mailbox limit reached: .* bytes are in use"):
        store(mailboxes, b"xx")
    store(mailboxes, b"x")


def test_another_credential_may_fill_half_a_mailbox() -> None:
    mailboxes = boxes(credential_bytes=2**20)
    half = LIMITS.mailbox_bytes // 2 - MESSAGE_COST
    with pytest.raises(LimitReachedError, match="credential 'office' may fill half of it"):
        store(mailboxes, bytes(half + 1), BOB)
    fits = store(mailboxes, bytes(half), BOB)
    with pytest.raises(LimitReachedError, match="half of it"):
        store(mailboxes, b"", BOB)
    store(mailboxes, b"", ALICE)
    mailboxes.move(fits, MailEvent.FETCHED)
    store(mailboxes, b"", BOB)


def test_bytes_of_all() -> None:
    mailboxes = boxes(total_bytes=2 * MESSAGE_COST + 1)
    store(mailboxes, b"x")
    with pytest.raises(LimitReachedError, match="relay limit reached"):
        store(mailboxes, b"y", BOB, BOB)
    store(mailboxes, b"", BOB, BOB)


def test_old_messages_are_deleted() -> None:
    mailboxes = boxes()
    assert mailboxes.next_expiry == math.inf
    sent = store(mailboxes, b"first", now=100)
    store(mailboxes, b"second", now=110)
    mailboxes.move(sent, MailEvent.SEND)
    assert mailboxes.next_expiry == 160
    assert mailboxes.expire(159) == 0
    assert (mailboxes.expire(160), mailboxes.next_expiry) == (1, 170)
    assert (mailboxes.expire(1000), mailboxes.next_expiry) == (1, math.inf)


def test_a_refused_message_leaves_nothing_behind() -> None:
    mailboxes = boxes(total_bytes=1)
    with pytest.raises(LimitReachedError):
        store(mailboxes, b"x")
    assert (mailboxes._mailboxes, mailboxes._by_owner, mailboxes._by_age) == ({}, {}, {})


class MailMachine(RuleBasedStateMachine):
    """Mailboxes against a list of the messages that are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.mailboxes = boxes(total_bytes=9 * MESSAGE_COST)
        self.model: list[StoredMessage] = []
        self.now = 0.0
        self.number = 0

    @rule(sender=st.sampled_from(list(OWNERS)), recipient=st.sampled_from(list(OWNERS)), size=st.integers(0, 200))
    def store(self, sender: bytes, recipient: bytes, size: int) -> None:
        self.number += 1
        envelope = b"%d" % self.number + bytes(size)
        try:
            self.model.append(store(self.mailboxes, envelope, sender, recipient, self.now))
        except LimitReachedError:
            assert self.model

    @rule(data=st.data(), event=st.sampled_from(list(MailEvent)))
    def move(self, data: st.DataObject, event: MailEvent) -> None:
        possible = [message for message in self.model if (message.state, event) in TRANSITIONS]
        if possible:
            self.mailboxes.move(data.draw(st.sampled_from(possible)), event)

    @rule(seconds=st.integers(0, 40))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        self.mailboxes.expire(self.now)
        assert all(message.arrived + 60 > self.now for message in self.model if message.state is not MailState.GONE)

    @invariant()
    def sums_agree(self) -> None:
        self.model = [message for message in self.model if message.state is not MailState.GONE]
        for owner in set(OWNERS.values()):
            own = [message.cost for message in self.model if message.owner == owner]
            assert self.mailboxes.usage(owner) == MailUsage(len(own), sum(own))
            assert len(own) <= LIMITS.credential_messages
            assert sum(own) <= LIMITS.credential_bytes
        assert self.mailboxes.total.bytes == sum(message.cost for message in self.model) <= 9 * MESSAGE_COST
        for recipient in OWNERS:
            expected = [m.envelope for m in self.model if (m.recipient, m.state) == (recipient, MailState.WAITING)]
            assert waiting(self.mailboxes, recipient) == expected
        assert len(self.mailboxes._mailboxes) == len({message.recipient for message in self.model})


TestMailMachine = MailMachine.TestCase
TestMailMachine.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
