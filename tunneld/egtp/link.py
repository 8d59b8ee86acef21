"""One TCP connection between two nodes that have a session: frames in, messages out. The pump's handler of its socket.

    epoll ──► frame ──► session (TLS) ──► `message for you` ──► the carrier, which takes it ──► response
    carrier ──► `message for you` ──► session ──► `_outgoing` ──► one write after the batch

A link knows no streams. It ends with the first thing that goes wrong with its connection or its session; the carrier
decides whether to wait for another one.
"""

from __future__ import annotations

import os
import socket
import struct

from tunneld.egtp.limits import (
    DRAIN_SIZE,
    MAX_LINK_FRAME,
    MAX_REQUEST_VALUES,
    MAX_REQUESTS,
    MAX_UNSENT,
    MESSAGE_COST,
    OTHER_COST,
)
from tunneld.egtp.owners import LinkOwner
from tunneld.egtp.session import NodeSession
from tunneld.engine.events import READABLE, UNTIL_EAGAIN, WRITABLE
from tunneld.engine.pump import Pump
from tunneld.errors import RemoteProtocolError, reason_of
from tunneld.log import Logger
from tunneld.mux.connection import Connection
from tunneld.mux.limits import USER_TIMEOUT_HEARTBEATS, CarrierLimits
from tunneld.wire.egtp.envelope import ID_SIZE, decode_streams
from tunneld.wire.egtp.fast import decode_for_you, decode_received, encode_for_you, encode_received
from tunneld.wire.egtp.frames import FrameReader, pack_frame
from tunneld.wire.egtp.messages import RESPONSE, MojoRequest, MojoResponse, failure_of, parse_message
from tunneld.wire.egtp.relaying import ARE_THERE_MESSAGES, MESSAGE_FOR_YOU, parse_message_for_you, parse_outcome
from tunneld.wire.mencode import MencodeLimits, Value

LENGTH = struct.Struct(">I")
"""The length in front of a frame."""

log = Logger("egtp")


