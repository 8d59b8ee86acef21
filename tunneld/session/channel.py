"""One byte stream of a carrier.

Received octets go straight to the channel's user; what it does not take at once is *held* here, bounded by the window,
and credit is granted only for what was taken. The other way, `room` says how much may be put on the carrier now; it is
0 while the peer gives no credit or the carrier is full, and then the user hears `resume`.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import structlog

from tunneld.relay.engine import Limiter, Relay, RelayEnd, Side
from tunneld.session.joint import Joint
from tunneld.session.window import Window

if TYPE_CHECKING:
    from tunneld.session.carrier import Carrier

log = structlog.get_logger("session")


class User(Protocol):
    """Whoever has a channel. An exception of its costs this channel, and `failed` tells the user of it."""

    def receive(self, data: memoryview) -> int:
        """Octets arrived while none were held: how many of them are taken? `data` is gone when this returns."""

    def resume(self) -> None:
        """There may be room again."""

    def finished(self) -> None:
        """The peer sends no more, and nothing is held."""

    def broken(self, error: OSError) -> None:
        """The channel is gone; what was on its way is lost."""

    def failed(self, error: Exception) -> None:
        """A callback of this user raised: a bug. The channel has been reset."""


class Channel:
    """One byte stream; made by its carrier, which also tells the codec what is said on it."""

    __slots__ = ("_first", "carrier", "ended", "finishing", "held", "over", "sid", "user", "window")

    def __init__(self, carrier: Carrier, sid: int, window: Window) -> None:
        """`sid` is the codec's name for it."""
        self.carrier = carrier
        self.sid = sid
        self.window = window
        self.held = bytearray()
        self.ended = False  # the peer sends no more
        self.finishing = False  # we send no more
        self.over = False
        self.user: User = UNUSED
        self._first = b""  # octets of ours for which there was no credit yet

    # What its user does

    def accept(self) -> None:
        """Answer the peer who opened it. Otherwise `reset` it."""
        self.carrier.mux.accept(self.sid)
        self.carrier.touch()

    def send(self, data: bytes) -> None:
        """Say something of ours before the user does: a header, small enough to be kept where credit is lacking."""
        self._first += data
        self._send_first()

    def room(self) -> int:
        """Octets that `put` takes now. 0: `User.resume` comes when that changes, or the channel is over."""
        if self._first and not self._send_first():
            return 0
        room = self.carrier.room(self)
        return min(room, self.carrier.mux.credit(self.sid)) if room and not self.over else 0

    def put(self, data: memoryview) -> None:
        """Put octets on the carrier, at most as many as there is `room` for; `data` may be written over after."""
        self.carrier.put(self.sid, data)

    def take(self, octets: int) -> None:
        """The user has taken so many of those held."""
        del self.held[:octets]
        self._taken(octets)
        if self.ended and not self.held and not self.over:
            self._call(self.user.finished)

    def put_back(self, data: bytes) -> None:
        """Hold octets that were taken; few, since they are held beyond the window."""
        self.held[:0] = data

    def finish(self) -> None:
        """We send no more; the other direction goes on."""
        if not self.finishing and not self.over:
            self.finishing = True
            self.carrier.finish(self)

    def reset(self, reason: str) -> None:
        """End both directions now; the peer is told why. Harmless on one that is over."""
        if not self.over:
            self._forget()
            self.carrier.reset(self, reason)

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
        """Relay between the channel and a socket, which is this `side` of the relay; see `Engine.join`."""
        return Joint(self, connection, side, linger, on_end, throttle).start()

    # What its carrier reports

    def arrived(self, data: memoryview) -> None:
        """Octets of the peer."""
        taken = 0 if self.held else self._offer(data)
        if self.over:
            return
        if taken < len(data):
            self.held += data[taken:]
        if taken:
            self._taken(taken)

    def hear_end(self) -> None:
        """The peer's FIN."""
        self.ended = True
        if not self.held:
            self._call(self.user.finished)

    def hear_room(self) -> None:
        """More credit, or more room on the carrier."""
        self._call(self.user.resume)

    def hear_reset(self, reason: str) -> None:
        """The channel, or its whole carrier, is gone."""
        user = self.user
        self._forget()
        try:
            user.broken(ConnectionResetError(errno.ECONNRESET, reason))
        except Exception as error:
            user.failed(error)

    # Inside

    def _offer(self, data: memoryview) -> int:
        """Let the user take what it can; one that hands the channel on takes its part, and the next one the rest."""
        taken = 0
        try:
            while taken < len(data) and not self.over and not self.held:
                user = self.user
                taken += user.receive(data[taken:])
                if user is self.user:
                    break
        except Exception as error:
            self._fail(error)
        return taken

    def _forget(self) -> None:
        """Both directions are over: nothing is held, nobody is told anything more."""
        self.over = True
        self.user = UNUSED
        self.held = bytearray()
        self.window.close()

    def _taken(self, octets: int) -> None:
        grant = self.window.delivered(octets, len(self.held))
        if grant and not self.ended and not self.over:
            self.carrier.grant(self.sid, grant)

    def _send_first(self) -> bool:
        with memoryview(self._first) as view:
            taken = self.carrier.put(self.sid, view[: self.carrier.mux.credit(self.sid)])
        self._first = self._first[taken:]
        return not self._first

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
    """The user of a channel that nobody has yet, or nobody any more: everything is held."""

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
