"""Every kind of end, each with the far side that a test holds: for the conformance suite of ends."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio
from trio.abc import HalfCloseableStream
from trio.testing import memory_stream_pair

from tests.egtp.bench import AssociationOwner, sessions
from tests.engine.bench import Ends, stream, tcp_pair
from tests.mux.bench import RecordingOwner
from tests.support.pki import Pki
from tunneld.egtp.carrier import EgtpCarrier
from tunneld.egtp.limits import AssociationLimits
from tunneld.egtp.link import Link
from tunneld.engine.end import BufferedEnd, End
from tunneld.engine.end_stream import EndStream
from tunneld.engine.engine import Limiter, Relay
from tunneld.engine.limits import EngineLimits
from tunneld.engine.plain_transport import PlainTransport
from tunneld.engine.portable import PortableEngine
from tunneld.engine.pump import Pump
from tunneld.engine.stream_end import StreamEnd
from tunneld.engine.tls_end import TlsEnd
from tunneld.engine.tls_over_end import TlsOverEnd
from tunneld.mux.carrier import Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.connection import Connection
from tunneld.mux.limits import CarrierLimits
from tunneld.tls.connection import TlsSocket
from tunneld.tls.stream import TlsStream

SMALL = {"SO_SNDBUF": 65536, "SO_RCVBUF": 65536}
"""Buffers of connections, so that a slow reader is felt soon."""
MAX_HELD = 2 << 20
"""Bytes that two ends, a relay between them and their connections hold at most, if one side does not read."""
CARRIER = CarrierLimits(max_window=128 * 1024, pause_at=128 * 1024)


@dataclass
class Side:
    """One side of a relay: what the engine gets, and the far stream."""

    near: socket.socket | End
    far: HalfCloseableStream
    reset: Callable[[], None]
    """Break the far side's connection off."""


class EndsBench:
    """A running engine and the ends of one test."""

    def __init__(
        self, engine: Pump | PortableEngine, pki: Pki, stack: AsyncExitStack, stop: Callable[[], None]
    ) -> None:
        """`stop` stops the engine."""
        self.engine = engine
        self.pki = pki
        self.stack = stack
        self.stop = stop

    async def side(self, kind: str) -> Side:
        """A new end of this kind. It is closed after the test."""
        side = await KINDS[kind](self)
        self.stack.push_async_callback(trio.aclose_forcefully, side.far)
        return side

    def tcp(self) -> tuple[socket.socket, socket.socket]:
        """A connection, far and near."""
        far, near = tcp_pair(**SMALL)
        for connection in (far, near):  # a virtual clock does not wait for a delayed acknowledgement
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stack.callback(far.close)
        self.stack.callback(near.close)
        return far, near

    async def join(
        self, visitor: str, server: str, *, linger: float = 30, throttle: Limiter | None = None
    ) -> JoinedSides:
        """A relay between two new ends of these kinds."""
        sides = await self.side(visitor), await self.side(server)
        ends = Ends()
        relay = self.engine.join(sides[0].near, sides[1].near, linger=linger, on_end=ends.note, throttle=throttle)
        return JoinedSides(*sides, relay, ends)


@dataclass
class JoinedSides:
    """A relay and both of its sides."""

    visitor: Side
    server: Side
    relay: Relay
    ends: Ends


async def plain_socket(bench: EndsBench) -> Side:
    far, near = bench.tcp()
    return Side(near, stream(far), lambda: break_off(far))


async def tls_connection(bench: EndsBench) -> Side:
    far, near = bench.tcp()
    ours = TlsSocket(near, bench.pki.server, server_side=True)
    theirs = TlsSocket(far, bench.pki.client, server_hostname="localhost")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.shake_hands)
        nursery.start_soon(theirs.shake_hands)
    end = TlsEnd(pump_of(bench), ours)
    end.start()
    bench.stack.callback(end.reset, "the test is over")
    return Side(end, TlsStream(theirs), lambda: break_off(far))


async def channel(bench: EndsBench) -> Side:
    """A channel of a carrier of its own, whose other carrier is in the same pump."""
    far, near = bench.tcp()
    owner, pump = RecordingOwner(), pump_of(bench)
    relay = Carrier(pump, Connection(near), RecordingOwner(), initiator=False, limits=CARRIER)
    agent = Carrier(pump, Connection(far), owner, initiator=True, limits=CARRIER)
    bench.stack.callback(relay.close)
    bench.stack.callback(agent.close)
    end = relay.open(80)
    there = await owner.channel()
    return Side(end, EndStream(there), lambda: there.reset("broken off by the test"))


