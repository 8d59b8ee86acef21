"""The socket below an SSH connection: what is bounded there."""

from __future__ import annotations

import trio

from tests.engine.bench import tcp_pair
from tests.support.people import PATIENCE
from tunneld.backends.ssh.transport import ANSWERS, SshTransport
from tunneld.engine.pump import Pump
from tunneld.mux.connection import Connection
from tunneld.mux.limits import CarrierLimits

LIMITS = CarrierLimits(pause_at=64 * 1024)


class Chatterbox:
    """Answers each octet with a thousand, until it is told to be busy."""

    def __init__(self) -> None:
        self.heard = 0
        self.is_busy = self.has_unparsed = False
        self.read_limit = 0
        self.transport: SshTransport

    def take_partial_packet(self) -> bytes:
        return b""

    def feed(self, data: memoryview) -> None:
        self.heard += len(data)
        self.transport.write(bytes(1000) * len(data))


async def test_who_asks_and_does_not_read_the_answers_is_not_read_either(engine: Pump) -> None:
    far, near = tcp_pair(SO_SNDBUF=4096, SO_RCVBUF=4096)
    lost: list[str] = []
    box = Chatterbox()
    box.transport = transport = SshTransport(engine, Connection(near), box, LIMITS, lost.append)
    transport.start()
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(far))
    with trio.fail_after(PATIENCE):
        sent = 0
        while len(transport.outgoing) <= ANSWERS * LIMITS.pause_at:
            await peer.send_all(b"?")
            sent += 1
            await trio.testing.wait_all_tasks_blocked()
        await peer.send_all(b"?" * 100)
        await trio.testing.wait_all_tasks_blocked()
        assert box.heard == sent
        answers = 0
        while answers < 1000 * (sent + 100):
            answers += len(await peer.receive_some())
        assert (box.heard, lost) == (sent + 100, [])
        transport.abort()
        await peer.aclose()
    assert lost == ["closed"]


async def test_who_is_busy_is_not_told_more_until_it_is_not(engine: Pump) -> None:
    far, near = tcp_pair()
    box = Chatterbox()
    box.transport = transport = SshTransport(engine, Connection(near), box, LIMITS, lambda _reason: None)
    transport.start()
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(far))
    with trio.fail_after(PATIENCE):
        box.is_busy = True
        await peer.send_all(b"hello")
        await trio.testing.wait_all_tasks_blocked()
        assert box.heard == 0
        box.is_busy = False
        transport.resume_reading()
        while box.heard != 5:
            await trio.lowlevel.checkpoint()
        transport.end("enough")
        await peer.aclose()
