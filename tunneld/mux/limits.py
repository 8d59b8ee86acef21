"""Sizes and times of one carrier, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

MAX_FRAMES_PER_TURN: Final = 256
"""Frames parsed before other handlers of the pump have their turn. A peer that sends the most expensive frames in few
bytes delays nothing for long; an honest peer, whose frames carry data, reaches the turn's byte limit first or has had a
millisecond of work done.
"""

PREAUTH_LIMIT: Final = 4096
"""Bytes that an unauthenticated peer may send: the endpoint's URI, and whatever an agent of another make sends first.
"""

USER_TIMEOUT_HEARTBEATS: Final = 6
"""TCP_USER_TIMEOUT in heartbeats; the heartbeat gives the connection up after two or three."""


@dataclass(frozen=True, slots=True)
class CarrierLimits:
    """The limits of a carrier. Sizes are bytes, times are seconds."""

    initial_window: int = 64 * KIB
    "Initial receive window of a channel, in bytes: a page and its answer; 127 of them are 8 MiB."

    max_window: int = 8 * MIB
    "Largest receive window of a channel, in bytes: what 600 Mbit/s have in flight over a round trip of 100 ms."

    window_budget: int = 32 * MIB
    """Bytes by which all windows of a carrier together may exceed their initial size. This much is buffered in the
    worst case, when no visitor reads.
    """

    pause_at: int = 256 * KIB
    "Bytes of pending output above which visitors are not read: a small response queues behind this much."

    max_unsent: int = 128 * KIB
    "Bytes that the kernel may hold unsent (TCP_NOTSENT_LOWAT); no frame can overtake what is queued there either."

    coalesce: float = 0.0002
    "Seconds that output may wait for more to share its write: the time a busy pump needs for several visitors."

    quantum: int = 128 * KIB
    "Bytes that one channel may write before the other channels have their turn (deficit round robin)."

    heartbeat: float = 10.0
    "Seconds without input after which the peer is pinged; a dead peer is given up within three times this."

    patience: float = 2.0
    """Seconds to wait for the answer to a ping before new visitors go to another carrier: enough for two lost packets
    on a path around the world.
    """

    max_rto: float = 1.0
    """Longest interval in seconds between TCP retransmissions (TCP_RTO_MAX_MS). TCP doubles the interval each time, up
    to half a minute; after an outage of the network, visitors would wait for that."""
