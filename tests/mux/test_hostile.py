"""Peers of a carrier that break the rules on purpose: it costs them something, and nobody else."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import pytest
import trio
from trio.testing import MockClock

from tests.engine.bench import NOISE, Ends, flood, read_all, read_exactly, stream, tcp_pair
from tests.mux.bench import Person, Two
from tunneld.engine.end_relay import MIN_READ_COST, EndRelay
from tunneld.engine.engine import Cause
from tunneld.mux.carrier import FRAGMENTS, MAX_FRAMES_PER_TURN, PREAUTH_EXCEEDED, PREAUTH_LIMIT, Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.connection import Connection
from tunneld.wire.webmux.header import CONTROL, FIN, FIRST_ATOM, LONG, RST, SYN, TWO_WORDS, WORD, Code

pytestmark = pytest.mark.parametrize("two", ["plain"], indirect=True)


class Host(Person):
    """The owner, as the shared port is one: it serves nobody who calls, and welcomes whoever says a name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.at_call: Callable[[], None] = lambda: None
        self.welcomes: Carrier | None = None

    def on_opened(self, channel: Channel, protocol: int) -> None:
        channel.reset("nothing is served here")
        self.calls.append(protocol)
        self.at_call()
        self.stirred.set()

    def on_endpoint(self, uri: str | None) -> None:
        super().on_endpoint(uri)
        if self.welcomes is not None:
            self.welcomes.mark_authenticated()

    async def wait_called(self, protocol: int) -> None:
        while protocol not in self.calls[-1:]:
            self.stirred = trio.Event()
            await self.stirred.wait()


class Raw:
    """The far end of a carrier of the relay's, which says whatever it likes."""

    def __init__(self, two: Two, *, is_strange: bool = False) -> None:
        self.two = two
        self.socket, near = tcp_pair()
        self.person = Host()
        self.stream = stream(self.socket)
        self.carrier = Carrier(
            two.pump, Connection(near), self.person, initiator=False, limits=two.relay.limits, is_strange=is_strange
        )

    async def say(self, *octets: bytes) -> None:
        """Say it, and wait until the carrier has read it."""
        await self.stream.send_all(b"".join(octets))
        await self.settle()

    async def settle(self) -> None:
        """Let everything that was said arrive."""
        await trio.testing.wait_all_tasks_blocked(0.01)

    async def read_away(self) -> None:
        """Read what the carrier says, for ever."""
        with contextlib.suppress(trio.ClosedResourceError):
            while await self.stream.receive_some(65536):
                pass


@pytest.fixture
async def raw(two: Two) -> AsyncIterator[Raw]:
    raw = Raw(two)
    yield raw
    raw.carrier.close()
    await trio.aclose_forcefully(raw.stream)


def head(sid: int, flags: int = 0, value: int = 0) -> bytes:
    return WORD.pack(sid << 24 | flags | value)


CREDIT = CONTROL | Code.ADD_CREDIT << 19
MSS = CONTROL | Code.SET_MSS << 19
NOOP = head(0, CONTROL | Code.NO_OP << 19)


def join(channel: Channel, linger: float = 5) -> tuple[socket.socket, Ends]:
    """A visitor on a channel, and what is told of the relay."""
    (visitor, near), ends = tcp_pair(), Ends()
    channel.join(near, linger=linger, on_end=ends.note)
    return visitor, ends


async def test_data_instead_of_a_sign_of_life_ends_the_question_and_not_the_next_who_has_its_number(
    mock_clock: MockClock, two: Two, raw: Raw
) -> None:
    """A visitor's channel that passed for the question was reset behind its back, and what ended it later the pump."""
    mock_clock.rate = 1
    assert raw.carrier.send_ping()
    question = 3  # the first that an acceptor opens
    await raw.say(head(question, 0, 4), b"what")
    for _ in range(126):  # ids that were not used yet come first
        channel = raw.carrier.open(80)
        await raw.say(head(channel.sid, SYN, 80), head(channel.sid, FIN))
        channel.reset("that is all")
    channel = raw.carrier.open(80)
    assert channel.sid == question
    visitor, ends = join(channel)
    with visitor:
        visitor.shutdown(socket.SHUT_WR)
        await raw.say(head(question, SYN, 80), head(question, 0, 8), b"for this")
        assert visitor.recv(16) == b"for this"
        mock_clock.jump(6)
        assert (await ends.one()).cause is Cause.LINGERED
    assert raw.carrier.send_ping()
    assert not two.relay.over


