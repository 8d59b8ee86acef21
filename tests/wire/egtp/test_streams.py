"""Streams in messages: each frame, what a peer may not do, and two machines over a link that loses messages."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tunneld.errors import LimitReachedError, RemoteProtocolError
from tunneld.wire.egtp.delivery import Inbox, Outbox
from tunneld.wire.egtp.streams import (
    ASSOCIATION,
    CREDIT,
    DATA,
    EOF,
    GOODBYE,
    HEADER,
    INITIAL_CREDIT,
    MAX_CREDIT,
    MAX_IDS,
    MAX_TEXT,
    OPEN,
    RESET,
    RETIRE,
    PeerLeft,
    PeerRetired,
    StreamCredit,
    StreamEnded,
    StreamItem,
    StreamOpened,
    StreamReset,
    Streams,
)

TIMEOUT = 10.0


def frame(kind: int, sid: int, value: int | None = None, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, sid, len(payload) if value is None else value) + payload


def receive(streams: Streams, *frames: bytes) -> list[StreamItem]:
    """What the frames of one message mean; data as bytes."""
    streams.receive(b"".join(frames))
    return [
        (item[0], memoryview(bytes(item[1]))) if isinstance(item, tuple) else item for item in streams.parse(1 << 20)
    ]


def taken(streams: Streams) -> bytes:
    """What is to be sent."""
    frames = bytes(streams.outgoing)
    streams.outgoing.clear()
    return frames


def pair() -> tuple[Streams, Streams]:
    """A relay and a node that made the association."""
    return Streams(initiator=False), Streams(initiator=True)


def test_a_stream_from_its_beginning_to_its_end() -> None:
    relay, agent = pair()
    stream = relay.open(b"80")
    relay.send(stream, memoryview(b"hello"))
    relay.finish(stream.sid)
    assert receive(agent, taken(relay)) == [StreamOpened(2, b"80"), (2, memoryview(b"hello")), StreamEnded(2)]
    agent.grant(2, 5)  # nothing: the peer sends no more
    agent.send(agent.streams[2], memoryview(b"bye"))
    agent.finish(2)
    assert not agent.streams
    assert receive(relay, taken(agent)) == [(2, memoryview(b"bye")), StreamEnded(2)]
    assert not relay.streams


def test_ids_are_used_once() -> None:
    relay, agent = pair()
    assert [relay.open(b"").sid for _ in range(3)] == [2, 4, 6]
    assert [agent.open(b"").sid for _ in range(3)] == [1, 3, 5]
    relay._next = MAX_IDS
    with pytest.raises(LimitReachedError):
        relay.open(b"")


def test_nothing_is_sent_without_credit() -> None:
    relay, agent = pair()
    stream = relay.open(b"")
    assert relay.send(stream, memoryview(bytes(INITIAL_CREDIT + 1))) == INITIAL_CREDIT
    assert relay.send(stream, memoryview(b"x")) == 0
    receive(agent, taken(relay))
    agent.grant(2, 3)
    assert receive(relay, taken(agent)) == [StreamCredit(2)]
    assert relay.send(stream, memoryview(b"abcd")) == 3


def test_a_reset_ends_both_directions_and_what_crosses_it_is_ignored() -> None:
    relay, agent = pair()
    stream = relay.open(b"")
    receive(agent, taken(relay))
    agent.reset(2, "no server")
    agent.reset(2, "again")
    relay.send(stream, memoryview(b"late"))
    relay.grant(2, 1)
    relay.finish(2)
    assert receive(agent, taken(relay)) == []
    assert receive(relay, taken(agent)) == [StreamReset(2, "no server")]
    assert receive(agent, frame(RESET, 2)) == []


def test_retirement_and_goodbye() -> None:
    relay, agent = pair()
    relay.open(b"")
    receive(agent, taken(relay))
    agent.retire()
    agent.leave("x" * 1000)
    assert receive(relay, taken(agent)) == [PeerRetired(), PeerLeft("x" * MAX_TEXT)]
    assert not relay.streams
    assert not agent.streams


def test_parsing_stops_after_the_given_number_of_frames_and_goes_on() -> None:
    relay, agent = pair()
    relay.open(b"")
    relay.open(b"")
    first = taken(relay)
    relay.open(b"")
    agent.receive(first)
    agent.receive(taken(relay))
    assert list(agent.parse(1)) == [StreamOpened(2, b"")]
    assert agent.has_unparsed
    assert list(agent.parse(10)) == [StreamOpened(4, b""), StreamOpened(6, b"")]
    assert not agent.has_unparsed


OPENED = frame(OPEN, 2, payload=b"80")

MISTAKES = {
    "a cut header": OPENED[:5],
    "a cut label": frame(OPEN, 2, 5, b"80"),
    "cut data": OPENED + frame(DATA, 2, 5, b"abc"),
    "an unknown kind": frame(99, 0),
    "the wrong parity": frame(OPEN, 1),
    "a gap in the ids": frame(OPEN, 4),
    "an id again": OPENED + OPENED,
    "a long label": frame(OPEN, 2, payload=bytes(MAX_TEXT + 1)),
    "data of no stream": frame(DATA, 2, payload=b"x"),
    "data of the association": frame(DATA, ASSOCIATION, payload=b"x"),
    "credit of no stream": frame(CREDIT, 8, 1),
    "end of no stream": frame(EOF, 3),
    "reset of no stream": frame(RESET, 3),
    "too much data": OPENED + frame(DATA, 2, payload=bytes(INITIAL_CREDIT + 1)),
    "data after the end": OPENED + frame(EOF, 2) + frame(DATA, 2, payload=b"x"),
    "two ends": OPENED + frame(EOF, 2) + frame(EOF, 2),
    "an end with a value": OPENED + frame(EOF, 2, 1),
    "too much credit": OPENED + frame(CREDIT, 2, MAX_CREDIT),
    "retirement of a stream": OPENED + frame(RETIRE, 2),
    "goodbye of a stream": OPENED + frame(GOODBYE, 2),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_peer_may_not_send(mistake: str) -> None:
    with pytest.raises(RemoteProtocolError):
        receive(Streams(initiator=True), MISTAKES[mistake])


class Machine:
    """One end: its streams and the two directions of messages."""

    def __init__(self, *, initiator: bool) -> None:
        self.streams = Streams(initiator=initiator)
        self.outbox = Outbox(max_octets=300_000)
        self.inbox = Inbox(max_octets=2_000)
        self.sent: dict[int, bytes] = {}
        self.received: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.over: set[int] = set()  # reset by either end
        self.opened: list[int] = []

    def handle(self, ready: list[bytes | memoryview] | None) -> None:
        for frames in ready or ():
            self.streams.receive(frames)
        for item in self.streams.parse(1 << 20):
            match item:
                case (sid, data):
                    self.received[sid] += bytes(data)
                case StreamOpened(sid):
                    self.received[sid] = b""
                    self.sent[sid] = b""
                    self.opened.append(sid)
                case StreamEnded(sid):
                    self.ended.add(sid)
                case StreamReset(sid):
                    self.over.add(sid)
                case _:
                    pass


class LossyLink(RuleBasedStateMachine):
    """Two machines; the link between them loses, repeats and reorders messages and responses."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = (Machine(initiator=False), Machine(initiator=True))
        self.link: list[tuple[int, int, bytes | None]] = []  # receiver, number, frames; None: a response
        self.now = 0.0

    def live(self, end: int) -> list[int]:
        return sorted(self.ends[end].streams.streams)

    @rule(end=st.integers(0, 1))
    def open(self, end: int) -> None:
        machine = self.ends[end]
        sid = machine.streams.open(b"80").sid
        machine.sent[sid] = machine.received[sid] = b""

    @rule(end=st.integers(0, 1), data=st.data(), size=st.sampled_from([0, 1, 10, 1000, 50_000]))
    def send(self, end: int, data: st.DataObject, size: int) -> None:
        machine = self.ends[end]
        if machine.streams.streams:
            stream = machine.streams.streams[data.draw(st.sampled_from(self.live(end)))]
            octets = bytes([len(machine.sent[stream.sid]) % 251]) * size
            sent = machine.streams.send(stream, memoryview(octets))
            machine.sent[stream.sid] += octets[:sent]

    @rule(end=st.integers(0, 1), data=st.data(), what=st.sampled_from(["finish", "reset", "grant"]))
    def act(self, end: int, data: st.DataObject, what: str) -> None:
        machine = self.ends[end]
        if machine.streams.streams:
            sid = data.draw(st.sampled_from(self.live(end)))
            if what == "finish":
                machine.streams.finish(sid)
            elif what == "reset":
                machine.streams.reset(sid, "reset")
                machine.over.add(sid)
            else:
                machine.streams.grant(sid, 1000)

    @rule(end=st.integers(0, 1))
    def turn(self, end: int) -> None:
        machine = self.ends[end]
        if machine.streams.outgoing and machine.outbox.has_room:
            frames = taken(machine.streams)
            self.link.append((1 - end, machine.outbox.add(frames, self.now), frames))

    @precondition(lambda self: self.link)
    @rule(data=st.data(), keep=st.booleans())
    def deliver(self, data: st.DataObject, keep: bool) -> None:
        index = data.draw(st.integers(0, len(self.link) - 1))
        self._deliver(self.link[index] if keep else self.link.pop(index))

    @precondition(lambda self: self.link)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.link.pop(data.draw(st.integers(0, len(self.link) - 1)))

    @rule()
    def time_out(self) -> None:
        self.now += TIMEOUT
        for end, machine in enumerate(self.ends):
            for message in machine.outbox.overdue(self.now, TIMEOUT):
                self.link.append((1 - end, message.number, message.frames))

    def _deliver(self, item: tuple[int, int, bytes | None]) -> None:
        receiver, number, frames = item
        machine = self.ends[receiver]
        if frames is None:
            machine.outbox.acknowledge_before(number + 1)
            return
        ready = machine.inbox.receive(number, frames)
        machine.handle(ready)
        if ready is not None:
            self.link.append((1 - receiver, number, None))

    @invariant()
    def nothing_is_repeated_or_reordered(self) -> None:
        for one, other in (self.ends, self.ends[::-1]):
            for sid, received in other.received.items():
                assert one.sent.get(sid, b"").startswith(received)
            assert one.inbox._octets <= 2_000

    def teardown(self) -> None:
        """The link works from now on: everything arrives."""
        for _ in range(200):
            for end in (0, 1):
                self.turn(end)
            self.time_out()
            while self.link:
                self._deliver(self.link.pop(0))
            if all(not end.streams.outgoing and end.outbox.is_empty for end in self.ends):
                break
        for one, other in (self.ends, self.ends[::-1]):
            assert one.outbox.is_empty
            assert one.outbox.octets == 0
            for sid in set(one.sent) - one.over - other.over:
                assert other.received[sid] == one.sent[sid]
            assert other.opened == sorted(other.opened)


LossyLink.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLossyLink = LossyLink.TestCase


@pytest.fixture
def machines() -> tuple[Machine, Machine]:
    return Machine(initiator=False), Machine(initiator=True)


def test_a_message_that_finds_no_room_comes_again(machines: tuple[Machine, Machine]) -> None:
    relay, agent = machines
    first, early = relay.outbox.add(b"", 0.0), relay.outbox.add(bytes(3000), 0.0)
    assert agent.inbox.receive(early, bytes(3000)) is None
    assert agent.inbox.receive(first, b"") == [b""]
    relay.outbox.acknowledge_before(first + 1)
    (again,) = relay.outbox.overdue(TIMEOUT, TIMEOUT)
    assert agent.inbox.receive(again.number, again.frames) == [bytes(3000)]
