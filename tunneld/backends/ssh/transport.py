"""The socket below an SSH connection, served by the pump: an asyncio transport without asyncio's selector.

    epoll ──► on_event ──► connection.feed ──► channel.feed ──► the visitor's socket, at once
    connection.write ──► `outgoing` ──► one write after the batch, see mux/send_buffer.py

The transport stops reading from a peer that sends requests and does not read the replies, or that sends data while a
key exchange is computed. Both buffers are bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import structlog

from tunneld.engine.events import READABLE, UNTIL_EAGAIN, WRITABLE
from tunneld.engine.pump import Pump
from tunneld.errors import reason_of
from tunneld.mux.connection import Connection
from tunneld.mux.heartbeat import Heartbeat
from tunneld.mux.limits import CarrierLimits
from tunneld.mux.send_buffer import SendBuffer
from tunneld.mux.turns import CarrierTurns
from tunneld.net.accept import local_address
from tunneld.net.endpoint import Peer

log = structlog.get_logger("ssh")

PREAUTH_READ_BYTES = 1024
"""Read per turn of the pump before the login: 64 of the smallest packets."""
MAX_PREAUTH_BYTES = 128 * 1024
"""Accepted before the login. A key exchange takes about 3 KiB, and each of a few dozen keys and certificates less."""
PREAUTH_BYTES_EXCEEDED = f"the peer sent more than {MAX_PREAUTH_BYTES} bytes and did not log in"
MAX_BUFFERED_REPLIES = 4
"""Multiples of `CarrierLimits.pause_at` that the send buffer may hold before reading stops. Channels fill one of them
at most; the rest is for replies.
"""


class PacketReceiver(Protocol):
    """The protocol above the transport, which parses what is received."""

    def take_partial_packet(self) -> bytes:
        """Remove and return the bytes of an incomplete packet; the transport puts them in front of what it reads."""

    def feed(self, data: memoryview) -> None:
        """Parse received bytes. `data` is invalid when this returns."""

    @property
    def is_busy(self) -> bool:
        """Whether reading must stop until `SshTransport.resume_reading`."""

    @property
    def has_unparsed(self) -> bool:
        """Whether complete packets were left over for the next turn, in which `feed` is called before reading."""

    @property
    def read_limit(self) -> int:
        """Bytes to read per turn of the pump; 0: no limit."""


class NoHeartbeat:
    """Takes the place of a heartbeat before the login."""

    received = False


class SshTransport(asyncio.Transport):
    """A connected socket, and the pump's handler for it."""

    def __init__(
        self,
        pump: Pump,
        link: Connection,
        peer: Peer,
        receiver: PacketReceiver,
        limits: CarrierLimits,
        on_lost: Callable[[str], None],
    ) -> None:
        """Own the socket, which `start` begins to serve. Behind a proxy, `peer` is not the peer of the socket.
        `on_lost` is called once, with a reason, when the socket has been closed, also by `abort`.
        """
        super().__init__()
        self.pump = pump
        self.outgoing = bytearray()
        self.heartbeat: NoHeartbeat | Heartbeat = NoHeartbeat()  # its `received` is set at every read
        self.outbox = SendBuffer(pump, link, self.outgoing, limits, self.end)
        self._max_replies = MAX_BUFFERED_REPLIES * limits.pause_at
        self.link = link
        self._fd = link.connection.fileno()
        self._receiver = receiver
        self._on_lost = on_lost
        self._names = {"peername": peer, "sockname": local_address(link.connection)}
        self._paused = self._over = self._until_eagain = False
        self._unauthenticated = True
        self._preauth_bytes = 0  # received before the login
        self.turns = CarrierTurns(pump.budget, self._read_on, self.on_failure)
        link.keep_unsent_below(limits.max_unsent)

    def mark_authenticated(self) -> None:
        """The client has logged in: the limits before the login end."""
        self._unauthenticated = False

    @property
    def has_received(self) -> bool:
        """Whether the client has sent anything."""
        return self._preauth_bytes > 0

    def reschedule(self) -> None:
        """The receiver has unparsed packets: serve it again in the next turn, after the other owners."""
        self.turns.read_later()

    def start(self) -> None:
        """Begin to serve the socket. Raises OSError if it is closed."""
        self.pump.attach(self._fd, self)

    # asyncio's transport interface, as far as asyncssh uses it

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append to the send buffer, which is written after the batch of events. Ignored after the end."""
        if not self._over:
            self.outgoing += data
            self.outbox.schedule_flush()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """`peername` or `sockname`."""
        return self._names.get(name, default)

    def is_closing(self) -> bool:
        """Whether the socket is closed."""
        return self._over

    def abort(self) -> None:
        """Write as much of the send buffer as the kernel takes now, and close. Idempotent."""
        if not self._over:
            self.outbox.flush()
            self.end("closed")

    close = abort

    def resume_reading(self) -> None:
        """Read again after a pause, unless the receiver is busy."""
        if self._paused and not self._over and not self._receiver.is_busy:
            self._paused = False
            self.pump.rearm(self._fd)

    # The pump's handler

    def on_event(self, events: int) -> None:
        """Epoll reported events of the socket."""
        if events & UNTIL_EAGAIN:
            self._until_eagain = True
        if events & WRITABLE and self.outbox.blocked:
            self.outbox.unblock()
            if self._paused and len(self.outgoing) < self._max_replies:
                self.resume_reading()
        if (events & READABLE or self._receiver.has_unparsed) and not self._over and not self._paused:
            self._read()

    def on_failure(self, error: Exception) -> None:
        """A handler raised, which is a bug: close this connection only."""
        log.error("internal error: ssh connection closed", exc_info=error)
        self.end("internal error")

    def on_stop(self) -> None:
        """The pump stops."""
        self.end("the relay stopped")

    def end(self, reason: str) -> None:
        """Close the socket now and report `reason`. Idempotent."""
        if self._over:
            return
        self._over = True
        self.turns.close()
        self.pump.remove(self._fd, self)
        self.outbox.close()
        self.link.close()
        self._on_lost(reason)
        self.pump.timers.wake_soon()

    # Internals

    def _read_on(self) -> None:
        if not self._over and not self._paused:
            self._read()

    def _read(self) -> None:
        """Read until the socket is drained, or this turn's quantum or the owner's share of it is used up."""
        if self.turns.share.left <= 0:
            self.reschedule()
            return
        pump, receiver, quantum = self.pump, self._receiver, self.pump.quantum
        with memoryview(pump.wide_buffer) as view:
            while not self._over:
                if receiver.is_busy or len(self.outgoing) > self._max_replies:
                    self._paused = True
                    return
                has_unparsed = receiver.has_unparsed
                partial = receiver.take_partial_packet()
                start = len(partial)
                view[:start] = partial
                if has_unparsed:
                    receiver.feed(view[:start])
                    self.reschedule()
                    return
                limit = PREAUTH_READ_BYTES if self._unauthenticated else receiver.read_limit
                try:
                    count = self.link.receive_into(view[start : start + limit] if limit else view[start:])
                except BlockingIOError:
                    receiver.feed(view[:start])
                    return
                except OSError as error:
                    self.end(f"the connection broke: {reason_of(error)}")
                    return
                if not count:
                    self.end("closed by the peer")
                    return
                self.heartbeat.received = True
                receiver.feed(view[: start + count])
                if self._unauthenticated and self._exceeds_preauth_limit(count):
                    return
                if receiver.has_unparsed or (limit and (count == limit or self._until_eagain)):
                    self.reschedule()
                    return
                if start + count < len(view) and not self._until_eagain:
                    return
                quantum -= count
                if quantum <= 0:
                    pump.rearm(self._fd)
                    return

    def _exceeds_preauth_limit(self, count: int) -> bool:
        """Count bytes received before the login, and close the connection beyond the limit. Whether it is closed."""
        self._preauth_bytes += count
        if self._preauth_bytes > MAX_PREAUTH_BYTES:
            self.end(PREAUTH_BYTES_EXCEEDED)
        return self._over
