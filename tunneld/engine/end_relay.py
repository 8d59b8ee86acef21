"""A channel, or another duct, joined to a kernel socket: a relay like `relay.pair`, one of whose ends is not a socket.

The socket is read only as far as there is room on the channel, so a slow peer stops its sender; what the socket does
not take stays in the channel, bounded by its window, so a slow visitor stops the peer's sending on this channel and
holds up no other. Both are resumed through epoll (`arm_again`), behind whoever else is ready: nothing here calls the
carrier in the middle of its reading, and no joint can keep the pump to itself.

How a joint ends is the same as with a pair, with one more way: the channel is reset, or its carrier is lost, and then
the socket is reset.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import structlog

from tunneld.engine.engine import Cause, Limiter, Relay, RelayEnd, Side
from tunneld.engine.failures import reset_on_close
from tunneld.engine.socket_flow import BROKEN, INEXACT, READABLE, WRITABLE
from tunneld.engine.throttle import Allowance, Throttle
from tunneld.errors import reason_of

if TYPE_CHECKING:
    from tunneld.engine.end import End

LEAST = 2048
"""Octets of its share that a read takes at least: where the peer wants fragments of one octet, each read costs as much.
"""

log = structlog.get_logger("session")


class EndRelay:
    """The `Relay` its owner holds, the pump's handler for the socket, and the channel's user."""

    __slots__ = (
        "allowances", "blocked", "channel", "connection", "deadline", "ended", "exact", "fd", "from_channel",
        "from_socket", "linger", "lingering", "on_end", "over", "passed", "paused", "pump", "seen", "side",
    )  # fmt: skip

    def __init__(
        self,
        channel: End,
        connection: socket.socket,
        side: Side,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Limiter | None,
    ) -> None:
        """See `End.join`. `start` attaches it."""
        self.channel = channel
        self.pump = channel.pump
        self.connection = connection
        self.fd = connection.fileno()
        self.side = side
        self.linger = linger
        self.on_end = on_end
        self.from_socket = self.from_channel = 0  # octets delivered to the channel; to the socket
        self.exact = False  # the socket's end may stand behind its last octets: read until EAGAIN
        self.ended = False  # the socket's end was read
        self.passed = False  # the channel's end was passed to the socket
        self.paused = False  # no room on the channel: the socket is not read
        self.blocked = bool(channel.buffered or channel.eof_received)  # the socket has to take something first
        self.allowances: tuple[Allowance, Allowance] | None = None  # for what the socket says, and what it is told
        if throttle is not None:
            limiter = cast(Throttle, throttle)
            self.allowances = Allowance(limiter, self._arm), Allowance(limiter, self._arm)
        self.over = self.lingering = False
        self.deadline = 0.0
        self.seen = 0

    def start(self) -> Relay:
        """Begin. The end is never told from inside."""
        if self.channel.closed:
            self.end(RelayEnd(Cause.RESET, self._far_side, ConnectionResetError("the carrier was lost")))
        else:
            self.channel.handler = self
            try:
                self.pump.attach(self.fd, self)
            except OSError as error:
                self._break(error)
        if self.over:
            self.pump.timers.wake_soon()
        return self

    # The relay

    @property
    def up(self) -> int:
        """Bytes delivered from the visitor to the server."""
        return self.from_socket if self.side is Side.VISITOR else self.from_channel

    @property
    def down(self) -> int:
        """Bytes delivered from the server to the visitor."""
        return self.from_channel if self.side is Side.VISITOR else self.from_socket

    def drop(self) -> None:
        """See `Relay.drop`."""
        self.end(RelayEnd(Cause.DROPPED))
        self.pump.timers.wake_soon()

    def end(self, how: RelayEnd) -> None:
        """Close the socket now, reset the channel unless both are done; the owner hears of it after the batch."""
        if self.over:
            return
        self.over = True
        self.pump.timers.forget(self)
        for allowance in self.allowances or ():
            allowance.end()
        if self.channel.buffered or how.cause is Cause.RESET:
            reset_on_close(self.connection)
        if self.pump.handlers.get(self.fd) is self:
            del self.pump.handlers[self.fd]
        self.connection.close()
        self.pump.ended_relays.append((self, how))
        if how.cause is Cause.FINISHED:
            self.channel.detach_handler()
        else:
            self.channel.reset(reason_of(how.error) if how.error else how.cause.value)

    def notify_ended(self, how: RelayEnd) -> None:
        """Tell the owner."""
        try:
            self.on_end(self, how)
        except Exception as error:
            log.exception("could not tell the end of a relay", exc_info=error)

    def on_deadline(self) -> None:
        """`linger` seconds have passed without a byte."""
        self.end(RelayEnd(Cause.LINGERED))

    # The pump's handler

    def on_event(self, events: int) -> None:
        """Something happened on the socket."""
        if events & READABLE and not self.ended:
            if events & INEXACT:
                self.exact = True
            if not self.paused:
                self._serve()
        if self.blocked and events & WRITABLE and not self.over:
            self._deliver_held()
        if events & BROKEN and (self.paused or self.ended) and not self.over:
            self._look_for_error()
        if self.lingering:
            self._touch()

    def on_failure(self, error: Exception) -> None:
        """A bug of ours while serving this relay: it costs the relay, nothing else."""
        log.error("relay failed", exc_info=error)
        self.end(RelayEnd(Cause.DROPPED))

    def on_stop(self) -> None:
        """The pump stops."""
        self.end(RelayEnd(Cause.DROPPED))

    # The channel's user

    def on_data(self, data: memoryview) -> int:
        """Octets of the channel: the socket takes what it can."""
        if self.blocked:
            return 0
        if self.allowances is not None:
            allowed = self.allowances[1].get()
            if allowed < len(data):  # the rest is held, and comes when the throttle or the socket lets it
                self.blocked = True
                data = data[:allowed]
        try:
            sent = self.connection.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._break(error)
            return 0
        self._told(sent)
        if sent < len(data):
            self.blocked = True
        elif self.blocked:
            self._arm()  # the socket could take more: let epoll say so again, for what is held from now on
        if self.lingering:
            self._touch()
        return sent

    def on_writable(self) -> None:
        """There is room again: let epoll tell what stands in the socket."""
        if self.paused:
            self.paused = False
            self.pump.rearm(self.fd)

    def on_eof(self) -> None:
        """The channel's end, behind all of its octets: pass it on."""
        self._pass_end()

    def on_reset(self, error: OSError) -> None:
        """The channel is gone."""
        self.end(RelayEnd(Cause.RESET, self._far_side, error))

    def on_internal_error(self, error: Exception) -> None:
        """A bug; see `on_failure`."""
        self.on_failure(error)

    # Inside

    @property
    def _far_side(self) -> Side:
        return Side.SERVER if self.side is Side.VISITOR else Side.VISITOR

    def _serve(self) -> None:
        """Read from the socket until it is drained, the channel is full, or this turn's share is used up."""
        pump, channel, receive_into = self.pump, self.channel, self.connection.recv_into
        share = channel.quantum
        while share > 0:
            room = channel.send_capacity()
            if not room or self.over:
                self.paused = True
                return
            want = min(room, pump.buffer_size)
            if self.allowances is not None and not (want := min(want, self.allowances[0].get())):
                return
            try:
                count = receive_into(pump.buffer, want)
            except BlockingIOError:
                break
            except OSError as error:
                self._break(error)
                return
            if not count:
                self._end_socket()
                return
            channel.write(pump.view[:count])
            self.from_socket += count
            if self.allowances is not None:
                self.allowances[0].use(count)
            if count < want and not self.exact:
                break
            share -= max(LEAST, count)
        else:
            pump.rearm(self.fd)
            return
        if self.allowances is not None:
            self.allowances[0].rest()

    def _end_socket(self) -> None:
        """The socket's end was read."""
        self.ended = True
        self.channel.finish()
        self._half_done()

    def _deliver_held(self) -> None:
        """The socket may take octets again."""
        held = self.channel.buffered
        if held:
            most = len(held) if self.allowances is None else min(len(held), self.allowances[1].get())
            try:
                with memoryview(held) as view:
                    sent = self.connection.send(view[:most]) if most else 0
            except BlockingIOError:
                return
            except OSError as error:
                self._break(error)
                return
            self._told(sent)
            self.blocked = sent < len(held)
            if self.blocked and sent == most and most:
                self._arm()
            self.channel.consume(sent)  # which comes back to `finished` behind the last
        else:
            self.blocked = False
            if self.channel.eof_received:
                self._pass_end()

    def _told(self, octets: int) -> None:
        """So many were delivered to the socket."""
        self.from_channel += octets
        if self.allowances is not None:
            self.allowances[1].use(octets)
            self.allowances[1].rest()

    def _arm(self) -> None:
        """Let epoll tell what stands in the socket, and whether it takes more."""
        if not self.over:
            self.pump.rearm(self.fd)

    def _pass_end(self) -> None:
        if self.passed:  # told already: who joins a channel that has ended hears of it, and finds it when it can write
            return
        if self.ended:  # both are over: closing says it
            self.end(RelayEnd(Cause.FINISHED))
            return
        try:
            if not self.from_channel:
                self.connection.send(b"")  # EAGAIN from a socket that is still connecting
            self.connection.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self.blocked = True
        except OSError as error:
            self._break(error)
        else:
            self.passed = True
            self._half_done()

    def _half_done(self) -> None:
        """One direction is over: the other, too, or does it have `linger` seconds from byte to byte?"""
        if self.passed and self.ended:
            self.end(RelayEnd(Cause.FINISHED))
        elif not self.lingering and not self.over:
            self.lingering = True
            self.seen = -1
            self._touch()
            self.pump.timers.watch(self)

    def _touch(self) -> None:
        """Put the deadline off if bytes have moved since it was set."""
        moved = self.from_socket + self.from_channel
        if moved != self.seen:
            self.seen = moved
            self.deadline = self.pump.now() + self.linger

    def _break(self, error: OSError) -> None:
        """The socket is broken: the channel is reset."""
        self.end(RelayEnd(Cause.RESET, self.side, error))

    def _look_for_error(self) -> None:
        """Ask the kernel whether the socket is broken, without reading from it."""
        number = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._break(OSError(number, os.strerror(number)))
