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

from tunneld.relay.engine import Limiter, Relay, RelayEnd, Side
from tunneld.relay.pump import Pump
from tunneld.session.joint import Joint

log = structlog.get_logger("session")


class User(Protocol):
    """Whoever has a duct. An exception of its costs this duct, and `failed` tells the user of it."""

    def receive(self, data: memoryview) -> int:
        """Octets arrived while none were held: how many of them are taken? `data` is gone when this returns."""

    def resume(self) -> None:
        """There may be room again."""

    def finished(self) -> None:
        """The peer sends no more, and nothing is held."""

    def broken(self, error: OSError) -> None:
        """The duct is gone; what was on its way is lost."""

    def failed(self, error: Exception) -> None:
        """A callback of this user raised: a bug. The duct has been reset."""


class Duct:
    """What all kinds have in common. The kind says what is below `room`."""

    __slots__ = ("ended", "finishing", "held", "over", "user")

    def __init__(self) -> None:
        self.held = bytearray()
        self.ended = False  # the peer sends no more
        self.finishing = False  # we send no more
        self.over = False
        self.user: User = UNUSED

    # What a kind is

    @property
    def pump(self) -> Pump:
        """Where it lives."""
        raise NotImplementedError

    @property
    def share(self) -> int:
        """Octets that may be put in before others have their turn."""
        raise NotImplementedError

    def room(self) -> int:
        """Octets that `put` takes now. 0: `User.resume` comes when that changes, or the duct is over."""
        raise NotImplementedError

    def put(self, data: memoryview) -> None:
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

    def _taken(self, octets: int) -> None:
        """The user has taken so many, which are not among those held any more."""
        raise NotImplementedError

    # What its user does

    def take(self, octets: int) -> None:
        """The user has taken so many of those held."""
        del self.held[:octets]
        self._taken(octets)
        if self.ended and not self.held and not self.over:
            self._call(self.user.finished)

    def offer(self) -> None:
        """Offer what is held to a user that has just come and takes it as it arrives."""
        held, self.held = self.held, bytearray()
        if held:
            self.arrived(memoryview(held))
        if self.ended and not self.held and not self.over:
            self._call(self.user.finished)

    def put_back(self, data: bytes) -> None:
        """Hold octets that were taken; few, since they are held beyond what is allowed."""
        self.held[:0] = data

    def part(self) -> None:
        """The user goes; nothing is left to tell it. Parted from each other, both die without the garbage collector."""
        self.user = UNUSED

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
        return Joint(self, connection, side, linger, on_end, throttle).start()

    # What is reported from below

    def arrived(self, data: memoryview) -> None:
        """Octets of the peer."""
        size = len(data)
        taken = self._offer(data, size) if size and not self.held else 0
        if self.over:
            return
        if taken < size:
            self.held += data[taken:]
        if taken:
            self._taken(taken)

    def hear_end(self) -> None:
        """The peer sends no more."""
        self.ended = True
        if not self.held:
            self._call(self.user.finished)

    def hear_room(self) -> None:
        """There is more room."""
        self._call(self.user.resume)

    def hear_reset(self, reason: str) -> None:
        """The duct, or all that is below it, is gone."""
        self._hear_broken(ConnectionResetError(errno.ECONNRESET, reason))

    # Inside

    def _hear_broken(self, error: OSError) -> None:
        user = self.user
        self._forget()
        try:
            user.broken(error)
        except Exception as bug:
            user.failed(bug)

    def _offer(self, data: memoryview, size: int) -> int:
        """Let the user take what it can; one that hands the duct on takes its part, and the next one the rest."""
        taken, user = 0, self.user
        try:
            taken = user.receive(data)
            while user is not self.user and taken < size and not self.over and not self.held:
                user = self.user
                taken += user.receive(data[taken:])
        except Exception as error:
            self._fail(error)
        return taken

    def _forget(self) -> None:
        """Both directions are over: nothing is held, nobody is told anything more."""
        self.over = True
        self.user = UNUSED
        self.held = bytearray()

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        user = self.user
        self.reset("internal error")
        user.failed(error)


class _Unused:
    """The user of a duct that nobody has yet, or nobody any more: everything is held."""

    def receive(self, _data: memoryview) -> int:
        return 0

    def resume(self) -> None:
        pass

    def finished(self) -> None:
        pass

    def broken(self, error: OSError) -> None:
        pass

    def failed(self, error: Exception) -> None:
        log.error("channel failed", exc_info=error)


UNUSED = _Unused()
