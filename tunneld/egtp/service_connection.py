"""One connection of a node that uses the relay service: frames in, frames out. No input or output.

    bytes ──► frame ──► envelope ──► request ──► PassingService ──► response ──► envelope ──► frame ──► `outgoing`
                                      response to `message for you` ──► acknowledged
    PassingService ──`message for you`──► envelope ──► frame ──► `outgoing`

`service_task` drives it: `receive` what was read and write `outgoing`; `on_written` after each write that the kernel
took; `due` at `next_deadline`; `close` once the connection is gone. Any exception of `receive` ends the connection.
`on_output` is called when another connection has caused output on this one.

The envelopes are those of a `NodeEnvelopes`, such as `ClassicEnvelopes` (`classic`). A connection is not bound to one
node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from tunneld.egtp.freshness import FreshnessGuard
from tunneld.egtp.passing import PassingService
from tunneld.errors import LimitReachedError, LocalProtocolError, NotAllowedError, RemoteProtocolError
from tunneld.wire.egtp.frames import FrameReader, pack_frame
from tunneld.wire.egtp.ids import ID_OCTETS, id_of, id_text
from tunneld.wire.egtp.messages import MojoRequest, MojoResponse, failure_of, parse_message, response_to
from tunneld.wire.egtp.relaying import (
    ARE_THERE_MESSAGES,
    MESSAGE_FOR_YOU,
    RETRIEVE_MESSAGES,
    Mail,
    canonical_kind,
    encode_retrieved,
    parse_outcome,
)
from tunneld.wire.egtp.requests import DEFAULT_TIMEOUT, RequestTable
from tunneld.wire.mencode import Value

FRAME_OVERHEAD = 16 * 1024
"""Bytes of a frame around the message that it passes along: header, envelope, mencode."""

MAX_FIRST_FRAME = 256 * 1024
"""Bytes of a frame before a known node has been heard on the connection."""

MAX_BATCH = 16
"""Frames that are handled before other tasks have a turn."""

ENOUGH_UNSENT = 1024 * 1024
"""Bytes of output at which no further request is handled and no `message for you` made. So output is at most this, and
one response.
"""

NOTHING: dict[bytes, Value] = {ARE_THERE_MESSAGES: Mail().encode(), RETRIEVE_MESSAGES: encode_retrieved(())}
"""The responses to requests that are not fresh: what a node gets for which nothing waits."""


class NodeEnvelopes(Protocol):
    """The envelopes of a connection, as the relay's own node opens and makes them."""

    @property
    def can_be_replayed(self) -> bool:
        """Whether an envelope that was recorded can be sent again."""

    def open(self, envelope: bytes) -> list[tuple[bytes, bytes]]:
        """The messages that an envelope completes, packed, each with the id of the node that sent it. Raises
        `RemoteProtocolError`.
        """

    def unpack(self, packed: bytes) -> bytes:
        """The mencoded message in what `open` returned. Raises `RemoteProtocolError`."""

    def seal(self, node: bytes, message: bytes) -> bytes:
        """The envelope of a mencoded message. Raises `LocalProtocolError` if the node has no
        session.
        """

    def take_outgoing(self) -> list[bytes]:
        """Remove and return envelopes that answer envelopes."""

    def request_id(self, request: MojoRequest, encoded: bytes) -> bytes:
        """The id of a request, which its response refers to."""


