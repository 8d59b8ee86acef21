"""All sessions of a node with the classic envelope: which kind of envelope is sent, what is received. Pure.

What we send to a peer depends on one state for that peer:

    state      what we send        our message    short message   another header   reject of
                                   to the peer    of our session  from the peer    what we send
    NONE       -                   OFFERED        -               ADOPTED          -
    OFFERED    our header, type 0  OFFERED        CONFIRMED       OFFERED          NONE
    CONFIRMED  our session, type 1 CONFIRMED      CONFIRMED       ADOPTED          NONE
    ADOPTED    its session, type 1 ADOPTED        ADOPTED         ADOPTED          NONE

A header is made once and repeated until the first short message comes back, which acknowledges it. If both ends make
headers at once, both keep sending type 0: the original does so, and it works. A header that is repeated costs the
receiver a hash; only a new one costs an operation with the private key.

A reject proves nothing, so it is believed only if it names the session that we use for the node it names; nodes that do
not see our messages cannot forge one. After it, the caller must store the peer's key again before it can send.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from tunneld.errors import LocalProtocolError
from tunneld.wire.egtp.mesgen.ciphers import BLOCK_OCTETS
from tunneld.wire.egtp.mesgen.envelope import (
    AnyEnvelope,
    EnvelopeError,
    HeaderMessage,
    RejectMessage,
    ShortMessage,
    opening_message,
    parse_envelope,
    sealing_message,
)
from tunneld.wire.egtp.mesgen.header import RandomOctets, SessionKeys, make_header, open_header
from tunneld.wire.egtp.mesgen.keys import ClassicKey, ClassicPublicKey
from tunneld.wire.egtp.steps import Steps, finish

MAX_PEERS = 1024
"""Peers with a key or a session, by default. The one that was not used for longest gives way; about 2 KiB each."""


class UnknownKeyError(LocalProtocolError):
    """A message to a node whose public key is not known, or no longer: `store_key` comes first."""


class SendState(Enum):
    """What is sent to a peer."""

    NONE = auto()
    OFFERED = auto()
    CONFIRMED = auto()
    ADOPTED = auto()


class SessionEvent(Enum):
    """What can change that."""

    SEND = auto()
    SHORT_MESSAGE = auto()
    NEW_HEADER = auto()
    REJECT = auto()


TRANSITIONS = {
    (SendState.NONE, SessionEvent.SEND): SendState.OFFERED,
    (SendState.NONE, SessionEvent.NEW_HEADER): SendState.ADOPTED,
    (SendState.OFFERED, SessionEvent.SEND): SendState.OFFERED,
    (SendState.OFFERED, SessionEvent.SHORT_MESSAGE): SendState.CONFIRMED,
    (SendState.OFFERED, SessionEvent.NEW_HEADER): SendState.OFFERED,
    (SendState.OFFERED, SessionEvent.REJECT): SendState.NONE,
    (SendState.CONFIRMED, SessionEvent.SEND): SendState.CONFIRMED,
    (SendState.CONFIRMED, SessionEvent.SHORT_MESSAGE): SendState.CONFIRMED,
    (SendState.CONFIRMED, SessionEvent.NEW_HEADER): SendState.ADOPTED,
    (SendState.CONFIRMED, SessionEvent.REJECT): SendState.NONE,
    (SendState.ADOPTED, SessionEvent.SEND): SendState.ADOPTED,
    (SendState.ADOPTED, SessionEvent.SHORT_MESSAGE): SendState.ADOPTED,
    (SendState.ADOPTED, SessionEvent.NEW_HEADER): SendState.ADOPTED,
    (SendState.ADOPTED, SessionEvent.REJECT): SendState.NONE,
}


@dataclass(frozen=True, slots=True)
class OpenedEnvelope:
    """A message that `sender`, a node id, sealed for us. It may be a replay: the envelope cannot tell."""

    sender: bytes
    message: bytes


@dataclass(frozen=True, slots=True)
class RejectAnswer:
    """The envelope was of an unknown session; send `envelope` back the way it came."""

    envelope: bytes


@dataclass(frozen=True, slots=True)
class SessionLost:
    """The peer does not know the session any more; what was sent last did not arrive. Its key is forgotten, too."""

    peer: bytes


Received: TypeAlias = OpenedEnvelope | RejectAnswer | SessionLost


@dataclass(slots=True)
class _Peer:
    """What is known of a peer: our session with our header, and the session that the peer's header set up."""

    key: ClassicPublicKey
    state: SendState = SendState.NONE
    header: bytes = b""
    ours: SessionKeys | None = None
    theirs: SessionKeys | None = None
    their_header: bytes = b""  # its hash

    @property
    def sending(self) -> SessionKeys | None:
        return self.theirs if self.state is SendState.ADOPTED else self.ours

    def sessions(self) -> list[SessionKeys]:
        return [session for session in (self.ours, self.theirs) if session is not None]


