"""The relay service over real sockets: two classic nodes, one of which waits for messages of the other."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing

from tests.egtp.test_service_connection import NONCES, RELAY, Relay
from tests.engine.bench import stream, tcp_pair
from tests.wire.egtp.mesgen.keys import A, B, counted
from tunneld.egtp.passing import PassingLimits
from tunneld.egtp.service_connection import ENOUGH_UNSENT, MAX_WORK
from tunneld.egtp.service_task import serve_node
from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.frames import FrameReader, pack_frame
from tunneld.wire.egtp.ids import id_of
from tunneld.wire.egtp.mesgen import ClassicKey, ClassicPublicKey, MesgenSessions, OpenedEnvelope
from tunneld.wire.egtp.messages import MojoRequest, MojoResponse, parse_message, response_to
from tunneld.wire.egtp.packing import deflate, inflate
from tunneld.wire.egtp.relaying import (
    ARE_THERE_MESSAGES,
    MESSAGE_FOR_YOU,
    PASS_THIS_ALONG,
    MailQuery,
    PassAlong,
    parse_mail,
    success,
)

KEEPALIVE, TURN = 10, trio.Lock()


class RemoteNode:
    """A classic node at the other end of a TCP connection."""

    def __init__(self, far: trio.SocketStream, key: ClassicKey, relay: ClassicPublicKey = RELAY.public) -> None:
        self.far = far
        self.key = key
        self.sessions = MesgenSessions(key, counted())
        self.relay = self.sessions.store_key(relay)
        self.frames = FrameReader()
        self.last: bytes | None = None

    async def send(self, message: MojoRequest | MojoResponse) -> None:
        await self.far.send_all(pack_frame(self.sessions.seal(self.relay, deflate(message.encode()))))

    async def receive(self) -> MojoRequest | MojoResponse:
        while (frame := self.frames.next_message()) is None:
            data = await self.far.receive_some()
            assert data
            self.frames.feed(data)
        opened = self.sessions.open(frame)
        assert isinstance(opened, OpenedEnvelope)
        encoded = inflate(opened.message)
        self.last = id_of(encoded)
        return parse_message(encoded)

    async def ask(self, kind: bytes, body: PassAlong | MailQuery) -> MojoRequest | MojoResponse:
        await self.send(MojoRequest(kind, self.relay, NONCES(20), body.encode(), self.last))
        return await self.receive()


Ended = list[str]
Connect = Callable[..., tuple[RemoteNode, Ended]]


@pytest.fixture
async def connect(nursery: trio.Nursery) -> AsyncIterator[Connect]:
    """Connects a node to a relay; the list gets the reason for which its connection ended."""
    nodes: list[RemoteNode] = []

    def connect(relay: Relay, key: ClassicKey, **options: int) -> tuple[RemoteNode, Ended]:
        far, near = tcp_pair(**options)
        ended: Ended = []

        async def serve(near: socket.socket) -> None:
            with near:
                ended.append(await serve_node(near, relay.connection(), KEEPALIVE, TURN))

        nursery.start_soon(serve, near)
        nodes.append(RemoteNode(stream(far), key))
        return nodes[-1], ended

    yield connect
    for node in nodes:
        node.far.socket.close()


async def test_a_message_goes_down_the_connection_of_its_recipient(connect: Connect) -> None:
    relay = Relay(clock=trio.current_time)
    (a, a_ended), (b, b_ended) = connect(relay, A), connect(relay, B)
    for _ in range(2):
        await b.ask(ARE_THERE_MESSAGES, MailQuery())
    response = await a.ask(PASS_THIS_ALONG, PassAlong(B.node_id, b"hello"))
    assert response.body == success()
    message = await b.receive()
    assert isinstance(message, MojoRequest)
    assert (message.kind, message.body) == (MESSAGE_FOR_YOU, b"hello")
    assert b.last is not None
    await b.send(response_to(message, b.last, success()))
    await b.ask(ARE_THERE_MESSAGES, MailQuery())
    assert relay.service.mailboxes.total.messages == 0
    await a.ask(PASS_THIS_ALONG, PassAlong(B.node_id, b"not acknowledged"))
    await b.receive()
    for node, ended in ((a, a_ended), (b, b_ended)):
        await node.far.aclose()
        while not ended:
            await trio.testing.wait_all_tasks_blocked()
        assert ended[0] in ("the node closed the connection", "connection lost: connection reset by peer")
    assert [message.envelope for message in relay.service.mailboxes.waiting(B.node_id)] == [b"not acknowledged"]


async def test_a_broken_protocol_ends_the_connection(connect: Connect) -> None:
    node, ended = connect(Relay(clock=trio.current_time), A)
    await node.far.send_all(b"\xff\xff\xff\xff")
    with pytest.raises((trio.BrokenResourceError, AssertionError)):
        await node.receive()
    assert ended == [f"EGTP frame of {2**32 - 1} bytes is longer than 262144 bytes"]


async def test_the_timeouts_of_requests_are_applied(connect: Connect, autojump_clock: trio.testing.MockClock) -> None:
    relay = Relay(clock=trio.current_time)
    (a, _), (b, _) = connect(relay, A), connect(relay, B)
    for _ in range(2):
        await b.ask(ARE_THERE_MESSAGES, MailQuery())
    await a.ask(PASS_THIS_ALONG, PassAlong(B.node_id, b"hello"))
    assert list(relay.service.mailboxes.waiting(B.node_id)) == []
    await trio.sleep(301)
    assert [message.envelope for message in relay.service.mailboxes.waiting(B.node_id)] == [b"hello"]


async def test_a_node_that_does_not_read_is_not_read(connect: Connect) -> None:
    """Requests whose responses fill the connection: the relay stops to read, and goes on when there is room."""
    relay = Relay(clock=trio.current_time)
    (a, _), (b, ended) = connect(relay, A), connect(relay, B, SO_RCVBUF=65536, SO_SNDBUF=65536)
    await b.ask(ARE_THERE_MESSAGES, MailQuery(fast_relay=False))
    await a.ask(ARE_THERE_MESSAGES, MailQuery(fast_relay=False))
    for number in range(5):
        await a.ask(PASS_THIS_ALONG, PassAlong(B.node_id, NONCES(ENOUGH_UNSENT // 2) + b"%d" % number))
    body = MailQuery(fast_relay=False).encode()
    for _ in range(100):
        await b.send(MojoRequest(ARE_THERE_MESSAGES, RELAY.node_id, NONCES(20), body, b.last))
    await trio.testing.wait_all_tasks_blocked()
    assert relay.service.mailboxes.total.messages > 0
    counts = [len(parse_mail(response.body).messages) for response in [await b.receive() for _ in range(100)]]
    assert counts == [1] * 5 + [0] * 95
    assert ended == []


async def test_a_node_that_reads_slowly_gets_all_messages(connect: Connect) -> None:
    relay = Relay(clock=trio.current_time)
    relay.limits = PassingLimits(fast_bytes=2**23)
    (a, _), (b, _) = connect(relay, A), connect(relay, B, SO_RCVBUF=65536, SO_SNDBUF=65536)
    for _ in range(2):
        await b.ask(ARE_THERE_MESSAGES, MailQuery())
    await a.ask(ARE_THERE_MESSAGES, MailQuery(fast_relay=False))
    for number in range(4):
        await a.ask(PASS_THIS_ALONG, PassAlong(B.node_id, NONCES(ENOUGH_UNSENT // 2) + b"%d" % number))
    assert [type(await b.receive()) for _ in range(4)] == [MojoRequest] * 4


def test_the_protocol_errors_of_a_connection_are_the_peers() -> None:
    with pytest.raises(RemoteProtocolError):
        Relay().connection().receive(b"\0\0\0\0")


async def test_other_tasks_go_on_while_large_messages_are_opened(connect: Connect, nursery: trio.Nursery) -> None:
    """However many nodes there are, one piece of one message is opened between two turns of the other tasks."""
    relay = Relay(clock=trio.current_time)
    size, turns, answered = 512 * 1024, 0, 0
    nodes = [connect(relay, A)[0] for _ in range(3)]

    async def send(node: RemoteNode) -> None:
        nonlocal answered
        body = PassAlong(B.node_id, os.urandom(size))
        request = MojoRequest(PASS_THIS_ALONG, node.relay, NONCES(20), body.encode(), node.last)
        await node.far.send_all(pack_frame(node.sessions.seal(node.relay, request.encode())))
        await node.receive()
        answered += 1

    for node in nodes:
        await node.ask(ARE_THERE_MESSAGES, MailQuery())
        nursery.start_soon(send, node)
    while answered < len(nodes):
        await trio.lowlevel.checkpoint()
        turns += 1
    assert turns >= len(nodes) * size // MAX_WORK
