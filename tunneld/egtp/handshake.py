"""The first messages on a new connection between two nodes, in a task: the session, and one request with its response.

    agent     begin_session ──► ask: `are there messages`, and wait for the response
    relay     accept_session ──► receive: the request; judge it; answer

After that the connection needs no task: a `Link` takes it over, with the bytes that were read already.
"""

from __future__ import annotations

import os
import socket

import trio

from tunneld.egtp.limits import MAX_LINK_FRAME
from tunneld.egtp.session import FindIdentity, NodeSession
from tunneld.errors import NoSuchTunnelError, NotAllowedError, RefusedError, RemoteProtocolError
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import Identity
from tunneld.wire.egtp.envelope import ID_SIZE
from tunneld.wire.egtp.frames import FrameReader, pack_frame
from tunneld.wire.egtp.messages import RESPONSE, MojoRequest, MojoResponse, failure_of, parse_message
from tunneld.wire.egtp.relaying import ARE_THERE_MESSAGES
from tunneld.wire.mencode import Value

MAX_HANDSHAKE_FRAME = 8 * 1024
"""Octets of a frame of a peer that is not authenticated: a certificate and a TLS handshake."""
READ_SIZE = 64 * 1024
CLOSED_EARLY = "the peer closed the connection during the handshake"


class NodeConnection:
    """A connection with a session, while a task serves it. The caller owns the socket."""

    def __init__(self, connection: socket.socket, session: NodeSession) -> None:
        self.connection = connection
        self.session = session
        self.frames = FrameReader(MAX_HANDSHAKE_FRAME)
        self.has_received = False
        self._messages: list[memoryview] = []

    async def establish(self) -> None:
        """Do the handshake. Raises OSError, `RemoteProtocolError` or `NotAllowedError`."""
        try:
            await self._send_envelopes()
            while not self.session.established:
                await self._advance()
            await self._send_envelopes()
        except (RemoteProtocolError, NotAllowedError, NoSuchTunnelError):
            await self._send_envelopes()  # an alert or a rejection
            raise

    async def send(self, message: bytes) -> None:
        """Send one message. Raises OSError or `RemoteProtocolError`."""
        await self._write(pack_frame(b"".join(self.session.seal(message))))

    async def receive(self) -> bytes:
        """The next message. Raises OSError or `RemoteProtocolError`."""
        while not self._messages:
            await self._advance()
        return bytes(self._messages.pop(0))

    def take_messages(self) -> list[bytes]:
        """Remove and return the messages that were read already, for the caller that takes the connection over."""
        taken, self._messages = self._messages, []
        return [bytes(message) for message in taken]

    async def ask(self, body: Value) -> Value:
        """Send `are there messages` and return the body of the response. Raises OSError, `RemoteProtocolError`, or
        `RefusedError` if the peer answered with a failure.
        """
        assert self.session.peer is not None
        nonce = os.urandom(ID_SIZE)
        await self.send(MojoRequest(ARE_THERE_MESSAGES, self.session.peer.digest, nonce, body).encode())
        response = parse_message(await self.receive())
        if not isinstance(response, MojoResponse) or response.reference != nonce:
            raise RemoteProtocolError("the response to 'are there messages' is missing")
        if response.failure is not None:
            raise RefusedError("refused", response.failure)
        return response.body

    async def receive_request(self) -> MojoRequest:
        """The first request. Raises OSError or `RemoteProtocolError`."""
        request = parse_message(await self.receive())
        if not isinstance(request, MojoRequest) or request.recipient != self.session.own_id.digest:
            raise RemoteProtocolError("expected a request to this node")
        return request

    async def respond(self, request: MojoRequest, body: Value) -> None:
        """Answer a request. Raises OSError or `RemoteProtocolError`."""
        await self.send(MojoResponse(request.kind + RESPONSE, request.nonce, body, freshness=request.nonce).encode())

    async def refuse(self, request: MojoRequest, reason: str) -> None:
        """Answer a request with a failure. Raises OSError or `RemoteProtocolError`."""
        await self.send(failure_of(request, request.nonce, reason).encode())

    async def _advance(self) -> None:
        """Read until there is another envelope, and handle it."""
        while (frame := self.frames.next_message()) is None:
            await trio.lowlevel.wait_readable(self.connection)
            try:
                data = self.connection.recv(min(READ_SIZE, self.frames.limit))
            except BlockingIOError:
                continue
            if not data:
                raise RemoteProtocolError(CLOSED_EARLY)
            self.has_received = True
            self.frames.feed(data)
        self._messages += self.session.receive(memoryview(frame))
        await self._send_envelopes()

    async def _send_envelopes(self) -> None:
        for envelope in self.session.take_outgoing():
            await self._write(pack_frame(envelope))

    async def _write(self, data: bytes) -> None:
        with memoryview(data) as left:
            sent = 0
            while sent < len(left):
                try:
                    sent += self.connection.send(left[sent:])
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.connection)


async def begin_session(connection: socket.socket, identity: Identity, peer: NodeId) -> NodeConnection:
    """Begin a session with the node that has this id. Raises OSError, `RemoteProtocolError` or `NotAllowedError`."""
    made = NodeConnection(connection, NodeSession.initiate(identity, peer))
    await made.establish()
    made.frames.limit = MAX_LINK_FRAME  # the response to a poll has the messages that wait
    return made


async def accept_session(connection: socket.socket, find: FindIdentity, received: bytes = b"") -> NodeConnection:
    """Let another node begin a session. Raises as `begin_session`, and `NoSuchTunnelError` for an unknown node."""
    made = NodeConnection(connection, NodeSession.accept(find))
    made.frames.feed(received)
    await made.establish()
    return made