class MesgenSessions:
    """The envelopes of one node. `random` is its source of random octets."""

    def __init__(self, own: ClassicKey, random: RandomOctets, max_peers: int = MAX_PEERS) -> None:
        self._own = own
        self._random = random
        self._max_peers = max_peers
        self._peers: OrderedDict[bytes, _Peer] = OrderedDict()  # by node id, the one used last at the end
        self._receiving: dict[bytes, tuple[bytes, SessionKeys]] = {}  # by session id, with the peer's id
        self._headers: dict[bytes, SessionKeys] = {}  # of peers, by their hash

    def __len__(self) -> int:
        """Number of peers that are known."""
        return len(self._peers)

    def state(self, peer: bytes) -> SendState:
        """What is sent to a peer."""
        return self._peers[peer].state if peer in self._peers else SendState.NONE

    def store_key(self, key: ClassicPublicKey) -> bytes:
        """Note the public key of a peer, and return its node id."""
        self._peer(key)
        return key.node_id

    def knows(self, peer: bytes) -> bool:
        """Whether the key of a peer is known."""
        return peer in self._peers

    def seal(self, peer: bytes, message: bytes) -> bytes:
        """The envelope of a message to a peer. Raises `UnknownKeyError`."""
        return finish(self.sealing(peer, message))

    def sealing(self, peer: bytes, message: bytes) -> Steps[bytes]:
        """`seal` in steps. Other methods may be called between them."""
        if (known := self._peers.get(peer)) is None:
            raise UnknownKeyError("the public key of the EGTP node is not known")
        self._peers.move_to_end(peer)
        if known.state is SendState.NONE:
            self._make_session(known)
        known.state = TRANSITIONS[known.state, SessionEvent.SEND]
        session = known.sending
        assert session is not None
        header = known.header if known.state is SendState.OFFERED else b""
        iv = self._random(BLOCK_OCTETS)
        ciphertext = yield from sealing_message(session.key, iv, message)
        if header:
            return HeaderMessage(header, iv, ciphertext).encode()
        return ShortMessage(session.sending_id, iv, ciphertext).encode()

    def needs_private_key(self, envelope: bytes) -> bool:
        """Whether `open` would use the private key, which takes about 10 ms: limit how often a sender that is not
        known can cause it. Raises `EnvelopeError`.
        """
        match parse_envelope(envelope):
            case HeaderMessage(header):
                return _digest(header) not in self._headers
        return False

    def open(self, envelope: bytes) -> Received:
        """Open an envelope that arrived. Raises `EnvelopeError`; nothing has changed then."""
        return finish(self.opening(envelope))

    def opening(self, envelope: bytes) -> Steps[Received]:
        """`open` in steps. Other methods may be called between them."""
        parsed: AnyEnvelope = parse_envelope(envelope)
        match parsed:
            case HeaderMessage(header, iv, ciphertext):
                return (yield from self._open_first(header, iv, ciphertext))
            case ShortMessage(session_id, iv, ciphertext):
                if session_id not in self._receiving:
                    return RejectAnswer(RejectMessage(session_id, self._own.node_id).encode())
                peer, session = self._receiving[session_id]
                message = yield from opening_message(session.key, iv, ciphertext)
                self._acknowledged(peer, session)
                return OpenedEnvelope(peer, message)
            case RejectMessage(session_id, node_id):
                return self._rejected(session_id, node_id)

    def forget(self, peer: bytes) -> None:
        """Drop the key and the sessions of a peer."""
        if (known := self._peers.pop(peer, None)) is not None:
            for session in known.sessions():
                self._receiving.pop(session.receiving_id, None)
            self._headers.pop(known.their_header, None)

    def _open_first(self, header: bytes, iv: bytes, ciphertext: bytes) -> Steps[OpenedEnvelope]:
        digest = _digest(header)
        session = self._headers.get(digest)
        if session is not None:
            message = yield from opening_message(session.key, iv, ciphertext)
            if session.peer.node_id in self._peers:
                self._peers.move_to_end(session.peer.node_id)
            return OpenedEnvelope(session.peer.node_id, message)
        session = open_header(self._own, header)
        message = yield from opening_message(session.key, iv, ciphertext)
        self._adopt(session, digest)
        return OpenedEnvelope(session.peer.node_id, message)

    def _adopt(self, session: SessionKeys, digest: bytes) -> None:
        peer = self._peer(session.peer)
        if peer.theirs is not None:
            self._receiving.pop(peer.theirs.receiving_id, None)
            self._headers.pop(peer.their_header, None)
        peer.theirs, peer.their_header = session, digest
        self._headers[digest] = session
        self._receiving[session.receiving_id] = (peer.key.node_id, session)
        peer.state = TRANSITIONS[peer.state, SessionEvent.NEW_HEADER]

    def _acknowledged(self, peer_id: bytes, session: SessionKeys) -> None:
        peer = self._peers.get(peer_id)
        if peer is None:  # it was forgotten between two steps
            return
        self._peers.move_to_end(peer_id)
        if session is peer.ours:
            peer.state = TRANSITIONS[peer.state, SessionEvent.SHORT_MESSAGE]

    def _rejected(self, session_id: bytes, node_id: bytes) -> SessionLost:
        peer = self._peers.get(node_id)
        if peer is None or peer.sending is None or peer.sending.sending_id != session_id:
            raise EnvelopeError("EGTP reject of a session that this node does not use")
        peer.state = TRANSITIONS[peer.state, SessionEvent.REJECT]
        self.forget(node_id)
        return SessionLost(node_id)

    def _make_session(self, peer: _Peer) -> None:
        peer.header, peer.ours = make_header(self._own, peer.key, self._random)
        self._receiving[peer.ours.receiving_id] = (peer.key.node_id, peer.ours)

    def _peer(self, key: ClassicPublicKey) -> _Peer:
        """The peer with this key, now the one used last; new if it is not known."""
        if key.node_id not in self._peers:
            if len(self._peers) >= self._max_peers:
                self.forget(next(iter(self._peers)))
            self._peers[key.node_id] = _Peer(key)
        self._peers.move_to_end(key.node_id)
        return self._peers[key.node_id]


def _digest(header: bytes) -> bytes:
    return hashlib.sha256(header).digest()
