"""What one carrier may use, each number with its reason."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class CarrierLimits:
    """The sizes and times of a carrier."""

    first_window: int = 64 * KIB
    "Octets that a new channel may receive unread: a page and its answer; 127 of them are 8 MiB."

    max_window: int = 8 * MIB
    "Octets that one channel's window may grow to: what 600 Mbit/s over 100 ms have on the way."

    memory: int = 32 * MIB
    "Octets that all windows of a carrier may add up to, beside the first 64 KiB of each: held if nobody reads."

    pause_at: int = 256 * KIB
    "Octets waiting for the carrier beyond which visitors are not read: what a small answer then queues behind."

    unsent: int = 128 * KIB
    "Octets that the kernel holds unsent (TCP_NOTSENT_LOWAT): queued there they could not be overtaken, either."

    gather: float = 0.0002
    "Seconds that what is said may wait for more that goes into the same write: some visitors' worth of a busy pump."

    quantum: int = 128 * KIB
    "Octets that one channel puts on the carrier before the others have their turn."

    heartbeat: float = 10.0
    "Seconds of silence after which the peer is asked for a sign of life; within three of them a dead one is given up."

    patience: float = 2.0
    "Seconds for the answer, after which others are preferred: two lost packets on a way around the world."

    resend: float = 1.0
    """Seconds after which what was lost is sent again, at the latest. TCP waits twice as long each time, until the next
    try is half a minute away; whose network comes back does not want to wait for that."""