async def test_a_deadline_or_a_flush_that_fails_ends_nobody_else(two: Two) -> None:
    """Both run in the pump's own tasks, of which there is one each for all."""

    class Faulty:
        deadline = 0.0

        def on_deadline(self) -> None:
            raise ZeroDivisionError

    def write() -> None:
        raise ZeroDivisionError

    flushed = trio.Event()
    two.pump.timers.watch(Faulty())
    two.pump.call_after_batch(write)
    two.pump.call_after_batch(flushed.set)
    await flushed.wait()
    visit = await two.visit()
    await visit.visitor.send_all(b"still here")
    assert await read_exactly(visit.server, 10) == b"still here"


async def test_who_waits_for_a_confirmation_asks_again_where_the_question_was_broken(two: Two, raw: Raw) -> None:
    raw.carrier.request_ack()
    raw.carrier.request_ack()  # while the first is out
    await raw.say(head(3, 0, 4), b"what")
    await raw.say(head(5, SYN))
    assert raw.person.answers == 1


# A storm


class Neighbour:
    """Somebody else in the same pump, who counts their turns."""

    def __init__(self, two: Two) -> None:
        self.turns = 0
        self.far, self.near = tcp_pair()
        self._pump, self._fd = two.pump, self.near.fileno()
        two.pump.attach(self._fd, self)
        two.far.append(stream(self.far))

    def on_event(self, events: int) -> None:
        self.turns += 1
        self._pump.rearm(self._fd)

    def on_failure(self, error: Exception) -> None:
        raise AssertionError from error

    def on_stop(self) -> None:
        """It is closed below."""

    def leave(self) -> None:
        del self._pump.handlers[self._fd]
        self.near.close()


SMALLEST = {
    "noop": head(0, CONTROL | Code.NO_OP << 19),
    "end of nothing": head(2, FIN),
    "reset of nothing": head(2, RST),
    "data of no octets": head(2),
    "call": head(2, SYN) + head(2, RST),
    "a question": head(4, SYN),
    "an octet of credit": head(3, CONTROL | Code.ADD_CREDIT << 19, 1),
    "an octet of data": head(3, 0, 1) + b"....",
}


@pytest.mark.parametrize("what", SMALLEST)
async def test_a_storm_of_the_smallest_fragments_leaves_others_their_turns(two: Two, raw: Raw, what: str) -> None:
    visitor, _ends = join(raw.carrier.open(80))
    await raw.say(head(3, SYN, 80))
    neighbour = Neighbour(two)
    with visitor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raw.read_away)
            raw.person.at_call = lambda: turns.append(neighbour.turns)
            turns: list[int] = []
            await raw.stream.send_all(
                head(6, SYN, 80) + SMALLEST[what] * (40 * MAX_FRAMES_PER_TURN) + head(8, SYN, 4711)
            )
            await raw.person.wait_called(4711)
            nursery.cancel_scope.cancel()
    assert turns[-1] - turns[0] >= 40
    neighbour.leave()


async def test_of_a_storm_nothing_is_lost(two: Two, raw: Raw) -> None:
    visitor, ends = join(raw.carrier.open(80))
    text = NOISE[: 20 * MAX_FRAMES_PER_TURN]
    octets = [head(3, 0, 1) + text[at : at + 1] + b"..." for at in range(len(text))]
    await raw.stream.send_all(head(3, SYN, 80) + b"".join(octets) + head(3, FIN))
    far = stream(visitor)
    assert await read_all(far) == text
    await far.aclose()
    assert (await ends.one()).cause is Cause.FINISHED


# Somebody who has not said whose the carrier is


@pytest.fixture
async def stranger(two: Two) -> AsyncIterator[Raw]:
    raw = Raw(two, is_strange=True)
    yield raw
    raw.carrier.close()
    await trio.aclose_forcefully(raw.stream)


