"""The table of outstanding requests of a node: which response fits, which request has timed out. Pure.

    state     soft timeout    response     timeout
    WAITING   OVERDUE         ANSWERED     EXPIRED
    OVERDUE   -               ANSWERED     EXPIRED
    ANSWERED, EXPIRED         not in the table any more

The response is the only acknowledgement and nothing is sent again, so a request ends in exactly one of two ways. The
soft timeout only notifies the caller. A response that comes late or twice finds no request and is dropped.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from enum import Enum, auto

from tunneld.errors import LimitReachedError, LocalProtocolError, RemoteProtocolError
from tunneld.wire.egtp.messages import RESPONSE, MojoRequest, MojoResponse
from tunneld.wire.egtp.relaying import canonical_kind

DEFAULT_TIMEOUT = 300.0
"""Seconds until a request without a response has failed."""

MAX_TIMEOUT = 3600.0
"""Seconds of the longest timeout; the original drops any response that comes later."""

MAX_OUTSTANDING = 4096
"""Requests that may wait at once, by default: about 400 bytes each."""


class RequestState(Enum):
    """The state of a request that was sent."""

    WAITING = auto()
    OVERDUE = auto()
    ANSWERED = auto()
    EXPIRED = auto()


class RequestEvent(Enum):
    """What happens to a request that was sent."""

    SOFT_TIMEOUT = auto()
    RESPONSE = auto()
    TIMEOUT = auto()


TRANSITIONS = {
    (RequestState.WAITING, RequestEvent.SOFT_TIMEOUT): RequestState.OVERDUE,
    (RequestState.WAITING, RequestEvent.RESPONSE): RequestState.ANSWERED,
    (RequestState.WAITING, RequestEvent.TIMEOUT): RequestState.EXPIRED,
    (RequestState.OVERDUE, RequestEvent.RESPONSE): RequestState.ANSWERED,
    (RequestState.OVERDUE, RequestEvent.TIMEOUT): RequestState.EXPIRED,
}
ENDED = frozenset({RequestState.ANSWERED, RequestState.EXPIRED})


@dataclass(slots=True)
class OutstandingRequest:
    """A request that was sent to `peer`, by the id of the message. Times are in seconds, of the caller's clock."""

    message_id: bytes
    kind: bytes
    peer: bytes
    deadline: float
    soft_deadline: float
    state: RequestState = RequestState.WAITING


class RequestTable:
    """All outstanding requests of a node."""

    def __init__(self, limit: int = MAX_OUTSTANDING) -> None:
        self._limit = limit
        self._requests: dict[bytes, OutstandingRequest] = {}
        self._deadlines: list[tuple[float, bytes]] = []  # a heap; entries of ended requests are skipped and swept

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def next_deadline(self) -> float:
        """When to call `due` next; infinity if nothing is outstanding."""
        self._sweep()
        return self._deadlines[0][0] if self._deadlines else math.inf

    def add(
        self,
        request: MojoRequest,
        message_id: bytes,
        now: float,
        timeout: float = DEFAULT_TIMEOUT,
        soft_timeout: float = math.inf,
    ) -> OutstandingRequest:
        """Note a request that is about to be sent to its recipient; `message_id` is what a response will refer to.

        Raises `LocalProtocolError` for a timeout out of range or a message that is outstanding already (its nonce was
        used twice), `LimitReachedError` if too many are outstanding.
        """
        if not 0 < timeout <= MAX_TIMEOUT:
            raise LocalProtocolError(
                f"request timeout of {timeout:g} s is out of range; the largest is {MAX_TIMEOUT:g}"
            )
        if len(self._requests) >= self._limit:
            raise LimitReachedError(f"too many EGTP requests wait for a response: {self._limit}; try again later")
        if message_id in self._requests:
            raise LocalProtocolError("the same EGTP request is outstanding already; use a new nonce")
        entry = OutstandingRequest(message_id, request.kind, request.recipient, now + timeout, now + soft_timeout)
        self._requests[message_id] = entry
        heapq.heappush(self._deadlines, (min(entry.deadline, entry.soft_deadline), message_id))
        return entry

    def answered(self, response: MojoResponse, sender: bytes) -> OutstandingRequest | None:
        """Remove and return the request of a response that `sender` sent; None if it is late, or a duplicate.

        Raises `RemoteProtocolError`, and keeps the request, if it was sent to another peer or is of another type.
        """
        entry = self._requests.get(response.reference)
        if entry is None:
            return None
        if entry.peer != sender:
            raise RemoteProtocolError("EGTP response from another node than the one that was asked")
        if canonical_kind(response.kind.removesuffix(RESPONSE)) != canonical_kind(entry.kind):
            raise RemoteProtocolError(f"EGTP response of type {ascii(response.kind)[1:]} to {ascii(entry.kind)[1:]}")
        self._move(entry, RequestEvent.RESPONSE)
        return entry

    def due(self, now: float) -> list[OutstandingRequest]:
        """Apply the timeouts that have passed, and return their requests: each is now OVERDUE or EXPIRED."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now:
            message_id = heapq.heappop(self._deadlines)[1]
            if (entry := self._requests.get(message_id)) is None:
                continue
            if entry.deadline <= now:
                self._move(entry, RequestEvent.TIMEOUT)
            else:
                self._move(entry, RequestEvent.SOFT_TIMEOUT)
                heapq.heappush(self._deadlines, (entry.deadline, message_id))
            found.append(entry)
        return found

    def lost(self, peer: bytes) -> list[OutstandingRequest]:
        """Expire all requests to a peer that cannot be reached any more, and return them."""
        found = [entry for entry in self._requests.values() if entry.peer == peer]
        for entry in found:
            self._move(entry, RequestEvent.TIMEOUT)
        return found

    def _move(self, entry: OutstandingRequest, happened: RequestEvent) -> None:
        entry.state = TRANSITIONS[entry.state, happened]
        if entry.state in ENDED:
            del self._requests[entry.message_id]
            self._sweep()

    def _sweep(self) -> None:
        """Drop heap entries of ended requests: those in front, and all once they are the majority."""
        while self._deadlines and self._deadlines[0][1] not in self._requests:
            heapq.heappop(self._deadlines)
        if len(self._deadlines) > 2 * len(self._requests) + 16:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._requests]
            heapq.heapify(self._deadlines)
