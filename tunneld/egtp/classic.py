"""Classic envelopes for the connections of a relay. Imported only if `egtp.classic` is on; `wire.egtp.mesgen`
says why they protect nothing today. No input or output.
"""

from __future__ import annotations

from collections.abc import Callable

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.ids import id_of
from tunneld.wire.egtp.mesgen import MesgenSessions, OpenedEnvelope, RejectAnswer, SessionLost
from tunneld.wire.egtp.messages import MojoRequest
from tunneld.wire.egtp.packing import deflating, inflate
from tunneld.wire.egtp.steps import Steps


class ClassicEnvelopes:
    """The classic envelopes on one connection. `sessions` belong to the relay; `admits_session` takes a token for each
    operation with the private key. Implements `NodeEnvelopes`.
    """

    can_be_replayed = True

    def __init__(self, sessions: MesgenSessions, admits_session: Callable[[], bool]) -> None:
        self._sessions = sessions
        self._admits_session = admits_session
        self._outgoing: list[bytes] = []

    def opening(self, envelope: bytes) -> Steps[list[tuple[bytes, bytes]]]:
        """See `NodeEnvelopes.opening`."""
        if self._sessions.needs_private_key(envelope) and not self._admits_session():
            raise RemoteProtocolError("too many new EGTP sessions; try again later")
        match (yield from self._sessions.opening(envelope)):
            case OpenedEnvelope(sender, packed):
                return [(sender, packed)]
            case RejectAnswer(answer):
                self._outgoing.append(answer)
            case SessionLost():
                pass  # the messages of that session time out
        return []

    def unpack(self, packed: bytes) -> bytes:
        """See `NodeEnvelopes.unpack`."""
        return inflate(packed)

    def can_seal(self, node: bytes) -> bool:
        """See `NodeEnvelopes.can_seal`."""
        return self._sessions.knows(node)

    def sealing(self, node: bytes, message: bytes) -> Steps[bytes]:
        """See `NodeEnvelopes.sealing`."""
        packed = yield from deflating(message)
        return (yield from self._sessions.sealing(node, packed))

    def take_outgoing(self) -> list[bytes]:
        """See `NodeEnvelopes.take_outgoing`."""
        taken, self._outgoing = self._outgoing, []
        return taken

    def request_id(self, _request: MojoRequest, encoded: bytes) -> bytes:
        """See `NodeEnvelopes.request_id`."""
        return id_of(encoded)