async def test_somebody_strange_may_say_so_much_and_no_octet_more(stranger: Raw) -> None:
    await stranger.say(NOOP * (PREAUTH_LIMIT // 4 - 1))
    await stranger.say(NOOP)
    assert stranger.person.reason is None
    await stranger.say(b"\0")
    assert stranger.person.reason == PREAUTH_EXCEEDED


async def test_who_is_welcome_may_go_on_in_the_same_breath(two: Two) -> None:
    raw = Raw(two, is_strange=True)
    raw.person.welcomes = raw.carrier
    name = b"webmux://localhost:1/key"
    named = head(0, CONTROL | Code.INTERN_ATOM << 19, len(name)) + name
    named += head(0, CONTROL | Code.DEFINE_ENDPOINT << 19, FIRST_ATOM)
    await raw.say(NOOP * 500 + named + NOOP * PREAUTH_LIMIT + head(6, SYN, 4711))
    assert raw.person.uris == [name.decode()]
    assert raw.person.calls[-1] == 4711
    assert not raw.carrier.over
    raw.carrier.close()
    await trio.aclose_forcefully(raw.stream)


# What is held and what waits


async def test_what_a_window_has_grown_by_is_not_anothers_while_it_is_held(two: Two, raw: Raw) -> None:
    """Else each channel that ends with a visitor who does not read holds as much as all of a carrier may."""
    channel = raw.carrier.open(80)
    assert channel.window._budget.reserve(1 << 20)
    channel.window.size += 1 << 20
    budget = channel.window._budget
    left = budget.left
    await raw.say(head(3, SYN, 80), head(3, 0, 1000), bytes(1000))
    channel.finish()
    await raw.say(head(3, FIN))
    assert not raw.carrier.channels
    assert (len(channel.buffered), budget.left) == (1000, left)
    channel.consume(999)
    assert budget.left == left
    channel.consume(1)
    assert budget.left == left + (1 << 20) == raw.carrier.limits.memory


async def test_what_is_taken_after_the_end_gives_nobody_a_larger_window(two: Two, raw: Raw) -> None:
    """Nobody would ever give back what that had grown by."""
    channel = raw.carrier.open(80)
    await raw.say(head(3, SYN, 80), head(3, 0, 65536), bytes(65536))
    channel.finish()
    await raw.say(head(3, FIN))
    channel.consume(len(channel.buffered))
    assert channel.window._budget.left == raw.carrier.limits.memory


async def test_a_channel_that_was_lost_says_nothing_with_a_number_that_is_anothers(raw: Raw) -> None:
    """A visitor who had to wait gets its channel in one moment, and is paired in another."""
    lost = raw.carrier.open(80)
    await raw.say(head(3, RST))
    raw.carrier.mux._lives.ids._settled.rotate(1)
    assert raw.carrier.open(80).sid == lost.sid
    with pytest.raises(ConnectionResetError):
        lost.send(b"PROXY ...")


async def test_who_waits_for_a_full_carrier_waits_once(two: Two, raw: Raw) -> None:
    """However often its peer grants an octet more, and reads none."""
    visitors = [join(raw.carrier.open(80))[0] for _ in range(3)]
    await raw.say(*(head(sid, SYN, 80) + TWO_WORDS.pack(sid << 24 | CREDIT | LONG, 1 << 30) for sid in (3, 5, 7)))
    async with trio.open_nursery() as nursery:
        for visitor in visitors:
            two.far.append(stream(visitor))
            nursery.start_soon(flood, two.far[-1])
        outbox = raw.carrier._outbox
        while len(outbox._paused) < 3:
            await trio.lowlevel.checkpoint()
        for _ in range(20):
            await raw.say(*(head(sid, CREDIT, 1) for sid in (3, 5, 7)))
        assert len(outbox._paused) == 3
        nursery.cancel_scope.cancel()


class Recorder:
    """In the place of a joint in the pump: how many octets each of its turns moves."""

    def __init__(self, joint: EndRelay) -> None:
        self.joint = joint
        self.steps: list[int] = []
        self.on_failure, self.on_stop = joint.on_failure, joint.on_stop

    def on_event(self, events: int) -> None:
        before = self.joint.from_socket
        self.joint.on_event(events)
        self.steps.append(self.joint.from_socket - before)


async def test_who_wants_single_octets_of_a_visitor_who_says_much_has_a_turn_and_no_more(two: Two, raw: Raw) -> None:
    """Each read makes 256 fragments then, and costs as much as one of 64 KiB."""
    channel = raw.carrier.open(80)
    visitor, _ends = join(channel)
    await raw.say(head(3, SYN, 80), TWO_WORDS.pack(3 << 24 | CREDIT | LONG, 1 << 30), head(0, MSS, 1))
    assert isinstance(channel.handler, EndRelay)
    recorder = two.pump.handlers[channel.handler.fd] = Recorder(channel.handler)
    with visitor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raw.read_away)
            said = visitor.send(NOISE)
            while channel.handler.from_socket < said:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    assert 0 < max(recorder.steps) <= channel.quantum // MIN_READ_COST * FRAGMENTS
