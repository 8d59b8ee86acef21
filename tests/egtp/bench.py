"""Fixtures of the EGTP carriers' tests: two nodes, the link between them, and whoever tampers with that."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import trio

from tests.engine.bench import Ends, stream, tcp_pair
from tunneld.egtp.carrier import EgtpCarrier
from tunneld.egtp.handshake import NodeConnection, accept_session, begin_session
from tunneld.egtp.limits import AssociationLimits
from tunneld.egtp.link import Link
from tunneld.engine.limits import EngineLimits
from tunneld.engine.pump import Pump
from tunneld.mux.channel import Channel
from tunneld.mux.limits import CarrierLimits
from tunneld.tls.identity import Identity
from tunneld.wire.egtp.frames import FrameReader, pack_frame

RELAY, AGENT = Identity.from_seed(bytes(32)), Identity.from_seed(b"\x01" * 32)
LIMIT = 30
"""Seconds, real or virtual, after which a test fails."""

FROM_AGENT, FROM_RELAY = 0, 1
Tamper = Callable[[int, int, bytes], Sequence[bytes]]
"""Gets the direction, the number of the frame in it and the frame; returns what is passed on."""


class AssociationOwner:
    """The owner of an association: keeps its channels and records the callbacks."""

    def __init__(self) -> None:
        self.labels: list[bytes] = []
        self.retired = 0
        self.settled = 0
        self.detached: list[str] = []
        self.polled: list[int] = []
        self.reason: str | None = None
        self.changed = trio.Event()
        self._opened, self._channels = trio.open_memory_channel[Channel](1000)

    async def channel(self) -> Channel:
        """The next channel that the peer opened."""
        return await self._channels.receive()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a callback after which the condition is true."""
        while not condition():
            await self.changed.wait()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def on_opened(self, channel: Channel, label: bytes) -> None:
        self.labels.append(label)
        self._opened.send_nowait(channel)

    def on_capacity(self) -> None:
        self._notify()

    def on_retired(self) -> None:
        self.retired += 1
        self._notify()

    def on_settled(self) -> None:
        self.settled += 1
        self._notify()

    def on_unresponsive(self) -> None:
        self._notify()

    def on_detached(self, reason: str) -> None:
        self.detached.append(reason)
        self._notify()

    def on_output(self) -> None:
        self._notify()

    def on_polled(self, count: int) -> None:
        self.polled.append(count)
        self._notify()

    def on_closed(self, reason: str) -> None:
        self.reason = reason
        self._notify()


@dataclass
class NodePair:
    """An association at the relay and at the agent, in one pump."""

    pump: Pump
    nursery: trio.Nursery
    relay: EgtpCarrier
    agent: EgtpCarrier
    relay_owner: AssociationOwner
    agent_owner: AssociationOwner
    far: list[trio.SocketStream] = field(default_factory=list)

    async def connect(self, tamper: Tamper | None = None) -> None:
        """Make a link, in place of the present one; `tamper` sees all of its frames."""
        near, far = tcp_pair() if tamper is None else self._tampered(tamper)
        agent, relay = await sessions(near, far)
        received = self.relay.attachment.inbox.next, self.agent.attachment.inbox.next
        for carrier, node, number in ((self.agent, agent, received[0]), (self.relay, relay, received[1])):
            link = Link(self.pump, node.connection, node.session, node.frames, carrier.limits)
            carrier.attachment.attach(link, number)

    def _tampered(self, tamper: Tamper) -> tuple[socket.socket, socket.socket]:
        (near, one), (far, other) = tcp_pair(), tcp_pair()
        ends = stream(one), stream(other)
        self.far += ends
        self.nursery.start_soon(_pass_on, FROM_AGENT, *ends, tamper)
        self.nursery.start_soon(_pass_on, FROM_RELAY, *ends[::-1], tamper)
        return near, far

    async def channels(self) -> tuple[Channel, Channel]:
        """A channel that the relay opened: its end at the relay and its end at the agent."""
        near = self.relay.open(80)
        return near, await self.agent_owner.channel()

    async def visit(self) -> tuple[trio.SocketStream, trio.SocketStream, tuple[Ends, Ends]]:
        """Join a visitor and a local server by a channel."""
        near, far = await self.channels()
        (visitor, near_visitor), (server, near_server) = tcp_pair(), tcp_pair()
        ends = Ends(), Ends()
        self.pump.join(near_visitor, near, linger=10, on_end=ends[0].note)
        self.pump.join(far, near_server, linger=10, on_end=ends[1].note)
        self.far += [stream(visitor), stream(server)]
        return self.far[-2], self.far[-1], ends


async def sessions(near: socket.socket, far: socket.socket) -> tuple[NodeConnection, NodeConnection]:
    """The sessions of an agent and a relay that are connected."""
    accepted: list[NodeConnection] = []

    async def accept() -> None:
        accepted.append(await accept_session(far, lambda _recipient: RELAY))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        begun = await begin_session(near, AGENT, RELAY.id)
    return begun, accepted[0]


async def _pass_on(direction: int, source: trio.SocketStream, target: trio.SocketStream, tamper: Tamper) -> None:
    """Pass frames on as `tamper` says, until either side ends."""
    frames, number = FrameReader(), 0
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in source:
            frames.feed(data)
            while (frame := frames.next_message()) is not None:
                for each in tamper(direction, number, frame):
                    await target.send_all(pack_frame(each))
                number += 1
        await target.send_eof()


@asynccontextmanager
async def node_pair(
    limits: CarrierLimits | None = None, times: AssociationLimits | None = None
) -> AsyncIterator[NodePair]:
    """Two nodes that are not connected yet. Everything is closed after the block."""
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            pump = Pump(EngineLimits())
            await nursery.start(pump.run)
            owners = AssociationOwner(), AssociationOwner()
            relay, agent = (
                EgtpCarrier(
                    pump,
                    owner,
                    initiator=initiator,
                    limits=limits or CarrierLimits(),
                    times=times or AssociationLimits(),
                )
                for owner, initiator in zip(owners, (False, True), strict=True)
            )
            pair = NodePair(pump, nursery, relay, agent, *owners)
            yield pair
            pair.relay.close()
            pair.agent.close()
        for far in pair.far:
            await trio.aclose_forcefully(far)
        nursery.cancel_scope.cancel()
