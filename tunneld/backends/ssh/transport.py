"""The socket below an SSH connection, in the pump: what asyncio would call a transport, without asyncio's selector.

    epoll ──► on_event ──► connection.hear ──► channel.arrived ──► the visitor's socket, at once
    connection.write ──► `outgoing` ──► one write after the batch, see session/outbox.py

A peer that asks and does not read the answers, or that goes on talking while a key exchange is computed, is not read
further: both are bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import structlog

from tunneld.engine.pump import Pump
from tunneld.engine.socket_flow import INEXACT, READABLE, WRITABLE
from tunneld.errors import reason_of
from tunneld.mux.connection import Connection
from tunneld.mux.heartbeat import Heartbeat
from tunneld.mux.limits import CarrierLimits
from tunneld.mux.send_buffer import SendBuffer

log = structlog.get_logger("ssh")

PREAUTH_READ = 1024
"""Octets read of somebody who has not logged in before others have their turn: 64 of the smallest packets."""
PREAUTH_LIMIT = 128 * 1024
"""Octets that they say at most: a key exchange has about 3 KiB, and each of a few dozen keys and certificates less."""
PREAUTH_EXCEEDED = f"it said more than {PREAUTH_LIMIT} octets and had not logged in"
ANSWERS = 4
"""Times `CarrierLimits.pause_at` that answers may wait in: what channels may say is within one."""


class PacketReceiver(Protocol):
    """Who hears what arrives."""

    def take_partial_packet(self) -> bytes:
        """Octets of a packet that had not arrived as a whole, to be heard again in front of what comes."""

    def feed(self, data: memoryview) -> None:
        """Octets of the peer; `data` is gone when this returns."""

    @property
    def is_busy(self) -> bool:
        """Nothing more is to be read until `SshTransport.resume_reading`."""

    @property
    def has_unparsed(self) -> bool:
        """It was told more than it hears at once: nothing more is to be read, and the rest is to be heard."""

    @property
    def read_limit(self) -> int:
        """Octets that are to be read at most, before others have their turn; 0: what there is."""


class NoHeartbeat:
    """Nobody's pulse."""

    received = False


class SshTransport(asyncio.Transport):
    """A connected socket; the pump's handler for it."""

    def __init__(
        self,
        pump: Pump,
        link: Connection,
        hearer: PacketReceiver,
        limits: CarrierLimits,
        on_lost: Callable[[str], None],
    ) -> None:
        """`on_lost` is told once, also after `abort`; then the socket is closed. `start` begins to serve."""
        super().__init__()
        self.pump = pump
        self.outgoing = bytearray()
        self.pulse: NoHeartbeat | Heartbeat = NoHeartbeat()  # is told of every arrival
        self.outbox = SendBuffer(pump, link, self.outgoing, limits, self.end)
        self._most_answers = ANSWERS * limits.pause_at
        self.link = link
        self._fd = link.connection.fileno()
        self._hearer = hearer
        self._on_lost = on_lost
        self._names = {"peername": link.connection.getpeername(), "sockname": link.connection.getsockname()}
        self._paused = self._over = self._exact = False
        self._is_strange = True
        self._said = 0  # octets, while it was strange
        link.keep_unsent_below(limits.unsent)

    def mark_authenticated(self) -> None:
        """It has logged in."""
        self._is_strange = False

    def reschedule(self) -> None:
        """The hearer is behind: have it hear the rest, after others had their turn."""
        self.pump.rearm(self._fd)

    def start(self) -> None:
        """Serve. Raises OSError where it is closed already."""
        self.pump.attach(self._fd, self)

    # What asyncssh asks of it

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Say it after the batch."""
        if not self._over:
            self.outgoing += data
            self.outbox.schedule_flush()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """`peername` and `sockname`."""
        return self._names.get(name, default)

    def is_closing(self) -> bool:
        """Whether nothing can be said any more."""
        return self._over

    def abort(self) -> None:
        """Say what was said, as far as the kernel takes it, and close."""
        if not self._over:
            self.outbox.flush()
            self.end("closed")

    close = abort

    def resume_reading(self) -> None:
        """The hearer is not busy any more."""
        if self._paused and not self._over and not self._hearer.is_busy:
            self._paused = False
            self.pump.rearm(self._fd)

    # The pump's handler

    def on_event(self, events: int) -> None:
        """Something happened on the socket."""
        if events & INEXACT:
            self._exact = True
        if events & WRITABLE and self.outbox.blocked:
            self.outbox.unblock()
            if self._paused and len(self.outgoing) < self._most_answers:
                self.resume_reading()
        if (events & READABLE or self._hearer.has_unparsed) and not self._over and not self._paused:
            self._read()

    def on_failure(self, error: Exception) -> None:
        """A bug of ours: it costs the connection, nothing else."""
        log.error("ssh connection failed", exc_info=error)
        self.end("internal error")

    def on_stop(self) -> None:
        """The pump stops."""
        self.end("the relay stopped")

    def end(self, reason: str) -> None:
        """Close the socket now. Harmless when repeated."""
        if self._over:
            return
        self._over = True
        if self.pump.handlers.get(self._fd) is self:
            del self.pump.handlers[self._fd]
        self.outbox.close()
        self.link.close()
        self._on_lost(reason)
        self.pump.timers.wake_soon()

    # Inside

    def _read(self) -> None:
        """Read until the socket is drained, or this turn's share is used up."""
        pump, hearer, share = self.pump, self._hearer, self.pump.quantum
        with memoryview(pump.wide_buffer) as view:
            while not self._over:
                if hearer.is_busy or len(self.outgoing) > self._most_answers:
                    self._paused = True
                    return
                is_behind = hearer.has_unparsed
                rest = hearer.take_partial_packet()
                start = len(rest)
                view[:start] = rest
                if is_behind:
                    hearer.feed(view[:start])
                    self.reschedule()
                    return
                most = self._most()
                try:
                    count = self.link.receive_into(view[start : start + most] if most else view[start:])
                except BlockingIOError:
                    hearer.feed(view[:start])
                    return
                except OSError as error:
                    self.end(f"its connection broke: {reason_of(error)}")
                    return
                if not count:
                    self.end("the peer closed it")
                    return
                self.pulse.received = True
                hearer.feed(view[: start + count])
                if self._is_strange and self._is_talkative(count):
                    return
                if hearer.has_unparsed or (most and (count == most or self._exact)):
                    self.reschedule()
                    return
                if start + count < len(view) and not self._exact:
                    return
                share -= count
                if share <= 0:
                    pump.rearm(self._fd)
                    return

    def _is_talkative(self, octets: int) -> bool:
        """Whether somebody strange has said too much, and so is gone."""
        self._said += octets
        if self._said > PREAUTH_LIMIT:
            self.end(PREAUTH_EXCEEDED)
        return self._over

    def _most(self) -> int:
        """Octets to read before others have their turn; 0: what there is."""
        return PREAUTH_READ if self._is_strange else self._hearer.read_limit
