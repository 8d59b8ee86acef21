"""Numbered messages at their edges; tests/wire/egtp/test_streams.py has two machines over a link that loses some."""

from __future__ import annotations

from tunneld.wire.egtp.delivery import MAX_EARLY, WINDOW, Inbox, Outbox


def test_messages_are_delivered_in_order_and_once() -> None:
    inbox = Inbox()
    assert inbox.receive(1, b"b") is None
    assert inbox.receive(2, b"c") is None
    assert inbox.receive(1, b"b") is None
    assert inbox.receive(0, b"a") == [b"a", b"b", b"c"]
    for number in (0, 1, 2):
        assert inbox.receive(number, b"again") == []
    assert inbox.next == 3


def test_an_early_message_beyond_the_window_or_the_room_is_not_answered() -> None:
    inbox = Inbox()
    for number, size in ((WINDOW, 0), (WINDOW - 1, 0), (1, MAX_EARLY), (2, 1)):
        assert inbox.receive(number, bytes(size)) is None
    assert len(inbox._early) == 2
    assert len(inbox.receive(0, b"") or ()) == 2
    assert inbox.receive(3, b"x") is None
    assert len(inbox._early) == 2


def test_the_outbox_is_full_by_number_and_by_size() -> None:
    outbox = Outbox(max_octets=10)
    assert outbox.add(bytes(100), 0.0) == 0  # one message always has room
    assert not outbox.has_room
    outbox.acknowledge_before(1)
    outbox.acknowledge_before(1)  # late
    assert outbox.octets == 0
    assert outbox.is_empty
    outbox = Outbox()
    for _ in range(WINDOW):
        assert outbox.has_room
        outbox.add(b"", 0.0)
    assert not outbox.has_room
    outbox.acknowledge_before(0)
    assert not outbox.has_room
    outbox.acknowledge_before(1)
    assert outbox.has_room


def test_what_is_overdue_is_sent_again_until_it_is_acknowledged() -> None:
    outbox = Outbox()
    outbox.add(b"a", 0.0)
    outbox.add(b"b", 5.0)
    assert [message.number for message in outbox.overdue(10.0, 10.0)] == [0]
    assert outbox.overdue(11.0, 10.0) == []
    assert [message.number for message in outbox.overdue(20.0, 10.0)] == [0, 1]
    outbox.acknowledge_before(1)
    assert [message.number for message in outbox.overdue(99.0, 10.0)] == [1]
    outbox.acknowledge_before(2)
    assert outbox.is_empty