class ServiceConnection:
    """A connection of nodes that use the relay service. Implements `FastReceiver`."""

    def __init__(
        self,
        own_id: bytes,
        service: PassingService,
        envelopes: NodeEnvelopes,
        guard: FreshnessGuard,
        random: Callable[[int], bytes],
        now: Callable[[], float],
        frames: FrameReader | None = None,
    ) -> None:
        """`guard` belongs to the relay, as the service does. `frames` has what was read already."""
        self.outgoing = bytearray()
        self.on_output: Callable[[], None] = _ignore
        self._own_id = own_id
        self._service = service
        self._envelopes = envelopes
        self._guard = guard
        self._random = random
        self._now = now
        self.heard: bytes | None = None  # the last known node that sent a message
        self._frames = frames or FrameReader()
        self._frames.limit = MAX_FIRST_FRAME
        self._requests = RequestTable()

    @property
    def next_deadline(self) -> float:
        """When to call `due` next; infinity if nothing is outstanding."""
        return self._requests.next_deadline

    def receive(self, data: bytes | bytearray | memoryview) -> bool:
        """Handle bytes that were read, and what was left before. Returns False after `MAX_BATCH` frames or with
        `ENOUGH_UNSENT` bytes of output: then read no more, and call this again, with no bytes, after other tasks had
        their turn and there is room.

        Raises `RemoteProtocolError`, or `NotAllowedError` for a node that is not known; `outgoing` may have a last
        message then.
        """
        self._frames.feed(data)
        for _ in range(MAX_BATCH):
            if len(self.outgoing) >= ENOUGH_UNSENT:
                return False
            if (envelope := self._frames.next_message()) is None:
                return True
            messages = self._envelopes.open(envelope)
            for answer in self._envelopes.take_outgoing():
                self.outgoing += pack_frame(answer)
            for sender, packed in messages:
                self.accept(sender, packed)
        return False

    def accept(self, sender: bytes, packed: bytes) -> None:
        """Handle a message that `sender` sent. Raises as `receive`."""
        if not self._service.knows(sender):  # before anything is decompressed for it
            raise NotAllowedError(f"node {id_text(sender)} is not known to this relay")
        self.heard = sender
        self._frames.limit = self._service.max_message_bytes + FRAME_OVERHEAD
        self._handle(sender, self._envelopes.unpack(packed))

    def on_written(self) -> None:
        """The kernel took output."""
        if len(self.outgoing) < ENOUGH_UNSENT:
            self._service.on_room(self)

    def due(self) -> None:
        """A `message for you` was not answered in time."""
        for entry in self._requests.due(self._now()):
            self._service.on_response(self, entry.message_id, succeeded=False)

    def close(self) -> None:
        """The connection is gone. Idempotent."""
        self._service.on_lost(self)

    def send_message(self, node: bytes, envelope: bytes) -> bytes | None:
        """See `FastReceiver.send_message`."""
        if len(self.outgoing) >= ENOUGH_UNSENT:
            return None
        request = MojoRequest(MESSAGE_FOR_YOU, node, self._random(ID_OCTETS), envelope)
        encoded = request.encode()
        try:
            sealed = self._envelopes.seal(node, encoded)
            request_id = self._envelopes.request_id(request, encoded)
            entry = self._requests.add(request, request_id, self._now(), DEFAULT_TIMEOUT)
        except (LimitReachedError, LocalProtocolError):
            return None
        self._guard.note_sent(node, entry.message_id)
        self.outgoing += pack_frame(sealed)
        self.on_output()
        return entry.message_id

    def _handle(self, sender: bytes, encoded: bytes) -> None:
        message = parse_message(encoded)
        if isinstance(message, MojoResponse):
            self._acknowledge(sender, message)
            return
        if message.recipient != self._own_id:
            raise RemoteProtocolError("EGTP request is for another node than the envelope")
        request_id = self._envelopes.request_id(message, encoded)
        response = self._respond(sender, message, request_id)
        if self._envelopes.can_be_replayed:  # its id must be new, also if the request is a replay
            response = replace(response, header={**response.header, b"nonce": self._random(ID_OCTETS)})
        answer = response.encode()
        self._guard.note_sent(sender, id_of(answer))
        self.outgoing += pack_frame(self._envelopes.seal(sender, answer))
        self._service.on_room(self)

    def _respond(self, sender: bytes, request: MojoRequest, request_id: bytes) -> MojoResponse:
        nothing = NOTHING.get(canonical_kind(request.kind)) if self._envelopes.can_be_replayed else None
        if nothing is not None and not self._guard.is_fresh(sender, request, request_id):
            return response_to(request, request_id, nothing, request_id)
        try:
            body = self._service.on_request(sender, request, self)
        except NotAllowedError as problem:
            return failure_of(request, request_id, str(problem), request_id)
        if body is None:
            return failure_of(request, request_id, "unrecognized message type", request_id)
        return response_to(request, request_id, body, request_id)

    def _acknowledge(self, sender: bytes, response: MojoResponse) -> None:
        entry = self._requests.answered(response, sender)
        if entry is not None:
            succeeded = response.failure is None and parse_outcome(response.body) is None
            self._service.on_response(self, entry.message_id, succeeded)


def _ignore() -> None:
    """Output is written after `receive`."""