class Link:
    """One connection with a session, which it owns."""

    __slots__ = (
        "_answer", "_answer_to", "_asked", "_connection", "_fd", "_frames", "_me", "_mencode", "_outgoing", "_owner",
        "_pump", "_requests", "_scheduled", "_until_eagain", "_view", "blocked", "closed", "peer", "session",
    )  # fmt: skip

    def __init__(
        self,
        pump: Pump,
        connection: socket.socket,
        session: NodeSession,
        frames: FrameReader,
        limits: CarrierLimits,
        max_values: int = MAX_REQUEST_VALUES,
    ) -> None:
        """`frames` has what was read already. Nothing is read before `start`. `max_values` are those in a message that
        is not one of the two of streams.
        """
        assert session.peer is not None
        self.session = session
        self.blocked = False  # the connection accepts nothing until it is writable
        self.closed = False
        self.peer = session.peer
        self._me = session.own_id
        self._pump = pump
        self._connection = Connection(connection)
        self._fd = connection.fileno()
        self._frames = frames
        self._mencode = MencodeLimits(values=max_values)
        self._outgoing = bytearray()
        self._owner: LinkOwner | None = None
        self._requests: dict[bytes, int] = {}  # by nonce: the number of the message; oldest first
        self._answer = b""  # the nonce of the last message that is to be answered
        self._answer_to = -1  # and its number
        self._asked = b""  # the nonce of `are there messages`, while the response is outstanding
        self._scheduled = False  # a flush comes after the batch
        self._until_eagain = False
        self._view = memoryview(pump.wide_buffer)
        frames.limit = MAX_LINK_FRAME
        self._connection.keep_unsent_below(limits.max_unsent)
        self._connection.limit_retransmission(limits.max_rto, USER_TIMEOUT_HEARTBEATS * limits.heartbeat)

    def start(self, owner: LinkOwner) -> None:
        """Deliver to `owner` from now on. Raises OSError if the connection is closed already."""
        self._owner = owner
        self._pump.attach(self._fd, self)

    # Called by the carrier

    @property
    def pending_output(self) -> int:
        """Bytes that the kernel does not have yet."""
        return len(self._outgoing)

    def round_trip(self) -> float:
        """See `Connection.round_trip`."""
        return self._connection.round_trip()

    def idle_seconds(self) -> float:
        """See `Connection.idle_seconds`."""
        return self._connection.idle_seconds()

    def send_streams(self, number: int, envelope: bytes) -> None:
        """Send a message of streams. The owner is told when it was acknowledged."""
        if len(self._requests) >= MAX_REQUESTS:
            self._end("the peer does not acknowledge")
            return
        nonce = os.urandom(ID_SIZE)
        self._requests[nonce] = number
        self._send(encode_for_you(self.peer.digest, nonce, envelope))

    def ask(self, body: Value) -> None:
        """Send `are there messages`, in place of an earlier one without a response."""
        self._asked = os.urandom(ID_SIZE)
        self._send(MojoRequest(ARE_THERE_MESSAGES, self.peer.digest, self._asked, body).encode())
        self._flush_later()

    def flush(self) -> bool:
        """Write pending output; returns whether the kernel has all of it."""
        self._scheduled = False
        if self.closed or self.blocked:
            return False
        if self._answer:
            answer, self._answer, self._answer_to = self._answer, b"", -1
            self._send(encode_received(answer))
        if self._outgoing:
            try:
                self.blocked = not self._connection.write(self._outgoing)
            except OSError as error:
                self._end(f"connection lost: {reason_of(error)}")
                return False
        return not self.blocked

    def close(self) -> None:
        """Close the connection, after what is pending if the kernel takes that now. Idempotent."""
        if self.closed:
            return
        self.flush()
        if not self.closed:
            self._discard_input()
            self._close()

    # Called by the pump

    def on_event(self, events: int) -> None:
        """Handle events of the socket."""
        if events & UNTIL_EAGAIN:
            self._until_eagain = True
        owner = self._owner
        if events & WRITABLE and self.blocked:
            self.blocked = False
            if self.flush() and owner is not None:
                owner.on_writable()
        if (events & READABLE or len(self._frames)) and not self.closed:  # the handshake may have read more
            self.read()

    def on_failure(self, error: Exception) -> None:
        """A callback raised, which is a bug: it ends this link and nothing else."""
        log.error("link failed: a bug", exc_info=error)
        self._end("internal error")

    def on_stop(self) -> None:
        """The pump stops: there will be no other link."""
        if self._owner is not None:
            self._owner.on_stop()
        self._end("the relay stopped")

    def read(self) -> None:
        """Read until the socket is drained, this turn's quantum is used up, or the owner must wait."""
        owner, connection, quantum, view = self._owner, self._connection, self._pump.quantum, self._view
        if owner is None or not self._process(owner):
            return
        while not self.closed:
            try:
                count = connection.receive_into(view)
            except BlockingIOError:
                return
            except OSError as error:
                self._end(f"connection lost: {reason_of(error)}")
                return
            if not count:
                self._end("the peer closed the connection")
                return
            owner.on_input()
            if not self._take(owner, view[:count]):
                return
            if connection.drained and not self._until_eagain:
                return
            quantum -= count
            if quantum <= 0:
                self._pump.rearm(self._fd)
                return

    # Internal

    def _take(self, owner: LinkOwner, data: memoryview) -> bool:
        """Handle the frames that are complete in `data`, where they are; keep the rest. Returns whether more may be
        read.
        """
        at, size = 0, len(data)
        if not len(self._frames):
            while size - at >= LENGTH.size and not owner.must_wait:
                start = at + LENGTH.size
                end = start + LENGTH.unpack_from(data, at)[0]
                if end > size:
                    break
                at = end
                if not self._receive_envelope(owner, data[start:end]):
                    return False
        if at < size:
            self._frames.feed(data[at:])
        return self._process(owner)

    def _process(self, owner: LinkOwner) -> bool:
        """Handle the frames that are complete among those that were kept. Returns whether more may be read."""
        while not owner.must_wait:
            try:
                frame = self._frames.next_message()
            except RemoteProtocolError as error:
                self._end(f"the peer broke the EGTP protocol: {error}")
                return False
            if frame is None:
                return not self.closed
            if not self._receive_envelope(owner, memoryview(frame)):
                return False
        return False

    def _receive_envelope(self, owner: LinkOwner, envelope: memoryview) -> bool:
        """Handle one frame. Returns whether the link goes on."""
        try:
            for message in self.session.receive(envelope):
                self._receive(owner, message)
        except RemoteProtocolError as error:
            self._answer = b""
            for alert in self.session.take_outgoing():
                self._outgoing += pack_frame(alert)
            self.flush()
            self._end(f"the peer broke the EGTP protocol: {error}")
        return not self.closed

    def _receive(self, owner: LinkOwner, message: memoryview) -> None:
        owner.use(MESSAGE_COST)
        reference = decode_received(message)
        if reference is not None:
            self._acknowledge(owner, reference)
            return
        found = decode_for_you(message, self._me.digest)
        if found is None:
            self._receive_other(owner, bytes(message))
            return
        nonce, envelope = found
        number, frames = decode_streams(envelope)
        if owner.on_streams(number, frames):
            self._answer_later(nonce, number)

    def _receive_other(self, owner: LinkOwner, data: bytes) -> None:
        """A message that is not one of the two of streams, or is encoded in another way."""
        owner.use(OTHER_COST)
        message = parse_message(data, self._mencode)
        if isinstance(message, MojoResponse):
            if message.reference == self._asked:
                self._asked = b""
                if message.failure is not None:
                    raise RemoteProtocolError(f"the peer refused 'are there messages': {message.failure}")
                owner.on_mail(message.body)
            elif message.failure is None and parse_outcome(message.body) is None:
                self._acknowledge(owner, message.reference)
            return
        if message.recipient != self._me.digest:
            raise RemoteProtocolError("a message for another node")
        if message.kind == MESSAGE_FOR_YOU:
            number, frames = decode_streams(memoryview(parse_message_for_you(message.body)))
            if owner.on_streams(number, frames):
                self._answer_later(message.nonce, number)
            return
        try:
            body = owner.on_request(message)
            response = MojoResponse(message.kind + RESPONSE, message.nonce, body, freshness=message.nonce)
        except RemoteProtocolError as error:
            response = failure_of(message, message.nonce, str(error))
        self._send(response.encode())
        self._flush_later()

    def _answer_later(self, nonce: bytes, number: int) -> None:
        """Acknowledge this message and all before it, once everything that is ready has been handled."""
        if number > self._answer_to:
            self._answer, self._answer_to = nonce, number
        self._flush_later()

    def _acknowledge(self, owner: LinkOwner, nonce: bytes) -> None:
        number = self._requests.get(nonce)
        if number is None:
            return
        for each in list(self._requests):  # the peer need not answer those before it
            del self._requests[each]
            if each == nonce:
                break
        owner.on_acknowledged(number)

    def _send(self, message: bytes) -> None:
        if self.closed:
            return
        try:
            head, records, padding = self.session.seal(message)
        except RemoteProtocolError as error:
            self._end(str(error))
            return
        outgoing = self._outgoing
        outgoing += LENGTH.pack(len(head) + len(records) + len(padding))
        outgoing += head
        outgoing += records
        outgoing += padding
        if len(outgoing) > MAX_UNSENT:
            self._end(f"the peer sends but does not read: {len(outgoing)} bytes are pending for it")

    def _flush_later(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._pump.call_after_batch(self._flush_now)

    def _flush_now(self) -> None:
        self.flush()

    def _end(self, reason: str) -> None:
        if not self.closed:
            self._close()
            if self._owner is not None:
                self._owner.on_lost(self, reason)

    def _close(self) -> None:
        self.closed = True
        self._pump.remove(self._fd, self)
        self._connection.close()
        self._requests.clear()

    def _discard_input(self) -> None:
        left = DRAIN_SIZE
        try:
            while left > 0 and (count := self._connection.receive_into(self._view)):
                left -= count
        except OSError:  # BlockingIOError is one
            return
