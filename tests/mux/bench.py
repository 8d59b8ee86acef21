"""Fixtures of the carriers' tests: two carriers on one connection, and the far ends of the relays on them."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from tests.engine.bench import Ends, stream, tcp_pair
from tests.support.pki import Pki
from tests.support.private import ALICE, BOB
from tunneld.engine.engine import Limiter, Relay
from tunneld.engine.limits import EngineLimits
from tunneld.engine.plain_transport import PlainTransport
from tunneld.engine.pump import Pump
from tunneld.engine.tls_end import TlsEnd
from tunneld.engine.tls_over_end import TlsOverEnd
from tunneld.mux.carrier import Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.connection import connection_over
from tunneld.mux.end_connection import EndConnection
from tunneld.mux.limits import CarrierLimits
from tunneld.mux.transport import CarrierTransport
from tunneld.tls.connection import TlsSocket, shake_hands
from tunneld.tls.identity import peer_context

LIMIT = 30
"""Seconds, real or virtual, after which a test fails."""


class RecordingOwner:
    """The owner of a carrier: accepts every channel and records the callbacks."""

    def __init__(self) -> None:
        self.uris: list[str | None] = []
        self.pongs = self.unresponsive_calls = self.capacity_calls = 0
        self.reason: str | None = None
        self._opened, self._channels = trio.open_memory_channel[Channel](1000)
        self.closed = trio.Event()
        self.called = trio.Event()

    async def channel(self) -> Channel:
        """The next channel that the peer opened."""
        return await self._channels.receive()

    def channel_nowait(self) -> Channel:
        """The next channel that the peer has opened already. Raises `trio.WouldBlock`."""
        return self._channels.receive_nowait()

    def on_opened(self, channel: Channel, protocol: int) -> None:
        channel.accept()
        self._opened.send_nowait(channel)

    def on_endpoint(self, uri: str | None) -> None:
        self.uris.append(uri)
        self.called.set()

    def on_capacity(self) -> None:
        self.capacity_calls += 1

    def on_over(self, _channel: Channel) -> None:
        self.on_capacity()

    def on_pong(self) -> None:
        self.pongs += 1
        self.called.set()

    def on_unresponsive(self) -> None:
        self.unresponsive_calls += 1

    def on_closed(self, reason: str) -> None:
        self.reason = reason
        self.closed.set()


@dataclass
class RelayedVisit:
    """A visitor relayed through both carriers, and the two far ends."""

    visitor: trio.SocketStream
    server: trio.SocketStream
    relays: tuple[Relay, Relay]
    ends: tuple[Ends, Ends]


@dataclass
class CarrierPair:
    """The relay's carrier and the agent's, in one pump."""

    pump: Pump
    relay: Carrier
    agent: Carrier
    relay_owner: RecordingOwner
    agent_owner: RecordingOwner
    far: list[trio.SocketStream] = field(default_factory=list)

    async def channels(self) -> tuple[Channel, Channel]:
        """A channel that the relay opened: its end at the relay and its end at the agent."""
        near = self.relay.open(80)
        return near, await self.agent_owner.channel()

    async def visit(self, *, linger: float = 10, throttle: Limiter | None = None, **options: int) -> RelayedVisit:
        """Join a visitor and a local server by a channel; `options` are socket options of both."""
        near, far = await self.channels()
        (visitor, near_visitor), (server, near_server) = tcp_pair(**options), tcp_pair(**options)
        ends = Ends(), Ends()
        relays = (
            self.pump.join(near_visitor, near, linger=linger, on_end=ends[0].note, throttle=throttle),
            self.pump.join(far, near_server, linger=linger, on_end=ends[1].note),
        )
        visit = RelayedVisit(stream(visitor), stream(server), relays, ends)
        self.far += [visit.visitor, visit.server]
        return visit


@asynccontextmanager
async def carrier_pair(
    certificates: Pki | None, limits: CarrierLimits | None = None, *, over_ends: bool = False
) -> AsyncIterator[CarrierPair]:
    """Two carriers on one connection, in TLS if there are certificates. Everything is closed after the block.
    `over_ends`: that connection is another end, as in a private tunnel.
    """
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            pump = Pump(EngineLimits())
            await nursery.start(pump.run)
            one, other = tcp_pair()
            here, there = (one, other) if certificates is None else await _encrypt(one, other, certificates)
            below: list[CarrierTransport]
            if over_ends:
                below = [EndConnection(end) for end in await _private_ends(pump, other, one)]
            else:
                below = [connection_over(there), connection_over(here)]
            owners, limits = (RecordingOwner(), RecordingOwner()), limits or CarrierLimits()
            pair = CarrierPair(
                pump,
                Carrier(pump, below[0], owners[0], initiator=False, limits=limits),
                Carrier(pump, below[1], owners[1], initiator=True, limits=limits),
                *owners,
            )
            yield pair
            pair.relay.close()
            pair.agent.close()
        for far in pair.far:
            await trio.aclose_forcefully(far)
        nursery.cancel_scope.cancel()


async def _encrypt(near: socket.socket, far: socket.socket, certificates: Pki) -> tuple[TlsSocket, TlsSocket]:
    done: list[TlsSocket] = []

    async def answer() -> None:
        done.append(await shake_hands(far, certificates.server, server_side=True))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        client = await shake_hands(near, certificates.client, server_hostname="localhost")
    return client, done[0]


async def _private_ends(pump: Pump, host: socket.socket, visitor: socket.socket) -> tuple[TlsOverEnd, TlsOverEnd]:
    """The two ends of a visit to a private tunnel: TLS over other ends."""
    done: list[OSError | None] = []
    changed = trio.Event()

    def on_done(_end: TlsOverEnd, error: OSError | None) -> None:
        done.append(error)
        changed.set()

    made = []
    for near, own, peer, is_server in ((host, ALICE, BOB, True), (visitor, BOB, ALICE, False)):
        below = TlsEnd(pump, PlainTransport(near))
        below.start()
        context = peer_context(own, peer.certificate, server_side=is_server)
        made.append(TlsOverEnd(below, context, on_done, server_side=is_server))
    for end in made:
        end.start(b"", LIMIT)
    while len(done) < len(made):
        await changed.wait()
        changed = trio.Event()
    assert done == [None, None]
    return made[0], made[1]
