"""Peers of a carrier that break the rules on purpose: it costs them something, and nobody else."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from tests.relay.bench import Ends, read_exactly, stream, tcp_pair
from tests.session.bench import Person, Two
from tunneld.relay import Cause
from tunneld.session import Carrier, Channel, Link
from tunneld.wire.webmux.header import FIN, SYN, WORD

pytestmark = pytest.mark.parametrize("two", ["plain"], indirect=True)


class Raw:
    """The far end of a carrier of the relay's, which says whatever it likes."""

    def __init__(self, two: Two) -> None:
        self.two = two
        self.socket, near = tcp_pair()
        self.person = Person()
        self.stream = stream(self.socket)
        self.carrier = Carrier(two.pump, Link(near), self.person, initiator=False, limits=two.relay.limits)

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
    assert raw.carrier.ask()
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
    assert raw.carrier.ask()
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
    two.pump.after_batch(write)
    two.pump.after_batch(flushed.set)
    await flushed.wait()
    visit = await two.visit()
    await visit.visitor.send_all(b"still here")
    assert await read_exactly(visit.server, 10) == b"still here"


async def test_who_waits_for_a_confirmation_asks_again_where_the_question_was_broken(two: Two, raw: Raw) -> None:
    raw.carrier.confirm()
    raw.carrier.confirm()  # while the first is out
    await raw.say(head(3, 0, 4), b"what")
    await raw.say(head(5, SYN))
    assert raw.person.answers == 1
