"""What one engine may use, each number with its reason."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The sizes of an engine; the portable one has no pipes and ignores theirs."""

    buffer_size: int = 64 * KIB
    "Bytes of the shared buffer. A read that fills it counts as bulk; a stopped flow holds no more than this in memory."

    wide_size: int = 256 * KIB
    "Bytes of the buffer that carriers read into: dozens of frames, or one that is full, in a system call."

    pipe_size: int = MIB
    "Bytes asked for per pipe: the largest that Linux grants without privilege (fs.pipe-max-size)."

    max_pipes: int = 64
    "Pipes at one time, idle ones included: 64 of 1 MiB are all that fs.pipe-user-pages-soft grants without privilege."

    turn_size: int = 4 * MIB
    "Bytes that one batch of events should move in all: about two milliseconds."

    turn_time: float = 0.002
    "Seconds after which other tasks have their turn, though somebody has more to do."

    poll_timeout: float = 0.0
    "Seconds (a millisecond is the least) that a turn waits for more, in which other tasks have to wait, too."

    busy_poll: float = 0.0001
    """Seconds at the beginning of a doze in which the pump looks again and again, where the last wait was no longer:
    about what it takes a processor to fall asleep and be woken. 0: it sleeps at once.
    """

    accept_batch: int = 64
    "Connections accepted from one listener before others have their turn."

    accept_backoff: float = 0.1
    "Seconds an acceptor rests when the machine is out of descriptors or socket memory."

    descriptors: int = 1 << 30
    "The first of the numbers that connections to tunnels, and pipes, leave to others; see room.py."


POLL_TIMEOUT = 0.001
"""For a process that moves bytes and does little else: shorter than the way to the next machine and back, longer than
to the next process.
"""
