"""A duct: one byte stream inside the pump, whatever lies under it: a channel of a carrier, or a connection in TLS.

Received octets go straight to the duct's user; what it does not take at once is *held* here. The other way, `room` says
how much may be put in now; where it is 0, the user hears `resume` when that changes.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Protocol

import structlog

from tunneld.engine.end_relay import EndRelay
from tunneld.engine.engine import Limiter, Relay, RelayEnd, Side
from tunneld.engine.pump import Pump

log = structlog.get_logger("session")


class EndHandler(Protocol):
    """Whoever has a duct. An exception of its costs this duct, and `failed` tells the user of it."""

    def on_data(self, data: memoryview) -> int:
        """Octets arrived while none were held: how many of them are taken? `data` is gone when this returns."""

    def on_writable(self) -> None:
        """There may be room again."""

    def on_eof(self) -> None:
        """The peer sends no more, and nothing is held."""

    def on_reset(self, error: OSError) -> None:
        """The duct is gone; what was on its way is lost."""

    def on_internal_error(self, error: Exception) -> None:
        """A callback of this user raised: a bug. The duct has been reset."""


class End:
    """What all kinds have in common. The kind says what is below `room`."""

    __slots__ = ("buffered", "closed", "eof_received", "eof_sent", "handler")

    def __init__(self) -> None:
        self.buffered = bytearray()
        self.eof_received = False  # the peer sends no more
        self.eof_sent = False  # we send no more
        self.closed = False
        self.handler: EndHandler = NO_HANDLER

    # What a kind is

    @property
    def pump(self) -> Pump:
        """Where it lives."""
        raise NotImplementedError

    @property
    def quantum(self) -> int:
        """Octets that may be put in before others have their turn."""
        raise NotImplementedError

    def send_capacity(self) -> int:
        """Octets that `put` takes now. 0: `EndHandler.resume` comes when that changes, or the duct is over."""
        raise NotImplementedError

    def write(self, data: memoryview) -> None:
        """Put octets in, at most as many as there is `room` for; `data` may be written over after."""
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """Say something of ours before the user does: a header, small enough to be kept where there is no room."""
        raise NotImplementedError

    def finish(self) -> None:
        """We send no more; the other direction goes on."""
        raise NotImplementedError

    def reset(self, reason: str) -> None:
        """End both directions now; the peer is told why, where there is a way to. Harmless on one that is over."""
        raise NotImplementedError

    def _consumed(self, octets: int) -> None:
        """The user has taken so many, which are not among those held any more."""
        raise NotImplementedError

    # What its user does

    def consume(self, octets: int) -> None:
        """The user has taken so many of those held."""
        del self.buffered[:octets]
        self._consumed(octets)
        if self.eof_received and not self.buffered and not self.closed:
            self._call(self.handler.on_eof)

    def deliver_buffered(self) -> None:
        """Offer what is held to a user that has just come and takes it as it arrives."""
        held, self.buffered = self.buffered, bytearray()
        if held:
            self.feed(memoryview(held))
        if self.eof_received and not self.buffered and not self.closed:
            self._call(self.handler.on_eof)

    def unread(self, data: bytes) -> None:
        """Hold octets that were taken; few, since they are held beyond what is allowed."""
        self.buffered[:0] = data

    def detach_handler(self) -> None:
        """The user goes; nothing is left to tell it. Parted from each other, both die without the garbage collector."""
        self.handler = NO_HANDLER

    def close(self) -> None:
        """Let go of it, unused."""
        self.reset("not wanted")

    def join(
        self,
        connection: socket.socket,
        *,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        side: Side = Side.VISITOR,
        throttle: Limiter | None = None,
    ) -> Relay:
        """Relay between the duct and a socket, which is this `side` of the relay; see `Engine.join`."""
        return EndRelay(self, connection, side, linger, on_end, throttle).start()

    # What is reported from below

    def feed(self, data: memoryview) -> None:
        """Octets of the peer."""
        size = len(data)
        taken = self._deliver(data, size) if size and not self.buffered else 0
        if self.closed:
            return
        if taken < size:
            self.buffered += data[taken:]
        if taken:
            self._consumed(taken)

    def feed_eof(self) -> None:
        """The peer sends no more."""
        self.eof_received = True
        if not self.buffered:
            self._call(self.handler.on_eof)

    def notify_writable(self) -> None:
        """There is more room."""
        self._call(self.handler.on_writable)

    def notify_reset(self, reason: str) -> None:
        """The duct, or all that is below it, is gone."""
        self._notify_broken(ConnectionResetError(errno.ECONNRESET, reason))

    # Inside

    def _notify_broken(self, error: OSError) -> None:
        user = self.handler
        self._discard()
        try:
            user.on_reset(error)
        except Exception as bug:
            user.on_internal_error(bug)

    def _deliver(self, data: memoryview, size: int) -> int:
        """Let the user take what it can; one that hands the duct on takes its part, and the next one the rest."""
        taken, user = 0, self.handler
        try:
            taken = user.on_data(data)
            while user is not self.handler and taken < size and not self.closed and not self.buffered:
                user = self.handler
                taken += user.on_data(data[taken:])
        except Exception as error:
            self._fail(error)
        return taken

    def _discard(self) -> None:
        """Both directions are over: nothing is held, nobody is told anything more."""
        self.closed = True
        self.handler = NO_HANDLER
        self.buffered = bytearray()

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        user = self.handler
        self.reset("internal error")
        user.on_internal_error(error)


class _NoHandler:
    """The user of a duct that nobody has yet, or nobody any more: everything is held."""

    def on_data(self, _data: memoryview) -> int:
        return 0

    def on_writable(self) -> None:
        pass

    def on_eof(self) -> None:
        pass

    def on_reset(self, error: OSError) -> None:
        pass

    def on_internal_error(self, error: Exception) -> None:
        log.error("channel failed", exc_info=error)


NO_HANDLER = _NoHandler()
