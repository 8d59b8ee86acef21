"""The channels of one SSH connection: a `ChannelTransport`. The protocol state of each channel is in channel.py."""

from __future__ import annotations

from collections.abc import Callable

import asyncssh
import structlog
import trio
from asyncssh.constants import MSG_CHANNEL_WINDOW_ADJUST
from asyncssh.packet import UInt32

from tunneld.backends.ssh.channel import ForwardEvents, SshChannel
from tunneld.backends.ssh.fast import FastConnection
from tunneld.backends.ssh.forwarded import ForwardedChannel
from tunneld.backends.ssh.transport import SshTransport
from tunneld.mux.channel import Channel
from tunneld.mux.heartbeat import Heartbeat
from tunneld.mux.limits import CarrierLimits
from tunneld.mux.window import ReceiveWindow, WindowBudget
from tunneld.net.endpoint import Peer

log = structlog.get_logger("ssh")

HIDDEN_ORIGINATOR = ("0.0.0.0", 0)
"""The originator of a visitor whose address is hidden; RFC 4254, section 7.2, requires an address."""


class SshCarrier:
    """The part of an SSH connection that asyncssh does not handle: forwarded channels and the heartbeat."""

    def __init__(
        self,
        connection: FastConnection,
        transport: SshTransport,
        limits: CarrierLimits,
        dial_timeout: float,
        on_unresponsive: Callable[[], None],
    ) -> None:
        """`dial_timeout` is in seconds, see `SshChannel`. `on_unresponsive` is called when a keepalive is not answered
        in time.
        """
        self.pump = transport.pump
        self.limits = limits
        self.dial_timeout = dial_timeout
        self.over = False
        self.connection = connection
        self.transport = transport
        self.heartbeat = Heartbeat(self, limits, transport.pump.timers, transport.link.idle_seconds)
        self._reply = trio.Event()  # to a keepalive
        self._on_unresponsive = on_unresponsive
        self._outbox = transport.outbox
        self._budget = WindowBudget(limits.window_budget, transport.pump.now, transport.link.round_trip)
        self.channels: dict[int, SshChannel] = {}
        self._waiting_for_keys: dict[Channel, None] = {}  # channels that a key exchange blocks, oldest first
        transport.heartbeat = self.heartbeat
        connection.on_channel_data = self._on_channel_data
        connection.on_new_keys = self._on_new_keys
        connection.on_keepalive_reply = self._on_keepalive_reply

    def open(self, events: ForwardEvents) -> Channel:
        """A channel for a visitor; the caller owns it. Nothing is sent before `Channel.set_originator`."""
        opened = SshChannel(self, events)
        number = self.connection.add_channel(opened)  # type: ignore[arg-type]  # SshChannel has the methods it needs
        window = ReceiveWindow(self.limits.initial_window, self.limits.max_window, self._budget)
        opened.number, opened.channel = number, ForwardedChannel(self, number, window)
        self.channels[number] = opened
        return opened.channel

    def on_lost(self, reason: str) -> None:
        """The connection was closed: reset all channels."""
        self.over = True
        self.heartbeat.stop()
        self._reply.set()
        channels, self.channels = self.channels, {}
        for each in channels.values():
            each.channel.notify_reset(f"the ssh connection was lost: {reason}")

    # Called by channels, see `ChannelTransport`

    def accept(self, channel: Channel) -> None:
        """Nothing: the peer cannot open a forwarded channel."""

    def set_originator(self, channel: Channel, visitor: Peer | None) -> None:
        """Send SSH_MSG_CHANNEL_OPEN "forwarded-tcpip", with the visitor as its originator."""
        if found := self.channels.get(channel.sid):
            found.send_open(HIDDEN_ORIGINATOR if visitor is None else (str(visitor[0]), int(visitor[1])))

    def send_capacity(self, channel: Channel) -> int:
        """Bytes that may be written for this channel now: limited by the send buffer and the peer's window."""
        if self.connection.can_send:
            found = self.channels.get(channel.sid)
            return 0 if found is None else min(self._outbox.send_capacity(channel), found.credit)
        self._waiting_for_keys[channel] = None
        return 0

    def write(self, sid: int, data: memoryview) -> int:
        """Send SSH_MSG_CHANNEL_DATA, split by the peer's maximum packet size."""
        target = self.channels[sid]
        taken = min(len(data), target.credit)
        if target.closed_by_peer:
            target.close()
            target.channel.notify_reset("closed by the peer")
            return taken
        limit, send_data = target.max_data, self.connection.send_data
        if taken <= limit:
            if taken:
                send_data(target.data_header, data[:taken])
        else:
            for start in range(0, taken, limit):
                send_data(target.data_header, data[start : min(start + limit, taken)])
        target.credit -= taken
        return taken

    def grant_credit(self, sid: int, credit: int) -> None:
        """Send SSH_MSG_CHANNEL_WINDOW_ADJUST."""
        if (found := self.channels.get(sid)) and not found.closed_by_peer:
            found.window += credit
            found.send(MSG_CHANNEL_WINDOW_ADJUST, UInt32(credit))

    def finish(self, channel: Channel) -> None:
        """Send SSH_MSG_CHANNEL_EOF; if the peer has sent its own, this ends the channel."""
        if found := self.channels.get(channel.sid):
            found.finish()

    def reset(self, channel: Channel, reason: str) -> None:
        """Send SSH_MSG_CHANNEL_CLOSE without an EOF before it."""
        if (found := self.channels.get(channel.sid)) and found.channel is channel:
            found.close()

    # Heartbeat

    async def is_alive(self) -> bool:
        """Send a keepalive now, and wait at most `CarrierLimits.patience` seconds for the reply."""
        with trio.move_on_after(self.limits.patience):
            if self._reply.is_set():
                self._reply = trio.Event()
            self.connection.send_keepalive()
            self.pump.timers.wake_soon()
            await self._reply.wait()
            return not self.over
        return False

    def send_ping(self) -> bool:
        """See `HeartbeatTarget.send_ping`."""
        self.connection.send_keepalive()
        return True

    def on_unresponsive(self) -> None:
        """See `HeartbeatTarget.on_unresponsive`."""
        self._on_unresponsive()

    def on_dead(self, reason: str) -> None:
        """See `HeartbeatTarget.on_dead`."""
        self.transport.end(reason)

    # Called by SSH channels and the connection

    def release(self, channel: SshChannel) -> None:
        """Remove a channel on which nothing more is sent. Idempotent."""
        if self.channels.pop(channel.number, None) is not None:
            channel.channel.release_window()
            channel.events.on_capacity(channel.channel)

    def _on_channel_data(self, number: int, packet: bytes, start: int, stop: int) -> None:
        found = self.channels.get(number)
        if found is not None:
            found.receive_data(packet, start, stop)
        elif number in self.connection._channels:
            self.connection._dispatch(packet[1:stop])  # of a session, or of a channel on which we have sent CLOSE
        else:
            raise asyncssh.ProtocolError(f"invalid channel number {number}")

    def _on_new_keys(self) -> None:
        waiting, self._waiting_for_keys = self._waiting_for_keys, {}
        for channel in waiting:
            channel.notify_writable()

    def _on_keepalive_reply(self) -> None:
        self._reply.set()
