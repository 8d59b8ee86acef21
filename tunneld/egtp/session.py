"""One session of the modern envelope: TLS 1.3 inside EGTP messages, between two nodes that know each other's ids.

    initiator                            acceptor
    hello: its certificate       ──►
                                 ◄──     hello: its certificate     each compares it with the id
    records 0: ClientHello       ──►
                                 ◄──     records 0: ServerHello ... Finished
    records 1: Finished          ──►
    records 2: a message         ──►     from here on, one message in each envelope, in both directions
                                 ◄──     records 1: a message

Hellos are not authenticated: they only say which certificate is to be trusted for this handshake, and TLS proves that
the peer has its key. TLS also makes sure that nothing is altered, left out, repeated or reordered; the number of an
envelope only lets the receiver put right what the way between the nodes does by itself. If something is lost there, the
session is over, and the nodes begin another one.

This does no input or output: envelopes in, envelopes out.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tunneld.errors import NoSuchTunnelError, NotAllowedError, RemoteProtocolError, reason_of
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import Identity, node_id, peer_context
from tunneld.tls.session import TlsSession
from tunneld.wire.egtp.delivery import Inbox
from tunneld.wire.egtp.envelope import (
    ID_SIZE,
    HelloEnvelope,
    RecordsEnvelope,
    decode_envelope,
    encode_hello,
    encode_records,
    encode_reject,
    records_parts,
)

PROTOCOL = "tunneld-egtp"
"""ALPN of the TLS connection (RFC 7301), so that no other use of the same keys can be confused with this one."""
UNKNOWN_NODE = "no open tunnel has this node id"
MAX_EARLY_RECORDS = 64 * 1024
"""Octets of envelopes that are kept because an earlier one has not come."""


class RejectedError(RemoteProtocolError):
    """The peer does not know this session, or the id. Nothing proves that it was the peer who said so."""


FindIdentity = Callable[[bytes], Identity | None]
"""Returns the identity with this id, if this program has it."""


class NodeSession:
    """One end of a session."""

    __slots__ = ("_find", "_identity", "_inbox", "_next", "_outgoing", "_session", "_tls", "established", "peer")

    def __init__(self, identity: Identity | None, peer: NodeId | None, find: FindIdentity) -> None:
        """Use `initiate` or `accept`."""
        self.peer = peer  # known for an acceptor after the hello, and proved once the session is established
        self.established = False  # messages may be sent
        self._find = find
        self._identity = identity
        self._session = b""
        self._inbox = Inbox(MAX_EARLY_RECORDS)
        self._next = 0  # the number of our next records
        self._outgoing: list[bytes] = []
        self._tls: TlsSession | None = None

    @classmethod
    def initiate(cls, identity: Identity, peer: NodeId) -> NodeSession:
        """Begin a session with the node that has this id."""
        made = cls(identity, peer, _find_none)
        made._session = os.urandom(ID_SIZE)
        made._outgoing.append(encode_hello(peer.digest, made._session, identity.certificate))
        return made

    @classmethod
    def accept(cls, find: FindIdentity) -> NodeSession:
        """Wait for another node to begin a session with one of the nodes that `find` knows."""
        return cls(None, None, find)

    @property
    def own_id(self) -> NodeId:
        """The id of this end, for an acceptor after the hello."""
        assert self._identity is not None
        return self._identity.id

    def take_outgoing(self) -> list[bytes]:
        """The envelopes that are to be sent now."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def receive(self, envelope: memoryview) -> list[memoryview]:
        """Take an envelope, whose memory the caller may reuse then. Returns the messages that are complete now, in
        order.

        Raises `RemoteProtocolError`, or `NotAllowedError` where the peer has another id; the session is over then.
        """
        match decode_envelope(envelope):
            case HelloEnvelope(recipient, session, certificate):
                self._receive_hello(recipient, session, certificate)
                return []
            case RecordsEnvelope(session, number, records):
                if session != self._session or self._tls is None:
                    raise RemoteProtocolError("records of another session")
                if number != self._inbox.next:
                    records = memoryview(bytes(records))  # it may be kept; the caller reuses its memory
                ready = self._inbox.receive(number, records)
                return [message for each in ready or () for message in self._receive_records(each)]
            case rejected:
                raise RejectedError(f"the peer rejected the session: {rejected.reason or 'no reason given'}")

    def seal(self, message: bytes) -> tuple[bytes, bytes, bytes]:
        """The parts of the envelope with this message. Raises `RemoteProtocolError` if the session is over."""
        assert self._tls is not None
        try:
            with memoryview(message) as view:
                self._tls.write(view)
        except OSError as error:
            raise RemoteProtocolError(f"TLS: {reason_of(error)}") from None
        number, self._next = self._next, self._next + 1
        return records_parts(self._session, number, self._tls.take_output())

    def _receive_hello(self, recipient: bytes, session: bytes, certificate: bytes) -> None:
        is_initiator = bool(self._session)
        if self._tls is not None or (is_initiator and session != self._session):
            raise RemoteProtocolError("a second hello" if self._tls is not None else "a hello of another session")
        identity = self._identity or self._find(recipient)
        if identity is None:
            self._outgoing.append(encode_reject(session, recipient, UNKNOWN_NODE))
            raise NoSuchTunnelError(UNKNOWN_NODE)
        if recipient != identity.id.digest:
            raise RemoteProtocolError("a hello for another node")
        sender = node_id(certificate)
        if self.peer is not None and sender != self.peer:
            raise NotAllowedError(f"the peer is node {sender}, not {self.peer}")
        context = peer_context(identity, certificate, server_side=not is_initiator, protocol=PROTOCOL)
        self.peer, self._session, self._identity = sender, session, identity
        self._tls = TlsSession(context, server_side=not is_initiator)
        if is_initiator:
            self._advance(self._tls)
        else:
            self._outgoing.append(encode_hello(sender.digest, session, identity.certificate))

    def _receive_records(self, records: bytes | memoryview) -> list[memoryview]:
        tls = self._tls
        assert tls is not None
        if not len(records):
            raise RemoteProtocolError("records without octets")
        tls.feed(records)
        if not self.established:
            self._advance(tls)
            return []
        plain = memoryview(bytearray(len(records)))
        try:
            size = tls.decrypt(plain)
        except OSError as error:
            raise RemoteProtocolError(f"TLS: {reason_of(error)}") from None
        if tls.ended:
            raise RemoteProtocolError("the peer ended the session")
        return [plain[:size]] if size else []

    def _advance(self, tls: TlsSession) -> None:
        try:
            done = tls.advance_handshake()
        except OSError as error:
            if alert := tls.take_output():
                self._outgoing.append(self._records(alert))
            raise RemoteProtocolError(f"TLS: {reason_of(error)}") from None
        if output := tls.take_output():
            self._outgoing.append(self._records(output))
        if done and tls.protocol != PROTOCOL:
            raise RemoteProtocolError("the peer's TLS connection is not one of EGTP")
        self.established = done

    def _records(self, records: bytes) -> bytes:
        number, self._next = self._next, self._next + 1
        return encode_records(self._session, number, records)


def _find_none(_recipient: bytes) -> None:
    """An initiator has one identity."""
