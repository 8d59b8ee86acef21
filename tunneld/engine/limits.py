"""The sizes and times of an engine, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tunneld.net.accept import ACCEPT_BACKOFF

KIB: Final = 1024
MIB: Final = 1024 * KIB
UNLIMITED: Final = 1 << 60
"""Bytes: no limit."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The limits of one engine. The portable engine has no use for most of them."""

    buffer_size: int = 64 * KIB
    "Bytes of the shared buffer. A read that fills it starts splicing; a blocked flow keeps at most this in memory."

    wide_size: int = 256 * KIB
    "Bytes of the buffer that carriers read into: one large frame or dozens of small ones per system call."

    pipe_size: int = MIB
    "Bytes to ask for per pipe: the most that Linux grants without privilege (fs.pipe-max-size)."

    max_pipes: int = 64
    "Pipes open at one time, idle ones included: fs.pipe-user-pages-soft grants 64 of 1 MiB without privilege."

    turn_size: int = 4 * MIB
    "Bytes that one batch of events should move in total: about two milliseconds of work."

    turn_time: float = 0.002
    "Seconds after which the pump returns to Trio's scheduler even if more handlers are ready."

    turn_cost: int = 512
    """Units of cost (frames parsed, channels woken, fragments written) that the owners of carriers share in one turn:
    two or three milliseconds of work. 400 connections that all send at once need 300: with less than that, a request
    of theirs costs three times as much.
    """

    poll_timeout: float = 0.0
    """Seconds that the pump waits in `epoll_wait` for the next event before it returns to Trio's scheduler; no other
    task runs meanwhile. epoll counts in milliseconds. 0: it does not wait.
    """

    busy_poll: float = 0.0001
    """Seconds at the beginning of that wait in which the pump polls instead of sleeping, if the last wait was no
    longer: about the time a processor takes to go to sleep and wake up. 0: it sleeps at once.
    """

    accept_batch: int = 64
    "Connections accepted from one listener before other handlers are served."

    accept_backoff: float = ACCEPT_BACKOFF
    "Seconds an acceptor waits when the machine is out of descriptors or socket memory."

    unacknowledged_timeout: float = 60.0
    """Seconds without any answer from a peer for which bytes are outstanding, after which its relay ends, see
    `vanished`: longer than networks are usually away, shorter than the quarter of an hour that TCP tries. 0: that.
    """

    descriptors: int = 1 << 30
    """Descriptors with this number or a higher one are reserved for the rest of the process (control port, reload,
    restart): neither visitors nor pipes get them. See `FdReserve`.
    """


POLL_TIMEOUT: Final = 0.001
"""`EngineLimits.poll_timeout`, in seconds, for a process that does little but relay: less than a round trip to another
machine, more than one to another process.
"""
