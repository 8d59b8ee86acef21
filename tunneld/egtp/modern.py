"""The modern envelope on a connection of a node that uses the relay service. No input or output.

A session belongs to its connection and to one node, and TLS prevents replays. Messages are not compressed, and the id
of a request is its nonce, as on the connections of tunnels (`wire.egtp.fast`).
"""

from __future__ import annotations

from tunneld.egtp.session import NodeSession
from tunneld.errors import LocalProtocolError, RemoteProtocolError
from tunneld.wire.egtp.messages import MojoRequest
from tunneld.wire.egtp.steps import Steps

SPEED = 32
"""Octets that cost as much as one octet in a classic envelope."""


class ModernEnvelopes:
    """The envelopes of an established session. Implements `NodeEnvelopes`."""

    can_be_replayed = False

    def __init__(self, session: NodeSession) -> None:
        assert session.peer is not None
        self._session = session
        self._peer = session.peer.digest

    def opening(self, envelope: bytes) -> Steps[list[tuple[bytes, bytes]]]:
        """See `NodeEnvelopes.opening`."""
        yield len(envelope) // SPEED
        return [(self._peer, bytes(message)) for message in self._session.receive(memoryview(envelope))]

    def unpack(self, packed: bytes) -> bytes:
        """See `NodeEnvelopes.unpack`."""
        return packed

    def can_seal(self, node: bytes) -> bool:
        """See `NodeEnvelopes.can_seal`: a session has one peer."""
        return node == self._peer

    def sealing(self, node: bytes, message: bytes) -> Steps[bytes]:
        """See `NodeEnvelopes.sealing`."""
        yield len(message) // SPEED
        try:
            return b"".join(self._session.seal(message))
        except RemoteProtocolError as error:
            raise LocalProtocolError(str(error)) from None

    def take_outgoing(self) -> list[bytes]:
        """See `NodeEnvelopes.take_outgoing`."""
        return self._session.take_outgoing()

    def request_id(self, request: MojoRequest, _encoded: bytes) -> bytes:
        """See `NodeEnvelopes.request_id`."""
        return request.nonce