async def stream_of_an_association(bench: EndsBench) -> Side:
    """A channel of an EGTP carrier, whose other carrier is in the same pump."""
    far, near = bench.tcp()
    pump, owner = pump_of(bench), AssociationOwner()
    agent_node, relay_node = await sessions(far, near)
    times = AssociationLimits()
    relay = EgtpCarrier(pump, AssociationOwner(), initiator=False, limits=CARRIER, times=times)
    agent = EgtpCarrier(pump, owner, initiator=True, limits=CARRIER, times=times)
    bench.stack.callback(relay.close)
    bench.stack.callback(agent.close)
    for carrier, node in ((relay, relay_node), (agent, agent_node)):
        carrier.attachment.attach(Link(pump, node.connection, node.session, node.frames, CARRIER), 0)
    end = relay.open(80)
    there = await owner.channel()
    return Side(end, EndStream(there), lambda: there.reset("broken off by the test"))


async def tls_over_an_end(bench: EndsBench) -> Side:
    """TLS that ends above an end, here above a socket as one."""
    far, near = bench.tcp()
    below = TlsEnd(pump_of(bench), PlainTransport(near))
    below.start()
    return await _tls_over(bench, below, far)


async def tls_over_a_channel(bench: EndsBench) -> Side:
    """TLS that a relay passes through to the agent's end of a channel."""
    side = await channel(bench)
    assert isinstance(side.near, Channel)
    assert isinstance(side.far, EndStream)
    far, near = bench.tcp()
    bench.engine.join(near, side.near, linger=30, on_end=lambda _relay, _end: None)
    return await _tls_over(bench, side.far._end, far)


async def _tls_over(bench: EndsBench, below: BufferedEnd, far: socket.socket) -> Side:
    theirs, done = TlsSocket(far, bench.pki.client, server_hostname="localhost"), trio.Event()

    def on_done(_end: TlsOverEnd, error: OSError | None) -> None:
        assert error is None
        done.set()

    end = TlsOverEnd(below, bench.pki.server, on_done)
    end.start(b"", timeout=30)
    await theirs.shake_hands()
    await done.wait()
    bench.stack.callback(end.reset, "the test is over")
    return Side(end, TlsStream(theirs), lambda: break_off(far))


async def stream_over_a_socket(bench: EndsBench) -> Side:
    far, near = bench.tcp()
    return Side(StreamEnd(bench.engine, stream(near)), stream(far), lambda: break_off(far))


async def memory_stream(bench: EndsBench) -> Side:
    """A stream without a socket. It cannot be reset."""
    near, far = memory_stream_pair()

    def end() -> None:
        far.send_stream.close()
        far.receive_stream.close()

    return Side(StreamEnd(bench.engine, near), far, end)


KINDS: dict[str, Callable[[EndsBench], Awaitable[Side]]] = {
    "socket": plain_socket,
    "tls": tls_connection,
    "channel": channel,
    "egtp": stream_of_an_association,
    "tls-over-end": tls_over_an_end,
    "tls-over-channel": tls_over_a_channel,
    "stream": stream_over_a_socket,
    "memory": memory_stream,
}
IN_A_PUMP = ("socket", "tls", "channel")
"""The kinds that a pump serves itself; tasks serve the others."""
PORTABLE = ("socket", "stream", "memory")
"""The kinds that exist without a pump."""
ENGINES: dict[str, Callable[[], Pump | PortableEngine]] = {
    "pump": lambda: Pump(EngineLimits()),
    "tiny": lambda: Pump(EngineLimits(buffer_size=512, pipe_size=4096, turn_size=1)),
    "portable": lambda: PortableEngine(EngineLimits()),
}


def pump_of(bench: EndsBench) -> Pump:
    assert isinstance(bench.engine, Pump)
    return bench.engine


def break_off(far: socket.socket) -> None:
    """Close a socket with a reset."""
    if far.fileno() != -1:
        trio.lowlevel.notify_closing(far)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()


@asynccontextmanager
async def ends_bench(engine: str, pki: Pki) -> AsyncIterator[EndsBench]:
    """A running engine; everything is closed after the block."""
    made = ENGINES[engine]()
    stopped = trio.CancelScope()

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        with stopped:
            await made.run(task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        async with AsyncExitStack() as stack:
            yield EndsBench(made, pki, stack, stopped.cancel)
        stopped.cancel()


async def received(far: trio.abc.ReceiveStream) -> tuple[bytes, bool]:
    """Everything that arrives, and whether it ended cleanly."""
    data = bytearray()
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while chunk := await far.receive_some(65536):
            data += chunk
        return bytes(data), True
    return bytes(data), False
