"""One connection of a node that uses the relay service: frames in, frames out. No input or output.

    bytes ──► frame ──► envelope ──► request ──► PassingService ──► response ──► envelope ──► frame ──► `outgoing`
                                      response to `message for you` ──► acknowledged
    PassingService ──`message for you`──► envelope ──► frame ──► `outgoing`

`service_task` drives it: `receive` what was read and write `outgoing`; `on_written` after each write that the kernel
took; `due` at `next_deadline`; `close` once the connection is gone. Any exception of `receive` ends the connection.
`on_output` is called when another connection has caused output on this one, which `seal_more` may have to complete.

Classic envelopes are slow: 120 ms to open one of 1 MiB and to seal the answer. So opening and sealing go in steps, and
`MAX_WORK` octets at a time.

The envelopes are those of a `NodeEnvelopes`, such as `ClassicEnvelopes` (`classic`). A connection is not bound to one
node.
"""

from __future__ import annotations

from collections import deque
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
from tunneld.wire.egtp.steps import Result, Steps
from tunneld.wire.mencode import MencodeLimits, Value

FRAME_OVERHEAD = 16 * 1024
"""Bytes of a frame around the message that it passes along: header, envelope, mencode."""

MESSAGE_LIMITS = MencodeLimits(values=2048)
"""Of the messages of nodes: a request for 256 messages has 1800 values. A hostile one takes 15 ms to parse."""

MAX_FIRST_FRAME = 256 * 1024
"""Bytes of a frame before a known node has been heard on the connection."""

MAX_WORK = 32 * 1024
"""Octets of envelopes that are opened and sealed before other tasks have a turn: 3 ms with classic envelopes."""

FRAME_WORK = 2 * 1024
"""Octets that opening or sealing costs in addition, whatever its size."""

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

    def opening(self, envelope: bytes) -> Steps[list[tuple[bytes, bytes]]]:
        """The messages that an envelope completes, packed, each with the id of the node that sent it. Raises
        `RemoteProtocolError`. Other methods may be called between the steps.
        """

    def unpack(self, packed: bytes) -> bytes:
        """The mencoded message in what `open` returned. Raises `RemoteProtocolError`."""

    def can_seal(self, node: bytes) -> bool:
        """Whether there can be envelopes for this node: its key is known."""

    def sealing(self, node: bytes, message: bytes) -> Steps[bytes]:
        """The envelope of a mencoded message. Raises `LocalProtocolError` if that is not possible any more. Other
        methods may be called between the steps.
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
        self._opening: Steps[list[tuple[bytes, bytes]]] | None = None
        self._sealing: deque[tuple[Steps[bytes], int]] = deque()  # in the order of the output, with their sizes
        self._unsealed = 0  # octets of them
        self._work = MAX_WORK  # octets left for this turn

    @property
    def unsent(self) -> int:
        """Bytes of output, the messages that are to be sealed included."""
        return len(self.outgoing) + self._unsealed

    @property
    def has_unsealed(self) -> bool:
        """Whether `seal_more` has something to do."""
        return bool(self._sealing)

    @property
    def next_deadline(self) -> float:
        """When to call `due` next; infinity if nothing is outstanding."""
        return self._requests.next_deadline

    def receive(self, data: bytes | bytearray | memoryview) -> bool:
        """Handle bytes that were read, and what was left before. Returns False after `MAX_WORK` octets or with
        `ENOUGH_UNSENT` bytes of output: then read no more, and call this again, with no bytes, after other tasks had
        their turn and there is room.

        Raises `RemoteProtocolError`, or `NotAllowedError` for a node that is not known; `outgoing` may have a last
        message then.
        """
        self._frames.feed(data)
        self._work = MAX_WORK
        while self._work > 0:
            if not self._seal() or self.unsent >= ENOUGH_UNSENT:
                return False
            if self._opening is None:
                if (envelope := self._frames.next_message()) is None:
                    return True
                self._work -= FRAME_WORK
                self._opening = self._envelopes.opening(envelope)
            messages = self._advance(self._opening)
            if messages is None:
                return False
            self._opening = None
            for answer in self._envelopes.take_outgoing():
                self.outgoing += pack_frame(answer)
            for sender, packed in messages:
                self.accept(sender, packed)
        return not (self._opening or self._sealing or len(self._frames))

    def seal_more(self) -> None:
        """Go on to seal messages, for one turn."""
        self._work = MAX_WORK
        self._seal()

    def accept(self, sender: bytes, packed: bytes) -> None:
        """Handle a message that `sender` sent. Raises as `receive`."""
        if not self._service.knows(sender):  # before anything is decompressed for it
            raise NotAllowedError(f"node {id_text(sender)} is not known to this relay")
        self.heard = sender
        self._frames.limit = self._service.max_message_bytes + FRAME_OVERHEAD
        self._handle(sender, self._envelopes.unpack(packed))

    def on_written(self) -> None:
        """The kernel took output."""
        if self.unsent < ENOUGH_UNSENT:
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
        if self.unsent >= ENOUGH_UNSENT or not self._envelopes.can_seal(node):
            return None
        request = MojoRequest(MESSAGE_FOR_YOU, node, self._random(ID_OCTETS), envelope)
        encoded = request.encode()
        try:
            request_id = self._envelopes.request_id(request, encoded)
            entry = self._requests.add(request, request_id, self._now(), DEFAULT_TIMEOUT)
        except LimitReachedError:
            return None
        self._guard.note_sent(node, entry.message_id)
        self._send(node, encoded)
        self.on_output()
        return entry.message_id

    def _handle(self, sender: bytes, encoded: bytes) -> None:
        self._work -= min(len(encoded), MAX_WORK)
        message = parse_message(encoded, MESSAGE_LIMITS)
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
        self._send(sender, answer)
        self._service.on_room(self)

    def _send(self, node: bytes, message: bytes) -> None:
        """Have a message sealed, in this turn if there is time left, after those before it."""
        self._sealing.append((self._envelopes.sealing(node, message), len(message)))
        self._unsealed += len(message)
        self._seal()

    def _seal(self) -> bool:
        """Seal messages as far as this turn goes; returns whether all are sealed."""
        while self._sealing and self._work > 0:
            steps, size = self._sealing[0]
            try:
                sealed = self._advance(steps)
            except LocalProtocolError:
                sealed = b""  # its key was forgotten; a message that is not answered is sent again
            if sealed is None:
                return False
            self._work -= FRAME_WORK
            self._sealing.popleft()
            self._unsealed -= size
            if sealed:
                self.outgoing += pack_frame(sealed)
        return not self._sealing

    def _advance(self, steps: Steps[Result]) -> Result | None:
        """Take steps as far as this turn goes; returns the result after the last one."""
        try:
            while self._work > 0:
                self._work -= next(steps)
        except StopIteration as done:
            result: Result = done.value
            return result
        return None

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
