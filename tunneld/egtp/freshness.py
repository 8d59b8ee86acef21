"""Which requests of a node are fresh: sent after something that this relay sent to it. No input or output.

The classic envelope allows replays. A replayed `are there messages` would send the waiting messages of a node to
whoever repeats its request, and delete them. EGTP has a field against that, the freshness proof: the id of the last
message that the node received from us. The original sends it but never checks it; we do, for requests that delete.

    relay ──response, id 1──► node ──request, proof 1──► fresh     the same request again: not fresh
    relay ──response, id 2──► node ──request, proof 2──► fresh     proof 1 again, in any request: not fresh

Every message of ours must therefore have an id of its own, also the response to a request that is repeated.

So the first request of a node after a start of the relay is never fresh: it is answered as if nothing waited, and the
answer makes the next one fresh.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from tunneld.wire.egtp.messages import MojoRequest

MAX_PROOFS = 64
"""Ids of our messages to one node that are remembered: more than it can have on the way at once."""
MAX_SEEN = 256
"""Requests with one proof; more are not fresh. A node proves what it received last, so these were sent at once."""
MAX_NODES = 1024
"""Nodes that are remembered, by default; the one that was not heard for longest gives way. About 10 KiB each."""


@dataclass(slots=True)
class _Sent:
    """What was sent to a node: the ids that may still be proved, oldest first, and the requests with the first."""

    ids: deque[bytes] = field(default_factory=lambda: deque(maxlen=MAX_PROOFS))
    seen: set[bytes] = field(default_factory=set)


class FreshnessGuard:
    """What was sent to which node."""

    def __init__(self, max_nodes: int = MAX_NODES) -> None:
        self._max_nodes = max_nodes
        self._nodes: OrderedDict[bytes, _Sent] = OrderedDict()

    def __len__(self) -> int:
        """Nodes that are remembered."""
        return len(self._nodes)

    def note_sent(self, node: bytes, message_id: bytes) -> None:
        """A message is sent to a node that is known to the relay."""
        if node not in self._nodes and len(self._nodes) >= self._max_nodes:
            self._nodes.popitem(last=False)
        sent = self._nodes.setdefault(node, _Sent())
        self._nodes.move_to_end(node)
        if len(sent.ids) == MAX_PROOFS:
            sent.seen.clear()  # they had the proof that is forgotten now
        sent.ids.append(message_id)

    def is_fresh(self, node: bytes, request: MojoRequest, request_id: bytes) -> bool:
        """Whether a request proves a message of ours, not an older one than an earlier request did, and is not such a
        request itself. Tell each request once.
        """
        sent = self._nodes.get(node)
        if sent is None or request.freshness not in sent.ids:
            return False
        while sent.ids[0] != request.freshness:
            sent.ids.popleft()
            sent.seen.clear()
        if request_id in sent.seen or len(sent.seen) >= MAX_SEEN:
            return False
        sent.seen.add(request_id)
        return True
