"""What the tests of carriers have in common: two of them back to back, and the far ends of what they join."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from tests.engine.bench import Ends, stream, tcp_pair
from tests.support.papers import Papers
from tunneld.engine.engine import Limiter, Relay, Side
from tunneld.engine.limits import EngineLimits
from tunneld.engine.pump import Pump
from tunneld.mux.carrier import Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.connection import connection_over
from tunneld.mux.limits import CarrierLimits
from tunneld.tls.connection import TlsSocket, shake_hands

LIMIT = 30
"""Seconds, virtual ones included, after which a test has failed."""


class Person:
    """The owner of a carrier: remembers what it was told."""

    def __init__(self) -> None:
        self.uris: list[str | None] = []
        self.answers = self.silences = self.freedoms = 0
        self.reason: str | None = None
        self._opened, self._channels = trio.open_memory_channel[Channel](1000)
        self.over = trio.Event()
        self.stirred = trio.Event()

    async def channel(self) -> Channel:
        """The next channel that the peer opened."""
        return await self._channels.receive()

    def channel_nowait(self) -> Channel:
        """The same, if there is one. Raises `trio.WouldBlock`."""
        return self._channels.receive_nowait()

    def on_opened(self, channel: Channel, protocol: int) -> None:
        channel.accept()
        self._opened.send_nowait(channel)

    def on_endpoint(self, uri: str | None) -> None:
        self.uris.append(uri)
        self.stirred.set()

    def on_capacity(self) -> None:
        self.freedoms += 1

    def on_pong(self) -> None:
        self.answers += 1
        self.stirred.set()

    def on_unresponsive(self) -> None:
        self.silences += 1

    def on_closed(self, reason: str) -> None:
        self.reason = reason
        self.over.set()


@dataclass
class Visit:
    """A visitor's relay through both carriers, and the two far ends."""

    visitor: trio.SocketStream
    server: trio.SocketStream
    relays: tuple[Relay, Relay]
    ends: tuple[Ends, Ends]


@dataclass
class Two:
    """A relay's carrier and an agent's, in one pump."""

    pump: Pump
    relay: Carrier
    agent: Carrier
    relays_owner: Person
    agents_owner: Person
    far: list[trio.SocketStream] = field(default_factory=list)

    async def channels(self) -> tuple[Channel, Channel]:
        """A channel that the relay opened, at both ends."""
        near = self.relay.open(80)
        return near, await self.agents_owner.channel()

    async def visit(self, *, linger: float = 10, throttle: Limiter | None = None, **options: int) -> Visit:
        """A visitor joined to a local server by a channel; `options` are those of both sockets."""
        near, far = await self.channels()
        (visitor, near_visitor), (server, near_server) = tcp_pair(**options), tcp_pair(**options)
        ends = Ends(), Ends()
        relays = (
            near.join(near_visitor, linger=linger, on_end=ends[0].note, throttle=throttle),
            far.join(near_server, linger=linger, on_end=ends[1].note, side=Side.SERVER),
        )
        visit = Visit(stream(visitor), stream(server), relays, ends)
        self.far += [visit.visitor, visit.server]
        return visit


@asynccontextmanager
async def two_carriers(papers: Papers | None, limits: CarrierLimits | None = None) -> AsyncIterator[Two]:
    """Two carriers on one connection, in TLS where there are papers; nothing is left of them after the block."""
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            pump = Pump(EngineLimits())
            await nursery.start(pump.run)
            one, other = tcp_pair()
            here, there = (one, other) if papers is None else await _encrypt(one, other, papers)
            people, limits = (Person(), Person()), limits or CarrierLimits()
            two = Two(
                pump,
                Carrier(pump, connection_over(there), people[0], initiator=False, limits=limits),
                Carrier(pump, connection_over(here), people[1], initiator=True, limits=limits),
                *people,
            )
            yield two
            two.relay.close()
            two.agent.close()
        for far in two.far:
            await trio.aclose_forcefully(far)
        nursery.cancel_scope.cancel()


async def _encrypt(near: socket.socket, far: socket.socket, papers: Papers) -> tuple[TlsSocket, TlsSocket]:
    done: list[TlsSocket] = []

    async def answer() -> None:
        done.append(await shake_hands(far, papers.server, server_side=True))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        mine = await shake_hands(near, papers.client, server_hostname="localhost")
    return mine, done[0]
