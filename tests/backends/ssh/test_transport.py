"""The limits of the socket below an SSH connection."""

from __future__ import annotations

import trio

from tests.engine.bench import tcp_pair
from tests.support.peers import PATIENCE
from tunneld.backends.ssh.transport import MAX_BUFFERED_REPLIES, SshTransport
from tunneld.engine.pump import Pump
from tunneld.mux.connection import Connection
from tunneld.mux.limits import CarrierLimits

PEER = ("192.0.2.7", 50000)
LIMITS = CarrierLimits(pause_at=64 * 1024)


class AmplifyingReceiver:
    """Replies with a thousand bytes to each received byte."""

    def __init__(self) -> None:
        self.received = 0
        self.is_busy = self.has_unparsed = False
        self.read_limit = 0
        self.transport: SshTransport

    def take_partial_packet(self) -> bytes:
        return b""

    def feed(self, data: memoryview) -> None:
        self.received += len(data)
        self.transport.write(bytes(1000) * len(data))


async def test_a_peer_that_does_not_read_replies_is_not_read(engine: Pump) -> None:
    far, near = tcp_pair(SO_SNDBUF=4096, SO_RCVBUF=4096)
    lost: list[str] = []
    receiver = AmplifyingReceiver()
    receiver.transport = transport = SshTransport(engine, Connection(near), PEER, receiver, LIMITS, lost.append)
    transport.start()
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(far))
    with trio.fail_after(PATIENCE):
        sent = 0
        while len(transport.outgoing) <= MAX_BUFFERED_REPLIES * LIMITS.pause_at:
            await peer.send_all(b"?")
            sent += 1
            await trio.testing.wait_all_tasks_blocked()
        await peer.send_all(b"?" * 100)
        await trio.testing.wait_all_tasks_blocked()
        assert receiver.received == sent
        replies = 0
        while replies < 1000 * (sent + 100):
            replies += len(await peer.receive_some())
        assert (receiver.received, lost) == (sent + 100, [])
        transport.abort()
        await peer.aclose()
    assert lost == ["closed"]


async def test_a_busy_receiver_is_not_fed(engine: Pump) -> None:
    far, near = tcp_pair()
    receiver = AmplifyingReceiver()
    receiver.transport = transport = SshTransport(
        engine, Connection(near), PEER, receiver, LIMITS, lambda _reason: None
    )
    transport.start()
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(far))
    with trio.fail_after(PATIENCE):
        receiver.is_busy = True
        await peer.send_all(b"hello")
        await trio.testing.wait_all_tasks_blocked()
        assert receiver.received == 0
        receiver.is_busy = False
        transport.resume_reading()
        while receiver.received != 5:
            await trio.lowlevel.checkpoint()
        transport.end("enough")
        await peer.aclose()
